//! Commands whose client stays with them: their standard input comes from the host, in a window, and
//! when the host leaves they are hung up.

use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::{ATTACH_LEAVE, STDIN_WINDOW};
use aegis_wire::channel::output::Kind;
use aegis_wire::channel::{ExecStart, Window};
use aegis_wire::pipe::mux::Stream;
use tokio::io::{AsyncRead, AsyncWriteExt as _, Interest};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::exec::{Host, hang_up, limited};
use crate::machine::Machine;
use crate::output::{self, CHUNK, Source, Sources, UNKNOWN, last_frame};

/// Runs a command with its input, and hangs it up when the host leaves.
pub async fn serve(machine: Arc<Machine>, stream: Stream, start: ExecStart) {
    let (from_host, to_host) = tokio::io::split(stream);
    let mut host = Host::new(to_host);
    let deadline = start.timeout_secs.map(Duration::from_secs);
    let (wish, seat) = match machine.take_seat(start) {
        Ok(begun) => begun,
        Err(error) => return host.end(&last_frame(Kind::Failed, &error)).await,
    };
    let (child, pipes) = match machine.starter.start(&wish, true).await {
        Ok(started) => started,
        Err(unable) => {
            host.end(&last_frame(Kind::Failed, &unable.answer())).await;
            return seat.leave(&machine, None).await;
        }
    };
    seat.taken_by(&machine, &child);
    let pid = child.pid;
    let mut exit = limited(Arc::clone(&machine), child, deadline);
    let (input, outputs) = output::split(pipes);
    let (held, (tell, taken)) = (watch::Sender::default(), watch::channel(0));
    let held = Arc::new(held);
    let feeder = tokio::spawn(feed(Arc::clone(&held), input, tell));
    let mut reader = tokio::spawn({
        let taken = taken.clone();
        async move { read(from_host, &held, &taken).await }
    });
    let both = Both { outputs: Some(outputs), taken: Some(taken) };
    let ended = tokio::select! {
        ended = output::pump(both, &mut exit, &mut host) => Some(ended.unwrap_or(UNKNOWN)),
        _ = &mut reader => None,
    };
    let ended = match ended {
        Some(ended) => {
            host.end(&last_frame(Kind::Exit, &ended)).await;
            // The other side leaves when it has it all.
            let _ = tokio::time::timeout(ATTACH_LEAVE, &mut reader).await;
            Some(ended)
        }
        // Its input stays open until it is gone: what came of it is not the whole.
        None => hang_up(&machine, pid, exit).await,
    };
    reader.abort();
    feeder.abort();
    seat.leave(&machine, ended).await;
}

/// Input that came and is not yet with the command.
#[derive(Default)]
struct Held {
    bytes: Vec<u8>,
    over: bool,
}

/// Takes what the host sends, until it leaves; more than the window, and what is no input, is its end
/// too.
async fn read(
    mut from: impl AsyncRead + Unpin,
    held: &watch::Sender<Held>,
    taken: &watch::Receiver<u64>,
) {
    let mut bytes = Vec::new();
    let (mut came, mut over) = (0_u64, false);
    while let Ok(Some(kind)) = output::read_frame(&mut from, &mut bytes).await {
        match kind {
            Kind::Stdin if !over => {
                came += bytes.len() as u64;
                if came - *taken.borrow() > STDIN_WINDOW as u64 {
                    return;
                }
                held.send_modify(|held| held.bytes.extend_from_slice(&bytes));
            }
            Kind::StdinEnd if !over => {
                over = true;
                held.send_modify(|held| held.over = true);
            }
            _ => return,
        }
    }
}

/// Gives it to the command, and tells how much, until the end or until nobody reads it any more.
async fn feed(held: Arc<watch::Sender<Held>>, to: Option<pipe::Sender>, taken: watch::Sender<u64>) {
    let Some(mut to) = to else { return };
    let mut news = held.subscribe();
    loop {
        tokio::select! {
            there = news.wait_for(|held| !held.bytes.is_empty() || held.over) => {
                if there.is_err() {
                    return;
                }
            }
            _ = to.ready(Interest::ERROR) => return,
        }
        let mut bytes = Vec::new();
        held.send_if_modified(|held| {
            bytes = std::mem::take(&mut held.bytes);
            false
        });
        // Nothing came before the end.
        if bytes.is_empty() {
            return;
        }
        for piece in bytes.chunks(CHUNK) {
            if to.write_all(piece).await.is_err() {
                return;
            }
            taken.send_modify(|total| *total += piece.len() as u64);
        }
    }
}

/// What a command puts out, and how much it has taken in.
struct Both {
    outputs: Option<Sources>,
    taken: Option<watch::Receiver<u64>>,
}

impl Source for Both {
    const REST_MAX: usize = Sources::REST_MAX;

    async fn read(&mut self, buffer: &mut [u8]) -> Option<(Kind, usize)> {
        // Also a command without any output may still read.
        while self.taken.is_some() || self.outputs.is_some() {
            tokio::select! {
                total = changed(&mut self.taken) => match total {
                    Some(total) => {
                        let bytes = Window::bytes(total);
                        buffer[..bytes.len()].copy_from_slice(&bytes);
                        return Some((Kind::Taken, bytes.len()));
                    }
                    None => self.taken = None,
                },
                piece = piece(&mut self.outputs, buffer) => match piece {
                    Some(piece) => return Some(piece),
                    None => self.outputs = None,
                },
            }
        }
        None
    }

    fn read_now(&mut self, buffer: &mut [u8]) -> Option<(Kind, usize)> {
        self.outputs.as_mut()?.read_now(buffer)
    }
}

async fn changed(taken: &mut Option<watch::Receiver<u64>>) -> Option<u64> {
    match taken {
        Some(taken) => taken.changed().await.ok().map(|()| *taken.borrow_and_update()),
        None => std::future::pending().await,
    }
}

async fn piece(outputs: &mut Option<Sources>, buffer: &mut [u8]) -> Option<(Kind, usize)> {
    match outputs {
        Some(outputs) => outputs.read(buffer).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
