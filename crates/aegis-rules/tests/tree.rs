//! A tree of machines that spawn machines, everything that can happen to it in any order, all
//! invariants after each.
//!
//! The world is what the ledger is: records of one tree that change only by [`Change`]s, each set
//! followed by its cascade. A daemon that crashes between two writes leaves exactly one of the
//! states that are looked at here.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use aegis_rules::authorize::{Call, Claims, Grant, Request, SpawnAsk, authorize};
use aegis_rules::capability::CapabilityAsk;
use aegis_rules::cascade;
use aegis_rules::change::Change;
use aegis_rules::egress::EgressAsk;
use aegis_rules::envelope::{self, Draw, EnvelopeAsk};
use aegis_rules::given::Given;
use aegis_rules::guest::{self, Guest, GuestStatus};
use aegis_rules::instance::{
    self, Asked, Exit, Fact, IdlePolicy, Instance, InstanceState, Spec, Verb, Wanted, ask,
    children, find, observe,
};
use aegis_rules::invite::{self, Fresh, Offer, Redeem, Redeemed, SecretHash};
use aegis_rules::kill;
use aegis_rules::spawn::spawn;
use aegis_rules::words::{
    CpuMillis, DiskBytes, DurationMs, EgressBytes, InstanceId, Limits, LlmTokens, MemoryMb,
    Permissions, Time, Tree, Usage,
};
use proptest::prelude::*;

const HOUR: u64 = DurationMs::HOUR;

fn spec(size: u32) -> Spec {
    Spec {
        handle: None,
        image: "base".parse().unwrap(),
        command: vec!["true".to_owned()],
        env: BTreeMap::new(),
        cwd: None,
        cpu: CpuMillis(250 * size),
        memory: MemoryMb(128 * size),
        disk: DiskBytes(u64::from(size) << 28),
        exposes: vec![],
        await_port: None,
        idle_policy: IdlePolicy::Default,
        authorized_key: None,
        given: Given::default(),
        origin: None,
        attach: false,
    }
}

fn limits() -> Limits {
    Limits {
        cpu: CpuMillis(4000),
        memory: MemoryMb(2048),
        disk: DiskBytes(4 << 30),
        egress: EgressBytes(1000),
        duration: DurationMs(3 * HOUR),
        tokens: LlmTokens(1000),
    }
}

struct World {
    now: Time,
    made: u32,
    guest: Option<Guest>,
    root: InstanceId,
    family: Vec<Instance>,
    /// What the meters saw, whatever became of the records.
    spent: LlmTokens,
    egress: EgressBytes,
}

fn id(n: u32) -> InstanceId {
    format!("inst-01ARZ3NDEKTSV4RRFFQ6{n:06}").parse().unwrap()
}

impl World {
    fn new(with_guest: bool) -> World {
        let mut world = World {
            now: Time(0),
            made: 1,
            guest: None,
            root: id(0),
            family: vec![],
            spent: LlmTokens(0),
            egress: EgressBytes(0),
        };
        if with_guest {
            let create = invite::Create {
                created_by: "noah".parse().unwrap(),
                label: None,
                limits: limits(),
                permissions: Permissions { spawn: true, ..Permissions::default() },
                offer: Offer { spawn_depth: Some(3), max_children: Some(3), ..Offer::default() },
                expires_in: DurationMs(HOUR),
            };
            let invite_id = "01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
            let made = invite::create(create, invite_id, SecretHash([1; 32]), Time(0));
            let Some(Change::InviteCreated(invite)) = made.into_iter().next() else {
                panic!("create creates")
            };
            let fresh = Fresh {
                guest: "01ARZ3NDEKTSV4RRFFQ69G5FAW".parse().unwrap(),
                token_hash: SecretHash([2; 32]),
                instance: id(0),
            };
            let ask = Redeem { name: "ty".parse().unwrap(), public_key: None, idempotency: None };
            let redeemed =
                invite::redeem(Some(&invite), None, ask, Some(spec(4)), fresh, Time(0)).unwrap();
            let Redeemed::New { changes, .. } = redeemed else { panic!("it is new") };
            world.write(changes);
        } else {
            let capabilities = CapabilityAsk {
                spawn: Some(true),
                spawn_depth: Some(3),
                max_children: Some(3),
                allowed_images: Some(vec!["*".to_owned()]),
                max_memory: Some(MemoryMb(2048)),
                max_vcpus: Some(4),
                ..CapabilityAsk::default()
            };
            let root = Instance::new(id(0), Tree::Instance(id(0)), None, None, spec(4), Time(0))
                .with_rights(
                    capabilities.granted().unwrap(),
                    limits(),
                    Some(Time(3 * HOUR as i64)),
                );
            world.write(vec![Change::InstanceCreated(Box::new(root))]);
        }
        world
    }

    /// As the ledger writes: the changes, and what follows from them, together.
    fn write(&mut self, changes: Vec<Change>) {
        for change in &changes {
            self.apply(change);
        }
        for change in cascade::follow(&self.family, self.guest.as_ref(), self.now) {
            self.apply(&change);
        }
        assert!(
            cascade::follow(&self.family, self.guest.as_ref(), self.now).is_empty(),
            "what follows from it is complete"
        );
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::GuestCreated(guest) => self.guest = Some((**guest).clone()),
            Change::InstanceCreated(instance) => self.family.push((**instance).clone()),
            Change::InstanceForgotten { id, .. } => self.family.retain(|i| i.id != *id),
            change => {
                let subject = change.subject();
                if let Some(guest) = &mut self.guest
                    && guest.id.as_str() == subject.id()
                {
                    guest.apply(change);
                }
                self.family
                    .iter_mut()
                    .filter(|i| i.id.as_str() == subject.id())
                    .for_each(|i| i.apply(change));
            }
        }
    }

    fn note(&mut self, instance: &Instance, fact: Fact) {
        let mut changes = observe(instance, self.guest.as_ref(), &self.family, fact, self.now);
        // The driver closes a kill with the last proof.
        if let Some(guest) = &self.guest {
            let (mut guest, mut machines) = (guest.clone(), self.family.clone());
            for change in &changes {
                guest.apply(change);
                machines
                    .iter_mut()
                    .filter(|m| m.id.as_str() == change.subject().id())
                    .for_each(|m| m.apply(change));
            }
            changes.extend(kill::close(&guest, &machines).unwrap_or_default());
        }
        self.write(changes);
    }

    /// What a driver would do next for this instance.
    fn turn(&mut self, instance: &Instance) {
        match (instance.wanted, instance.state) {
            (Wanted::Gone, InstanceState::Gone) => {}
            (Wanted::Gone, _) => {
                let verified = kill::MUST_VERIFY.map(str::to_owned).to_vec();
                let fact =
                    Fact::Destroyed { frozen_at: None, verified, remaining: vec![], usage: None };
                self.note(instance, fact);
            }
            (Wanted::Stopped, state) if state != InstanceState::Stopped => {
                self.note(instance, Fact::Cleared { usage: None });
            }
            (Wanted::Running, state) if state != InstanceState::Running => {
                let jti = format!("jti-{}", self.made);
                let id = instance.id.clone();
                self.write(vec![Change::InstanceToken { id, jti, at: self.now }]);
                let fact = Fact::Runs { boot_id: format!("b{}", self.made), endpoint: None };
                self.made += 1;
                self.note(instance, fact);
            }
            (Wanted::Paused | Wanted::Frozen, InstanceState::Running) => {
                self.note(instance, Fact::Froze);
            }
            _ => {}
        }
    }

    fn call(&self, caller: &Instance, request: Request<'_>) -> Option<Grant> {
        let claims = Claims {
            sub: caller.id.clone(),
            exp: Time(i64::MAX),
            jti: caller.jti.clone()?,
            cap: caller.capabilities.clone(),
        };
        let call = Call {
            channel: &caller.id,
            claims: &claims,
            family: &self.family,
            guest: self.guest.as_ref(),
        };
        authorize(&call, request, self.now).ok()
    }

    fn check(&self) {
        for instance in &self.family {
            let drawn = envelope::drawn(&self.family, &instance.id);
            assert!(drawn.fits(&instance.envelope), "{} draws {drawn:?}", instance.id);
            let live = children(&self.family, &instance.id)
                .filter(|c| c.is_live() || !c.is_ending())
                .count();
            assert!(live <= instance.capabilities.max_children as usize, "too many children");

            let Some(parent) = &instance.parent else { continue };
            let parent = find(&self.family, parent).expect("a parent is forgotten last");
            if parent.is_ending() {
                assert!(instance.is_ending(), "{} lives below an ended one", instance.id);
            }
            if parent.wanted == Wanted::Gone {
                assert_eq!(instance.wanted, Wanted::Gone);
            }
            let (own, above) = (&instance.capabilities, &parent.capabilities);
            assert!(own.spawn_depth < above.spawn_depth && above.spawn);
            assert!(own.max_children <= above.max_children);
            assert!(own.max_memory <= above.max_memory && own.max_vcpus <= above.max_vcpus);
            assert!(instance.ends_at <= parent.ends_at, "it outlives its parent's envelope");
            let most = &parent.envelope;
            assert!(instance.envelope.cpu <= most.cpu && instance.envelope.memory <= most.memory);
            assert!(instance.envelope.disk <= most.disk && instance.envelope.tokens <= most.tokens);
        }
        // What was spent does not come back, whoever ends and is forgotten.
        if let Some(root) = find(&self.family, &self.root) {
            let drawn = envelope::drawn(&self.family, &root.id);
            assert_eq!(drawn.tokens, self.spent.0);
            assert_eq!(drawn.egress_bytes, self.egress.0);
            assert!(drawn.tokens <= limits().tokens.0 && drawn.egress_bytes <= limits().egress.0);
        } else {
            assert!(self.family.is_empty() && self.guest.is_none(), "a tree without its root");
        }
        if let Some(guest) = &self.guest {
            let root = find(&self.family, &self.root).expect("a guest's machine is kept");
            assert_eq!(guest.usage(&self.family).tokens, self.spent);
            if guest.status == GuestStatus::Stopped {
                assert!(root.is_ending(), "a guest was stopped by another's end");
            }
            if let Some(receipt) = &guest.receipt {
                let listed: Vec<_> = receipt.machines.iter().map(|m| &m.id).collect();
                assert_eq!(listed, self.family.iter().map(|i| &i.id).collect::<Vec<_>>());
                assert!(self.family.iter().all(|i| i.state == InstanceState::Gone));
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Happens {
    Spawn {
        who: usize,
        size: u32,
        ask: Box<(CapabilityAsk, EnvelopeAsk)>,
    },
    /// A machine's parent asks for it.
    Parent(usize, u8),
    Host(usize, Verb),
    Turn(usize),
    Exits(usize),
    BootFails(usize),
    Spends {
        who: usize,
        tokens: u64,
        egress: u64,
    },
    TimePasses(u32),
    Sweep,
    Freeze,
    Thaw,
    Kill,
}

fn happens() -> impl Strategy<Value = Happens> {
    let who = 0..12_usize;
    let ask = (
        prop::option::of(0..5_u32),
        prop::option::of(0..5_u32),
        prop::option::of(1..20_u32),
        prop::option::of(1..20_u32),
        prop::option::of(0..500_u64),
        prop::option::of(0..5 * HOUR),
    )
        .prop_map(|(depth, children, cpu, memory, tokens, duration)| {
            let capabilities = CapabilityAsk {
                spawn_depth: depth,
                max_children: children,
                max_memory: memory.map(|m| MemoryMb(m * 128)),
                ..CapabilityAsk::default()
            };
            let envelope = EnvelopeAsk {
                cpu: cpu.map(|c| CpuMillis(c * 250)),
                memory: memory.map(|m| MemoryMb(m * 128)),
                tokens: tokens.map(LlmTokens),
                duration: duration.map(DurationMs),
                ..EnvelopeAsk::default()
            };
            Box::new((capabilities, envelope))
        });
    prop_oneof![
        8 => (who.clone(), 1..6_u32, ask).prop_map(|(who, size, ask)| Happens::Spawn { who, size, ask }),
        3 => (who.clone(), 0..4_u8).prop_map(|(who, what)| Happens::Parent(who, what)),
        2 => (who.clone(), prop::sample::select(&Verb::ALL[..]))
            .prop_map(|(who, verb)| Happens::Host(who, verb)),
        12 => who.clone().prop_map(Happens::Turn),
        1 => who.clone().prop_map(Happens::Exits),
        1 => who.clone().prop_map(Happens::BootFails),
        3 => (who, 0..400_u64, 0..400_u64)
            .prop_map(|(who, tokens, egress)| Happens::Spends { who, tokens, egress }),
        1 => (0..90_u32).prop_map(Happens::TimePasses),
        1 => Just(Happens::Sweep),
        1 => Just(Happens::Freeze),
        1 => Just(Happens::Thaw),
        1 => Just(Happens::Kill),
    ]
}

fn step(world: &mut World, happens: Happens) {
    let pick = |world: &World, who: usize| {
        let n = world.family.len();
        (n > 0).then(|| world.family[who % n].clone())
    };
    match happens {
        Happens::Spawn { who, size, ask } => {
            let Some(caller) = pick(world, who) else { return };
            let (capabilities, envelope) = *ask;
            let ask = SpawnAsk {
                spec: spec(size),
                services: None,
                workspace: None,
                capabilities,
                envelope,
                egress: EgressAsk::default(),
            };
            if let Some(Grant::Spawn(permit)) = world.call(&caller, Request::Spawn(Box::new(ask))) {
                let (changes, child) = spawn(*permit, id(world.made), world.now);
                world.made += 1;
                world.write(changes);
                let kept = find(&world.family, &child.id).unwrap();
                assert_eq!(kept.wanted, Wanted::Running, "permitted, and yet ended at once");
            }
        }
        Happens::Parent(who, what) => {
            let Some(child) = pick(world, who) else { return };
            let Some(parent) = child.parent.as_ref().and_then(|p| find(&world.family, p)) else {
                return;
            };
            let name = child.id.as_str();
            let request = match what {
                0 => Request::Start(name),
                1 => Request::Stop(name),
                2 => Request::Delete(name),
                _ => Request::Exec(name, &[]),
            };
            if let Some(Grant::Changes { changes, .. }) = world.call(parent, request) {
                world.write(changes);
            }
        }
        Happens::Host(who, verb) => {
            let Some(instance) = pick(world, who) else { return };
            let asked = ask(&instance, world.guest.as_ref(), &world.family, verb, world.now);
            // The host may start more children than their parent may.
            let crowded = instance.parent.as_ref().is_some_and(|p| {
                let most = find(&world.family, p).map_or(0, |p| p.capabilities.max_children);
                children(&world.family, p).filter(|c| c.is_live()).count() >= most as usize
            });
            if let Ok(Asked::Yes(changes)) = asked
                && !(crowded && verb == Verb::Start)
            {
                world.write(changes);
            }
        }
        Happens::Turn(who) => {
            if let Some(instance) = pick(world, who) {
                world.turn(&instance);
            }
        }
        Happens::Exits(who) => {
            if let Some(instance) = pick(world, who)
                && instance.state.is_up()
            {
                let exit = Exit { code: Some(1), message: "exited".to_owned(), at: world.now };
                world.note(&instance, Fact::Ended(exit));
            }
        }
        Happens::BootFails(who) => {
            if let Some(instance) = pick(world, who)
                && instance.state == InstanceState::Starting
            {
                world.note(&instance, Fact::BootFailed { message: "no".to_owned() });
            }
        }
        Happens::Spends { who, tokens, egress } => {
            let Some(instance) = pick(world, who) else { return };
            let more = Draw { tokens, egress_bytes: egress, ..Draw::default() };
            // As a meter does: nothing is spent that is not there.
            if instance.state == InstanceState::Running
                && envelope::admit(&world.family, &instance.id, &more).is_ok()
            {
                let before = instance.usage_boot;
                let usage = Usage {
                    tokens: LlmTokens(before.tokens.0 + tokens),
                    egress: EgressBytes(before.egress.0 + egress),
                    ..before
                };
                world.spent.0 += tokens;
                world.egress.0 += egress;
                world.note(&instance, Fact::Used(usage));
            }
        }
        Happens::TimePasses(minutes) => {
            world.now = world.now.plus(DurationMs(u64::from(minutes) * 60_000));
        }
        Happens::Sweep => {
            let mut changes = Vec::new();
            if let Some(guest) = &world.guest {
                changes.extend(guest::expire(guest, &world.family, world.now));
            }
            let due: Vec<Change> =
                world.family.iter().flat_map(|i| instance::expire(i, world.now)).collect();
            changes.extend(due);
            world.write(changes);
        }
        Happens::Freeze | Happens::Thaw | Happens::Kill => {
            let Some(guest) = &world.guest else { return };
            let judge = match happens {
                Happens::Freeze => guest::freeze,
                Happens::Thaw => guest::thaw,
                _ => kill::open,
            };
            if let Ok(changes) = judge(guest, &world.family, world.now) {
                world.write(changes);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Whatever happens, in whatever order: nothing is held or spent above any limit, nothing lives
    /// below what has ended, nothing gets wider, nothing that was spent is forgotten. And when the
    /// root goes, all goes.
    #[test]
    fn no_sequence_breaks_a_tree(
        with_guest in any::<bool>(),
        events in prop::collection::vec(happens(), 0..120),
    ) {
        let mut world = World::new(with_guest);
        world.check();
        for event in events {
            step(&mut world, event);
            world.check();
        }
        // Liveness: time is over, or the host deletes it; every driver comes.
        world.now = world.now.plus(DurationMs(10 * HOUR));
        step(&mut world, Happens::Sweep);
        if let (Some(root), None) = (world.family.first().cloned(), &world.guest) {
            let deleted = ask(&root, None, &world.family, Verb::Delete, world.now);
            if let Ok(Asked::Yes(changes)) = deleted {
                world.write(changes);
            }
        }
        for instance in world.family.clone() {
            world.turn(&instance);
            world.check();
        }
        prop_assert!(world.family.iter().all(|i| i.state == InstanceState::Gone));
        prop_assert!(world.guest.is_some() || world.family.is_empty());
    }
}

/// The sequences above do reach deep and crowded trees.
#[test]
fn a_tree_grows_to_its_limits_and_ends_with_its_root() {
    for with_guest in [false, true] {
        let mut world = World::new(with_guest);
        for _ in 0..4 {
            for who in 0..world.family.len() {
                step(&mut world, Happens::Turn(who));
            }
            for who in 0..world.family.len() {
                for _ in 0..4 {
                    let ask = Box::new((CapabilityAsk::default(), EnvelopeAsk::default()));
                    step(&mut world, Happens::Spawn { who, size: 1, ask });
                    world.check();
                }
            }
        }
        // 16 sizes are in the envelope: the root takes 4, its descendants the other 12.
        assert_eq!(world.family.len(), 13);
        let depth = |i: &Instance| instance::ancestors(&world.family, &i.id).count();
        assert_eq!(world.family.iter().map(depth).max(), Some(3));
        let root = world.family[0].clone();
        let exit = Exit { code: Some(0), message: "done".to_owned(), at: world.now };
        world.note(&root, Fact::Ended(exit));
        assert!(world.family.iter().all(|i| i.wanted == Wanted::Stopped));
        world.check();
    }
}
