//! Commands at a terminal of a machine: what it shows, and what is typed.

use std::io;

use aegis_wire::bounds::OUTPUT_CHUNK_MAX;
use aegis_wire::channel::output::Kind;
use aegis_wire::channel::rpc::RpcError;
use aegis_wire::channel::{ExecStart, ProcessExit, WindowSize};
use aegis_wire::logs::{ExecDone, ExecStarted};
use aegis_wire::words::InstanceId;
use tokio::io::{ReadHalf, WriteHalf};

use super::exec::{HOST_WAIT, once_running};
use super::instances::to_run_in;
use super::{App, Error, Host, frames};
use crate::ctx::InUse;
use crate::keys;
use crate::lifecycle::{self, Connection};

/// Longest reason of a machine's own that is told, bytes.
const REASON_MAX: usize = 512;

/// A command at its terminal; it is hung up when this is dropped.
pub struct Terminal {
    /// Its name, for its client.
    pub started: ExecStarted,
    /// What it shows.
    pub screen: Screen,
    /// What is typed.
    pub keys: Keys,
}

/// What a terminal shows, until its command has ended.
pub struct Screen {
    from: ReadHalf<Connection>,
    exec_id: String,
    /// A machine at which somebody sits is no idle one.
    _in_use: InUse,
}

/// Where a client types.
pub struct Keys(WriteHalf<Connection>);

/// What a terminal does next.
#[derive(Debug)]
pub enum Shows {
    /// It shows this.
    Bytes(Vec<u8>),
    /// Its command has ended.
    Done(ExecDone),
}

/// Runs a command at a terminal; waits for a starting machine, wakes a paused one.
pub async fn open(_: Host, app: &App, name: &str, start: ExecStart) -> Result<Terminal, Error> {
    let id = to_run_in(app, name).await?;
    once_running(app, &id, HOST_WAIT, || attempt(app, &id, start.clone())).await
}

/// `None` where the machine does not run at this instant.
async fn attempt(app: &App, id: &InstanceId, start: ExecStart) -> Result<Option<Terminal>, Error> {
    let connected = lifecycle::terminal(&app.ctx, id, start).await;
    let Some(connection) = frames::connected(id, connected)? else { return Ok(None) };
    let exec_id = keys::uuid()?;
    let (from, to) = tokio::io::split(connection);
    Ok(Some(Terminal {
        started: ExecStarted { exec_id: exec_id.clone(), started_at: app.ctx.now() },
        screen: Screen { from, exec_id, _in_use: InUse::begin(&app.ctx, id) },
        keys: Keys(to),
    }))
}

impl Screen {
    /// What comes next. Nothing that a machine sends is believed but its bounds.
    pub async fn next(&mut self) -> Shows {
        let mut done =
            ExecDone { exec_id: self.exec_id.clone(), exit_code: None, done: true, error: None };
        match frames::read(&mut self.from).await {
            Ok((Kind::Stdout | Kind::Stderr, bytes)) => return Shows::Bytes(bytes),
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
        Shows::Done(done)
    }
}

impl Keys {
    /// Types; waits as long as the machine takes no more.
    pub async fn typed(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(OUTPUT_CHUNK_MAX) {
            frames::write(&mut self.0, Kind::Stdin, piece).await?;
        }
        Ok(())
    }

    /// The client's window has another size now.
    pub async fn resize(&mut self, size: WindowSize) -> io::Result<()> {
        frames::write(&mut self.0, Kind::Resize, &size.bytes()).await
    }
}
