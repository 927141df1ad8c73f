//! The primary process: started once, its output goes to whatever logs stream there is; or it waits
//! for a client, which it is started for.

use std::sync::Arc;

use aegis_wire::bounds::ATTACH_DEADLINE;
use aegis_wire::channel::ProcessExit;
use aegis_wire::channel::output::Kind;
use aegis_wire::channel::rpc::RpcError;
use aegis_wire::pipe::mux::Stream;
use rustix::process::Pid;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{mpsc, oneshot, watch};

use crate::exec::Exit;
use crate::machine::Machine;
use crate::output::{self, Sink, last_frame};
use crate::process::Wish;
use crate::reaper::Child;

/// Starts it; `streams` are the logs streams that the host opens, one per session.
pub async fn start(
    machine: &Arc<Machine>,
    wish: &Wish,
    streams: mpsc::Receiver<Stream>,
) -> Result<Pid, (RpcError, mpsc::Receiver<Stream>)> {
    let (child, pipes) = match machine.starter.start(wish, false).await {
        Ok(started) => started,
        Err(unable) => return Err((unable.answer(), streams)),
    };
    let pid = child.pid;
    let (_, outputs) = output::split(pipes);
    let (alive, exited) = (machine.primary_alive.clone(), machine.primary_exit.clone());
    alive.send_replace(true);
    let (tell, exit) = oneshot::channel();
    let mut exit = Exit::new(exit);
    tokio::spawn(async move {
        if let Ok(exit) = child.exit.await {
            alive.send_replace(false);
            let _ = tell.send(exit);
        }
    });
    tokio::spawn(async move {
        let mut host = Host { stream: None, streams };
        let exit = output::pump(outputs, &mut exit, &mut host).await;
        report(host, exit.unwrap_or(output::UNKNOWN), &exited).await;
    });
    Ok(pid)
}

/// Says for ever how it ended. Only now: whoever hears of the exit has been sent all output.
async fn report(mut host: Host, exit: ProcessExit, exited: &watch::Sender<Option<ProcessExit>>) {
    host.send(&last_frame(Kind::Exit, &exit)).await;
    if let Some(stream) = &mut host.stream {
        let _ = stream.shutdown().await;
    }
    exited.send_replace(Some(exit));
    // A later session's logs stream has nothing to tell but the end.
    while let Some(mut stream) = host.streams.recv().await {
        let _ = stream.write_all(&last_frame(Kind::Exit, &exit)).await;
        let _ = stream.shutdown().await;
    }
}

/// The end of a primary process that was never there: as shells have it.
const NOT_STARTED: ProcessExit = ProcessExit { code: 127, signal: None, timed_out: false };
/// The end of one for which nobody came.
const HUNG_UP: ProcessExit = ProcessExit { code: 128 + 1, signal: Some(1), timed_out: false };

/// What a command gets that is started for a client: the primary process's place, or none, beside it.
pub struct Seat(Option<mpsc::Receiver<Stream>>);

impl Seat {
    /// None: it runs beside the primary process.
    pub fn beside() -> Seat {
        Seat(None)
    }

    /// The primary process's own.
    pub fn own(streams: mpsc::Receiver<Stream>) -> Seat {
        Seat(Some(streams))
    }

    /// The command is there.
    pub fn taken_by(&self, machine: &Machine, child: &Child) {
        if self.0.is_some() {
            machine.is_primary(child.pid);
        }
    }

    /// The command is gone, and its client heard all of it; or it never came.
    pub async fn leave(self, machine: &Machine, exit: Option<ProcessExit>) {
        let Some(streams) = self.0 else { return };
        machine.primary_alive.send_replace(false);
        let host = Host { stream: None, streams };
        report(host, exit.unwrap_or(NOT_STARTED), &machine.primary_exit).await;
    }
}

/// Ends the wait for a client that never comes.
pub fn wait(machine: &Arc<Machine>) {
    machine.primary_alive.send_replace(true);
    let machine = Arc::clone(machine);
    tokio::spawn(async move {
        tokio::time::sleep(ATTACH_DEADLINE).await;
        if let Some(seat) = machine.empty_seat() {
            seat.leave(&machine, Some(HUNG_UP)).await;
        }
    });
}

/// The host's newest logs stream. While there is none, output waits in the pipes of the process,
/// and so does the process; what a lost session had already taken is not sent again.
struct Host {
    stream: Option<Stream>,
    streams: mpsc::Receiver<Stream>,
}

impl Sink for Host {
    async fn send(&mut self, frame: &[u8]) {
        loop {
            while let Ok(newer) = self.streams.try_recv() {
                self.stream = Some(newer);
            }
            if self.stream.is_none() {
                self.stream = self.streams.recv().await;
            }
            let Some(stream) = &mut self.stream else { return };
            if stream.write_all(frame).await.is_ok() && stream.flush().await.is_ok() {
                return;
            }
            self.stream = None;
        }
    }
}
