//! LLM calls of a tree of machines, side by side and in any order, with crashes: no budget is ever
//! passed, and nothing that a vendor billed is forgotten.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use aegis_rules::cascade;
use aegis_rules::change::Change;
use aegis_rules::envelope;
use aegis_rules::given::Given;
use aegis_rules::guest::{Guest, ReportedUsage, report_usage};
use aegis_rules::instance::{Fact, IdlePolicy, Instance, InstanceState, Spec, Wanted, observe};
use aegis_rules::invite::{self, Fresh, Offer, Redeem, Redeemed, SecretHash};
use aegis_rules::kill::MUST_VERIFY;
use aegis_rules::tokens::{self, Ask, Reserved, Short};
use aegis_rules::words::{
    CpuMillis, DiskBytes, DurationMs, InstanceId, Limits, LlmTokens, MemoryMb, Permissions, Time,
    Usage,
};
use proptest::prelude::*;

const BUDGET: u64 = 10_000;

fn id(n: usize) -> InstanceId {
    format!("inst-01ARZ3NDEKTSV4RRFFQ6{n:06}").parse().unwrap()
}

fn spec() -> Spec {
    Spec {
        handle: None,
        image: "base".parse().unwrap(),
        command: vec!["true".to_owned()],
        env: BTreeMap::new(),
        cwd: None,
        cpu: CpuMillis(100),
        memory: MemoryMb(128),
        disk: DiskBytes(1 << 20),
        exposes: vec![],
        await_port: None,
        idle_policy: IdlePolicy::Default,
        authorized_key: None,
        given: Given::default(),
        origin: None,
        attach: false,
    }
}

struct Call {
    who: InstanceId,
    name: String,
    reserved: Reserved,
}

/// A guest's machine, a child with a smaller envelope, and that one's child.
struct World {
    now: Time,
    guest: Guest,
    family: Vec<Instance>,
    calls: Vec<Call>,
    made: u32,
    /// What was settled, whatever became of the records; and what may have been billed by vendors.
    settled: u64,
}

impl World {
    fn new() -> World {
        let create = invite::Create {
            created_by: "noah".parse().unwrap(),
            label: None,
            limits: Limits { tokens: LlmTokens(BUDGET), ..Limits::default() },
            permissions: Permissions { spawn: true, ..Permissions::default() },
            offer: Offer::default(),
            expires_in: DurationMs(DurationMs::HOUR),
        };
        let invite_id = "01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        let made = invite::create(create, invite_id, SecretHash([1; 32]), Time(0));
        let Some(Change::InviteCreated(invite)) = made.into_iter().next() else { panic!("made") };
        let fresh = Fresh {
            guest: "01ARZ3NDEKTSV4RRFFQ69G5FAW".parse().unwrap(),
            token_hash: SecretHash([2; 32]),
            instance: id(0),
        };
        let ask = Redeem { name: "ty".parse().unwrap(), public_key: None, idempotency: None };
        let redeemed = invite::redeem(Some(&invite), None, ask, Some(spec()), fresh, Time(0));
        let Redeemed::New { changes, guest } = redeemed.unwrap() else { panic!("it is new") };
        let mut world = World {
            now: Time(0),
            guest: *guest,
            family: vec![],
            calls: vec![],
            made: 0,
            settled: 0,
        };
        let root = changes.into_iter().find_map(|change| match change {
            Change::InstanceCreated(root) => Some(*root),
            _ => None,
        });
        let root = root.unwrap();
        world.family.push(root.clone());
        for (n, tokens) in [(1, 6_000), (2, 6_000)] {
            let envelope = Limits { tokens: LlmTokens(tokens), ..root.envelope };
            let parent = Some(id(n - 1));
            let child = Instance::new(
                id(n),
                root.tree.clone(),
                root.guest.clone(),
                parent,
                spec(),
                Time(0),
            )
            .with_rights(root.capabilities.clone(), envelope, root.ends_at);
            world.family.push(child);
        }
        for n in 0..3 {
            world.runs(n);
        }
        world
    }

    fn runs(&mut self, n: usize) {
        let boot_id = format!("b{}", self.made);
        self.write(vec![Change::InstanceRuns { id: id(n), boot_id, at: self.now }]);
    }

    fn write(&mut self, changes: Vec<Change>) {
        for change in &changes {
            self.apply(change);
        }
        for change in cascade::follow(&self.family, Some(&self.guest), self.now) {
            self.apply(&change);
        }
    }

    fn apply(&mut self, change: &Change) {
        if let Change::InstanceForgotten { id, .. } = change {
            self.family.retain(|i| i.id != *id);
        }
        self.guest.apply(change);
        for instance in &mut self.family {
            if change.subject().id() == instance.id.as_str() {
                instance.apply(change);
            }
        }
    }

    fn reserve(&mut self, n: usize, ask: &Ask) -> Result<Reserved, Short> {
        self.made += 1;
        let (who, name) = (id(n), format!("call-{}", self.made));
        let guest = Some(&self.guest);
        let (change, reserved) = tokens::reserve(&self.family, guest, &who, &name, ask, self.now)?;
        self.write(vec![change]);
        self.calls.push(Call { who, name, reserved });
        Ok(reserved)
    }

    fn settle(&mut self, at: usize, reported: Option<u64>) {
        let Call { who, name, reserved } = self.calls.remove(at);
        let spent = LlmTokens(tokens::spent(reserved.amount, reported));
        // Where the record went, its parent has counted all of it.
        if self.family.iter().any(|i| i.id == who) {
            self.settled += spent.0;
        }
        let reserved = LlmTokens(reserved.amount);
        let change =
            Change::TokensSettled { id: who, call: name, of: None, reserved, spent, at: self.now };
        self.write(vec![change]);
    }

    fn crash(&mut self) {
        // What its tasks would have settled they never will.
        self.calls.clear();
        for instance in self.family.clone() {
            if let Some(change) = tokens::settle_lost(&instance, self.now) {
                self.settled += instance.tokens_reserved;
                self.write(vec![change]);
            }
        }
        assert!(self.family.iter().all(|i| i.tokens_reserved == 0));
    }

    fn note(&mut self, n: usize, fact: Fact) {
        let Some(instance) = self.family.iter().find(|i| i.id == id(n)).cloned() else { return };
        let changes = observe(&instance, Some(&self.guest), &self.family, fact, self.now);
        self.write(changes);
    }

    fn end(&mut self, n: usize) {
        if !self.family.iter().any(|i| i.id == id(n)) {
            return;
        }
        // A forgotten record's open calls count in full.
        let open: u64 = self.family.iter().filter(|i| below(i, n)).map(|i| i.tokens_reserved).sum();
        let root = n == 0;
        self.write(vec![Change::InstanceWanted { id: id(n), wanted: Wanted::Gone, at: self.now }]);
        for below in (n..3).rev() {
            let verified = MUST_VERIFY.map(str::to_owned).to_vec();
            let gone =
                Fact::Destroyed { frozen_at: None, verified, remaining: vec![], usage: None };
            self.note(below, gone);
        }
        if !root && !self.family.iter().any(|i| i.id == id(n)) {
            self.settled += open;
        }
    }

    fn check(&self) {
        for instance in &self.family {
            let drawn = envelope::drawn(&self.family, &instance.id);
            assert!(drawn.tokens <= instance.envelope.tokens.0, "{}: {drawn:?}", instance.id);
        }
        let used = self.guest.usage(&self.family).tokens.0;
        assert!(used <= BUDGET, "{used} of {BUDGET}");
        let measured: u64 = self.family.iter().map(|i| i.usage().and(i.usage_below).tokens.0).sum();
        assert_eq!(measured, self.settled, "what was settled is what is counted");
    }
}

fn below(instance: &Instance, n: usize) -> bool {
    (n..3).any(|m| instance.id == id(m))
}

#[derive(Clone, Debug)]
enum Happens {
    Call { who: usize, ask: Ask },
    Settles { at: usize, reported: Option<u64> },
    Crash,
    Sampled(usize),
    Boots(usize),
    Ends(usize),
    HostReports(u64),
}

fn ask() -> impl Strategy<Value = Ask> {
    (0..3_000_u64, 0..4_u64, any::<bool>(), 1..5_000_u64, 1..3_u64, 1..20_u64).prop_map(
        |(bytes, messages, tools, output, choices, least_output)| Ask {
            bytes,
            messages,
            images: 0,
            tools,
            output,
            choices,
            least_output,
        },
    )
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        8 => (0..3_usize, ask()).prop_map(|(who, ask)| Happens::Call { who, ask }),
        6 => (0..8_usize, prop::option::of(0..20_000_u64))
            .prop_map(|(at, reported)| Happens::Settles { at, reported }),
        1 => Just(Happens::Crash),
        1 => (0..3_usize).prop_map(Happens::Sampled),
        1 => (0..3_usize).prop_map(Happens::Boots),
        1 => (1..3_usize).prop_map(Happens::Ends),
        1 => (0..BUDGET).prop_map(Happens::HostReports),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_order_of_calls_and_crashes_passes_a_budget(
        story in prop::collection::vec(happens(), 1..60),
    ) {
        let mut world = World::new();
        for event in story {
            match event {
                Happens::Call { who, ask } => {
                    if let Ok(reserved) = world.reserve(who, &ask) {
                        prop_assert!(reserved.output >= 1 && reserved.output <= ask.output);
                        prop_assert_eq!(
                            reserved.amount, ask.prompt() + reserved.output * ask.choices
                        );
                    }
                }
                Happens::Settles { at, reported } if !world.calls.is_empty() => {
                    let at = at % world.calls.len();
                    world.settle(at, reported);
                }
                Happens::Settles { .. } => {}
                Happens::Crash => world.crash(),
                Happens::Sampled(n) => {
                    world.note(n, Fact::Used(Usage { cpu_ns: 1, ..Usage::default() }));
                }
                Happens::Boots(n) => {
                    // The machine ends and comes again: its usage is folded.
                    world.note(n, Fact::Cleared { usage: None });
                    world.runs(n);
                }
                Happens::Ends(n) => world.end(n),
                Happens::HostReports(tokens) => {
                    let ask = ReportedUsage { tokens: Some(tokens), ..ReportedUsage::default() };
                    if let Ok(changes) = report_usage(&world.guest, ask, world.now) {
                        world.write(changes);
                    }
                }
            }
            world.check();
        }
    }
}

fn small(bytes: u64, output: u64) -> Ask {
    Ask { bytes, messages: 1, images: 0, tools: false, output, choices: 1, least_output: 1 }
}

#[test]
fn output_is_cut_down_to_what_is_left_and_then_nothing_is() {
    let mut world = World::new();
    let ask = small(728, 9_500);
    assert_eq!(ask.prompt(), 1_000);
    let first = world.reserve(0, &ask).unwrap();
    assert_eq!(first, Reserved { amount: BUDGET, output: 9_000 });
    // While it runs there is nothing for another one; but there may be.
    let Err(Short::Busy(refusal)) = world.reserve(1, &small(1, 1)) else { panic!("busy") };
    assert!(refusal.message.contains("10000 reserved"), "{}", refusal.message);
    world.settle(0, Some(9_700));
    let Err(Short::Exhausted(refusal)) = world.reserve(0, &ask) else { panic!("spent") };
    for part in ["9700 of 10000", "300 are left"] {
        assert!(refusal.message.contains(part), "{}", refusal.message);
    }
    assert_eq!(refusal.rule, Some("envelope.tokens"));
    assert_eq!(world.reserve(0, &small(8, 100)).unwrap().output, 20);
}

#[test]
fn nobody_is_served_whose_machine_is_to_end() {
    for wanted in [Wanted::Stopped, Wanted::Frozen, Wanted::Gone] {
        let mut world = World::new();
        world.write(vec![Change::InstanceWanted { id: id(1), wanted, at: Time(0) }]);
        assert!(matches!(world.reserve(1, &small(1, 1)), Err(Short::Ended(_))), "{wanted:?}");
    }
    let mut world = World::new();
    world.now = world.guest.expires_at;
    assert!(matches!(world.reserve(0, &small(1, 1)), Err(Short::Ended(_))));
    world.now = Time(0);
    assert!(matches!(world.reserve(7, &small(1, 1)), Err(Short::Ended(_))));
}

#[test]
fn a_picture_takes_more_than_its_bytes() {
    let one = Ask { images: 1, ..small(100, 1) };
    assert!(one.prompt() > small(100, 1).prompt() + 10_000);
}

#[test]
fn the_guests_limit_holds_where_its_envelope_is_wider() {
    let mut world = World::new();
    world.family[0].envelope.tokens = LlmTokens(1_000_000);
    let reserved = world.reserve(0, &small(728, 100_000)).unwrap();
    assert_eq!(reserved.amount, BUDGET);
    assert_eq!(world.family[0].state, InstanceState::Running);
}
