//! The ledger over a real file.

use aegis_rules::audit::{GENESIS, Hash, Row, link};
use aegis_rules::guest::GuestStatus;
use aegis_rules::invite::{self, Fresh, InviteStatus, Redeem, Redeemed};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::words::{DurationMs, Limits, Permissions, Time, Tree};

use super::*;
use crate::keys::{guest_id, hash, instance_id, invite_id};

mod tree;

const NOW: Time = Time(1_800_000_000_000);

fn ask() -> invite::Create {
    invite::Create {
        created_by: "noah".parse().unwrap(),
        label: None,
        limits: Limits::default(),
        permissions: Permissions::default(),
        offer: invite::Offer::default(),
        expires_in: DurationMs(DurationMs::HOUR),
    }
}

async fn make_invite(ledger: &Ledger, code: &str) -> aegis_wire::words::InviteId {
    let (id, code) = (invite_id(NOW).unwrap(), hash(code));
    let copy = id.clone();
    ledger.write("host", move |_| Ok((invite::create(ask(), copy, code, NOW), ()))).await.unwrap();
    id
}

async fn redeem(ledger: &Ledger, code: &str) -> Result<GuestStatus, WriteError> {
    let code = hash(code);
    let fresh = Fresh {
        guest: guest_id(NOW).unwrap(),
        token_hash: hash(&instance_id(NOW).unwrap().to_string()),
        instance: instance_id(NOW).unwrap(),
    };
    ledger
        .write("public", move |facts| {
            let found = facts.invite_by_code(&code)?;
            let ask = Redeem { name: "ty".parse().unwrap(), public_key: None, idempotency: None };
            match invite::redeem(found.as_ref(), None, ask, None, fresh, NOW)? {
                Redeemed::New { changes, guest } => Ok((changes, guest.status)),
                Redeemed::Again(guest) => Ok((vec![], guest.status)),
            }
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_gets_the_invite_and_a_reopened_ledger_knows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    let ledger = Arc::new(Ledger::open(&path).unwrap());
    let id = make_invite(&ledger, "code").await;
    let mut racers = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let ledger = Arc::clone(&ledger);
        racers.spawn(async move { redeem(&ledger, "code").await });
    }
    let (mut won, mut late) = (0, 0);
    while let Some(outcome) = racers.join_next().await {
        match outcome.unwrap() {
            Ok(GuestStatus::Provisioning) => won += 1,
            Err(WriteError::Refused(Refusal { code: Code::AlreadyRedeemed, .. })) => late += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((won, late), (1, 63));
    drop(ledger);
    let again = Ledger::open(&path).unwrap();
    let invite = again.read(|f| f.invite(&id)).unwrap().unwrap();
    assert_eq!(invite.status, InviteStatus::Redeemed);
    let guests = again.read(|f| f.guests(None, NOW, None, 10)).unwrap();
    assert_eq!(guests.rows.len(), 1);
    assert_eq!(Some(&guests.rows[0].id), invite.guest_id.as_ref());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_write_leaves_nothing_beside_others_of_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(&dir.path().join("ledger.db")).unwrap();
    let lost = invite_id(NOW).unwrap();
    let copy = lost.clone();
    let refused = ledger.write("host", move |_| -> Result<(Vec<Change>, ()), WriteError> {
        let _would = invite::create(ask(), copy, hash("lost"), NOW);
        Err(Refusal::new(Code::NoCapacity, "no").into())
    });
    let (refused, kept) = tokio::join!(refused, make_invite(&ledger, "kept"));
    assert!(matches!(refused, Err(WriteError::Refused(_))));
    assert!(ledger.read(|f| f.invite(&lost)).unwrap().is_none());
    assert!(ledger.read(|f| f.invite(&kept)).unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_tree_has_an_unbroken_chain() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    let ledger = Ledger::open(&path).unwrap();
    let (a, b) = (make_invite(&ledger, "a").await, make_invite(&ledger, "b").await);
    redeem(&ledger, "a").await.unwrap();
    redeem(&ledger, "b").await.unwrap();
    let file = Connection::open(&path).unwrap();
    for tree in [Tree::Invite(a), Tree::Invite(b)] {
        let mut previous = GENESIS;
        let mut statement = file
            .prepare("SELECT position, at, actor, kind, subject, data, hash FROM event WHERE tree = ?1 ORDER BY position")
            .unwrap();
        let mut rows = statement.query([tree.to_string()]).unwrap();
        let mut count = 0;
        while let Some(row) = rows.next().unwrap() {
            count += 1;
            let (actor, kind, subject, data): (String, String, String, String) = (
                row.get(2).unwrap(),
                row.get(3).unwrap(),
                row.get(4).unwrap(),
                row.get(5).unwrap(),
            );
            let expected = link(
                &previous,
                &Row {
                    tree: &tree,
                    position: count,
                    at: Time(row.get(1).unwrap()),
                    actor: &actor,
                    kind: &kind,
                    subject: &subject,
                    data: &data,
                },
            );
            let stored: Hash = row.get(6).unwrap();
            assert_eq!(expected, stored);
            previous = stored;
        }
        assert_eq!(count, 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_page_without_hole_or_duplicate() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(&dir.path().join("ledger.db")).unwrap();
    for n in 0..25 {
        make_invite(&ledger, &n.to_string()).await;
    }
    let (mut seen, mut cursor) = (Vec::new(), None);
    loop {
        let page = ledger.read(|f| f.invites(None, NOW, cursor.as_deref(), 10)).unwrap();
        seen.extend(page.rows.into_iter().map(|i| i.id));
        match page.next {
            Some(next) => cursor = Some(next),
            None => break,
        }
    }
    assert_eq!(seen.len(), 25);
    assert!(seen.windows(2).all(|w| w[0] > w[1]), "newest first, each once");
}

fn sealed(byte: u8) -> crate::keys::Sealed {
    crate::keys::Sealed { nonce: [byte; 12], bytes: vec![byte; 40] }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_kept_replaced_and_forgotten_with_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(&dir.path().join("ledger.db")).unwrap();
    let secret = |name: &str, byte| StoredSecret {
        name: name.parse().unwrap(),
        hosts: (byte > 1).then(|| vec!["api.example.com".parse().unwrap()]),
        updated_at: NOW,
        sealed: sealed(byte),
    };
    ledger.keep_secret("host", secret("B", 1)).await.unwrap();
    ledger.keep_secret("host", secret("A", 1)).await.unwrap();
    ledger.keep_secret("host", secret("A", 2)).await.unwrap();
    let all = ledger.read(|f| f.secrets()).unwrap();
    let names: Vec<&str> = all.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["A", "B"]);
    assert!(all[0].sealed == sealed(2) && all[0].hosts.as_ref().unwrap().len() == 1);
    assert_eq!(all[1].hosts, None);
    assert!(ledger.forget_secret("host", "B".parse().unwrap(), NOW).await.unwrap());
    assert!(!ledger.forget_secret("host", "B".parse().unwrap(), NOW).await.unwrap());
    assert!(ledger.read(|f| f.secret(&"B".parse().unwrap())).unwrap().is_none());
    let trail = ledger.read(|f| f.events(Some(&Tree::Host), 0, 10)).unwrap();
    let kinds: Vec<(&str, &str)> =
        trail.iter().map(|e| (e.kind.as_str(), e.subject.as_str())).collect();
    let set = "secret.set";
    assert_eq!(kinds, [(set, "B"), (set, "A"), (set, "A"), ("secret.deleted", "B")]);
    assert_eq!(trail[3].position, 4, "one chain");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_keeps_only_so_many_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Arc::new(Ledger::open(&dir.path().join("ledger.db")).unwrap());
    let keep = |n: usize| {
        let name = format!("S{n}").parse().unwrap();
        let secret = StoredSecret { name, hosts: None, updated_at: NOW, sealed: sealed(1) };
        let ledger = Arc::clone(&ledger);
        async move { ledger.keep_secret("host", secret).await }
    };
    let most = aegis_wire::bounds::SECRETS_KEPT_MAX;
    let mut all = tokio::task::JoinSet::new();
    (0..most).for_each(|n| {
        all.spawn(keep(n));
    });
    while let Some(kept) = all.join_next().await {
        kept.unwrap().unwrap();
    }
    assert!(matches!(keep(most).await, Err(WriteError::Refused(r)) if r.code == Code::NoCapacity));
    keep(3).await.unwrap();
}
