//! PID 1 of a machine that turns against its host. It behaves until it is told how not to: by its
//! host name while it is identified, by the first word of its command once it runs, by the first
//! word of an exec's command, by the number of a port, by the path of a file.
//!
//! ```text
//! port ─▶ session ─▶ control ─▶ attack      exec · ports · files
//! ```

// It is a test: it fails where it stands, and its machine with it.
#![allow(clippy::unwrap_used)]

mod attack;
mod control;
mod exec;
mod files;
mod noise;
mod port;
mod workspace;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use aegis_wire::channel::StreamHead;
use aegis_wire::pipe::mux::{self, Mux, Stream};
use aegis_wire::pipe::read_message;
use aegis_wire::pipe::session::{Ended, Pipe, SESSION_BUFFER};
use rustix::mount::{MountFlags, mount};

use crate::control::Machine;
use crate::port::Port;

fn main() {
    if !rustix::process::getpid().is_init() {
        eprintln!("aegis-hostile: only as the first process of a machine");
        return;
    }
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        let _ = mount(kind, target, kind, MountFlags::empty(), None::<&std::ffi::CStr>);
    }
    load_modules();
    let port = Arc::new(Port::open("ctl"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(serve(port));
}

/// Each kernel module, as often as another one makes it possible.
fn load_modules() {
    let entries = std::fs::read_dir("/modules").into_iter().flatten().flatten();
    let mut left: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    loop {
        let before = left.len();
        left.retain(|path| {
            let file = File::open(path).unwrap();
            rustix::system::finit_module(file.as_fd(), c"", 0).is_err()
        });
        if left.is_empty() || left.len() == before {
            return;
        }
    }
}

async fn serve(port: Arc<Port>) {
    let machine = Arc::new(Machine::new(Arc::clone(&port)));
    let mut pipe = Pipe::new(port.connect());
    let mut next = pipe.accept().await.unwrap();
    while let Some(epoch) = next {
        port.remember(epoch);
        let (app, ours) = tokio::io::duplex(SESSION_BUFFER);
        let (mux, mut streams) = mux::start(ours, false);
        let machine = Arc::clone(&machine);
        tokio::spawn(async move {
            while let Some(stream) = streams.recv().await {
                tokio::spawn(one(Arc::clone(&machine), mux.clone(), stream));
            }
        });
        next = match pipe.serve(epoch, app).await {
            Ok(Ended::NewEpoch(epoch)) => Some(epoch),
            Ok(Ended::Bye) => {
                pipe.acknowledge(epoch).await.unwrap();
                pipe.accept().await.unwrap()
            }
            _ => None,
        };
    }
}

async fn one(machine: Arc<Machine>, mux: Mux, mut stream: Stream) {
    let Ok(Some(head)) = read_message(&mut stream).await else { return };
    match head {
        StreamHead::Control => control::serve(machine, mux, stream).await,
        StreamHead::Logs => attack::logs(&machine.mode(), stream).await,
        StreamHead::Exec(start) => exec::serve(&start.command, stream).await,
        StreamHead::Files(ask) => files::serve(&ask, stream).await,
        StreamHead::Port { port } => exec::port(port, stream).await,
        StreamHead::Workspace(resume) => workspace::serve(&machine.mode(), stream, resume).await,
        StreamHead::Guest { .. } => {}
    }
}
