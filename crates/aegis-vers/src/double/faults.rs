//! What goes wrong, and how often. Counters count down to 0, which is never.

use serde::{Deserialize, Serialize};

/// All faults; what is left out of a change stays as it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Faults {
    /// So many creates go well before those that do not.
    pub(crate) creates_fine: u32,
    /// Creates that make a machine and answer 500.
    pub(crate) creates_500_made: u32,
    /// Creates that make none and answer 500.
    pub(crate) creates_500: u32,
    /// Creates that are not answered and make none.
    pub(crate) creates_hang: u32,
    /// Creates that make a machine and are not answered.
    pub(crate) creates_hang_made: u32,
    /// Creates that are not answered, and make a machine `late_ms` later, whoever left.
    pub(crate) creates_late: u32,
    /// How much later, milliseconds.
    pub(crate) late_ms: u64,
    /// Requests of any kind that get 429.
    pub(crate) limited: u32,
    /// What their `Retry-After` says; a fraction is said in milliseconds.
    pub(crate) retry_after_secs: f64,
    /// Requests of any kind that are not answered.
    pub(crate) hangs: u32,
    /// Deletes that find the machine asleep (409); waking it helps.
    pub(crate) deletes_asleep: u32,
    /// Deletes that answer 500 and do nothing.
    pub(crate) deletes_500: u32,
    /// Deletes that answer 200 and do nothing.
    pub(crate) deletes_lie: u32,
    /// Labels that are answered with 500 and not set.
    pub(crate) labels_500: u32,
    /// Machines die by themselves after so long, milliseconds; 0 for never.
    pub(crate) dead_after_ms: u64,
    /// Machines of others in the lists.
    pub(crate) foreign: u32,
    /// Every route of a machine answers 500.
    pub(crate) node_down: bool,
    /// No key is accepted.
    pub(crate) reject_key: bool,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults {
            creates_fine: 0,
            creates_500_made: 0,
            creates_500: 0,
            creates_hang: 0,
            creates_hang_made: 0,
            creates_late: 0,
            late_ms: 1000,
            limited: 0,
            retry_after_secs: 1.0,
            hangs: 0,
            deletes_asleep: 0,
            deletes_500: 0,
            deletes_lie: 0,
            labels_500: 0,
            dead_after_ms: 0,
            foreign: 0,
            node_down: false,
            reject_key: false,
        }
    }
}

/// What happens to one create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Create {
    /// It goes well.
    Fine,
    /// It fails, or hangs, having made a machine or not.
    Wrong { made: bool, answered: bool },
    /// It hangs, and a machine comes up later.
    Late,
}

/// Takes one off a counter; says whether there was one.
pub(crate) fn take(count: &mut u32) -> bool {
    let there = *count > 0;
    *count = count.saturating_sub(1);
    there
}

impl Faults {
    /// What happens to the next create.
    pub(crate) fn next_create(&mut self) -> Create {
        if take(&mut self.creates_fine) {
            Create::Fine
        } else if take(&mut self.creates_500_made) {
            Create::Wrong { made: true, answered: true }
        } else if take(&mut self.creates_500) {
            Create::Wrong { made: false, answered: true }
        } else if take(&mut self.creates_hang) {
            Create::Wrong { made: false, answered: false }
        } else if take(&mut self.creates_hang_made) {
            Create::Wrong { made: true, answered: false }
        } else if take(&mut self.creates_late) {
            Create::Late
        } else {
            Create::Fine
        }
    }
}
