//! Commands whose client stays with them, at a terminal or at pipes: what they put out, and what they
//! are given.

use std::io;
use std::sync::Arc;

use aegis_wire::bounds::OUTPUT_CHUNK_MAX;
use aegis_wire::channel::output::Kind;
use aegis_wire::channel::rpc::RpcError;
use aegis_wire::channel::{ExecStart, ProcessExit, Window, WindowSize};
use aegis_wire::logs::{ExecDone, ExecStarted, Stream};
use aegis_wire::words::InstanceId;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::watch;

use super::exec::{HOST_WAIT, once_running};
use super::instances::to_run_in;
use super::{App, Error, Host, frames};
use crate::ctx::InUse;
use crate::keys;
use crate::lifecycle::{self, Connection};

/// Longest reason of a machine's own that is told, bytes.
const REASON_MAX: usize = 512;

/// A command and its client; it is hung up when this is dropped.
pub struct Attached {
    /// Its name, for its client.
    pub started: ExecStarted,
    /// What it puts out.
    pub output: Output,
    /// What it is given.
    pub input: Input,
}

/// What a command puts out, until it has ended.
pub struct Output {
    from: ReadHalf<Connection>,
    exec_id: String,
    window: Arc<watch::Sender<Window>>,
    /// A machine that somebody is attached to is no idle one.
    _in_use: InUse,
}

/// Where a client types, or its input goes.
pub struct Input {
    to: WriteHalf<Connection>,
    /// How much may be under way to the command. A terminal has rules of its own.
    window: Option<Arc<watch::Sender<Window>>>,
}

/// What a command does next.
#[derive(Debug)]
pub enum Next {
    /// It puts this out; a terminal all of it as one.
    Bytes(Stream, Vec<u8>),
    /// It has ended.
    Done(ExecDone),
}

/// Runs a command for a client; waits for a starting machine, wakes a paused one.
pub async fn open(_: Host, app: &App, name: &str, start: ExecStart) -> Result<Attached, Error> {
    let id = to_run_in(app, name).await?;
    once_running(app, &id, HOST_WAIT, || attempt(app, &id, start.clone())).await
}

/// `None` where the machine does not run at this instant.
async fn attempt(app: &App, id: &InstanceId, start: ExecStart) -> Result<Option<Attached>, Error> {
    let (exec_id, windowed) = (keys::uuid()?, start.attached);
    let connected = lifecycle::attach(&app.ctx, id, exec_id.clone(), start).await;
    let Some(connection) = frames::connected(id, connected)? else { return Ok(None) };
    let (from, to) = tokio::io::split(connection);
    let window = Arc::new(watch::Sender::new(Window::default()));
    Ok(Some(Attached {
        started: ExecStarted { exec_id: exec_id.clone(), started_at: app.ctx.now() },
        input: Input { to, window: windowed.then(|| Arc::clone(&window)) },
        output: Output { from, exec_id, window, _in_use: InUse::begin(&app.ctx, id) },
    }))
}

impl Output {
    /// What comes next. Nothing that a machine sends is believed but its bounds.
    pub async fn next(&mut self) -> Next {
        let mut done =
            ExecDone { exec_id: self.exec_id.clone(), exit_code: None, done: true, error: None };
        loop {
            match frames::read(&mut self.from).await {
                Ok((Kind::Stdout, bytes)) => return Next::Bytes(Stream::Stdout, bytes),
                Ok((Kind::Stderr, bytes)) => return Next::Bytes(Stream::Stderr, bytes),
                Ok((Kind::Taken, bytes)) if self.taken(&bytes) => continue,
                Ok((Kind::Exit, json)) => match serde_json::from_slice::<ProcessExit>(&json) {
                    Ok(exit) => {
                        done.exit_code = Some(exit.code);
                        done.error = exit.timed_out.then(|| "its deadline ended it".to_owned());
                    }
                    Err(_) => done.error = Some("nobody knows how it ended".to_owned()),
                },
                Ok((Kind::Failed, json)) => match serde_json::from_slice::<RpcError>(&json) {
                    Ok(mut error) => {
                        error.message.truncate(error.message.floor_char_boundary(REASON_MAX));
                        done.error = Some(error.message);
                    }
                    Err(_) => done.error = Some("it was not started".to_owned()),
                },
                Ok(_) | Err(_) => {
                    done.error = Some("the machine ended before the command did".to_owned());
                }
            }
            return Next::Done(done);
        }
    }

    /// Notes how much input was taken; `false` where that can't be.
    fn taken(&self, bytes: &[u8]) -> bool {
        let Ok(total) = Window::parse(bytes) else { return false };
        let mut fits = false;
        self.window.send_modify(|window| fits = window.taken(total).is_ok());
        fits
    }
}

impl Input {
    /// Gives it to the command; waits as long as that takes no more.
    pub async fn give(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = self.room().await?.min(OUTPUT_CHUNK_MAX);
            let (piece, rest) = bytes.split_at(bytes.len().min(room));
            if let Some(window) = &self.window {
                // Before: the word that it was taken may come at once.
                window.send_modify(|window| window.sent(piece.len()));
            }
            frames::write(&mut self.to, Kind::Stdin, piece).await?;
            bytes = rest;
        }
        Ok(())
    }

    async fn room(&self) -> io::Result<usize> {
        let Some(window) = &self.window else { return Ok(OUTPUT_CHUNK_MAX) };
        let mut window = window.subscribe();
        let there = window.wait_for(|window| window.room() > 0).await;
        there.map(|window| window.room()).map_err(io::Error::other)
    }

    /// There is no more.
    pub async fn end(&mut self) -> io::Result<()> {
        frames::write(&mut self.to, Kind::StdinEnd, &[]).await
    }

    /// The client's window has another size now.
    pub async fn resize(&mut self, size: WindowSize) -> io::Result<()> {
        frames::write(&mut self.to, Kind::Resize, &size.bytes()).await
    }
}
