//! Each step of seeds/002 "Validation Flow" by itself, and each claim failing closed.

use super::*;
use crate::given::Secrets;
use crate::instance::Protocol;
use crate::spawn::spawn;
use crate::words::{CpuMillis, EgressBytes, Limits, LlmTokens, MemoryMb, Tree};

const NOW: Time = Time(1_000_000);

fn id(n: u8) -> InstanceId {
    format!("inst-01ARZ3NDEKTSV4RRFFQ69G5F{n:02}").parse().unwrap()
}

fn spec() -> Spec {
    Spec {
        image: "node:22".parse().unwrap(),
        command: vec!["true".to_owned()],
        memory: MemoryMb(512),
        disk: DiskBytes(1 << 30),
        ..Spec::example()
    }
}

fn all() -> Capabilities {
    Capabilities {
        spawn: true,
        spawn_depth: 2,
        max_children: 3,
        allowed_images: vec!["node:*".to_owned()],
        max_memory: MemoryMb(1024),
        max_vcpus: 2,
        allowed_secrets: vec!["KEY".to_owned()],
        allowed_workspaces: vec!["/srv/a".to_owned()],
        max_expose_ports: 2,
    }
}

fn limits() -> Limits {
    Limits {
        cpu: CpuMillis(16_000),
        memory: MemoryMb(8192),
        disk: DiskBytes(64 << 30),
        egress: EgressBytes(1000),
        duration: DurationMs(DurationMs::HOUR),
        tokens: LlmTokens(1000),
    }
}

/// A root with one live child (1), one stopped child (2), and a grandchild (3) below the first; and
/// another parent's child (5) with its parent (4).
struct World {
    family: Vec<Instance>,
    claims: Claims,
    channel: InstanceId,
}

impl World {
    fn new() -> World {
        let tree = Tree::Instance(id(0));
        let make = |n: u8, parent: Option<u8>, state| {
            let mut i = Instance::new(id(n), tree.clone(), None, parent.map(id), spec(), Time(0))
                .with_rights(all(), limits(), None);
            i.state = state;
            if state == InstanceState::Stopped {
                i.wanted = Wanted::Stopped;
            }
            i
        };
        let mut family = vec![
            make(0, None, InstanceState::Running),
            make(1, Some(0), InstanceState::Running),
            make(2, Some(0), InstanceState::Stopped),
            make(3, Some(1), InstanceState::Running),
            make(4, Some(0), InstanceState::Running),
            make(5, Some(4), InstanceState::Running),
        ];
        family[0].jti = Some("jti-0".to_owned());
        family[0].capabilities.max_children = 4;
        family[1].spec.handle = Some("work".parse().unwrap());
        let claims =
            Claims { sub: id(0), exp: Time(NOW.0 + 1), jti: "jti-0".to_owned(), cap: all() };
        let mut world = World { family, claims, channel: id(0) };
        world.claims.cap.max_children = 4;
        world
    }

    fn ask(&self, request: Request<'_>) -> Result<Grant, Refusal> {
        let call = Call {
            channel: &self.channel,
            claims: &self.claims,
            family: &self.family,
            guest: None,
        };
        authorize(&call, request, NOW)
    }

    fn spawn(&self, change: impl FnOnce(&mut SpawnAsk)) -> Result<Permit, Refusal> {
        let mut ask = SpawnAsk {
            spec: spec(),
            services: None,
            workspace: None,
            capabilities: CapabilityAsk::default(),
            envelope: EnvelopeAsk::default(),
            egress: EgressAsk::default(),
        };
        change(&mut ask);
        match self.ask(Request::Spawn(Box::new(ask)))? {
            Grant::Spawn(permit) => Ok(*permit),
            other => panic!("{other:?}"),
        }
    }

    /// Every kind of request is refused by this rule: also those that need no capability.
    fn refuses_all(&self, rule: &str) {
        let port = Port::try_from(80).unwrap();
        let expose = Expose { guest_port: port, public_port: None, protocol: Protocol::Http };
        let command = ["id".to_owned()];
        for request in [
            Request::SelfInfo,
            Request::List,
            Request::Get("work"),
            Request::Logs("work"),
            Request::Start("work"),
            Request::Stop("work"),
            Request::Delete("work"),
            Request::Exec("work", &command),
            Request::Keepalive { ttl: DurationMs(1), reason: None },
            Request::ReleaseKeepalive,
            Request::Expose(expose),
            Request::Unexpose(port),
        ] {
            let refusal = self.ask(request.clone()).unwrap_err();
            assert_eq!(refusal.rule, Some(rule), "{request:?}");
        }
        assert_eq!(self.spawn(|_| ()).unwrap_err().rule, Some(rule));
    }
}

fn denied(refusal: &Refusal, rule: &str, requested: &str, allowed: &str) {
    assert_eq!(refusal.code, Code::CapabilityDenied);
    assert_eq!(refusal.rule, Some(rule));
    assert_eq!(refusal.requested.as_deref(), Some(requested));
    assert_eq!(refusal.allowed.as_deref(), Some(allowed));
    assert!(refusal.hint.is_some());
}

#[test]
fn step_1_a_token_of_another_machine_is_refused() {
    let mut world = World::new();
    world.claims.sub = id(1);
    world.refuses_all("sub");
    let mut world = World::new();
    world.family.clear();
    world.refuses_all("sub");
}

#[test]
fn step_2_an_expired_or_replaced_token_is_refused() {
    let mut world = World::new();
    world.claims.exp = NOW;
    world.refuses_all("exp");
    let mut world = World::new();
    world.family[0].ends_at = Some(NOW);
    world.refuses_all("exp");
    let mut world = World::new();
    world.family[0].jti = Some("jti-1".to_owned());
    world.refuses_all("jti");
    world.family[0].jti = None;
    world.refuses_all("jti");
    // Of a guest's machine whose guest is not there.
    let mut world = World::new();
    world.family[0].guest = Some("01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap());
    world.refuses_all("exp");
}

#[test]
fn a_machine_that_does_not_run_may_nothing() {
    for wanted in [Wanted::Paused, Wanted::Frozen, Wanted::Stopped, Wanted::Gone] {
        let mut world = World::new();
        world.family[0].wanted = wanted;
        world.refuses_all("state");
    }
    for state in [InstanceState::Stopped, InstanceState::Gone] {
        let mut world = World::new();
        world.family[0].state = state;
        world.refuses_all("state");
    }
    let mut world = World::new();
    world.family[0].state = InstanceState::Starting;
    assert_eq!(world.ask(Request::SelfInfo), Ok(Grant::Own));
}

#[test]
fn step_3_spawn_must_be_allowed() {
    let mut world = World::new();
    assert!(world.spawn(|_| ()).is_ok());
    world.claims.cap.spawn = false;
    denied(&world.spawn(|_| ()).unwrap_err(), "spawn", "true", "false");
    let start = world.ask(Request::Start(id(2).as_str())).unwrap_err();
    assert_eq!(start.rule, Some("spawn"));
    // And the record may say no, whatever the token says.
    let mut world = World::new();
    world.family[0].capabilities = Capabilities::default();
    denied(&world.spawn(|_| ()).unwrap_err(), "spawn", "true", "false");
}

#[test]
fn step_4_a_level_must_be_left() {
    let mut world = World::new();
    world.claims.cap.spawn_depth = 0;
    denied(&world.spawn(|_| ()).unwrap_err(), "spawn_depth", "1", "0");
}

#[test]
fn step_5_live_children_are_counted() {
    // Two live ones; the stopped one does not count, another's children do not either.
    let mut world = World::new();
    world.claims.cap.max_children = 3;
    assert!(world.spawn(|_| ()).is_ok());
    world.claims.cap.max_children = 2;
    denied(&world.spawn(|_| ()).unwrap_err(), "max_children", "3", "2");
    assert_eq!(world.ask(Request::Start(id(2).as_str())).unwrap_err().rule, Some("max_children"));
    world.claims.cap.max_children = 0;
    denied(&world.spawn(|_| ()).unwrap_err(), "max_children", "3", "0");
    // One that is stopping still has its machine.
    let mut world = World::new();
    world.claims.cap.max_children = 2;
    world.family[1].wanted = Wanted::Stopped;
    assert!(world.spawn(|_| ()).is_err());
    world.family[1].state = InstanceState::Stopped;
    assert!(world.spawn(|_| ()).is_ok());
}

#[test]
fn step_6_the_image_must_be_allowed() {
    let world = World::new();
    let image = |image: &str| world.spawn(|ask| ask.spec.image = image.parse().unwrap());
    assert!(image("node:20").is_ok());
    assert!(image("docker.io/library/node:20").is_ok());
    for bad in ["python:3", "evil/node:22", "ghcr.io/node:22", "node"] {
        if bad == "node" {
            // It is node:latest.
            assert!(image(bad).is_ok());
        } else {
            denied(&image(bad).unwrap_err(), "allowed_images", bad, "node:*");
        }
    }
    let mut world = World::new();
    world.claims.cap.allowed_images.clear();
    denied(&world.spawn(|_| ()).unwrap_err(), "allowed_images", "node:22", "none");
}

#[test]
fn step_7_the_size_must_be_allowed() {
    let world = World::new();
    let refusal = world.spawn(|ask| ask.spec.memory = MemoryMb(4096)).unwrap_err();
    denied(&refusal, "max_memory_mb", "4096", "1024");
    let refusal = world.spawn(|ask| ask.spec.cpu = CpuMillis(2001)).unwrap_err();
    denied(&refusal, "max_vcpus", "2.001", "2");
    let port = |n| Expose {
        guest_port: Port::try_from(n).unwrap(),
        public_port: None,
        protocol: Protocol::Http,
    };
    let refusal =
        world.spawn(|ask| ask.spec.exposes = vec![port(1), port(2), port(3)]).unwrap_err();
    denied(&refusal, "max_expose_ports", "3", "2");
    // The host's ports are the host's.
    let own = Expose { public_port: Some(Port::try_from(22).unwrap()), ..port(1) };
    let refusal = world.spawn(|ask| ask.spec.exposes = vec![own]).unwrap_err();
    assert_eq!(refusal.code, Code::InvalidField);
    for none in
        [Capabilities { max_memory: MemoryMb(0), ..all() }, Capabilities { max_vcpus: 0, ..all() }]
    {
        let mut world = World::new();
        world.claims.cap = none;
        assert_eq!(world.spawn(|_| ()).unwrap_err().allowed.as_deref(), Some("0"));
    }
}

#[test]
fn step_8_secrets_must_be_allowed() {
    let mut world = World::new();
    let secrets = |world: &World, names: &[&str]| {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        world.spawn(|ask| ask.spec.given.secrets = Secrets::parse(&names).unwrap())
    };
    assert_eq!(secrets(&world, &["KEY"]).unwrap().spec().given.secrets.texts(), ["KEY"]);
    denied(&secrets(&world, &["KEY", "B"]).unwrap_err(), "allowed_secrets", "B", "KEY");
    denied(&secrets(&world, &["*"]).unwrap_err(), "allowed_secrets", "*", "KEY");
    world.claims.cap.allowed_secrets.clear();
    denied(&secrets(&world, &["KEY"]).unwrap_err(), "allowed_secrets", "KEY", "none");
}

#[test]
fn step_9_the_workspace_must_be_allowed() {
    let mut world = World::new();
    let workspace = |world: &World, given: &str, resolved: &str| {
        let ask = WorkspaceAsk { given: given.to_owned(), resolved: Some(resolved.to_owned()) };
        world.spawn(|s| s.workspace = Some(ask))
    };
    assert!(workspace(&world, "/srv/a/b", "/srv/a/b").is_ok());
    let refusal = workspace(&world, "/srv/ab", "/srv/ab").unwrap_err();
    denied(&refusal, "allowed_workspaces", "/srv/ab", "/srv/a");
    assert!(workspace(&world, "/srv/a/link", "/etc").is_err());
    world.claims.cap.allowed_workspaces.clear();
    assert!(workspace(&world, "/srv/a", "/srv/a").is_err());
    let permit = workspace(&world, "/workspace/x", "/nowhere").unwrap();
    assert_eq!(permit.workspace(), Some(&Workspace::OfParent { below: "x".to_owned() }));
}

#[test]
fn above_the_token_stands_the_envelope() {
    let mut world = World::new();
    // Six machines of which one is stopped: 2560 MB are held.
    world.family[0].envelope.memory = MemoryMb(3071);
    let refusal = world.spawn(|_| ()).unwrap_err();
    assert_eq!(refusal.code, Code::EnvelopeExhausted);
    assert_eq!(refusal.rule, Some("envelope.memory_mb"));
    assert_eq!(refusal.requested.as_deref(), Some("512MB"));
    assert_eq!(refusal.allowed.as_deref(), Some("511MB"));
    world.family[0].envelope.memory = MemoryMb(3072);
    assert!(world.spawn(|_| ()).is_ok());
    // Six disks are there, and nothing is left: no default makes a machine without one.
    world.family[0].envelope.disk = DiskBytes(6 << 30);
    let refusal = world.spawn(|ask| ask.spec.disk = DiskBytes(0)).unwrap_err();
    assert_eq!(refusal.rule, Some("envelope.disk_gb"));
    // An ancestor's envelope binds too.
    let mut world = World::new();
    world.channel = id(1);
    world.claims = Claims { sub: id(1), jti: "jti-1".to_owned(), ..world.claims };
    world.family[1].jti = Some("jti-1".to_owned());
    assert!(world.spawn(|_| ()).is_ok());
    world.family[0].envelope.cpu = CpuMillis(5500);
    let refusal = world.spawn(|_| ()).unwrap_err();
    assert_eq!(refusal.rule, Some("envelope.vcpus"));
    assert_eq!(refusal.allowed.as_deref(), Some("0.5"));
}

#[test]
fn steps_10_to_12_the_child_is_whole_and_narrower() {
    let mut world = World::new();
    world.family[0].ends_at = Some(Time(NOW.0 + 5000));
    let permit = world
        .spawn(|ask| {
            ask.envelope.memory = Some(MemoryMb(2048));
            ask.envelope.disk = Some(DiskBytes(u64::MAX));
            ask.envelope.duration = Some(DurationMs(90_000));
            ask.capabilities.max_children = Some(99);
            ask.capabilities.max_memory = Some(MemoryMb(100));
        })
        .unwrap();
    let (changes, child) = spawn(permit, id(9), NOW);
    assert_eq!(changes, [Change::InstanceCreated(Box::new(child.clone()))]);
    assert_eq!(changes[0].note().unwrap().kind, "instance.spawned");
    assert_eq!(child.parent, Some(id(0)));
    assert_eq!(child.tree, world.family[0].tree);
    assert_eq!((child.capabilities.spawn, child.capabilities.spawn_depth), (true, 1));
    assert_eq!(child.capabilities.max_children, 4);
    assert_eq!(child.capabilities.max_memory, MemoryMb(100));
    assert_eq!(child.envelope.memory, MemoryMb(2048));
    assert_eq!(child.envelope.disk, limits().disk);
    assert_eq!(child.ends_at, Some(Time(NOW.0 + 5000)), "never later than its parent");
    assert_eq!(child.envelope.duration, DurationMs(5000));
    let refusal = world.spawn(|ask| ask.envelope.memory = Some(MemoryMb(511))).unwrap_err();
    assert_eq!(refusal.field.as_deref(), Some("envelope"));
    // The last level has no level below it.
    world.claims.cap.spawn_depth = 1;
    let (_, child) = spawn(world.spawn(|_| ()).unwrap(), id(9), NOW);
    assert!(!child.capabilities.spawn);
}

#[test]
fn only_ones_own_children_are_there() {
    let world = World::new();
    let Grant::Children(seen) = world.ask(Request::List).unwrap() else { panic!("a list") };
    assert_eq!(seen, [id(1), id(2), id(4)]);
    assert_eq!(world.ask(Request::Get("work")), Ok(Grant::Child(id(1))));
    let nobody = world.ask(Request::Get("nobody")).unwrap_err();
    assert_eq!(nobody.code, Code::InstanceNotFound);
    // Itself, a grandchild, another's child: all the same as nobody.
    let (own, below, others) = (id(0), id(3), id(5));
    for name in [own.as_str(), below.as_str(), others.as_str(), "", "../x"] {
        for request in [
            Request::Get(name),
            Request::Logs(name),
            Request::Start(name),
            Request::Stop(name),
            Request::Delete(name),
            Request::Exec(name, &[]),
        ] {
            assert_eq!(world.ask(request), Err(nobody.clone()), "{name}");
        }
    }
    let mut world = world;
    world.family[1].wanted = Wanted::Gone;
    assert_eq!(world.ask(Request::Get("work")), Err(nobody));
}

#[test]
fn children_are_started_stopped_deleted_and_used() {
    let world = World::new();
    let stopped = id(2);
    let changes = |request| match world.ask(request).unwrap() {
        Grant::Changes { changes, .. } => changes,
        other => panic!("{other:?}"),
    };
    let wanted = |n: u8, wanted| Change::InstanceWanted { id: id(n), wanted, at: NOW };
    assert_eq!(changes(Request::Stop("work")), [wanted(1, Wanted::Stopped)]);
    assert_eq!(changes(Request::Stop(stopped.as_str())), []);
    assert_eq!(changes(Request::Delete("work")), [wanted(1, Wanted::Gone)]);
    assert_eq!(
        changes(Request::Start(stopped.as_str())),
        [Change::InstanceStarts { id: id(2), at: NOW }]
    );
    assert_eq!(world.ask(Request::Start("work")).unwrap_err().code, Code::InstanceState);
    let command = ["ls".to_owned(), "-l".to_owned()];
    let exec = changes(Request::Exec("work", &command));
    assert!(matches!(&exec[..], [Change::ChildExec { .. }]));
    assert_eq!(exec[0].note().unwrap().data[1].1, "ls -l");
    let refusal = world.ask(Request::Exec(stopped.as_str(), &command)).unwrap_err();
    assert_eq!(refusal.code, Code::InstanceState);
    let files = |child, what| Request::Files { child, what };
    assert_eq!(changes(files("work", None)), []);
    let written = changes(files("work", Some("write /a")));
    assert!(matches!(&written[..], [Change::ChildFiles { .. }]));
    assert_eq!(written[0].note().unwrap().data[1].1, "write /a");
    let refusal = world.ask(files(stopped.as_str(), None)).unwrap_err();
    assert_eq!(refusal.code, Code::InstanceState);
    let refusal = world.ask(files(id(0).as_str(), Some("write /a"))).unwrap_err();
    assert_eq!(refusal.code, Code::InstanceNotFound, "itself is no child");
}

#[test]
fn leases_and_ports_are_bounded() {
    let mut world = World::new();
    let lease = |world: &World, ttl| match world.ask(Request::Keepalive { ttl, reason: None })? {
        Grant::Changes { changes, .. } => Ok(changes),
        other => panic!("{other:?}"),
    };
    let held = |until| Change::LeaseHeld { id: id(0), reason: None, expires_at: until, at: NOW };
    assert_eq!(lease(&world, DurationMs(5)), Ok(vec![held(Time(NOW.0 + 5))]));
    world.family[0].ends_at = Some(Time(NOW.0 + 3));
    assert_eq!(lease(&world, DurationMs(5)), Ok(vec![held(Time(NOW.0 + 3))]), "not past the end");
    for bad in [DurationMs(0), DurationMs(LEASE_MAX.0 + 1), DurationMs(u64::MAX)] {
        let refusal: Refusal = lease(&world, bad).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("ttl_ms"));
    }
    let port = |n: u64| Expose {
        guest_port: Port::try_from(n).unwrap(),
        public_port: None,
        protocol: Protocol::Http,
    };
    for n in [80, 81] {
        let Ok(Grant::Changes { changes, .. }) = world.ask(Request::Expose(port(n))) else {
            panic!("port {n} is within the limit")
        };
        changes.iter().for_each(|c| world.family[0].apply(c));
    }
    denied(&world.ask(Request::Expose(port(82))).unwrap_err(), "max_expose_ports", "3", "2");
    // Again is not one more.
    assert!(world.ask(Request::Expose(port(81))).is_ok());
    assert!(world.ask(Request::Unexpose(port(81).guest_port)).is_ok());
    assert!(world.ask(Request::Unexpose(port(82).guest_port)).is_err());
}
