//! Trees of machines in the ledger: what is decided and what follows from it are one transaction.

use std::collections::BTreeMap;
use std::sync::Arc;

use aegis_rules::authorize::{Call, Claims, Grant, Request, SpawnAsk, authorize};
use aegis_rules::capability::{Capabilities, CapabilityAsk};
use aegis_rules::egress::EgressAsk;
use aegis_rules::envelope::{self, EnvelopeAsk};
use aegis_rules::given::Given;
use aegis_rules::instance::{IdlePolicy, Instance, InstanceState, Spec, Wanted};
use aegis_rules::kill::{MUST_VERIFY, MachineEnd};
use aegis_rules::spawn::spawn;
use aegis_wire::words::{
    CpuMillis, DiskBytes, EgressBytes, InstanceId, LlmTokens, MemoryMb, Usage,
};

use super::*;

fn spec() -> Spec {
    Spec {
        handle: None,
        image: "base".parse().unwrap(),
        command: vec!["true".to_owned()],
        env: BTreeMap::new(),
        cwd: None,
        cpu: CpuMillis(1000),
        memory: MemoryMb(512),
        disk: DiskBytes(1 << 30),
        exposes: vec![],
        await_port: None,
        idle_policy: IdlePolicy::Default,
        authorized_key: None,
        given: Given::default(),
        origin: None,
        attach: false,
    }
}

fn envelope() -> Limits {
    Limits { cpu: CpuMillis(64_000), memory: MemoryMb(65_536), ..Limits::default() }
}

async fn root(ledger: &Ledger, max_children: u32) -> Instance {
    let id = instance_id(NOW).unwrap();
    let capabilities = Capabilities {
        spawn: true,
        spawn_depth: 9,
        max_children,
        allowed_images: vec!["*".to_owned()],
        max_memory: MemoryMb(4096),
        max_vcpus: 4,
        ..Capabilities::default()
    };
    let tree = Tree::Instance(id.clone());
    let root = Instance::new(id, tree, None, None, spec(), NOW).with_rights(
        capabilities,
        envelope(),
        None,
    );
    write(ledger, vec![Change::InstanceCreated(Box::new(root.clone()))]).await;
    runs(ledger, &root.id).await;
    root
}

async fn write(ledger: &Ledger, changes: Vec<Change>) {
    ledger.write("host", move |_| Ok((changes, ()))).await.unwrap();
}

async fn runs(ledger: &Ledger, id: &InstanceId) {
    let (id, jti, boot_id) = (id.clone(), format!("jti of {id}"), "b".to_owned());
    let token = Change::InstanceToken { id: id.clone(), jti, at: NOW };
    write(ledger, vec![token, Change::InstanceRuns { id, boot_id, at: NOW }]).await;
}

/// As a machine's spawn is written: authorized upon the facts of the transaction that makes it.
async fn child(ledger: &Ledger, parent: &InstanceId) -> Result<InstanceId, WriteError> {
    let (parent, id) = (parent.clone(), instance_id(NOW).unwrap());
    ledger
        .write("guest", move |facts| {
            let caller = facts.instance(&parent)?.unwrap();
            let family = facts.family(&caller.tree)?;
            let claims = Claims {
                sub: parent.clone(),
                exp: Time(i64::MAX),
                jti: format!("jti of {parent}"),
                cap: caller.capabilities.clone(),
            };
            let call = Call { channel: &parent, claims: &claims, family: &family, guest: None };
            let ask = SpawnAsk {
                spec: spec(),
                services: None,
                workspace: None,
                capabilities: CapabilityAsk::default(),
                envelope: EnvelopeAsk::default(),
                egress: EgressAsk::default(),
            };
            match authorize(&call, Request::Spawn(Box::new(ask)), NOW)? {
                Grant::Spawn(permit) => Ok((spawn(*permit, id.clone(), NOW).0, id)),
                other => panic!("{other:?}"),
            }
        })
        .await
}

fn open(dir: &tempfile::TempDir) -> Arc<Ledger> {
    Arc::new(Ledger::open(&dir.path().join("ledger.db")).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_takes_all_below_it_along_in_the_same_write() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(&dir);
    let root = root(&ledger, 9).await;
    let first = child(&ledger, &root.id).await.unwrap();
    runs(&ledger, &first).await;
    let second = child(&ledger, &first).await.unwrap();
    assert!(ledger.take_touched().is_empty());
    let stopped = Change::InstanceWanted { id: root.id.clone(), wanted: Wanted::Stopped, at: NOW };
    write(&ledger, vec![stopped]).await;
    let family = ledger.read(|f| f.family(&root.tree)).unwrap();
    assert!(family.iter().all(|i| i.wanted == Wanted::Stopped), "{family:?}");
    assert_eq!(ledger.take_touched().into_iter().collect::<Vec<_>>(), {
        let mut both = vec![first, second];
        both.sort();
        both
    });
    assert!(ledger.take_touched().is_empty());
    let wanted = ledger.read(|f| f.events(Some(&root.tree), 0, 100)).unwrap();
    assert_eq!(wanted.iter().filter(|e| e.kind == "instance.wanted").count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_spawns_pass_neither_their_number_nor_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(&dir);
    let root = root(&ledger, 5).await;
    let mut racers = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let (ledger, parent) = (Arc::clone(&ledger), root.id.clone());
        racers.spawn(async move { child(&ledger, &parent).await });
    }
    let mut won = 0;
    while let Some(outcome) = racers.join_next().await {
        match outcome.unwrap() {
            Ok(_) => won += 1,
            Err(WriteError::Refused(r)) => assert_eq!(r.rule, Some("max_children")),
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!(won, 5);

    // Each of them spawns, while the root is stopped.
    let family = ledger.read(|f| f.family(&root.tree)).unwrap();
    for i in family.iter().filter(|i| i.parent.is_some()) {
        runs(&ledger, &i.id).await;
    }
    for (n, i) in family.into_iter().filter(|i| i.parent.is_some()).cycle().take(40).enumerate() {
        let (ledger, root) = (Arc::clone(&ledger), root.id.clone());
        racers.spawn(async move {
            if n == 20 {
                let wanted = Wanted::Stopped;
                write(&ledger, vec![Change::InstanceWanted { id: root, wanted, at: NOW }]).await;
            }
            child(&ledger, &i.id).await
        });
    }
    while let Some(outcome) = racers.join_next().await {
        if let Err(WriteError::Ledger(error)) = outcome.unwrap() {
            panic!("{error:?}");
        }
    }
    let family = ledger.read(|f| f.family(&root.tree)).unwrap();
    assert!(family.iter().all(|i| i.wanted == Wanted::Stopped), "one slipped through");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_deleted_child_spent_stays_spent() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(&dir);
    let root = root(&ledger, 5).await;
    let spender = child(&ledger, &root.id).await.unwrap();
    runs(&ledger, &spender).await;
    let below = child(&ledger, &spender).await.unwrap();
    let spent =
        |tokens| Usage { tokens: LlmTokens(tokens), egress: EgressBytes(7), ..Usage::default() };
    write(&ledger, vec![Change::InstanceUsed { id: spender.clone(), usage: spent(100) }]).await;
    write(&ledger, vec![Change::InstanceUsed { id: below.clone(), usage: spent(11) }]).await;
    let gone = Change::InstanceWanted { id: spender.clone(), wanted: Wanted::Gone, at: NOW };
    write(&ledger, vec![gone]).await;
    let destroyed = |id: &InstanceId, tokens| Change::InstanceDestroyed {
        end: MachineEnd {
            id: id.clone(),
            frozen_at: None,
            destroyed_at: NOW,
            verified: MUST_VERIFY.map(str::to_owned).to_vec(),
        },
        usage: spent(tokens),
    };
    // The parent is proven gone first: its record waits for its child's.
    write(&ledger, vec![destroyed(&spender, 100)]).await;
    let family = ledger.read(|f| f.family(&root.tree)).unwrap();
    assert_eq!(family.len(), 3);
    ledger.take_touched();
    write(&ledger, vec![destroyed(&below, 12)]).await;
    let touched = ledger.take_touched();
    assert!(touched.contains(&spender), "its driver has logs to remove");
    let family = ledger.read(|f| f.family(&root.tree)).unwrap();
    assert_eq!(family.len(), 1);
    let drawn = envelope::drawn(&family, &root.id);
    assert_eq!((drawn.tokens, drawn.egress_bytes, drawn.memory_mb), (112, 14, 512));
    // It is the same after a restart.
    drop(ledger);
    let again = open(&dir);
    assert_eq!(again.read(|f| f.family(&root.tree)).unwrap(), family);
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_tokens_leases_and_ends_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(&dir);
    let mut root = root(&ledger, 5).await;
    let (id, at) = (root.id.clone(), NOW);
    let reason = Some("building".to_owned());
    let held = Change::LeaseHeld { id: id.clone(), reason, expires_at: Time(NOW.0 + 9), at };
    let expose = aegis_rules::instance::Expose {
        guest_port: 80.try_into().unwrap(),
        public_port: None,
        protocol: aegis_rules::instance::Protocol::Tcp,
    };
    let changes = vec![
        Change::InstanceToken { id: id.clone(), jti: format!("jti of {id}"), at },
        Change::InstanceRuns { id: id.clone(), boot_id: "b".to_owned(), at },
        held,
        Change::InstanceExposed { id: id.clone(), expose, at },
    ];
    changes.iter().for_each(|c| root.apply(c));
    write(&ledger, changes).await;
    drop(ledger);
    let ledger = open(&dir);
    assert_eq!(ledger.read(|f| f.instance(&root.id)).unwrap(), Some(root.clone()));
    assert_eq!(ledger.read(|f| f.next_due()).unwrap(), None);
    let mut short = Instance::new(instance_id(NOW).unwrap(), root.tree, None, None, spec(), NOW);
    short.ends_at = Some(Time(NOW.0 + 5));
    write(&ledger, vec![Change::InstanceCreated(Box::new(short.clone()))]).await;
    assert_eq!(ledger.read(|f| f.next_due()).unwrap(), Some(Time(NOW.0 + 5)));
    assert_eq!(ledger.read(|f| f.due_instances(Time(NOW.0 + 4), 9)).unwrap(), []);
    assert_eq!(ledger.read(|f| f.due_instances(Time(NOW.0 + 5), 9)).unwrap(), [short]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_of_the_version_before_opens_and_allows_nothing_new() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    let (invite, guest) = (invite_id(NOW).unwrap(), guest_id(NOW).unwrap());
    let (own, hosts) = (instance_id(NOW).unwrap(), instance_id(NOW).unwrap());
    {
        let file = Connection::open(&path).unwrap();
        file.execute_batch(include_str!("schema-1.sql")).unwrap();
        file.pragma_update(None, "user_version", 1).unwrap();
        let limits = r#"{"cpu_millis":2000,"memory_mb":4096,"disk_bytes":20000000000,
            "egress_bytes":10000000000,"duration_ms":259200000,"tokens":1000000000000000}"#;
        let permissions = r#"{"internet":true,"spawn":true,"host_services":false}"#;
        let usage = r#"{"cpu_ns":0,"memory_peak_bytes":0,"disk_bytes":0,"egress_bytes":0,
            "tokens":0,"uptime_ms":0}"#;
        let offer = format!(
            r#"{{"limits":{limits},"permissions":{permissions},"golden":null,"agent_port":null,
            "egress_allow":null,"host_services":[],"spawn_depth":0,"max_children":0,
            "on_limit":null}}"#
        );
        file.execute(
            "INSERT INTO invite VALUES (?1, zeroblob(32), 'redeemed', 'noah', NULL, ?2, 1, 2, 1, 'ty', ?3)",
            [invite.as_str(), &offer, guest.as_str()],
        )
        .unwrap();
        let detail = format!(
            r#"{{"public_key":null,"idempotency":null,"provisioner":"local","limits":{limits},
            "permissions":{permissions},"vm_id":null,"agent_endpoint":null,"provision_error":null,
            "reported":{usage},"limits_exceeded":false,"receipt":null}}"#
        );
        file.execute(
            "INSERT INTO guest VALUES (?1, ?2, 'ty', zeroblob(32), 'running', ?3, ?4, 1, 77, NULL)",
            [guest.as_str(), invite.as_str(), own.as_str(), &detail],
        )
        .unwrap();
        let spec = r#"{"handle":null,"image":"base","command":["true"],"env":{},"cwd":null,
            "cpu_millis":2000,"memory_mb":4096,"disk_bytes":1073741824,"exposes":[],
            "await_port":null,"idle_policy":"default","authorized_key":null}"#;
        let detail = format!(
            r#"{{"enabled":true,"attempts":0,"retry_at":null,"last_error":null,"boot_id":"b",
            "usage_past":{usage},"usage_boot":{usage},"exit":null,"frozen_at":null,"end":null,
            "stopped_at":null}}"#
        );
        for (id, tree, guest) in
            [(&own, invite.as_str(), Some(guest.as_str())), (&hosts, hosts.as_str(), None)]
        {
            file.execute(
                "INSERT INTO instance VALUES
                 (?1, ?2, ?3, NULL, NULL, 'running', 'running', 4096, 1073741824, ?4, ?5, 1, 1)",
                rusqlite::params![id.as_str(), tree, guest, spec, detail],
            )
            .unwrap();
        }
    }
    let ledger = Ledger::open(&path).unwrap();
    let read = |id: &InstanceId| ledger.read(|f| f.instance(id)).unwrap().unwrap();
    let found = read(&own);
    assert_eq!(found.capabilities, Capabilities::default());
    assert_eq!(found.envelope, ledger.read(|f| f.guest(&guest)).unwrap().unwrap().limits);
    assert_eq!(found.envelope.tokens, LlmTokens(1_000_000_000_000_000));
    assert_eq!(found.ends_at, Some(Time(77)));
    assert_eq!((found.jti, found.lease, found.usage_below), (None, None, Usage::default()));
    let found = read(&hosts);
    assert_eq!(found.capabilities, Capabilities::default());
    assert_eq!((found.envelope.memory, found.envelope.tokens), (MemoryMb(4096), LlmTokens(0)));
    assert_eq!(found.ends_at, None);
    assert_eq!((&found.spec.given, found.tokens_reserved), (&Given::default(), 0));
    let offer = ledger.read(|f| f.invite(&invite)).unwrap().unwrap();
    assert_eq!(offer.root_given(), Given::default());
    assert!(ledger.read(|f| f.secrets()).unwrap().is_empty());
    assert!(!offer.root_capabilities().spawn, "what named no depth then gets none now");
    // It is a whole ledger of this version: it is written, and opens again.
    runs(&ledger, &hosts).await;
    drop(ledger);
    let again = Ledger::open(&path).unwrap();
    let found = again.read(|f| f.instance(&hosts)).unwrap().unwrap();
    assert_eq!(found.state, InstanceState::Running);
    assert!(found.jti.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_version_before_becomes_this_one() {
    for steps in [0, 1] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.db");
        {
            let file = Connection::open(&path).unwrap();
            file.execute_batch(include_str!("schema-1.sql")).unwrap();
            for step in &[include_str!("../schema-1-to-2.sql")][..steps] {
                file.execute_batch(step).unwrap();
            }
            file.pragma_update(None, "user_version", 1 + steps as i64).unwrap();
        }
        let tables = |file: &Connection| -> Vec<String> {
            let sql =
                "SELECT name || ' ' || (SELECT group_concat(name) FROM pragma_table_info(t.name))
                       FROM sqlite_master t WHERE type IN ('table', 'index') ORDER BY name";
            let mut all = file.prepare(sql).unwrap();
            all.query_map([], |r| r.get::<_, Option<String>>(0))
                .unwrap()
                .map(|row| row.unwrap().unwrap_or_default())
                .collect()
        };
        drop(Ledger::open(&path).unwrap());
        let fresh = dir.path().join("fresh.db");
        drop(Ledger::open(&fresh).unwrap());
        let sorted = |path: &Path| {
            let mut all = tables(&Connection::open(path).unwrap());
            // Columns that were added later stand last.
            all.iter_mut().for_each(|t| {
                let mut words: Vec<&str> = t.split([' ', ',']).collect();
                words.sort_unstable();
                *t = words.join(" ");
            });
            all
        };
        assert_eq!(sorted(&path), sorted(&fresh), "from {}", 1 + steps);
    }
}
