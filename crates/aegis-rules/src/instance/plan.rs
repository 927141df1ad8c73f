//! From what is wanted and what is seen to the one next step.

use super::{Instance, InstanceState, Wanted};
use crate::words::Time;

/// What is seen of an instance's machine, by looking at its worker and its run directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// No worker, no run directory.
    Nothing,
    /// A run directory without a living worker.
    Leftovers,
    /// A worker that boots its machine.
    Booting,
    /// A machine that runs.
    Running,
    /// A machine whose clock stands still.
    Frozen,
    /// A machine that said how it ended.
    Ended,
}

impl Seen {
    /// All of them.
    pub const ALL: [Seen; 6] =
        [Seen::Nothing, Seen::Leftovers, Seen::Booting, Seen::Running, Seen::Frozen, Seen::Ended];
}

/// One act upon the world. Each is safe to repeat, and finds its outside effect by instance id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Start a worker and have it boot a machine.
    Launch,
    /// Stop the machine's clock.
    Freeze,
    /// Let it go on.
    Thaw,
    /// End it in order.
    Shutdown,
    /// Remove what an ended machine left, but its disk.
    Clear,
    /// Freeze, destroy whatever there is, disk included, and prove it.
    Destroy,
}

impl Step {
    /// All of them: every fault is tried on every one.
    pub const ALL: [Step; 6] =
        [Step::Launch, Step::Freeze, Step::Thaw, Step::Shutdown, Step::Clear, Step::Destroy];
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Act.
    Do(Step),
    /// Nothing before this time.
    WaitUntil(Time),
    /// A machine that should be there is not: note its end, then plan again.
    Lost,
    /// Nothing to do until a fact or a wish changes.
    Rest,
}

/// The one next step. A kill (`Wanted::Gone`) never waits for anything.
pub fn plan(instance: &Instance, seen: Seen, now: Time) -> Plan {
    match (instance.wanted, seen) {
        (Wanted::Gone, _) => match instance.state {
            InstanceState::Gone => Plan::Rest,
            _ => Plan::Do(Step::Destroy),
        },

        (Wanted::Stopped, Seen::Nothing) if instance.state == InstanceState::Stopped => Plan::Rest,
        (Wanted::Stopped, Seen::Nothing | Seen::Leftovers | Seen::Ended) => Plan::Do(Step::Clear),
        (Wanted::Stopped, Seen::Booting | Seen::Running | Seen::Frozen) => Plan::Do(Step::Shutdown),

        (Wanted::Running | Wanted::Paused | Wanted::Frozen, Seen::Nothing) => {
            if instance.state.is_up() {
                return Plan::Lost;
            }
            match instance.retry_at {
                Some(at) if at > now => Plan::WaitUntil(at),
                _ => Plan::Do(Step::Launch),
            }
        }
        (Wanted::Running | Wanted::Paused | Wanted::Frozen, Seen::Leftovers) => {
            if instance.state.is_up() { Plan::Lost } else { Plan::Do(Step::Clear) }
        }
        (Wanted::Running | Wanted::Paused | Wanted::Frozen, Seen::Ended) => Plan::Do(Step::Clear),
        (Wanted::Running | Wanted::Paused | Wanted::Frozen, Seen::Booting) => Plan::Rest,

        (Wanted::Running, Seen::Running) => Plan::Rest,
        (Wanted::Running, Seen::Frozen) => Plan::Do(Step::Thaw),
        (Wanted::Paused | Wanted::Frozen, Seen::Running) => Plan::Do(Step::Freeze),
        (Wanted::Paused | Wanted::Frozen, Seen::Frozen) => Plan::Rest,
    }
}
