//! Events as they happen: none left out, none twice, in their order, whatever becomes of their
//! readers (contracts/couch.md 8).

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use aegis_tests::house::{House, MANUAL};
use aegis_tests::sse::{self, Events};
use serde_json::{Value, json};

const EVENTS: &str = "/couch/events";

fn open(house: &House, query: &str, last: Option<u64>) -> Events {
    let last = last.map(|seq| seq.to_string());
    sse::open(&house.host(), &format!("{EVENTS}{query}"), last.as_deref()).unwrap()
}

/// A number below this one.
fn below(most: u64) -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).unwrap();
    u64::from_le_bytes(bytes) % most
}

/// All events of a house, from its audit trail.
fn trail(house: &House) -> Vec<Value> {
    house.host().get("/v1/audit").lines()
}

/// Compares what a reader saw with what was written.
#[track_caller]
fn assert_same(seen: &[Value], written: &[Value]) {
    let seqs = |rows: &[Value]| rows.iter().map(|r| r["seq"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(seqs(seen), seqs(written));
    for (seen, written) in seen.iter().zip(written) {
        for field in ["at", "actor", "kind", "subject", "tree"] {
            assert_eq!(seen[field], written[field], "{seen}");
        }
        let data: Value = serde_json::from_str(written["data"].as_str().unwrap()).unwrap();
        assert_eq!(seen["data"], data);
    }
}

/// Makes invites, some redeemed, some withdrawn.
fn write(house: &House, invites: usize) {
    for n in 0..invites {
        let invite = house.invite(json!({}));
        if n % 2 == 0 {
            let ask = json!({"code": invite["code"], "name": "ty"});
            house.socket().post("/couch/redeem", &ask).expect(201);
        } else {
            let path = format!("/couch/invites/{}", invite["id"].as_str().unwrap());
            house.socket().delete(&path).expect(200);
        }
    }
}

/// Reads, and leaves and comes back all the time, until this event.
fn restless(house: &House, from: u64, done: impl Fn(u64) -> bool) -> Vec<Value> {
    let mut seen = Vec::new();
    let mut last = from;
    while !done(last) {
        let mut events = open(house, "", Some(last));
        for _ in 0..=below(150) {
            let (_, data) = events.must();
            last = data["seq"].as_u64().unwrap();
            seen.push(data);
            if done(last) {
                break;
            }
        }
    }
    seen
}

#[test]
fn readers_that_come_and_go_miss_nothing_and_see_nothing_twice() {
    const WRITERS: usize = 4;
    const INVITES: usize = 600;
    let mut house = House::new(MANUAL);
    write(&house, 1);
    let first = trail(&house).len() as u64;
    let mut lazy = open(&house, "?from=start", None);
    let mut follower = open(&house, "", None);
    let last = first + (WRITERS * INVITES * 2) as u64;
    let seen: Vec<Vec<Value>> = std::thread::scope(|scope| {
        let readers: Vec<_> =
            (0..3).map(|_| scope.spawn(|| restless(&house, first, |seq| seq >= last))).collect();
        for _ in 0..WRITERS {
            scope.spawn(|| write(&house, INVITES));
        }
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    let written = trail(&house);
    assert_eq!(written.len() as u64, last);
    for seen in &seen {
        assert_same(seen, &written[first as usize..]);
    }
    // One that stayed, and one that read nothing before all was written.
    let take =
        |events: &mut Events, n: u64| -> Vec<Value> { (0..n).map(|_| events.must().1).collect() };
    assert_same(&take(&mut follower, last - first), &written[first as usize..]);
    assert_same(&take(&mut lazy, last), &written);

    // The daemon dies: its readers are cut off, and go on where they were.
    house.kill9();
    assert!(follower.next().is_none() && lazy.next().is_none());
    house.start();
    let mut back = open(&house, "", Some(last));
    write(&house, 3);
    let more = trail(&house);
    assert_same(&take(&mut back, 6), &more[last as usize..]);
}

#[test]
fn a_reader_without_a_place_begins_now_and_is_told_where_that_is() {
    let house = House::new(MANUAL);
    write(&house, 2);
    let place = trail(&house).len();
    let answer = house.host().get(&format!("{EVENTS}?follow=false"));
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    assert_eq!(text, format!("id: {place}\nretry: 1000\n\n"));
    let mut events = open(&house, "", None);
    let mut again = open(&house, "?from=now&follow=true", None);
    let invite = house.invite(json!({}));
    for events in [&mut events, &mut again] {
        let (event, data) = events.must();
        assert_eq!(event.event, "couch.invite.created");
        assert_eq!(data["subject"], invite["id"]);
        assert_eq!(data["seq"], place + 1);
    }
    // The header is of a client that comes back: it counts more than what its address says.
    let mut back = open(&house, "?since=1", Some(place as u64));
    assert_eq!(back.must().1["seq"], place + 1);
    let mut since = open(&house, "?since=1", None);
    assert_eq!(since.must().1["seq"], 2);
}

#[test]
fn events_are_asked_for_by_kind_and_guest() {
    let house = House::new(MANUAL);
    let (one, _) = (house.guest(json!({})), house.guest(json!({})));
    let id = one["guestId"].as_str().unwrap();
    house.host().delete(&format!("/couch/guests/{id}")).expect(200);
    let kinds = |query: &str| -> Vec<String> {
        let mut events = open(&house, &format!("?from=start&follow=false&{query}"), None);
        std::iter::from_fn(|| events.next()).map(|event| event.event).collect()
    };
    assert_eq!(kinds("kind=couch.invite.c"), ["couch.invite.created"; 2]);
    let of_one = [
        "couch.invite.created",
        "couch.invite.redeemed",
        "couch.guest.killed",
        "couch.kill.verified",
    ];
    assert_eq!(kinds(&format!("guest={id}")), of_one);
    assert_eq!(kinds(&format!("guest={id}&kind=couch.guest.")), ["couch.guest.killed"]);
    assert_eq!(kinds("kind=instance.").len(), 0);
    // A follower of few hears of them while much else happens.
    let mut killed = open(&house, "?kind=couch.guest.killed", None);
    write(&house, 40);
    let two = house.guest(json!({}));
    house.host().delete(&format!("/couch/guests/{}", two["guestId"].as_str().unwrap())).expect(200);
    assert_eq!(killed.must().1["subject"], two["guestId"]);
}

#[test]
fn bad_questions_are_refused() {
    let house = House::new(MANUAL);
    write(&house, 1);
    for (query, field) in [
        ("since=x", "since"),
        ("since=-1", "since"),
        ("since=99", "since"),
        ("since=1&from=start", "from"),
        ("from=later", "from"),
        ("kind=", "kind"),
        ("kind=couch.*", "kind"),
        ("follow=maybe", "follow"),
    ] {
        house.host().get(&format!("{EVENTS}?{query}")).refused(400, field);
    }
    for guest in ["x", "01ARZ3NDEKTSV4RRFFQ69G5FAV"] {
        house.host().get(&format!("{EVENTS}?guest={guest}")).refused(404, "");
    }
    for last in ["", "x", "-1", "1.5", "99"] {
        assert_eq!(sse::open(&house.host(), EVENTS, Some(last)).err(), Some(400), "{last}");
    }
    assert_eq!(sse::open(&house.anybody(), EVENTS, None).err(), Some(401));
    assert_eq!(sse::open(&house.anybody().bearer("x"), EVENTS, Some("0")).err(), Some(401));
}

#[test]
fn so_many_follow_and_no_more_until_one_leaves() {
    let house = House::new(MANUAL);
    let mut followers: Vec<Events> = (0..64).map(|_| open(&house, "", None)).collect();
    house.host().get(EVENTS).refused(503, "");
    house.host().get("/v1/status").expect(200);
    followers.pop();
    let mut late =
        aegis_tests::wait_for("a place is free", std::time::Duration::from_secs(30), || {
            sse::open(&house.host(), EVENTS, None).ok()
        });
    house.invite(json!({}));
    assert_eq!(late.must().0.event, "couch.invite.created");
    for follower in &mut followers {
        assert_eq!(follower.must().0.event, "couch.invite.created");
    }
}

#[test]
fn followers_end_when_the_daemon_stops() {
    let mut house = House::new(MANUAL);
    let mut events = open(&house, "", None);
    assert!(house.stop().success());
    assert!(events.ends(), "it was cut off");
}

#[test]
fn the_command_line_shows_them_and_follows_over_a_restart() {
    let mut house = House::new(MANUAL);
    let guest = house.guest(json!({}));
    let id = guest["guestId"].as_str().unwrap();
    let home = house.home().to_owned();
    let aegis = |words: &[&str]| {
        let mut command = Command::new(aegis_tests::programs().join("aegis"));
        command.env_clear().env("AEGIS_HOME", &home).arg("events").args(words);
        command
    };
    let said = |words: &[&str]| {
        let done = aegis(words).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    let lines = said(&["--json"]);
    let seen: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_same(&seen, &trail(&house));
    let words = said(&["--guest", id, "--kind", "couch.invite.redeemed"]);
    assert_eq!(words.lines().count(), 1);
    assert!(words.contains("redeemedBy=ty") && words.contains(id), "{words}");
    assert_eq!(said(&["--since", &seen.len().to_string()]), "");
    let refused = aegis(&["-f", "--since", "99"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));

    let mut follower =
        aegis(&["-f", "--json", "--since", "0"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let mut take = |n: usize| -> Vec<Value> {
        let lines = lines.by_ref().take(n);
        lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
    };
    let mut followed = take(seen.len());
    house.kill9();
    house.start();
    write(&house, 2);
    let written = trail(&house);
    followed.extend(take(written.len() - seen.len()));
    follower.kill().unwrap();
    follower.wait().unwrap();
    assert_same(&followed, &written);
}
