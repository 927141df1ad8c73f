//! What happens when a limit is passed, and when it is raised (contracts/couch.md 6, `onLimit`).
//!
//! ```text
//! passed ──▶ limits_exceeded (event, at once) ──▶ throttle: what is spent is shut, the rest goes on
//!                                             ├─▶ freeze: the whole tree stands still
//!                                             └─▶ kill
//! raised above what was used ──▶ not exceeded any more; what a limit froze is thawed
//! ```

use crate::allowance;
use crate::change::Change;
use crate::envelope;
use crate::guest::{self, Guest, GuestStatus};
use crate::instance::{Instance, find};
use crate::kill;
use crate::refusal::Refusal;
use crate::words::{
    DurationMs, EgressBytes, Limit, Limits, LlmTokens, OnLimit, Time, Usage, Violation,
};

/// What is done where the invite says nothing (contracts/couch.md 2): for what is measured against a
/// size that is enforced anyway, nothing but the event.
fn ladder(guest: &Guest, limit: Limit) -> OnLimit {
    match (guest.on_limit, limit) {
        (Some(on_limit), _) => on_limit,
        (None, Limit::Egress | Limit::Tokens) => OnLimit::Freeze,
        (None, Limit::Cpu | Limit::Memory | Limit::Disk | Limit::Duration) => OnLimit::Throttle,
    }
}

/// What follows for a guest whose usage is past limits. `machines` are all of its tree.
pub fn passed(guest: &Guest, machines: &[Instance], found: &[Violation], now: Time) -> Vec<Change> {
    if found.is_empty() || !guest.status_at(now).is_live() {
        return Vec::new();
    }
    // The strictest of what each calls for.
    let action = found.iter().map(|v| ladder(guest, v.limit)).fold(OnLimit::Throttle, stricter);
    let follows = match (action, guest.status_at(now)) {
        (OnLimit::Freeze, GuestStatus::Running) => {
            guest::freeze(guest, machines, now).unwrap_or_default()
        }
        (OnLimit::Kill, _) => kill::open_whole(guest, machines, now).unwrap_or_default(),
        _ => Vec::new(),
    };
    if guest.limits_exceeded && follows.is_empty() {
        return Vec::new();
    }
    let mut changes = vec![Change::LimitsExceeded {
        id: guest.id.clone(),
        violations: found.iter().map(ToString::to_string).collect(),
        froze: action == OnLimit::Freeze && !follows.is_empty(),
        at: now,
    }];
    changes.extend(follows);
    changes
}

/// What follows when a machine of the guest's tree wanted more of something of which nothing is left.
pub fn spent(guest: &Guest, machines: &[Instance], limit: Limit, now: Time) -> Vec<Change> {
    let allowed = guest.limits.get(limit);
    let used = match limit {
        Limit::Egress => guest.usage(machines).egress.gb(),
        Limit::Tokens => guest.usage(machines).tokens.0 as f64,
        _ => allowed,
    };
    passed(guest, machines, &[Violation { limit, used, allowed }], now)
}

/// Every limit that was passed, for showing: also those of which a machine wanted more when nothing was
/// left, as what is cut at the byte is never more than the limit.
pub fn violations(guest: &Guest, usage: &Usage, until: Time) -> Vec<Violation> {
    let mut found = usage.violations(&guest.limits, until.since(guest.created_at));
    let at_limit = [
        (Limit::Egress, usage.egress.gb(), usage.egress == guest.limits.egress),
        (Limit::Tokens, usage.tokens.0 as f64, usage.tokens == guest.limits.tokens),
    ];
    for (limit, used, full) in at_limit {
        if guest.limits_exceeded && full {
            found.push(Violation { limit, used, allowed: guest.limits.get(limit) });
        }
    }
    found
}

fn stricter(a: OnLimit, b: OnLimit) -> OnLimit {
    let rank = |o: OnLimit| match o {
        OnLimit::Throttle => 0,
        OnLimit::Freeze => 1,
        OnLimit::Kill => 2,
    };
    if rank(a) >= rank(b) { a } else { b }
}

/// New values for what is spent over time; what a machine is made of stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raise {
    /// `maxNetworkEgressGB`
    pub egress: Option<EgressBytes>,
    /// `maxTokenBudget`
    pub tokens: Option<LlmTokens>,
    /// `maxDurationHours`, from the redeem on.
    pub duration: Option<DurationMs>,
}

/// Sets limits of a living guest anew, higher or lower. What a limit froze is thawed when nothing is
/// passed any more.
pub fn set_limits(
    guest: &Guest,
    machines: &[Instance],
    ask: Raise,
    now: Time,
) -> Result<Vec<Change>, Refusal> {
    let status = guest.status_at(now);
    if !status.is_live() {
        return Err(guest::wrong_state("change limits of", status));
    }
    let limits = Limits {
        egress: ask.egress.unwrap_or(guest.limits.egress),
        tokens: ask.tokens.unwrap_or(guest.limits.tokens),
        duration: ask.duration.unwrap_or(guest.limits.duration),
        ..guest.limits
    };
    let expires_at = guest.created_at.plus(limits.duration);
    if expires_at <= now {
        return Err(Refusal::field(
            "resourceLimits.maxDurationHours",
            "more than the time since the redeem; to end it, kill the guest",
        ));
    }
    let mut changes = vec![Change::GuestLimits {
        id: guest.id.clone(),
        limits: Box::new(limits),
        expires_at,
        at: now,
    }];
    for machine in machines {
        // Below the root each envelope is its own; its end follows the guest's.
        let envelope = if machine.parent.is_none() {
            Limits {
                egress: limits.egress,
                tokens: limits.tokens,
                duration: limits.duration,
                ..machine.envelope
            }
        } else {
            machine.envelope
        };
        let was_the_guests = machine.ends_at == Some(guest.expires_at);
        let ends_at = if machine.parent.is_none() || was_the_guests {
            Some(expires_at)
        } else {
            machine.ends_at.map(|end| end.min(expires_at))
        };
        if envelope != machine.envelope || ends_at != machine.ends_at {
            changes.push(Change::InstanceEnvelope {
                id: machine.id.clone(),
                envelope: Box::new(envelope),
                ends_at,
                at: now,
            });
        }
    }
    let (after, family) = guest::after(guest, machines, &changes);
    changes.extend(eased(&after, &family, now));
    Ok(changes)
}

/// Takes back what a passed limit did, once nothing is passed any more.
fn eased(guest: &Guest, machines: &[Instance], now: Time) -> Vec<Change> {
    let usage = guest.usage(machines);
    let nothing_left = match guest.instance.as_ref().and_then(|id| find(machines, id)) {
        Some(root) => {
            let left = envelope::left(machines, &root.id, now);
            let leased = machines.iter().any(|m| allowance::unsent(m) > 0);
            (left.egress.0 == 0 && !leased) || left.tokens.0 == 0
        }
        None => usage.egress >= guest.limits.egress || usage.tokens >= guest.limits.tokens,
    };
    let passed = !usage.violations(&guest.limits, now.since(guest.created_at)).is_empty();
    if !guest.limits_exceeded || passed || nothing_left {
        return Vec::new();
    }
    let mut changes = vec![Change::LimitsEased { id: guest.id.clone(), at: now }];
    if guest.frozen_by_limit {
        changes.extend(guest::thaw(guest, machines, now).unwrap_or_default());
    }
    changes
}

#[cfg(test)]
mod tests;
