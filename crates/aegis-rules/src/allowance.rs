//! Egress in leases: how many bytes a machine may send before it must ask again.
//!
//! A gateway takes bytes from its machine's allowance before they leave, so that no packet needs the
//! ledger. What is allowed and not sent yet is drawn from every envelope above, like what was sent:
//! all allowances of a tree together are never more than its limit, whichever machine, worker or
//! daemon dies. When nothing is free any more, what others do not use is called back.

use crate::change::Change;
use crate::envelope;
use crate::instance::{Instance, ancestors, find};
use crate::words::{EgressBytes, InstanceId, Time, Usage};

/// Smallest and largest lease while there is enough, bytes: small enough that the last of an
/// envelope is not spread over machines that do not use it, large enough that a fast machine asks a
/// few times a second.
const LEASE: (u64, u64) = (64 * 1024, 64 * 1024 * 1024);
/// A lease is this part of what is free.
const PART: u64 = 16;

/// What a machine may send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// Bytes in this boot, those that were sent already included.
    pub ceiling: EgressBytes,
    /// No more will come: its envelope, or one above it, is used up.
    pub last: bool,
}

/// What is said to a machine that needs more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum More {
    /// It may go on.
    Yes(Allowance),
    /// Nothing is free, but these hold what they may not need.
    CallBack(Vec<InstanceId>),
    /// All is spent.
    Spent(Allowance),
}

/// Bytes that are allowed to an instance and that it has not sent yet.
pub fn unsent(instance: &Instance) -> u64 {
    instance.egress_allowed.0.saturating_sub(instance.usage_boot.egress.0)
}

/// What a machine that needs more may send. `family` are all records of its tree.
pub fn more(family: &[Instance], id: &InstanceId) -> More {
    let Some(own) = find(family, id) else { return More::Spent(Allowance::default()) };
    let free = envelope::left(family, id, Time(0)).egress.0;
    let held = own.egress_allowed.0;
    if free > 0 {
        let lease = (free / PART).clamp(LEASE.0, LEASE.1).min(free);
        let ceiling = EgressBytes(held.saturating_add(lease));
        return More::Yes(Allowance { ceiling, last: false });
    }
    let others = family.iter().filter(|i| i.id != *id && unsent(i) > 0);
    let others: Vec<_> = others.map(|i| i.id.clone()).collect();
    match others.is_empty() {
        true => More::Spent(Allowance { ceiling: EgressBytes(held), last: true }),
        false => More::CallBack(others),
    }
}

/// What the machine of an instance may have sent in this boot: what it was allowed, unless a limit
/// above it was lowered below what is drawn; then no more than it is known to have sent.
pub fn ceiling(family: &[Instance], id: &InstanceId) -> EgressBytes {
    let Some(own) = find(family, id) else { return EgressBytes(0) };
    let overdrawn = ancestors(family, id)
        .any(|i| envelope::drawn(family, &i.id).egress_bytes > i.envelope.egress.0);
    if overdrawn { own.usage_boot.egress } else { own.egress_allowed }
}

/// Records an allowance, before the machine hears of it.
pub fn allow(instance: &Instance, allowance: Allowance) -> Option<Change> {
    (instance.egress_allowed != allowance.ceiling)
        .then(|| Change::EgressAllowed { id: instance.id.clone(), ceiling: allowance.ceiling })
}

/// Begins to call back what a machine was allowed: whatever it was told before is of no worth once
/// it hears of this.
pub fn call_back(instance: &Instance) -> Change {
    Change::EgressCalledBack { id: instance.id.clone() }
}

/// Records what a machine gave back when it was called with this `version`: it said how many bytes
/// it has sent, and sends no more of its old allowance. A machine can't give back more than it was
/// given; who was allowed something else meanwhile gives back nothing.
pub fn give_back(instance: &Instance, version: u64, sent: EgressBytes) -> Vec<Change> {
    if instance.egress_version != version {
        return Vec::new();
    }
    let ceiling = sent.max(instance.usage_boot.egress).min(instance.egress_allowed);
    let usage = instance.usage_boot.at_least(Usage { egress: ceiling, ..Usage::default() });
    // Also where nothing came back: the machine hears nothing older any more.
    vec![
        Change::InstanceUsed { id: instance.id.clone(), usage },
        Change::EgressAllowed { id: instance.id.clone(), ceiling },
    ]
}

/// The usage of a boot that is over. What its gateway sent last may be unknown; then all that it was
/// allowed counts.
pub fn final_usage(instance: &Instance, measured: Option<Usage>) -> Usage {
    let unknown = Usage { egress: instance.egress_allowed, ..Usage::default() };
    instance.usage_boot.at_least(measured.unwrap_or(unknown))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::capability::Capabilities;
    use crate::instance::Spec;
    use crate::words::{Limits, Tree};

    fn id(n: u8) -> InstanceId {
        format!("inst-01ARZ3NDEKTSV4RRFFQ69G5FA{}", char::from(b'0' + n)).parse().unwrap()
    }

    /// 0 is the root, 1 and 2 are its children, 3 is a child of 1.
    fn family(limits: [u64; 4]) -> Vec<Instance> {
        let parents = [None, Some(0), Some(0), Some(1)];
        (0..4_u8)
            .map(|n| {
                let parent = parents[usize::from(n)].map(id);
                let tree = Tree::Instance(id(0));
                let envelope =
                    Limits { egress: EgressBytes(limits[usize::from(n)]), ..Limits::default() };
                Instance::new(id(n), tree, None, parent, Spec::example(), Time(0)).with_rights(
                    Capabilities::default(),
                    envelope,
                    None,
                )
            })
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Act {
        Send(u8, u64),
        Tell(u8),
        EndKnown(u8),
        EndUnknown(u8),
    }

    fn act() -> impl Strategy<Value = Act> {
        let who = 0..4_u8;
        prop_oneof![
            8 => (who.clone(), 0..300_000_u64).prop_map(|(n, bytes)| Act::Send(n, bytes)),
            2 => who.clone().prop_map(Act::Tell),
            1 => who.clone().prop_map(Act::EndKnown),
            1 => who.prop_map(Act::EndUnknown),
        ]
    }

    /// The world: what machines have really sent, which the records do not know at once.
    struct World {
        records: Vec<Instance>,
        // In this boot, and in boots before.
        sent: [(u64, u64); 4],
    }

    impl World {
        fn apply(&mut self, change: Option<Change>) {
            let Some(change) = change else { return };
            self.records
                .iter_mut()
                .filter(|i| change.subject().id() == i.id.as_str())
                .for_each(|i| i.apply(&change));
        }

        /// Sends as a gateway does: within the allowance, and asks for more at its end.
        fn send(&mut self, n: u8, mut bytes: u64) {
            let at = usize::from(n);
            loop {
                let room = self.records[at].egress_allowed.0 - self.sent[at].0;
                let now = bytes.min(room);
                self.sent[at].0 += now;
                bytes -= now;
                if bytes == 0 {
                    return;
                }
                match more(&self.records, &id(n)) {
                    More::Yes(allowance) => {
                        let change = allow(&self.records[at], allowance);
                        assert!(change.is_some());
                        self.apply(change);
                    }
                    More::CallBack(others) => {
                        for other in others {
                            let at = self.records.iter().position(|i| i.id == other).unwrap();
                            let sent = EgressBytes(self.sent[at].0);
                            self.apply(Some(call_back(&self.records[at])));
                            let version = self.records[at].egress_version;
                            assert_eq!(give_back(&self.records[at], version - 1, sent), []);
                            let changes = give_back(&self.records[at], version, sent);
                            changes.into_iter().for_each(|change| self.apply(Some(change)));
                        }
                        if matches!(more(&self.records, &id(n)), More::CallBack(_)) {
                            panic!("called back, and still held");
                        }
                    }
                    More::Spent(allowance) => {
                        assert!(allowance.last);
                        return;
                    }
                }
            }
        }

        fn end(&mut self, n: u8, known: bool) {
            let at = usize::from(n);
            let measured =
                known.then_some(Usage { egress: EgressBytes(self.sent[at].0), ..Usage::default() });
            let usage = final_usage(&self.records[at], measured);
            let cleared = Change::InstanceCleared { id: id(n), usage, stopped: false, at: Time(1) };
            self.apply(Some(cleared));
            self.sent[at] = (0, self.sent[at].0 + self.sent[at].1);
        }
    }

    proptest! {
        #[test]
        fn no_order_of_things_sends_more_than_an_envelope(
            limits in [0..2_000_000_u64, 0..2_000_000_u64, 0..2_000_000_u64, 0..2_000_000_u64],
            acts in proptest::collection::vec(act(), 1..60),
        ) {
            let mut world = World { records: family(limits), sent: [(0, 0); 4] };
            for act in acts {
                match act {
                    Act::Send(n, bytes) => world.send(n, bytes),
                    Act::Tell(n) => {
                        let sent = EgressBytes(world.sent[usize::from(n)].0);
                        let usage = Usage { egress: sent, ..Usage::default() };
                        world.apply(Some(Change::InstanceUsed { id: id(n), usage }));
                    }
                    Act::EndKnown(n) => world.end(n, true),
                    Act::EndUnknown(n) => world.end(n, false),
                }
                let total = |of: &[usize]| -> u64 {
                    of.iter().map(|n| world.sent[*n].0 + world.sent[*n].1).sum()
                };
                prop_assert!(total(&[0, 1, 2, 3]) <= limits[0]);
                prop_assert!(total(&[1, 3]) <= limits[1]);
                prop_assert!(total(&[2]) <= limits[2] && total(&[3]) <= limits[3]);
                for (at, record) in world.records.iter().enumerate() {
                    prop_assert!(world.sent[at].0 <= record.egress_allowed.0);
                    prop_assert!(record.usage().egress.0.max(record.egress_allowed.0
                        + record.usage_past.egress.0) >= world.sent[at].0 + world.sent[at].1);
                }
            }
        }
    }

    #[test]
    fn the_last_byte_can_be_sent_by_anybody() {
        let limit = 200_000;
        let mut world = World { records: family([limit; 4]), sent: [(0, 0); 4] };
        for n in [0, 1, 2] {
            world.send(n, 1);
        }
        world.send(3, 10 * limit);
        assert_eq!(world.sent.iter().map(|s| s.0).sum::<u64>(), limit);
    }

    #[test]
    fn a_limit_that_is_lowered_stops_what_was_allowed_before() {
        let mut world = World { records: family([10_000_000; 4]), sent: [(0, 0); 4] };
        world.send(1, 100);
        world.send(3, 100);
        let held = |world: &World, n: u8| ceiling(&world.records, &id(n)).0;
        assert!(held(&world, 1) > 100 && held(&world, 3) > 100);
        world.records[0].envelope.egress = EgressBytes(200);
        for n in [0, 1, 2, 3] {
            assert_eq!(ceiling(&world.records, &id(n)), EgressBytes(0), "as far as is known");
        }
        world.records[0].envelope.egress = EgressBytes(10_000_000);
        assert!(held(&world, 1) > 100);
    }

    #[test]
    fn nobody_gives_back_what_it_has_sent_or_never_had() {
        let mut world = World { records: family([1_000_000; 4]), sent: [(0, 0); 4] };
        world.send(1, 50_000);
        let used = Usage { egress: EgressBytes(50_000), ..Usage::default() };
        world.apply(Some(Change::InstanceUsed { id: id(1), usage: used }));
        let version = world.records[1].egress_version;
        let ceiling = |sent| match give_back(&world.records[1], version, EgressBytes(sent)).pop() {
            Some(Change::EgressAllowed { ceiling, .. }) => ceiling.0,
            other => panic!("{other:?}"),
        };
        assert_eq!(ceiling(0), 50_000);
        assert_eq!(ceiling(60_000), 60_000);
        assert_eq!(EgressBytes(ceiling(u64::MAX)), world.records[1].egress_allowed);
    }
}
