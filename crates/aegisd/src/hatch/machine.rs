//! One machine: what it has in common over its connections, and what it may do so often.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use aegis_rules::refusal::Refusal;
use aegis_wire::bounds::LLM_HELD_MAX;
use aegis_wire::words::InstanceId;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Hatch;
use super::tls::Shown;
use crate::app::llm::{self, Asker};
use crate::app::{self, App, tree};

/// In what the bytes are counted that calls hold.
pub(super) const HELD_UNIT: usize = 16 * 1024;
/// Bodies up to this are nobody's trouble, bytes.
const SMALL: usize = 64 * 1024;
/// A call waits so long for room.
const HELD_WAIT: Duration = Duration::from_secs(30);
/// LLM calls per second and machine, and at once: each is two synced writes.
const CALLS: [NonZeroU32; 2] = [NonZeroU32::new(10).unwrap(), NonZeroU32::new(64).unwrap()];
/// Denials of a machine that are noted per minute, and at once.
const NOTES: [NonZeroU32; 2] = [NonZeroU32::new(30).unwrap(), NonZeroU32::new(10).unwrap()];

/// A machine that may knock.
pub(super) struct Machine {
    /// What all have in common.
    pub(super) hatch: Arc<Hatch>,
    /// Which one it is, as its socket says.
    pub(super) id: InstanceId,
    /// Certificates of hosts, as it sees them.
    pub(super) shown: Shown,
    calls: DefaultDirectRateLimiter,
    notes: DefaultDirectRateLimiter,
    held: Arc<Semaphore>,
}

/// Room for a call; given back when it is dropped.
pub(super) struct Held {
    _rooms: Vec<OwnedSemaphorePermit>,
}

impl Machine {
    pub(super) fn new(hatch: Arc<Hatch>, id: InstanceId) -> Arc<Machine> {
        let [calls, at_once] = CALLS;
        let [notes, noted_at_once] = NOTES;
        Arc::new(Machine {
            hatch,
            id,
            shown: Shown::default(),
            calls: RateLimiter::direct(Quota::per_second(calls).allow_burst(at_once)),
            notes: RateLimiter::direct(Quota::per_minute(notes).allow_burst(noted_at_once)),
            held: Arc::new(Semaphore::new(LLM_HELD_MAX / HELD_UNIT)),
        })
    }

    pub(super) fn app(&self) -> &App {
        &self.hatch.app
    }

    /// The machine's records, where it is served.
    pub(super) fn asker(&self) -> Result<Asker, app::Error> {
        llm::asker(self.app(), &self.id)
    }

    /// Whether the machine is served still.
    pub(super) fn is_served(&self) -> bool {
        llm::is_served(self.app(), &self.id)
    }

    /// Whether one more LLM call may come now; where not, how many may.
    pub(super) fn may_call(&self) -> Result<(), String> {
        let [calls, at_once] = CALLS;
        self.calls
            .check()
            .map_err(|_| format!("{calls} calls per second and machine, {at_once} at once"))
    }

    /// Waits for room for a body of so many bytes; `None` where there is none for long.
    pub(super) async fn hold(&self, bytes: usize) -> Option<Held> {
        // Its own room first: a machine that waits there keeps nothing from others.
        let mut rooms = vec![room(&self.held, bytes).await?];
        if bytes > SMALL {
            rooms.push(room(&self.hatch.held, bytes).await?);
        }
        Some(Held { _rooms: rooms })
    }

    /// Waits for room for what a body that is there takes while it is looked at. Nothing that a
    /// machine does makes that longer.
    pub(super) async fn look(&self, bytes: usize) -> Option<Held> {
        Some(Held { _rooms: vec![room(&self.hatch.parsed, bytes).await?] })
    }

    /// Keeps in the trail that something was refused; of a flood only a part.
    pub(super) async fn note(&self, what: &str, refusal: &Refusal, target: Option<&str>) {
        if self.notes.check().is_err() {
            return;
        }
        let noted = tree::note_denial(self.app(), &self.id, what, refusal, target).await;
        if let Err(error) = noted {
            tracing::error!(instance = %self.id, %error, "a denial was not noted");
        }
    }
}

async fn room(of: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    let units = u32::try_from(bytes.div_ceil(HELD_UNIT)).ok()?;
    let room = Arc::clone(of).acquire_many_owned(units);
    tokio::time::timeout(HELD_WAIT, room).await.ok()?.ok()
}
