//! A cloud that answers unclearly, late or not at all, and a daemon that dies at the worst instants:
//! nothing of ours stays, nothing is claimed twice, nothing of others is touched.

use proptest::prelude::*;

use super::*;
use crate::instance::Spec;
use crate::words::Tree;

const WITHIN: DurationMs = DurationMs(90_000);
const RECORDS: usize = 3;

fn uuid(n: u64) -> Uuid {
    format!("00000000-0000-4000-8000-{n:012x}").parse().unwrap()
}

fn commit() -> Uuid {
    uuid(0xffff)
}

/// How a create ends.
#[derive(Clone, Copy, Debug)]
enum Answer {
    Made,
    Refused,
    /// No answer, or one that says nothing; a machine after so many seconds, or none.
    Unclear(Option<u32>),
    /// Made and answered, and the daemon dies before it writes that down.
    CrashBeforeClaim,
}

#[derive(Clone, Debug)]
enum Happens {
    Create(usize, Answer),
    Label(usize),
    Look(usize),
    Remove(usize),
    Sweep,
    Pass(u32),
    Foreign(bool),
}

fn happens() -> impl Strategy<Value = Happens> {
    let answer = prop_oneof![
        3 => Just(Answer::Made),
        1 => Just(Answer::Refused),
        3 => prop::option::of(0u32..1500).prop_map(Answer::Unclear),
        2 => Just(Answer::CrashBeforeClaim),
    ];
    prop_oneof![
        4 => (0..RECORDS, answer).prop_map(|(i, a)| Happens::Create(i, a)),
        2 => (0..RECORDS).prop_map(Happens::Label),
        4 => (0..RECORDS).prop_map(Happens::Look),
        2 => (0..RECORDS).prop_map(Happens::Remove),
        1 => Just(Happens::Sweep),
        2 => (1u32..200).prop_map(Happens::Pass),
        1 => any::<bool>().prop_map(Happens::Foreign),
    ]
}

struct Cloud {
    now: Time,
    made: u64,
    vms: Vec<Sighting>,
    coming: Vec<(Time, Uuid)>,
    foreign: BTreeSet<Uuid>,
    records: Vec<Instance>,
}

impl Cloud {
    fn new() -> Cloud {
        let record = |n: usize| {
            let id: InstanceId = format!("inst-01ARZ3NDEKTSV4RRFFQ69G5FA{n}").parse().unwrap();
            let tree = Tree::Instance(id.clone());
            let mut record = Instance::new(id, tree, None, None, Spec::example(), Time(0));
            record.remote = Some(Remote::default());
            record.spec.image = commit().as_str().parse().unwrap();
            record
        };
        Cloud {
            now: Time(10_000_000),
            made: 0,
            vms: vec![],
            coming: vec![],
            foreign: BTreeSet::new(),
            records: (0..RECORDS).map(record).collect(),
        }
    }

    fn make(&mut self, label: Label, parent: Uuid) -> Uuid {
        self.made += 1;
        let vm = uuid(self.made);
        let created_at = Some(self.now);
        self.vms.push(Sighting { vm: vm.clone(), created_at, label, parent: Some(parent) });
        vm
    }

    fn pass(&mut self, seconds: u32) {
        self.now = self.now.plus(DurationMs(u64::from(seconds) * 1000));
        let (due, later): (Vec<_>, Vec<_>) = self.coming.drain(..).partition(|c| c.0 <= self.now);
        self.coming = later;
        for (at, vm) in due {
            let (created_at, parent) = (Some(at), Some(commit()));
            self.vms.push(Sighting { vm, created_at, label: Label::None, parent });
        }
    }

    fn write(&mut self, i: usize, change: Option<Change>) -> bool {
        let Some(change) = change else { return false };
        self.records[i].apply(&change);
        let claims: Vec<_> =
            self.records.iter().filter_map(|r| r.remote.as_ref()?.vm.clone()).collect();
        let once: BTreeSet<_> = claims.iter().collect();
        assert_eq!(once.len(), claims.len(), "claimed twice");
        true
    }

    fn create(&mut self, i: usize, answer: Answer) {
        let intent = intend(&self.records[i], self.now);
        if !self.write(i, intent) {
            return;
        }
        match answer {
            Answer::Made => {
                let vm = self.make(Label::None, commit());
                let claim =
                    claim(&self.records[i], &claimed(&self.records), &vm, By::Answer, self.now);
                assert!(self.write(i, claim), "a fresh machine is nobody's");
            }
            Answer::Refused => {
                let absent = absent(&self.records[i], false, self.now);
                self.write(i, absent);
            }
            Answer::Unclear(None) => {}
            Answer::Unclear(Some(0)) | Answer::CrashBeforeClaim => {
                self.make(Label::None, commit());
            }
            Answer::Unclear(Some(seconds)) => {
                self.made += 1;
                let at = self.now.plus(DurationMs(u64::from(seconds) * 1000));
                self.coming.push((at, uuid(self.made)));
            }
        }
    }

    fn label(&mut self, i: usize) {
        let Some(vm) = self.records[i].remote.as_ref().and_then(|r| r.vm.clone()) else { return };
        let label = Label::Ours(Some(self.records[i].id.clone()));
        self.vms.iter_mut().filter(|s| s.vm == vm).for_each(|s| s.label = label.clone());
    }

    fn look(&mut self, i: usize) {
        let record = self.records[i].clone();
        let Some(at) = record.remote.as_ref().and_then(|r| r.intended_at) else { return };
        let taken = claimed(&self.records);
        match reconcile(&record.id, at, &commit(), &taken, &self.vms, WITHIN, self.now) {
            Verdict::Adopt(vm) => {
                assert!(!self.foreign.contains(&vm), "another's machine was taken");
                let claim = claim(&record, &taken, &vm, By::Look, self.now);
                assert!(self.write(i, claim));
            }
            Verdict::Wait(until) => assert!(until > self.now),
            Verdict::Absent => {
                let absent = absent(&record, true, self.now);
                assert!(self.write(i, absent));
            }
        }
    }

    fn remove(&mut self, i: usize) {
        self.look(i);
        let Some(vm) = self.records[i].remote.as_ref().and_then(|r| r.vm.clone()) else { return };
        self.vms.retain(|s| s.vm != vm);
        let absent = absent(&self.records[i], false, self.now);
        self.write(i, absent);
    }

    fn sweep(&mut self) {
        let found = strays(&self.records, &self.vms);
        let taken = claimed(&self.records);
        for vm in &found {
            assert!(!self.foreign.contains(vm), "another's machine was removed");
            assert!(!taken.contains(vm), "a machine that is claimed was removed");
        }
        self.vms.retain(|s| !found.contains(&s.vm));
    }

    fn step(&mut self, happens: Happens) {
        match happens {
            Happens::Create(i, answer) => self.create(i, answer),
            Happens::Label(i) => self.label(i),
            Happens::Look(i) => self.look(i),
            Happens::Remove(i) => self.remove(i),
            Happens::Sweep => self.sweep(),
            Happens::Pass(seconds) => self.pass(seconds),
            Happens::Foreign(labelled) => {
                // One of our commit that somebody labelled, or one of another commit.
                let vm = if labelled {
                    self.make(Label::Foreign, commit())
                } else {
                    self.make(Label::None, uuid(0xeeee))
                };
                self.foreign.insert(vm);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn nothing_of_ours_stays_and_nothing_of_others_goes(
        events in prop::collection::vec(happens(), 0..60),
    ) {
        let mut cloud = Cloud::new();
        for event in events {
            cloud.step(event);
        }
        // What is on its way comes up; every record ends; the sweep comes by, as it does all along.
        for _ in 0..30 {
            cloud.pass(60);
            (0..RECORDS).for_each(|i| cloud.remove(i));
            cloud.sweep();
        }
        prop_assert!(cloud.coming.is_empty());
        let left: BTreeSet<Uuid> = cloud.vms.iter().map(|s| s.vm.clone()).collect();
        prop_assert_eq!(left, cloud.foreign);
        prop_assert!(cloud.records.iter().all(|r| !r.remote.as_ref().unwrap().is_open()));
    }
}

#[test]
fn what_is_not_there_yet_is_waited_for() {
    let id: InstanceId = "inst-01ARZ3NDEKTSV4RRFFQ69G5FA0".parse().unwrap();
    let at = Time(1_000_000);
    let look = |seen: &[Sighting], now| {
        reconcile(&id, at, &commit(), &BTreeSet::new(), seen, WITHIN, Time(now))
    };
    let vm = |created_at, label, parent| Sighting {
        vm: uuid(1),
        created_at: Some(Time(created_at)),
        label,
        parent: Some(parent),
    };
    assert_eq!(look(&[], 1_000_001), Verdict::Wait(Time(1_090_000)));
    assert_eq!(look(&[], 1_090_000), Verdict::Absent);
    let adopted = Verdict::Adopt(uuid(1));
    assert_eq!(look(&[vm(1_000_500, Label::None, commit())], 1_090_000), adopted);
    // Its label says more than its time.
    assert_eq!(look(&[vm(1, Label::Ours(Some(id.clone())), commit())], 1_090_000), adopted);
    for other in [
        vm(900_000, Label::None, commit()),
        vm(1_200_000, Label::None, commit()),
        vm(1_000_500, Label::None, uuid(9)),
        vm(1_000_500, Label::Foreign, commit()),
        vm(1_000_500, Label::Ours(None), commit()),
    ] {
        assert_eq!(look(std::slice::from_ref(&other), 1_090_000), Verdict::Absent, "{other:?}");
    }
}

/// A receipt for a machine there needs the provider's word, and nothing of this host's counts as that.
#[test]
fn a_receipt_needs_the_providers_word() {
    use crate::guest::Provisioner;
    use crate::invite::{Fresh, Offer, Redeem, Redeemed, SecretHash};
    use crate::kill;
    use crate::words::{Limits, Permissions};

    let create = invite::Create {
        created_by: "noah".parse().unwrap(),
        label: None,
        limits: Limits::default(),
        permissions: Permissions::default(),
        offer: Offer::default(),
        expires_in: DurationMs(1),
    };
    assert_eq!(admits(&create), Ok(()));
    let id = "01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
    let created = invite::create(create, id, SecretHash([0; 32]), Time(0)).remove(0);
    let Change::InviteCreated(invite) = created else { panic!("{created:?}") };
    let fresh = Fresh {
        guest: "01ARZ3NDEKTSV4RRFFQ69G5FAW".parse().unwrap(),
        token_hash: SecretHash([1; 32]),
        instance: "inst-01ARZ3NDEKTSV4RRFFQ69G5FAX".parse().unwrap(),
    };
    let ask = Redeem { name: "ty".parse().unwrap(), public_key: None, idempotency: None };
    let redeemed =
        invite::redeem(Some(&invite), None, ask, Some(Spec::example()), fresh, Time(0)).unwrap();
    let Redeemed::New { changes, mut guest } = redeemed.in_vers() else { panic!() };
    assert_eq!(guest.provisioner, Provisioner::Vers);
    let mut machine = changes
        .into_iter()
        .find_map(|change| match change {
            Change::InstanceCreated(machine) => Some(*machine),
            _ => None,
        })
        .unwrap();
    assert_eq!(machine.remote, Some(Remote::default()));
    for change in kill::open(&guest, std::slice::from_ref(&machine), Time(0)).unwrap() {
        guest.apply(&change);
        machine.apply(&change);
    }
    let mut gone = |verified: &[&str]| {
        let end = kill::MachineEnd {
            id: machine.id.clone(),
            frozen_at: None,
            destroyed_at: Time(0),
            verified: verified.iter().map(|word| (*word).to_owned()).collect(),
        };
        machine.apply(&Change::InstanceDestroyed { end, usage: Default::default() });
        kill::close(&guest, std::slice::from_ref(&machine)).is_some()
    };
    assert!(!gone(&kill::MUST_VERIFY), "of this host");
    assert!(!gone(&[]));
    assert!(gone(&kill::MUST_VERIFY_ELSEWHERE));
}
