//! PID 1 of every machine. It **serves** and forwards, and it decides nothing.
//!
//! ```text
//! boot ─▶ channel ─▶ calls ─▶ warm (golden machine) · identity ─▶ root (clone) · end
//!            │         └────▶ machine: what all share, and the phases of its life
//!            ├──▶ files
//!            ├──▶ workspace ─▶ pump: the kernel's FUSE, carried to the host
//!            ├──▶ exec, terminal, primary ─▶ output ─▶ process, pty ─▶ reaper ─▶ sys     ports
//!            └◀── guest: what processes inside ask of the host
//! ```
//! A panic here ends the machine: the kernel stops without its first process, and the host sees it.

mod attached;
mod boot;
mod cage;
mod calls;
mod channel;
mod disks;
mod end;
mod exec;
mod files;
mod guest;
mod hands;
mod identity;
mod machine;
mod modules;
mod names;
mod net;
mod note;
mod output;
mod pipe;
mod ports;
mod primary;
mod process;
mod pty;
mod pump;
mod reaper;
mod root;
mod sys;
mod terminal;
mod trust;
mod uevents;
mod user;
mod warm;
mod workspace;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::channel::workspace::PORT;
use machine::Machine;
use process::Starter;
use uevents::Uevents;

/// Threads for files: so many file systems may hang before the rest does.
const CLERKS: usize = 4;
/// Time for the control port to show up.
const PORT_DEADLINE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        eprintln!("aegis-harness: only as the first process of a machine");
        return ExitCode::from(2);
    }
    match run() {
        Ok(()) => note::note("the control port is gone"),
        Err(e) => note::note(&format!("{e}")),
    }
    // The kernel stops.
    ExitCode::FAILURE
}

fn run() -> io::Result<()> {
    let ends = sys::children()?;
    let booted = boot::boot()?;
    // One thread: there is little to do at a time, and nothing is shared.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let uevents = Uevents::listen()?;
        let [port, workspace] = [pipe::NAME, PORT].map(|name| {
            let found = uevents.until(PORT_DEADLINE, move || pipe::find(name));
            async move { found.await.ok_or_else(|| io::Error::other(format!("no port {name}"))) }
        });
        let port = pipe::Port::open(&port.await?)?;
        let pump = pump::Pump::start(pipe::open(&workspace.await?)?)?;
        let starter = Starter::new(booted.cage)?;
        let hands = hands::Hands::start("hands")?;
        let clerks = hands::Hands::several("clerk", CLERKS)?;
        let doors = guest::Doors::open()?;
        let machine = Arc::new(Machine::new(starter, uevents, hands, clerks, booted.marks, pump));
        tokio::spawn(doors.serve(Arc::clone(&machine.guest)));
        let reaping = Arc::clone(&machine);
        tokio::select! {
            ended = channel::serve(machine, port) => ended,
            ended = reaping.starter.reaper.run(ends) => ended,
        }
    })
}
