//! The verbs: one function for each thing that can be asked. Proof of who asks comes first, then the
//! context, then the parsed request; what is decided is for the rules.

pub mod audit;
pub mod couch;
pub mod events;
pub mod exec;
pub mod instances;
pub mod kill;
pub mod limits;
pub mod llm;
pub mod logs;
pub mod metrics;
pub mod ports;
pub mod secrets;
pub mod terminal;
pub mod tree;

use std::io;
use std::sync::Arc;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::words::{ImageRef, Time};

use crate::config::Config;
use crate::ctx::Shared;
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

/// Most names of images that a refusal lists.
const IMAGES_NAMED: usize = 10;

/// Refuses an image that this host does not have: who asks now can still choose another.
fn check_image(config: &Config, field: &str, image: &ImageRef) -> Result<(), Refusal> {
    if config.image(image.as_str()).is_some() {
        return Ok(());
    }
    let listed = std::fs::read_dir(config.home.join("images")).into_iter().flatten().flatten();
    let named = listed.filter_map(|e| e.file_name().into_string().ok());
    let mut names: Vec<String> = named.filter(|name| config.image(name).is_some()).collect();
    names.sort();
    names.truncate(IMAGES_NAMED);
    let mut refusal = Refusal::field(field, format!("an image of this host: {}", names.join(", ")));
    refusal.requested = Some(image.to_string());
    let hint = "`aegis setup` makes the image base; others are directories below HOME/images";
    refusal.hint = Some(hint.to_owned());
    Err(refusal)
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
    /// When this daemon started.
    pub started_at: Time,
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
