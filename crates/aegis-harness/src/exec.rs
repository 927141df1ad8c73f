//! Commands beside the primary process, one per stream.

use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::GUEST_STOP_GRACE;
use aegis_wire::channel::output::Kind;
use aegis_wire::channel::{ExecStart, ProcessExit};
use aegis_wire::pipe::mux::Stream;
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::machine::Machine;
use crate::output::{self, Sink, last_frame};
use crate::reaper::Child;

/// Runs a command to its end, whether or not the host listens.
pub async fn serve(machine: Arc<Machine>, stream: Stream, start: ExecStart) {
    let (from_host, to_host) = tokio::io::split(stream);
    let mut host = Host::new(to_host);
    let deadline = start.timeout_secs.map(Duration::from_secs);
    let started = async {
        let wish = machine.wish(start)?;
        machine.starter.start(&wish, true).await.map_err(|unable| unable.answer())
    };
    let (child, pipes) = match started.await {
        Ok(started) => started,
        Err(error) => return host.end(&last_frame(Kind::Failed, &error)).await,
    };
    let (input, outputs) = output::split(pipes);
    let (pid, own) = (child.pid, Arc::clone(&machine));
    let feeder = tokio::spawn(async move {
        // Its input stays open until it is gone: what came of it is not the whole.
        if let Some(_open) = feed(from_host, input).await {
            hang(&own, pid).await;
        }
    });
    let mut exit = limited(Arc::clone(&machine), child, deadline);
    let exit = output::pump(outputs, &mut exit, &mut host).await;
    // An unknown end can only be told as such.
    let exit = exit.unwrap_or(output::UNKNOWN);
    host.end(&last_frame(Kind::Exit, &exit)).await;
    feeder.abort();
}

/// How a process ended, for whoever asks, and asks again.
pub struct Exit {
    comes: oneshot::Receiver<ProcessExit>,
    came: Option<Option<ProcessExit>>,
}

impl Exit {
    /// Of what is told there.
    pub fn new(comes: oneshot::Receiver<ProcessExit>) -> Exit {
        Exit { comes, came: None }
    }

    /// Waits for it; `None` when nobody knows. Who gives up the wait loses nothing.
    pub async fn ended(&mut self) -> Option<ProcessExit> {
        match self.came {
            Some(came) => came,
            None => *self.came.insert((&mut self.comes).await.ok()),
        }
    }
}

/// The exit of a child whose group is killed at the deadline.
pub fn limited(machine: Arc<Machine>, child: Child, deadline: Option<Duration>) -> Exit {
    let Some(deadline) = deadline else { return Exit::new(child.exit) };
    let (tell, exit) = oneshot::channel();
    tokio::spawn(async move {
        if let Some(exit) = within(&machine, child.pid, child.exit, deadline).await {
            let _ = tell.send(exit);
        }
    });
    Exit::new(exit)
}

async fn within(
    machine: &Machine,
    pid: Pid,
    mut exit: oneshot::Receiver<ProcessExit>,
    deadline: Duration,
) -> Option<ProcessExit> {
    match tokio::time::timeout(deadline, &mut exit).await {
        Ok(exit) => exit.ok(),
        Err(_) => {
            let timed_out = machine.starter.reaper.signal_group(pid, Signal::KILL);
            exit.await.ok().map(|exit| ProcessExit { timed_out, ..exit })
        }
    }
}

/// Gives a command whose client is gone a moment to end by itself. What it let go on in groups of
/// its own is as free as on any Unix.
pub async fn hang_up(machine: &Machine, pid: Pid, mut exit: Exit) -> Option<ProcessExit> {
    tokio::select! {
        ended = exit.ended() => return ended,
        () = hang(machine, pid) => {}
    }
    exit.ended().await
}

async fn hang(machine: &Machine, pid: Pid) {
    let reaper = &machine.starter.reaper;
    reaper.signal_group(pid, Signal::HUP);
    reaper.signal_group(pid, Signal::CONT);
    tokio::time::sleep(GUEST_STOP_GRACE).await;
    reaper.signal_group(pid, Signal::KILL);
}

/// The host's side of a stream; output for a host that is gone is dropped.
pub struct Host(Option<WriteHalf<Stream>>);

impl Sink for Host {
    async fn send(&mut self, frame: &[u8]) {
        if let Some(to) = &mut self.0
            && (to.write_all(frame).await.is_err() || to.flush().await.is_err())
        {
            self.0 = None;
        }
    }
}

impl Host {
    /// One that listens.
    pub fn new(to: WriteHalf<Stream>) -> Host {
        Host(Some(to))
    }

    /// Whether anybody takes what is sent.
    pub fn listens(&self) -> bool {
        self.0.is_some()
    }

    /// Sends the last frame.
    pub async fn end(&mut self, frame: &[u8]) {
        self.send(frame).await;
        if let Some(mut to) = self.0.take() {
            let _ = to.shutdown().await;
        }
    }
}

/// Host → standard input, until that ends, or nobody reads it; gives it back, still open, where the host
/// was gone before it had said that this is all.
async fn feed(mut from: ReadHalf<Stream>, to: Option<pipe::Sender>) -> Option<pipe::Sender> {
    let mut to = to?;
    let mut bytes = Vec::new();
    loop {
        match output::read_frame(&mut from, &mut bytes).await {
            Ok(Some(Kind::Stdin)) => to.write_all(&bytes).await.ok()?,
            Ok(Some(Kind::StdinEnd)) => return None,
            _ => return Some(to),
        }
    }
}
