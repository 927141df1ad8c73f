//! A guest that needs more than it was given asks for it; the host grants it, or not.

use crate::change::Change;
use crate::egress::{AllowList, Egress, EgressAsk};
use crate::exceed::{self, Raise};
use crate::guest::{self, Guest};
use crate::instance::{Instance, ancestors, find};
use crate::refusal::{Code, Refusal};
use crate::words::{InstanceId, Time};

/// Requests that may be open at a time.
pub const OPEN_MAX: usize = 8;
/// Requests that are remembered; the oldest decided ones are forgotten first.
pub const KEPT_MAX: usize = 32;
/// Longest reason, characters.
pub const REASON_MAX: usize = 500;

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// More that shall be reachable.
    pub egress: AllowList,
    /// Higher limits.
    pub raise: Raise,
}

impl Wish {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Wish::default()
    }
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The host has not looked yet.
    Open,
    /// The host said yes.
    Granted,
    /// The host said no.
    Denied,
}

impl Verdict {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Open => "open",
            Verdict::Granted => "granted",
            Verdict::Denied => "denied",
        }
    }

    /// From the word on the wire.
    pub fn parse(word: &str) -> Option<Verdict> {
        [Verdict::Open, Verdict::Granted, Verdict::Denied].into_iter().find(|v| v.word() == word)
    }
}

/// A request of a machine of a guest's tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRequest {
    /// Its number among the guest's, from 1.
    pub number: u32,
    /// The machine that asks.
    pub from: InstanceId,
    /// For what.
    pub wish: Wish,
    /// Why, for the host.
    pub reason: Option<String>,
    /// When.
    pub at: Time,
    /// What came of it.
    pub verdict: Verdict,
}

/// Takes a request of a machine.
pub fn raise(
    guest: Option<&Guest>,
    from: &InstanceId,
    wish: Wish,
    reason: Option<String>,
    now: Time,
) -> Result<Vec<Change>, Refusal> {
    let Some(guest) = guest else {
        let message = "this instance is the host's own: there is no invite to ask more of";
        return Err(Refusal::new(Code::InstanceState, message));
    };
    if wish.is_empty() {
        let expected = "at least one of egress and resourceLimits";
        return Err(Refusal::field("request", expected));
    }
    let same = |r: &&AccessRequest| r.verdict == Verdict::Open && r.from == *from && r.wish == wish;
    if guest.requests.iter().any(|r| same(&r)) {
        return Ok(Vec::new());
    }
    let open = guest.requests.iter().filter(|r| r.verdict == Verdict::Open).count();
    if open >= OPEN_MAX {
        return Err(Refusal::new(Code::EnvelopeExhausted, "too many requests are open")
            .rule("requests")
            .amounts((open + 1).to_string(), OPEN_MAX.to_string())
            .hint("wait until the host has decided one"));
    }
    let number = guest.requests.iter().map(|r| r.number).max().unwrap_or(0) + 1;
    let reason = reason.map(|r| r.chars().take(REASON_MAX).collect());
    let request =
        AccessRequest { number, from: from.clone(), wish, reason, at: now, verdict: Verdict::Open };
    Ok(vec![Change::RequestRaised { id: guest.id.clone(), request: Box::new(request) }])
}

/// Decides a request. What is granted holds for the machine that asked, and for all whose records
/// it lies below.
pub fn decide(
    guest: &Guest,
    machines: &[Instance],
    number: u32,
    grant: bool,
    now: Time,
) -> Result<Vec<Change>, Refusal> {
    let request = guest
        .requests
        .iter()
        .find(|r| r.number == number)
        .ok_or_else(|| Refusal::new(Code::RequestNotFound, "request not found"))?;
    if request.verdict != Verdict::Open {
        let message = format!("request {number} was {} already", request.verdict.word());
        return Err(Refusal::new(Code::GuestState, message));
    }
    if !guest.status_at(now).is_live() {
        return Err(guest::wrong_state("decide a request of", guest.status_at(now)));
    }
    let mut changes = Vec::new();
    if grant {
        if request.wish.raise != Raise::default() {
            changes.extend(exceed::set_limits(guest, machines, request.wish.raise, now)?);
        }
        if request.wish.egress != AllowList::default() {
            for instance in ancestors(machines, &request.from) {
                let egress = instance.egress.with(&request.wish.egress)?;
                changes.extend(egress_set(instance, egress, now));
            }
        }
    }
    changes.push(Change::RequestDecided { id: guest.id.clone(), number, granted: grant, at: now });
    Ok(changes)
}

/// Sets what a living guest's machines may reach, whatever was asked for: what is absent is open.
/// Children keep their own lists beside it.
pub fn set_egress(
    guest: &Guest,
    machines: &[Instance],
    ask: EgressAsk,
    now: Time,
) -> Result<Vec<Change>, Refusal> {
    let status = guest.status_at(now);
    if !status.is_live() {
        return Err(guest::wrong_state("change egress of", status));
    }
    let root = guest.instance.as_ref().and_then(|root| find(machines, root));
    let root = root.filter(|root| root.remote.is_none()).ok_or_else(no_machine)?;
    Ok(egress_set(root, ask.granted(), now).into_iter().collect())
}

/// The refusal of what only a guest with a machine of this host has.
pub fn no_machine() -> Refusal {
    Refusal::new(Code::GuestState, "this guest has no machine of this host")
}

// What an instance and all below it may reach.
fn egress_set(instance: &Instance, egress: Egress, now: Time) -> Option<Change> {
    (instance.egress != egress).then(|| Change::EgressSet {
        id: instance.id.clone(),
        egress: Box::new(egress),
        at: now,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::egress::policy;
    use crate::instance::Spec;
    use crate::words::Tree;

    fn list(texts: &[&str]) -> AllowList {
        let texts: Vec<String> = texts.iter().map(ToString::to_string).collect();
        AllowList::parse(&texts, "egress").unwrap()
    }

    fn instance(n: u8, parent: Option<u8>, egress: Egress) -> Instance {
        let id = |n: u8| -> InstanceId {
            format!("inst-01ARZ3NDEKTSV4RRFFQ69G5FA{}", char::from(b'0' + n)).parse().unwrap()
        };
        let tree = Tree::Instance(id(0));
        let new = Instance::new(id(n), tree, None, parent.map(id), Spec::example(), Time(0));
        Instance { egress, ..new }
    }

    #[test]
    fn what_is_granted_to_a_child_is_granted_above_it_and_not_beside_it() {
        let closed = Egress::default();
        let narrow = Egress { internet: true, allow: Some(list(&["a.test"])) };
        let mut family = [
            instance(0, None, closed.clone()),
            instance(1, Some(0), narrow.clone()),
            instance(2, Some(0), narrow),
        ];
        let more = list(&["b.test:443"]);
        let before = policy(&family, &family[1].id, vec![], false);
        assert!(!before.internet);
        let ids: Vec<_> = ancestors(&family, &family[1].id).map(|i| i.id.clone()).collect();
        for instance in family.iter_mut().filter(|i| ids.contains(&i.id)) {
            let egress = instance.egress.with(&more).unwrap();
            let change = egress_set(instance, egress, Time(1)).unwrap();
            instance.apply(&change);
        }
        let name = "b.test".parse().unwrap();
        assert!(policy(&family, &family[1].id, vec![], false).ask(&name).is_ok());
        assert!(policy(&family, &family[0].id, vec![], false).ask(&name).is_ok());
        assert!(policy(&family, &family[2].id, vec![], false).ask(&name).is_err());
        let other = "a.test".parse().unwrap();
        assert!(policy(&family, &family[1].id, vec![], false).ask(&other).is_err(), "the root");
    }
}
