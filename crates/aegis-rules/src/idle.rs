//! When an instance that nobody uses is paused, and when its memory is put on disk
//! (contracts/aegis.md 2).
//!
//! What counts as use is measured by others; a guest's signs can put this off, and never an end.

use crate::instance::{IdlePolicy, Instance, InstanceState, Wanted};
use crate::words::{DurationMs, Time};

/// How long idleness lasts before something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// From the last use to the pause.
    pub pause_after: DurationMs,
    /// From the pause to the memory on disk.
    pub suspend_after: DurationMs,
}

impl Default for Times {
    fn default() -> Times {
        Times { pause_after: DurationMs(60_000), suspend_after: DurationMs(300_000) }
    }
}

/// Signs of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signs {
    /// The last connection, exec, log line, or CPU or network above the threshold.
    pub last_active: Time,
    /// Connections and execs that are open now.
    pub connections: u64,
}

/// What idleness asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing now; look again then, where anything may follow by time alone.
    Stay {
        /// When.
        until: Option<Time>,
    },
    /// Stop its clock.
    Pause,
    /// Put its memory on disk and free it.
    Suspend,
}

/// Judges one instance.
pub fn judge(instance: &Instance, signs: &Signs, times: &Times, now: Time) -> Verdict {
    let stay = Verdict::Stay { until: None };
    match instance.spec.idle_policy {
        IdlePolicy::LeaveRunning => return stay,
        IdlePolicy::Default => {}
    }
    match (instance.wanted, instance.state) {
        (Wanted::Running, InstanceState::Running) => {
            if signs.connections > 0 {
                // Their end is an event; the time counts from there.
                return stay;
            }
            // It has not been idle for longer than it runs.
            let used = signs.last_active.max(instance.created_at);
            let idle_at = used.plus(times.pause_after);
            let held_until = instance.lease_at(now).map_or(now, |lease| lease.expires_at);
            let due = idle_at.max(held_until);
            if due > now { Verdict::Stay { until: Some(due) } } else { Verdict::Pause }
        }
        (Wanted::Paused, InstanceState::Paused) => {
            let since = instance.frozen_at.unwrap_or(instance.updated_at);
            let due = since.plus(times.suspend_after);
            if due > now { Verdict::Stay { until: Some(due) } } else { Verdict::Suspend }
        }
        // On the way somewhere: what is recorded next is looked at anew.
        _ => stay,
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::instance::{Lease, Spec};
    use crate::words::{InstanceId, Tree};

    const TIMES: Times = Times { pause_after: DurationMs(60), suspend_after: DurationMs(300) };

    fn running() -> Instance {
        let id: InstanceId = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        let mut instance =
            Instance::new(id.clone(), Tree::Instance(id), None, None, Spec::example(), Time(0));
        instance.state = InstanceState::Running;
        instance
    }

    fn judged(instance: &Instance, last_active: i64, connections: u64, now: i64) -> Verdict {
        let signs = Signs { last_active: Time(last_active), connections };
        judge(instance, &signs, &TIMES, Time(now))
    }

    #[test]
    fn idleness_pauses_and_later_suspends() {
        let mut instance = running();
        assert_eq!(judged(&instance, 40, 0, 99), Verdict::Stay { until: Some(Time(100)) });
        assert_eq!(judged(&instance, 40, 0, 100), Verdict::Pause);
        assert_eq!(judged(&instance, 40, 1, 1000), Verdict::Stay { until: None });
        instance.wanted = Wanted::Paused;
        assert_eq!(judged(&instance, 40, 0, 100), Verdict::Stay { until: None }, "being paused");
        instance.state = InstanceState::Paused;
        instance.frozen_at = Some(Time(110));
        assert_eq!(judged(&instance, 40, 0, 120), Verdict::Stay { until: Some(Time(410)) });
        assert_eq!(judged(&instance, 40, 0, 410), Verdict::Suspend);
        instance.wanted = Wanted::Frozen;
        instance.state = InstanceState::Frozen;
        assert_eq!(judged(&instance, 40, 0, 9999), Verdict::Stay { until: None });
    }

    #[test]
    fn a_lease_holds_it_off_and_a_policy_forbids_it() {
        let mut instance = running();
        instance.lease = Some(Lease { reason: None, expires_at: Time(500) });
        assert_eq!(judged(&instance, 0, 0, 400), Verdict::Stay { until: Some(Time(500)) });
        assert_eq!(judged(&instance, 0, 0, 500), Verdict::Pause);
        assert_eq!(judged(&instance, 480, 0, 499), Verdict::Stay { until: Some(Time(540)) });
        instance.spec.idle_policy = IdlePolicy::LeaveRunning;
        assert_eq!(judged(&instance, 0, 0, 9999), Verdict::Stay { until: None });
    }
}
