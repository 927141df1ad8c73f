//! What every verb of the daemon needs: settings, keys, clock, ledger, and what runs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use aegis_wire::words::{InstanceId, Time, Usage};

use crate::clock::Clock;
use crate::config::Config;
use crate::keys::Keys;
use crate::ledger::Ledger;

/// Shared by all tasks; made once by `main`.
pub struct Ctx {
    /// Settings.
    pub config: Config,
    /// Secrets.
    pub keys: Keys,
    /// The time.
    pub clock: Clock,
    /// The memory.
    pub ledger: Ledger,
    /// Usage of running machines that is newer than the ledger's.
    pub meters: Meters,
}

/// Every task's handle on the context.
pub type Shared = Arc<Ctx>;

impl Ctx {
    /// The time now.
    pub fn now(&self) -> Time {
        self.clock.now()
    }

    /// A machine's run directory.
    pub fn run_dir(&self, id: &InstanceId) -> PathBuf {
        self.config.home.join("run").join(id.as_str())
    }

    /// What is kept of an instance while it has a record: its disk and its logs.
    pub fn instance_dir(&self, id: &InstanceId) -> PathBuf {
        self.config.home.join("instances").join(id.as_str())
    }
}

/// The latest sample of each running machine's boot, and what it was seen doing.
#[derive(Default)]
pub struct Meters {
    live: Mutex<HashMap<InstanceId, Usage>>,
}

impl Meters {
    /// Notes a sample; counts never go down.
    pub fn note(&self, id: &InstanceId, usage: Usage) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = live.entry(id.clone()).or_default();
        *slot = slot.at_least(usage);
    }

    /// The latest sample of this boot.
    pub fn get(&self, id: &InstanceId) -> Usage {
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .copied()
            .unwrap_or_default()
    }

    /// The boot is over, and recorded.
    pub fn forget(&self, id: &InstanceId) {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}
