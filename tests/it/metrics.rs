//! Metrics, read strictly, before and after real things happened.

use std::time::Duration;

use aegis_tests::house::{House, MANUAL};
use aegis_tests::metrics::{Scrape, scrape};
use aegis_tests::wait_for;
use serde_json::json;

/// How much a series grew.
#[track_caller]
fn grew(before: &Scrape, after: &Scrape, name: &str, labels: &[(&str, &str)]) -> f64 {
    after.value(name, labels) - before.find(name, labels).unwrap_or(0.0)
}

#[test]
fn the_life_of_a_machine_shows() {
    let house = House::new("");
    let before = scrape(&house.host());
    for state in ["starting", "running", "paused", "frozen", "stopped"] {
        assert_eq!(before.value("aegis_machines", &[("state", state)]), 0.0);
    }
    assert_eq!(before.value("aegis_boots_total", &[("outcome", "running")]), 0.0);
    assert_eq!(before.value("aegis_boot_seconds_count", &[]), 0.0);

    let limits = json!({
        "maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.3,
        "maxTokenBudget": 1000, "maxNetworkEgressGB": 2,
    });
    let guest = house.guest(json!({"resourceLimits": limits}));
    let id = guest["guestId"].as_str().unwrap();
    house.until(id, "running");
    let during = scrape(&house.host());
    assert_eq!(during.value("aegis_machines", &[("state", "running")]), 1.0);
    assert_eq!(during.value("aegis_guests_live", &[]), 1.0);
    assert_eq!(during.value("aegis_boots_total", &[("outcome", "running")]), 1.0);
    assert_eq!(during.value("aegis_boots_total", &[("outcome", "failed")]), 0.0);
    assert_eq!(during.value("aegis_boot_seconds_count", &[]), 1.0);
    assert!(during.value("aegis_boot_seconds_sum", &[]) > 0.0);
    assert_eq!(during.value("aegis_guest_tokens_limit", &[("guest", id)]), 1000.0);
    assert_eq!(during.value("aegis_guest_egress_bytes_limit", &[("guest", id)]), 2e9);
    assert_eq!(during.value("aegis_guest_egress_bytes_left", &[("guest", id)]), 2e9);
    assert_eq!(during.value("aegis_kills_total", &[]), 0.0);
    let route = [("method", "POST"), ("route", "/couch/redeem"), ("status", "201")];
    assert_eq!(grew(&before, &during, "aegis_http_requests_total", &route), 1.0);
    assert!(grew(&before, &during, "aegis_ledger_commits_total", &[]) > 0.0);

    house.host().delete(&format!("/couch/guests/{id}")).expect(200);
    let after = wait_for("the proof is counted", Duration::from_secs(10), || {
        let now = scrape(&house.host());
        (now.value("aegis_kill_seconds_count", &[]) > 0.0).then_some(now)
    });
    assert_eq!(after.value("aegis_kills_total", &[]), 1.0);
    assert_eq!(after.value("aegis_kill_seconds_count", &[]), 1.0);
    assert!(after.value("aegis_kill_seconds_sum", &[]) > 0.0);
    assert_eq!(after.value("aegis_machines", &[("state", "running")]), 0.0);
    assert_eq!(after.value("aegis_guests_live", &[]), 0.0);
    // One who has ended is no series for ever.
    assert_eq!(after.find("aegis_guest_tokens_left", &[("guest", id)]), None);
    let start = "aegis_start_time_seconds";
    assert_eq!(after.value(start, &[]), before.value(start, &[]));
    // No count went down, no family changed its type.
    for (name, kind) in during.kinds() {
        assert!(after.kinds().get(name).is_none_or(|k| k == kind), "{name}");
        for (labels, value) in during.series(name).iter().filter(|_| kind == "counter") {
            let labels: Vec<_> = labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            assert!(after.value(name, &labels) >= *value, "{name} {labels:?}");
        }
    }
}

#[test]
fn what_a_machine_may_not_is_counted_by_its_rule() {
    let house = House::new("");
    let body = json!({"handle": "bot", "command": ["sleep", "infinity"], "memory_mb": 256, "disk_gb": 0.3});
    house.socket().post("/v1/instances", &body).expect(201);
    house.until_instance("bot", "running");
    let spawn = "curl -s -X POST http://127.0.0.1:7777/v1/instances -d '{\"command\":[\"true\"]}'";
    let said = house.sh("bot", &format!("{spawn}; {spawn}")).text();
    assert!(said.contains("capability_denied"), "{said}");
    let after = scrape(&house.host());
    let rule = [("code", "capability_denied"), ("rule", "spawn")];
    assert_eq!(after.value("aegis_denials_total", &rule), 2.0, "{said}");
}

#[test]
fn what_a_guest_spent_leaves_less() {
    let house = House::new(MANUAL);
    let limits = json!({"maxTokenBudget": 1000, "maxNetworkEgressGB": 2});
    let guest = house.guest(json!({"resourceLimits": limits}));
    let id = guest["guestId"].as_str().unwrap();
    let activate = json!({"vmId": "vm", "agentEndpoint": "http://x"});
    house.host().post(&format!("/couch/guests/{id}/activate"), &activate).expect(200);
    for (tokens, gb, left) in [(400, 0.5, 600.0), (900, 1.5, 100.0), (1500, 1.5, 0.0)] {
        let usage = json!({"tokensUsed": tokens, "networkEgressGB": gb});
        house.host().put(&format!("/couch/guests/{id}/usage"), &usage).expect(200);
        let now = scrape(&house.host());
        assert_eq!(now.value("aegis_guest_tokens_left", &[("guest", id)]), left);
        assert_eq!(now.value("aegis_guest_egress_bytes_left", &[("guest", id)]), 2e9 - gb * 1e9);
        assert_eq!(now.value("aegis_llm_tokens_total", &[]), f64::from(tokens));
        assert_eq!(now.value("aegis_egress_bytes_total", &[]), gb * 1e9);
    }
}

#[test]
fn labels_are_words_of_the_daemon_alone() {
    let house = House::new(MANUAL);
    let before = scrape(&house.host());
    for n in 0..50 {
        house.anybody().get(&format!("/made/up/{n}?token={n}")).refused(404, "");
        house.anybody().get(&format!("/couch/guests/{n}/status")).refused(401, "");
        let word = format!("MAKE{n}");
        let method = hyper::Method::from_bytes(word.as_bytes()).unwrap();
        house.anybody().ask(method, "/couch/guests", None).unwrap().refused(405, "");
    }
    let after = scrape(&house.host());
    let name = "aegis_http_requests_total";
    let counted = |method, route, status| {
        grew(&before, &after, name, &[("method", method), ("route", route), ("status", status)])
    };
    assert_eq!(counted("GET", "unknown", "404"), 50.0);
    assert_eq!(counted("GET", "/couch/guests/{id}/status", "401"), 50.0);
    assert_eq!(counted("OTHER", "/couch/guests", "405"), 50.0);
    // Those three, and the scrape before.
    assert_eq!(after.series(name).len(), before.series(name).len() + 4);
}

#[test]
fn more_guests_than_are_shown_are_counted() {
    const SHOWN: usize = 500;
    let house = House::new(MANUAL);
    for _ in 0..SHOWN + 3 {
        house.guest(json!({}));
    }
    let now = scrape(&house.host());
    assert_eq!(now.value("aegis_guests_live", &[]), (SHOWN + 3) as f64);
    assert_eq!(now.value("aegis_guests_unlisted", &[]), 3.0);
    assert_eq!(now.series("aegis_guest_tokens_left").len(), SHOWN);
}
