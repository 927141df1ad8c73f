//! The driver's view of one machine: its worker's watch, or what is left without one.

use std::path::Path;

use aegis_rules::instance::Seen;
use aegis_wire::bounds::WORKER_LINE_MAX;
use aegis_wire::words::InstanceId;
use aegis_wire::worker::{Ended, Event, MachineState, Request, run_dir};

use tokio::io::AsyncBufReadExt as _;

use super::worker::{self, Connection};
use crate::ctx::Ctx;

/// A watch on a worker, if there is one.
pub(super) struct Link {
    watch: Option<Connection>,
    line: Vec<u8>,
    state: MachineState,
    /// Read from `ended.json` of a worker that ended while nobody watched.
    ended: Option<Ended>,
}

/// What a link brought.
pub(super) enum News {
    /// The worker said something.
    Event(Event),
    /// The worker is gone.
    Lost,
}

impl Link {
    /// A link that has not looked yet.
    pub(super) fn new() -> Link {
        Link { watch: None, line: Vec::new(), state: MachineState::Waiting, ended: None }
    }

    /// Takes over the connection on which a launch was said.
    pub(super) fn launched(&mut self, connection: Connection) {
        self.watch = Some(connection);
        self.line.clear();
        self.state = MachineState::Booting { stage: "worker".to_owned() };
        self.ended = None;
    }

    /// Looks what is there. Connects to a living worker where there is one.
    pub(super) async fn look(&mut self, ctx: &Ctx, id: &InstanceId) -> Seen {
        if self.watch.is_none() {
            self.state = MachineState::Waiting;
            self.ended = None;
            if let Ok(mut connection) = worker::say(ctx, id, &Request::Watch).await {
                // The present state comes first.
                while let Ok(Some(event)) = worker::read_line(&mut connection).await {
                    if let Event::State(state) = event {
                        self.state = state;
                        self.watch = Some(connection);
                        self.line.clear();
                        break;
                    }
                }
            }
        }
        if self.watch.is_some() {
            return match &self.state {
                // A worker that nobody launched: its daemon died in between. It ends by itself.
                MachineState::Waiting | MachineState::Spare => Seen::Leftovers,
                MachineState::Booting { .. } => Seen::Booting,
                MachineState::Running { .. } => Seen::Running,
                MachineState::Frozen { .. } => Seen::Frozen,
                MachineState::Ended(_) => Seen::Ended,
            };
        }
        let dir = ctx.run_dir(id);
        if !dir.exists() {
            return Seen::Nothing;
        }
        self.ended = read_ended(&dir);
        if self.ended.is_some() { Seen::Ended } else { Seen::Leftovers }
    }

    /// The state that was last said.
    pub(super) fn state(&self) -> &MachineState {
        &self.state
    }

    /// How the machine ended, if it said so.
    pub(super) fn ended(&self) -> Option<&Ended> {
        match &self.state {
            MachineState::Ended(ended) => Some(ended),
            _ => self.ended.as_ref(),
        }
    }

    /// Waits for the worker's next word; for ever when there is no worker. Cancel-safe.
    pub(super) async fn news(&mut self) -> News {
        let Some(watch) = &mut self.watch else {
            return std::future::pending().await;
        };
        match next_event(watch, &mut self.line).await {
            Some(event) => {
                match &event {
                    // The worker has not read the launch yet that was said on this connection.
                    Event::State(MachineState::Waiting | MachineState::Spare) => {}
                    Event::State(state) => self.state = state.clone(),
                    Event::Usage(_) | Event::Egress(_) => {}
                }
                News::Event(event)
            }
            None => {
                self.watch = None;
                News::Lost
            }
        }
    }

    /// Forgets everything: the machine was removed.
    pub(super) fn clear(&mut self) {
        *self = Link::new();
    }
}

/// Reads the next event. What was read of a line stays in `line` when this is dropped in between.
async fn next_event(watch: &mut Connection, line: &mut Vec<u8>) -> Option<Event> {
    loop {
        let bytes = watch.fill_buf().await.ok()?;
        if bytes.is_empty() || line.len() > WORKER_LINE_MAX {
            return None;
        }
        let end = bytes.iter().position(|b| *b == b'\n');
        let taken = end.map_or(bytes.len(), |i| i + 1);
        line.extend_from_slice(&bytes[..taken]);
        watch.consume(taken);
        if end.is_some() {
            return serde_json::from_slice(&std::mem::take(line)).ok();
        }
    }
}

fn read_ended(dir: &Path) -> Option<Ended> {
    let path = dir.join(run_dir::ENDED);
    let small = std::fs::metadata(&path).is_ok_and(|m| m.len() < 64 * 1024);
    if !small {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}
