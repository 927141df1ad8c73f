//! Machines in somebody else's cloud: what an unclear answer to a create has come to, and which of
//! the machines there are ours and nobody's any more (contracts/vers.md 4 and 7).
//!
//! ```text
//! intended ──create──▶ claimed ──label──▶ …            a create is never sent again blindly:
//!     └── no clear answer ──look──▶ adopted            what the look finds is taken over,
//!                              └──▶ absent ──▶ again   what it does not find is waited for
//! ```
//! The intent is written before the cloud is asked, the claim before the machine gets its label. So a
//! machine with our label that no record claims is nobody's; and one without a label, of our commit
//! and of the time of an intent whose answer was not clear, is what that intent made.

use std::collections::BTreeSet;

use crate::change::Change;
use crate::instance::{Instance, InstanceState};
use crate::invite;
use crate::refusal::{Code, Refusal};
use crate::words::{DurationMs, InstanceId, Time, Uuid};

/// The cloud's clock may differ from ours by so much.
const SKEW: DurationMs = DurationMs(30_000);
/// So long after a create without a clear answer its machine may still come up.
pub const LATE: DurationMs = DurationMs(30 * 60_000);

/// What a record knows of its machine elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remote {
    /// The machine, once it is known.
    pub vm: Option<Uuid>,
    /// When the create was begun of which nothing is known yet.
    pub intended_at: Option<Time>,
    /// When creates were begun of which nothing ever became known: the first one, and the last.
    pub unclear: Option<(Time, Time)>,
}

impl Remote {
    /// Whether there is, or may be, a machine of this record.
    pub fn is_open(&self) -> bool {
        self.vm.is_some() || self.intended_at.is_some()
    }

    /// Nothing ever became known of a create that was begun at this time.
    pub(crate) fn note_unclear(&mut self, at: Time) {
        self.unclear = Some((self.unclear.map_or(at, |(first, _)| first), at));
    }
}

/// A machine, as the cloud shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// Its id there.
    pub vm: Uuid,
    /// When it was made, by the cloud's clock; absent where it does not say so legibly.
    pub created_at: Option<Time>,
    /// What its labels say.
    pub label: Label,
    /// The commit that it was made from; absent where nobody looked, or it has none.
    pub parent: Option<Uuid>,
}

/// Whose a machine is, by its labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Label {
    /// It has none at all.
    None,
    /// This daemon's, for that instance.
    Ours(Option<InstanceId>),
    /// Somebody else's.
    Foreign,
}

/// What a look at the cloud says of a create without a clear answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This is what it made.
    Adopt(Uuid),
    /// Nothing is there yet; it may still come before this time.
    Wait(Time),
    /// It made nothing.
    Absent,
}

/// Whether a machine without a label may be what a create made that was begun in this time; its commit
/// is not looked at.
pub fn may_be_of(seen: &Sighting, begun: (Time, Time), within: DurationMs) -> bool {
    let from = begun.0.0.saturating_sub_unsigned(SKEW.0);
    let until = begun.1.plus(within).plus(SKEW);
    seen.label == Label::None && seen.created_at.is_some_and(|at| from <= at.0 && at <= until)
}

/// Says what a create without a clear answer came to. `claimed` are the machines that any record
/// claims, `within` is how long after its beginning it can still make one.
pub fn reconcile(
    id: &InstanceId,
    intended_at: Time,
    golden: &Uuid,
    claimed: &BTreeSet<Uuid>,
    seen: &[Sighting],
    within: DurationMs,
    now: Time,
) -> Verdict {
    let free = || seen.iter().filter(|s| !claimed.contains(&s.vm));
    let labelled = free().find(|s| s.label == Label::Ours(Some(id.clone())));
    let made = || {
        free()
            .filter(|s| {
                s.parent.as_ref() == Some(golden)
                    && may_be_of(s, (intended_at, intended_at), within)
            })
            .min_by_key(|s| (s.created_at, s.vm.clone()))
    };
    if let Some(found) = labelled.or_else(made) {
        return Verdict::Adopt(found.vm.clone());
    }
    let settled_at = intended_at.plus(within);
    if now < settled_at { Verdict::Wait(settled_at) } else { Verdict::Absent }
}

/// Machines that are ours and that no record claims: nobody would ever end them. Asked while no create
/// is under way.
pub fn strays(records: &[Instance], seen: &[Sighting]) -> Vec<Uuid> {
    let claimed = claimed(records);
    let intends = |i: &&Instance| {
        i.remote.as_ref().is_some_and(|r| r.vm.is_none() && r.intended_at.is_some())
    };
    // What an open intent made is for its own record to find.
    let open: Vec<&Instance> = records.iter().filter(intends).collect();
    let is_stray = |s: &&Sighting| match &s.label {
        _ if claimed.contains(&s.vm) => false,
        Label::Ours(of) => !open.iter().any(|i| of.as_ref() == Some(&i.id)),
        Label::None if open.is_empty() => records.iter().any(|i| {
            let unclear = i.remote.as_ref().and_then(|r| r.unclear);
            unclear.is_some_and(|begun| may_be_of(s, begun, LATE))
                && s.parent.is_some()
                && s.parent == golden(i)
        }),
        Label::None | Label::Foreign => false,
    };
    seen.iter().filter(is_stray).map(|s| s.vm.clone()).collect()
}

/// Whether a machine without a label might be a stray, so that its commit is worth a look.
pub fn may_be_stray(records: &[Instance], seen: &Sighting) -> bool {
    let mut unclear = records.iter().filter_map(|i| i.remote.as_ref()?.unclear);
    unclear.any(|begun| may_be_of(seen, begun, LATE))
}

/// The machines that records claim. What is proven gone claims nothing.
pub fn claimed(records: &[Instance]) -> BTreeSet<Uuid> {
    let live = records.iter().filter(|i| i.state != InstanceState::Gone);
    live.filter_map(|i| i.remote.as_ref()?.vm.clone()).collect()
}

/// Refuses an invite of which something can't be held in another cloud: a promise that nobody enforces
/// is none.
pub fn admits(ask: &invite::Create) -> Result<(), Refusal> {
    let (may, offer) = (&ask.permissions, &ask.offer);
    let no = |field: &str, what: &str| {
        let message = format!("{field}: in the vers cloud {what}");
        let mut refusal = Refusal::new(Code::NotEnforceable, message);
        refusal.field = Some(field.to_owned());
        Err(refusal.hint("leave it out, or lend a machine of this host"))
    };
    if !may.internet {
        return no("permissions.canAccessInternet", "machines are always on the internet");
    }
    if may.spawn {
        return no("permissions.canSpawnSubAgents", "machines can't make machines of their own");
    }
    if may.host_services {
        return no("permissions.canAccessHostServices", "machines reach nothing of this host");
    }
    if offer.egress_allow.is_some() {
        return no("egressAllow", "machines reach whatever they like");
    }
    let golden: Option<Result<Uuid, _>> = offer.golden.as_ref().map(|g| g.as_str().parse());
    match golden {
        Some(Err(_)) => Err(Refusal::field("golden", "the id of a commit in the vers cloud")),
        _ => Ok(()),
    }
}

/// The commit that a record's machine comes from.
pub fn golden(instance: &Instance) -> Option<Uuid> {
    instance.remote.as_ref()?;
    instance.spec.image.as_str().parse().ok()
}

/// Writes the intent to have a machine made; `None` where one is, or may be, there already.
pub fn intend(instance: &Instance, now: Time) -> Option<Change> {
    let remote = instance.remote.as_ref().filter(|remote| !remote.is_open())?;
    debug_assert!(remote.vm.is_none());
    Some(Change::VmIntended { id: instance.id.clone(), at: now })
}

/// How it is known that a machine is a record's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The cloud answered the create with it.
    Answer,
    /// It was found. What the record's own create made may be another, and come later.
    Look,
}

/// Claims a machine for a record; `None` where another has it, or this one has one.
pub fn claim(
    instance: &Instance,
    claimed: &BTreeSet<Uuid>,
    vm: &Uuid,
    by: By,
    now: Time,
) -> Option<Change> {
    let remote = instance.remote.as_ref().filter(|remote| remote.vm.is_none())?;
    let intended_at = remote.intended_at.filter(|_| !claimed.contains(vm))?;
    let unclear_at = (by == By::Look).then_some(intended_at);
    Some(Change::VmClaimed { id: instance.id.clone(), vm: vm.clone(), unclear_at, at: now })
}

/// Notes that there is no machine of a record: it was never made, or is proven gone. `unclear` says
/// that the cloud never told what became of the create.
pub fn absent(instance: &Instance, unclear: bool, now: Time) -> Option<Change> {
    let remote = instance.remote.as_ref().filter(|remote| remote.is_open())?;
    let unclear_at = remote.intended_at.filter(|_| unclear);
    Some(Change::VmAbsent { id: instance.id.clone(), unclear_at, at: now })
}

#[cfg(test)]
mod tests;
