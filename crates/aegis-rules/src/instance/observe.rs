//! From facts to what is recorded. Facts come up, calls never do.

use super::{Exit, Instance, InstanceState, Wanted};
use crate::allowance;
use crate::change::Change;
use crate::guest::{self, Guest};
use crate::kill::MachineEnd;
use crate::words::{DurationMs, Time, Usage};

/// Something that was seen or done, and is to be recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The machine answered, and all that was awaited is there.
    Runs {
        /// What processes inside see.
        boot_id: String,
        /// Where the guest's agent answers.
        endpoint: Option<String>,
    },
    /// Its clock was stopped.
    Froze,
    /// What it used in this boot so far.
    Used(Usage),
    /// What it used in this boot, which is over; nothing is added to it any more.
    Final(Usage),
    /// It never came up.
    BootFailed {
        /// Why.
        message: String,
    },
    /// It came up, and has ended.
    Ended(Exit),
    /// All but the disk is gone.
    Cleared {
        /// Last usage, if it was still to be read.
        usage: Option<Usage>,
    },
    /// It was destroyed; `verified` names what was looked for and is not there.
    Destroyed {
        /// When its clock was stopped before.
        frozen_at: Option<Time>,
        /// What is proven gone.
        verified: Vec<String>,
        /// What is still there.
        remaining: Vec<String>,
        /// Last usage, if it was still to be read.
        usage: Option<Usage>,
    },
}

/// How often a host's own instance is tried before it stops with its error.
pub const RETRIES_OF_A_HOST: u32 = 2;
const FIRST_RETRY_MS: u64 = 500;
const LONGEST_RETRY_MS: u64 = 60_000;

/// What a fact changes, for the instance and for its guest, in one set. `family` are all records of
/// its tree. Only a guest's own machine moves its guest; what follows for the instances below this
/// one is for [`crate::cascade`].
pub fn observe(
    instance: &Instance,
    guest: Option<&Guest>,
    family: &[Instance],
    fact: Fact,
    now: Time,
) -> Vec<Change> {
    let id = || instance.id.clone();
    let of_guest = guest.filter(|g| g.instance.as_ref() == Some(&instance.id));
    match fact {
        Fact::Runs { boot_id, endpoint } => {
            let mut changes = Vec::new();
            let known = instance.boot_id.as_deref() == Some(boot_id.as_str());
            if !(known && instance.state == InstanceState::Running) {
                changes.push(Change::InstanceRuns { id: id(), boot_id, at: now });
            }
            if let Some(guest) = of_guest {
                changes.extend(guest::machine_runs(guest, instance, endpoint, now));
            }
            changes
        }
        Fact::Froze => {
            let to = match instance.wanted {
                Wanted::Paused => InstanceState::Paused,
                _ => InstanceState::Frozen,
            };
            if instance.state == to {
                return Vec::new();
            }
            vec![Change::InstanceFroze { id: id(), to, at: now }]
        }
        Fact::Used(usage) => {
            let total = instance.usage_boot.at_least(usage);
            if total == instance.usage_boot {
                return Vec::new();
            }
            let mut changes = vec![Change::InstanceUsed { id: id(), usage: total }];
            if let Some(guest) = guest {
                let mut tree = family.to_vec();
                tree.iter_mut().filter(|i| i.id == instance.id).for_each(|i| i.usage_boot = total);
                changes.extend(guest::note_usage(guest, &tree, now));
            }
            changes
        }
        Fact::Final(usage) => {
            let total = instance.usage_boot.at_least(usage);
            let mut changes = observe(instance, guest, family, Fact::Used(usage), now);
            // What it was allowed and did not send is free again.
            let given_back = allowance::Allowance { ceiling: total.egress, last: false };
            changes.extend(allowance::allow(instance, given_back));
            changes
        }
        Fact::BootFailed { message } => boot_failed(instance, of_guest, message, now),
        Fact::Ended(exit) => {
            if !matches!(instance.wanted, Wanted::Running | Wanted::Paused | Wanted::Frozen) {
                return Vec::new();
            }
            let mut changes = vec![
                Change::InstanceEnded { id: id(), exit },
                Change::InstanceWanted { id: id(), wanted: Wanted::Stopped, at: now },
            ];
            if let Some(guest) = of_guest {
                changes.extend(guest::machine_stopped(guest, now));
            }
            changes
        }
        Fact::Cleared { usage } => vec![Change::InstanceCleared {
            id: id(),
            usage: allowance::final_usage(instance, usage),
            stopped: instance.wanted == Wanted::Stopped,
            at: now,
        }],
        Fact::Destroyed { frozen_at, verified, remaining, usage } => {
            if !remaining.is_empty() {
                return match &instance.guest {
                    // Said once per kill, not once per try.
                    Some(guest) if instance.last_error.is_none() => vec![
                        Change::DestroyFailed { id: id(), message: remaining.join("; ") },
                        Change::KillUnverified { id: guest.clone(), remaining, at: now },
                    ],
                    _ => vec![Change::DestroyFailed { id: id(), message: remaining.join("; ") }],
                };
            }
            let end = MachineEnd {
                id: id(),
                frozen_at: frozen_at.or(instance.frozen_at),
                destroyed_at: now,
                verified,
            };
            let usage = allowance::final_usage(instance, usage);
            // Whether its record is still needed is for the cascade.
            vec![Change::InstanceDestroyed { end, usage }]
        }
    }
}

/// A guest's own machine is tried again, ever more slowly, until the guest's time is over; a host's
/// instance and a child a few times.
fn boot_failed(
    instance: &Instance,
    guest: Option<&Guest>,
    message: String,
    now: Time,
) -> Vec<Change> {
    let attempts = instance.attempts + 1;
    let delay = (FIRST_RETRY_MS << attempts.min(16).saturating_sub(1)).min(LONGEST_RETRY_MS);
    let retry = match guest {
        Some(guest) => guest.status_at(now).is_live(),
        None => attempts <= RETRIES_OF_A_HOST,
    };
    let mut changes = vec![Change::BootFailed {
        id: instance.id.clone(),
        attempts,
        retry_at: now.plus(DurationMs(delay)),
        message: message.clone(),
        at: now,
    }];
    if let Some(guest) = guest {
        changes.push(Change::ProvisionFailed { id: guest.id.clone(), reason: message, at: now });
    } else if !retry {
        changes.push(Change::InstanceEnded {
            id: instance.id.clone(),
            exit: Exit { code: None, message, at: now },
        });
    }
    if !retry && instance.wanted != Wanted::Gone {
        changes.push(Change::InstanceWanted {
            id: instance.id.clone(),
            wanted: Wanted::Stopped,
            at: now,
        });
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Spec;
    use crate::words::{InstanceId, Tree};

    #[test]
    fn an_end_tells_of_no_freeze_that_was_over() {
        let id: InstanceId = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        let mut instance =
            Instance::new(id.clone(), Tree::Instance(id), None, None, Spec::example(), Time(0));
        let gone = || Fact::Destroyed {
            frozen_at: None,
            verified: vec![],
            remaining: vec![],
            usage: None,
        };
        let frozen_at = |of: &Instance| match &observe(of, None, &[], gone(), Time(99))[..] {
            [Change::InstanceDestroyed { end, .. }] => end.frozen_at,
            other => panic!("{other:?}"),
        };
        let mut then = |fact, at| {
            for change in observe(&instance, None, &[], fact, Time(at)) {
                instance.apply(&change);
            }
            frozen_at(&instance)
        };
        let runs = || Fact::Runs { boot_id: "b".to_owned(), endpoint: None };
        assert_eq!(then(runs(), 1), None);
        assert_eq!(then(Fact::Froze, 2), Some(Time(2)));
        assert_eq!(then(runs(), 3), None, "it went on");
        assert_eq!(then(Fact::Froze, 4), Some(Time(4)));
        assert_eq!(then(Fact::Cleared { usage: None }, 5), None, "it has no machine");
    }
}
