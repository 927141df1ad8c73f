//! The verbs: one function for each thing that can be asked. Proof of who asks comes first, then the
//! context, then the parsed request; what is decided is for the rules.

pub mod attach;
pub mod audit;
pub mod commits;
pub mod couch;
pub mod events;
pub mod exec;
pub mod files;
mod frames;
pub mod images;
pub mod instances;
pub mod kill;
pub mod limits;
pub mod llm;
pub mod logs;
pub mod metrics;
pub mod ports;
pub mod secrets;
pub mod tree;
pub mod vers;
pub mod workspaces;

use std::io;
use std::sync::Arc;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::channel::files::{Fault, FilePath};
use aegis_wire::words::Time;

use crate::ctx::Shared;
use crate::images::Failed;
use crate::ledger::{self, WriteError};
use crate::lifecycle::{Lifecycle, WorkerError};
use crate::router::Router;

/// Proof that anybody may ask: public routes.
#[derive(Clone, Copy, Debug)]
pub struct Public(());

impl Public {
    /// Made by public routes, and by nothing else.
    pub fn route() -> Public {
        Public(())
    }
}

/// Proof that the host asks: made by the doors when the host's token or socket was shown.
#[derive(Clone, Copy, Debug)]
pub struct Host(());

impl Host {
    /// Only for the doors' authentication.
    pub fn authenticated() -> Host {
        Host(())
    }
}

/// What verbs need.
#[derive(Clone)]
pub struct App {
    /// Settings, keys, clock, ledger, meters.
    pub ctx: Shared,
    /// The drivers.
    pub lifecycle: Lifecycle,
    /// The public ports.
    pub router: Router,
    /// What the worker said of this host at the start.
    pub probe: Arc<Option<aegis_wire::worker::Probe>>,
    /// Where machines are reached by name.
    pub named_at: Option<std::net::SocketAddr>,
    /// When this daemon started.
    pub started_at: Time,
    /// Held by whoever changes the images: one at a time.
    pub fetching: Arc<tokio::sync::Mutex<()>>,
}

/// Why a verb brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The asker's fault, or the state's.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// A machine's worker failed.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A machine does not do what it is asked; not the daemon's fault.
    #[error("{0}")]
    Machine(String),
    /// An image could not be had; not the daemon's fault.
    #[error(transparent)]
    Image(#[from] Failed),
    /// A machine has no such file, or does not do that with it.
    #[error("{}", fault.sentence(path))]
    File {
        /// Why not.
        fault: Fault,
        /// Which file.
        path: FilePath,
    },
    /// The operating system failed.
    #[error("the operating system refused")]
    Io(#[from] io::Error),
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Error {
        match error {
            WriteError::Refused(refusal) => Error::Refused(refusal),
            WriteError::Ledger(error) => Error::Ledger(error),
        }
    }
}

fn guest_not_found() -> Refusal {
    Refusal::new(Code::GuestNotFound, "guest not found")
}

fn instance_not_found() -> Refusal {
    Refusal::new(Code::InstanceNotFound, "instance not found")
}
