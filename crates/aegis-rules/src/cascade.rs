//! What the end of an instance takes with it (contracts/aegis.md 2, orphan policy): everything that
//! descends from it.
//!
//! It looks at how things are, not at what was done: the ledger applies it to every tree that a write
//! touched, in the same transaction, so that no way to end can forget it and no spawn can slip
//! between.

use std::collections::{BTreeMap, BTreeSet};

use crate::change::Change;
use crate::guest::Guest;
use crate::instance::{Instance, InstanceState, Wanted};
use crate::words::{InstanceId, LlmTokens, Time, Usage};

/// What follows for a tree whose records are as they are after a write: below what is to stop or go,
/// all is to stop or go; and records that nobody needs are forgotten.
pub fn follow(family: &[Instance], guest: Option<&Guest>, now: Time) -> Vec<Change> {
    let mut changes = end_below(family, now);
    changes.extend(forget(family, guest, now));
    changes
}

fn end_below(family: &[Instance], now: Time) -> Vec<Change> {
    let mut wanted: BTreeMap<&InstanceId, Wanted> =
        family.iter().map(|i| (&i.id, i.wanted)).collect();
    let mut changes: BTreeMap<&InstanceId, Wanted> = BTreeMap::new();
    loop {
        let mut more = false;
        for instance in family {
            let Some(parent) = &instance.parent else { continue };
            // A parent without a record is gone longest.
            let above = wanted.get(parent).copied().unwrap_or(Wanted::Gone);
            let own = wanted.get(&instance.id).copied().unwrap_or(Wanted::Gone);
            let must = match (above, own) {
                (Wanted::Gone, Wanted::Gone)
                | (Wanted::Stopped, Wanted::Stopped | Wanted::Gone) => {
                    continue;
                }
                (Wanted::Gone | Wanted::Stopped, _) => above,
                (Wanted::Running | Wanted::Paused | Wanted::Frozen, _) => continue,
            };
            wanted.insert(&instance.id, must);
            changes.insert(&instance.id, must);
            more = true;
        }
        if !more {
            break;
        }
    }
    changes
        .into_iter()
        .map(|(id, wanted)| Change::InstanceWanted { id: id.clone(), wanted, at: now })
        .collect()
}

/// What an instance and those forgotten below it spent. A call that is not settled yet counts in
/// full: there will be no record to settle it on.
fn spent_below(instance: &Instance) -> Usage {
    let open = Usage { tokens: LlmTokens(instance.tokens_reserved), ..Usage::default() };
    instance.usage().and(instance.usage_below).and(open)
}

/// Records of what is proven gone, from the leaves up. A child's usage goes over to its parent. A
/// guest's own machine is kept, and so is everything once the guest has ended: for the receipt.
fn forget(family: &[Instance], guest: Option<&Guest>, now: Time) -> Vec<Change> {
    let kept = |i: &Instance| match (&i.guest, guest) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(_), Some(guest)) => guest.instance.as_ref() == Some(&i.id) || !guest.status.is_live(),
    };
    let mut usage: BTreeMap<&InstanceId, _> =
        family.iter().map(|i| (&i.id, spent_below(i))).collect();
    let mut forgotten: BTreeSet<&InstanceId> = BTreeSet::new();
    let mut changes = Vec::new();
    loop {
        let before = forgotten.len();
        for instance in family {
            let needed = family
                .iter()
                .any(|i| i.parent.as_ref() == Some(&instance.id) && !forgotten.contains(&i.id));
            if instance.state != InstanceState::Gone
                || needed
                || kept(instance)
                || !forgotten.insert(&instance.id)
            {
                continue;
            }
            let spent = usage.get(&instance.id).copied().unwrap_or_default();
            if let Some(parent) = &instance.parent
                && let Some(above) = usage.get_mut(parent)
            {
                *above = above.and(spent);
                changes.push(Change::InstanceAbsorbed { id: parent.clone(), usage: spent });
            }
            changes.push(Change::InstanceForgotten { id: instance.id.clone(), at: now });
        }
        if forgotten.len() == before {
            return changes;
        }
    }
}
