//! One small world, every event including crashes, all invariants after each.
//!
//! The world is what the ledger is: records that change only by [`Change`]s. The machines are a
//! model: what a step does to them is done, or not done, when the "daemon" crashes.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use aegis_rules::change::Change;
use aegis_rules::given::Given;
use aegis_rules::guest::{self, Guest, GuestStatus};
use aegis_rules::instance::{
    Asked, Exit, Expose, Fact, IdlePolicy, Instance, InstanceState, Plan, Protocol, Seen, Spec,
    Step, Verb, Wanted, ask, observe, plan,
};
use aegis_rules::invite::{self, Fresh, Invite, Offer, Redeem, Redeemed, SecretHash};
use aegis_rules::kill;
use aegis_rules::words::{
    CpuMillis, DiskBytes, DurationMs, Limits, MemoryMb, Permissions, Port, Time,
};
use proptest::prelude::*;

const HOUR: u64 = DurationMs::HOUR;

fn spec() -> Spec {
    Spec {
        handle: None,
        image: "base".parse().unwrap(),
        command: vec!["true".to_owned()],
        env: BTreeMap::new(),
        cwd: None,
        cpu: CpuMillis(1000),
        memory: MemoryMb(256),
        disk: DiskBytes(1 << 30),
        exposes: vec![Expose {
            guest_port: Port::try_from(80).unwrap(),
            public_port: None,
            protocol: Protocol::Http,
        }],
        await_port: None,
        idle_policy: IdlePolicy::Default,
        authorized_key: None,
        given: Given::default(),
        origin: None,
        attach: false,
    }
}

/// One invite, at most one guest and its machine.
struct World {
    now: Time,
    invite: Invite,
    guest: Option<Guest>,
    instance: Option<Instance>,
    /// The model of the machine: what a look at it would see.
    machine: Seen,
    redeems: u32,
    final_status: Option<GuestStatus>,
}

impl World {
    fn new() -> World {
        let id = "01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        let limits = Limits { duration: DurationMs(2 * HOUR), ..Limits::default() };
        let create = invite::Create {
            created_by: "noah".parse().unwrap(),
            label: None,
            limits,
            permissions: Permissions::default(),
            offer: Offer::default(),
            expires_in: DurationMs(HOUR),
        };
        let changes = invite::create(create, id, SecretHash([1; 32]), Time(0));
        let Some(Change::InviteCreated(invite)) = changes.into_iter().next() else {
            panic!("create creates")
        };
        World {
            now: Time(0),
            invite: *invite,
            guest: None,
            instance: None,
            machine: Seen::Nothing,
            redeems: 0,
            final_status: None,
        }
    }

    fn write(&mut self, changes: Vec<Change>) {
        for change in changes {
            match &change {
                Change::GuestCreated(guest) => self.guest = Some((**guest).clone()),
                Change::InstanceCreated(instance) => self.instance = Some((**instance).clone()),
                change => {
                    self.invite.apply(change);
                    if let Some(guest) = &mut self.guest
                        && change.subject().id() == guest.id.as_str()
                    {
                        guest.apply(change);
                    }
                    if let Some(instance) = &mut self.instance
                        && change.subject().id() == instance.id.as_str()
                    {
                        instance.apply(change);
                    }
                }
            }
        }
        // The receipt is written with the last proof, as the driver does it.
        if let (Some(guest), Some(instance)) = (&self.guest, &self.instance)
            && let Some(changes) = kill::close(guest, std::slice::from_ref(instance))
        {
            self.write(changes);
        }
    }

    fn machines(&self) -> Vec<Instance> {
        self.instance.iter().cloned().collect()
    }

    fn note(&mut self, fact: Fact) {
        if let Some(instance) = &self.instance {
            let family = std::slice::from_ref(instance);
            let changes = observe(instance, self.guest.as_ref(), family, fact, self.now);
            self.write(changes);
        }
    }

    /// One turn of the driver; with `crash` the daemon dies after acting, before recording.
    fn turn(&mut self, crash: bool) {
        let Some(instance) = self.instance.clone() else { return };
        if crash {
            // Only the act happens.
            if let Plan::Do(step) = plan(&instance, self.machine, self.now) {
                self.act(step);
            }
            return;
        }
        match self.machine {
            Seen::Running => {
                self.note(Fact::Runs { boot_id: "b".to_owned(), endpoint: None });
            }
            Seen::Frozen if matches!(instance.wanted, Wanted::Paused | Wanted::Frozen) => {
                self.note(Fact::Froze);
            }
            Seen::Ended => self.note(Fact::Ended(Exit {
                code: Some(0),
                message: "process exited (code=0)".to_owned(),
                at: self.now,
            })),
            _ => {}
        }
        let Some(instance) = self.instance.clone() else { return };
        match plan(&instance, self.machine, self.now) {
            Plan::Do(step) => {
                self.act(step);
                match step {
                    Step::Clear => self.note(Fact::Cleared { usage: None }),
                    Step::Destroy => self.note(Fact::Destroyed {
                        frozen_at: None,
                        verified: kill::MUST_VERIFY.map(str::to_owned).to_vec(),
                        remaining: vec![],
                        usage: None,
                    }),
                    Step::Freeze => self.note(Fact::Froze),
                    Step::Launch | Step::Thaw | Step::Shutdown => {}
                }
            }
            Plan::Lost => self.note(Fact::Ended(Exit {
                code: None,
                message: "lost".to_owned(),
                at: self.now,
            })),
            Plan::WaitUntil(_) | Plan::Rest => {}
        }
    }

    fn act(&mut self, step: Step) {
        self.machine = match step {
            Step::Launch => Seen::Booting,
            Step::Freeze => Seen::Frozen,
            Step::Thaw => Seen::Running,
            Step::Shutdown => Seen::Ended,
            Step::Clear | Step::Destroy => Seen::Nothing,
        };
    }

    fn check(&mut self) {
        // An invite is spent at most once.
        assert!(self.redeems <= 1);
        if let Some(guest) = &self.guest {
            // A final status never changes, but expired becomes revoked.
            if let Some(before) = self.final_status {
                let fine = guest.status == before
                    || (before == GuestStatus::Expired && guest.status == GuestStatus::Revoked);
                assert!(fine, "{before:?} became {:?}", guest.status);
            }
            if !guest.status.is_live() {
                self.final_status = Some(guest.status);
                assert!(guest.stopped_at.is_some());
            }
            // The clock decides, whatever was swept.
            if self.now >= guest.expires_at {
                assert!(!guest.status_at(self.now).is_live());
            }
            if let (Some(instance), GuestStatus::Revoked) = (&self.instance, guest.status) {
                assert_eq!(instance.wanted, Wanted::Gone, "a killed guest's machine is to go");
            }
            if guest.receipt.is_some() {
                assert_eq!(self.machine, Seen::Nothing, "a receipt for a machine that is there");
            }
        }
        if let Some(instance) = &self.instance {
            if instance.state == InstanceState::Gone {
                assert_eq!(instance.wanted, Wanted::Gone);
                assert_eq!(self.machine, Seen::Nothing, "gone, and yet there");
            }
        } else {
            assert_eq!(self.machine, Seen::Nothing, "a machine without a record");
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Happens {
    Redeem,
    Revoke,
    Turn,
    CrashInTurn,
    /// A booting machine comes up, a running one's process exits, or the worker dies.
    ComesUp,
    Exits,
    WorkerDies,
    BootFails,
    Freeze,
    Thaw,
    Kill,
    Host(Verb),
    TimePasses(u32),
    Sweep,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        2 => Just(Happens::Redeem),
        1 => Just(Happens::Revoke),
        8 => Just(Happens::Turn),
        2 => Just(Happens::CrashInTurn),
        4 => Just(Happens::ComesUp),
        1 => Just(Happens::Exits),
        1 => Just(Happens::WorkerDies),
        1 => Just(Happens::BootFails),
        1 => Just(Happens::Freeze),
        1 => Just(Happens::Thaw),
        1 => Just(Happens::Kill),
        2 => prop::sample::select(&Verb::ALL[..]).prop_map(Happens::Host),
        1 => (0u32..90).prop_map(Happens::TimePasses),
        1 => Just(Happens::Sweep),
    ]
}

fn step(world: &mut World, happens: Happens) {
    let machines = world.machines();
    match happens {
        Happens::Redeem => {
            let fresh = Fresh {
                guest: "01ARZ3NDEKTSV4RRFFQ69G5FAW".parse().unwrap(),
                token_hash: SecretHash([2; 32]),
                instance: "inst-01ARZ3NDEKTSV4RRFFQ69G5FAX".parse().unwrap(),
            };
            let ask = Redeem { name: "ty".parse().unwrap(), public_key: None, idempotency: None };
            let redeemed = invite::redeem(
                Some(&world.invite),
                world.guest.as_ref(),
                ask,
                Some(spec()),
                fresh,
                world.now,
            );
            if let Ok(Redeemed::New { changes, .. }) = redeemed {
                world.redeems += 1;
                world.write(changes);
            }
        }
        Happens::Revoke => {
            if let Ok(changes) = invite::revoke(&world.invite, world.now) {
                world.write(changes);
            }
        }
        Happens::Turn => world.turn(false),
        Happens::CrashInTurn => world.turn(true),
        Happens::ComesUp => {
            if world.machine == Seen::Booting {
                world.machine = Seen::Running;
            }
        }
        Happens::Exits => {
            if world.machine == Seen::Running {
                world.machine = Seen::Ended;
            }
        }
        Happens::WorkerDies => {
            if world.machine != Seen::Nothing {
                world.machine = Seen::Leftovers;
            }
        }
        Happens::BootFails => {
            if world.machine == Seen::Booting {
                world.machine = Seen::Leftovers;
                world.note(Fact::BootFailed { message: "no".to_owned() });
            }
        }
        Happens::Freeze => {
            if let Some(Ok(changes)) =
                world.guest.as_ref().map(|g| guest::freeze(g, &machines, world.now))
            {
                world.write(changes);
            }
        }
        Happens::Thaw => {
            if let Some(Ok(changes)) =
                world.guest.as_ref().map(|g| guest::thaw(g, &machines, world.now))
            {
                world.write(changes);
            }
        }
        Happens::Kill => {
            if let Some(Ok(changes)) =
                world.guest.as_ref().map(|g| kill::open(g, &machines, world.now))
            {
                world.write(changes);
            }
        }
        Happens::Host(verb) => {
            if let Some(instance) = &world.instance
                && let Ok(Asked::Yes(changes)) =
                    ask(instance, world.guest.as_ref(), &machines, verb, world.now)
            {
                world.write(changes);
            }
        }
        Happens::TimePasses(minutes) => {
            world.now = world.now.plus(DurationMs(u64::from(minutes) * 60_000));
        }
        Happens::Sweep => {
            let mut changes = invite::expire(&world.invite, world.now);
            if let Some(guest) = &world.guest {
                changes.extend(guest::expire(guest, &machines, world.now));
            }
            world.write(changes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever happens, in whatever order, with crashes in between: the invariants hold, and a
    /// guest whose time is over ends up with nothing left of its machine.
    #[test]
    fn no_sequence_breaks_the_laws(events in prop::collection::vec(happens(), 0..80)) {
        let mut world = World::new();
        for event in events {
            step(&mut world, event);
            world.check();
        }
        // Liveness: time goes by, the sweeper and the driver come; nothing may be left.
        world.now = world.now.plus(DurationMs(100 * HOUR));
        for _ in 0..20 {
            step(&mut world, Happens::Sweep);
            step(&mut world, Happens::Turn);
            world.check();
        }
        prop_assert_eq!(world.machine, Seen::Nothing);
        if let Some(instance) = &world.instance {
            prop_assert_eq!(instance.state, InstanceState::Gone);
        }
        if let Some(guest) = &world.guest {
            prop_assert!(!guest.status.is_live());
            prop_assert_eq!(guest.status == GuestStatus::Revoked, guest.receipt.is_some());
        }
    }
}

/// Every pair of wish and sight has a next step, and a kill never waits.
#[test]
fn the_plan_is_total_and_a_kill_never_waits() {
    let tree =
        aegis_rules::words::Tree::Instance("inst-01ARZ3NDEKTSV4RRFFQ69G5FAX".parse().unwrap());
    let id = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAX".parse().unwrap();
    let mut instance = Instance::new(id, tree, None, None, spec(), Time(0));
    instance.retry_at = Some(Time(1_000_000));
    for state in InstanceState::ALL {
        for wanted in Wanted::ALL {
            for seen in Seen::ALL {
                instance.state = state;
                instance.wanted = wanted;
                let next = plan(&instance, seen, Time(0));
                if wanted == Wanted::Gone && state != InstanceState::Gone {
                    assert_eq!(next, Plan::Do(Step::Destroy), "{state:?} {seen:?}");
                }
            }
        }
    }
}
