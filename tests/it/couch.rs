//! The couch flow with guests that are activated by hand (contracts/couch.md 1 to 5): no machine is
//! made, so all of it is quick.

use std::process::Command;
use std::time::Duration;

use aegis_tests::house::{House, MANUAL};
use aegis_tests::wait_until;
use hyper::Method;
use hyper::header::HeaderName;
use serde_json::{Value, json};

fn id(guest: &Value) -> &str {
    guest["guestId"].as_str().unwrap()
}

fn activation() -> Value {
    json!({"vmId": "vm-1", "agentEndpoint": "http://127.0.0.1:9"})
}

/// Runs a script as a person would, with the port that the daemon got.
fn shell(house: &House, script: &str) -> Value {
    let script = script.replace("localhost:3000", &format!("localhost:{}", house.address().port()));
    let done = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&done.stdout)))
}

#[test]
fn the_curl_lines_of_the_seed_work_as_written() {
    let house = House::without_auth(MANUAL);
    let invite = shell(
        &house,
        r#"curl -X POST http://localhost:3000/couch/invites \
-H "Content-Type: application/json" \
-d '{"createdBy":"noah","label":"test"}'"#,
    );
    assert_eq!(invite["status"], "active");
    let code = invite["code"].as_str().unwrap();
    assert!(code.starts_with("inv_") && code.len() == 4 + 32, "{code}");

    let redeem = r#"curl -X POST http://localhost:3000/couch/redeem \
-H "Content-Type: application/json" \
-d '{"code":"inv_...", "name":"guest-1"}'"#;
    let guest = shell(&house, &redeem.replace("inv_...", code));
    assert_eq!(guest["status"], "provisioning");
    let token = guest["authToken"].as_str().unwrap();
    assert!(token.starts_with("guest_") && token.len() == 6 + 43, "{token}");

    let status = r#"curl "http://localhost:3000/couch/status?token=guest_...""#;
    let own = shell(&house, &status.replace("guest_...", token));
    assert_eq!(own["guestId"], guest["guestId"]);
    assert_eq!(own["name"], "guest-1");

    let list = shell(&house, "curl http://localhost:3000/couch/guests");
    assert_eq!(list["count"], 1);
    assert_eq!(list["guests"][0]["id"], guest["guestId"]);

    let kill = "curl -X DELETE http://localhost:3000/couch/guests/<GUEST_ID>";
    let killed = shell(&house, &kill.replace("<GUEST_ID>", id(&guest)));
    assert_eq!(killed["status"], "revoked");
    assert_eq!(killed["receipt"]["machines"], json!([]));

    let dead = shell(&house, &status.replace("guest_...", token));
    assert_eq!(dead["error"], "invalid or expired token");
}

#[test]
fn an_invite_says_what_was_asked_and_what_was_filled_in() {
    let house = House::new(MANUAL);
    let invite = house.invite(json!({
        "label": " for ty ",
        "resourceLimits": {"maxMemoryMB": 512, "maxCpuCores": 0.5},
        "permissions": {"canSpawnSubAgents": true},
    }));
    assert_eq!(invite["createdBy"], "noah");
    assert_eq!(invite["label"], "for ty");
    assert_eq!(
        invite["resourceLimits"],
        json!({"maxCpuCores": 0.5, "maxMemoryMB": 512, "maxDiskGB": 20, "maxNetworkEgressGB": 10,
               "maxDurationHours": 72, "maxTokenBudget": 50_000_000})
    );
    assert_eq!(
        invite["permissions"],
        json!({"canAccessInternet": true, "canSpawnSubAgents": true,
               "canAccessHostServices": false})
    );
    for name in ["createdAt", "expiresAt"] {
        let time = invite[name].as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z') && &time[19..20] == ".", "{time}");
    }
    assert_eq!(invite["id"].as_str().unwrap().len(), 26);
    for absent in ["redeemedAt", "redeemedBy", "guestId"] {
        assert!(invite.get(absent).is_none(), "{invite}");
    }
}

#[test]
fn an_invite_is_spent_once_and_shows_by_whom() {
    let house = House::new(MANUAL);
    let invite = house.invite(json!({}));
    let ask = json!({"code": invite["code"], "name": " ty "});
    let guest = house.anybody().post("/couch/redeem", &ask).expect(201);
    assert_eq!(guest["agentEndpoint"], Value::Null);
    assert_eq!(guest["resourceLimits"], invite["resourceLimits"]);
    house.anybody().post("/couch/redeem", &ask).refused(409, "");
    let spent = &house.host().get("/couch/invites?status=redeemed").expect(200)["invites"][0];
    assert_eq!(spent["redeemedBy"], "ty");
    assert_eq!(spent["guestId"], guest["guestId"]);
    assert!(spent["redeemedAt"].is_string());
    let path = format!("/couch/invites/{}", invite["id"].as_str().unwrap());
    let refused = house.host().delete(&path).refused(400, "");
    assert_eq!(refused["error"], "cannot revoke invite with status 'redeemed'");
}

#[test]
fn a_revoked_invite_lets_nobody_in() {
    let house = House::new(MANUAL);
    let invite = house.invite(json!({}));
    let path = format!("/couch/invites/{}", invite["id"].as_str().unwrap());
    let revoked = house.host().delete(&path).expect(200);
    assert_eq!(revoked["status"], "revoked");
    assert_eq!(revoked["id"], invite["id"]);
    let ask = json!({"code": invite["code"], "name": "ty"});
    house.anybody().post("/couch/redeem", &ask).refused(404, "");
    let again = house.host().delete(&path).refused(400, "");
    assert_eq!(again["error"], "cannot revoke invite with status 'revoked'");
    for unknown in ["01ARZ3NDEKTSV4RRFFQ69G5FAV", "nonsense"] {
        let none = house.host().delete(&format!("/couch/invites/{unknown}")).refused(404, "");
        assert_eq!(none["error"], "invite not found");
    }
}

#[test]
fn the_clock_ends_an_invite() {
    let house = House::new(MANUAL);
    let invite = house.invite(json!({"expiresInHours": 0.0001}));
    wait_until("the invite expires", Duration::from_secs(3), || {
        house.host().get("/couch/invites?status=expired").expect(200)["count"] == 1
    });
    let ask = json!({"code": invite["code"], "name": "ty"});
    house.anybody().post("/couch/redeem", &ask).refused(404, "");
    assert_eq!(house.host().get("/couch/invites?status=active").expect(200)["count"], 0);
}

#[test]
fn the_clock_ends_a_guest_at_once() {
    let house = House::new(MANUAL);
    let guest = house.guest(json!({"resourceLimits": {"maxDurationHours": 0.0002}}));
    let path = format!("/couch/status?token={}", guest["authToken"].as_str().unwrap());
    house.anybody().get(&path).expect(200);
    wait_until("the token dies", Duration::from_secs(2), || {
        house.anybody().get(&path).status == 404
    });
    let status = house.guest_status(id(&guest));
    assert_eq!(status["status"], "expired");
    // An expired guest can still be killed, once.
    let path = format!("/couch/guests/{}", id(&guest));
    assert_eq!(house.host().delete(&path).expect(200)["status"], "revoked");
    assert_eq!(house.host().delete(&path).refused(400, "")["error"], "guest already revoked");
}

#[test]
fn a_guest_is_activated_by_hand_and_killed() {
    let house = House::new(MANUAL);
    let guest = house.guest(json!({}));
    let at = |verb: &str| format!("/couch/guests/{}{verb}", id(&guest));
    for (field, body) in [
        ("vmId", json!({"vmId": " ", "agentEndpoint": "x"})),
        ("agentEndpoint", json!({"vmId": "x", "agentEndpoint": ""})),
        ("vmId", json!({})),
        ("vmId", json!({"vmId": 7, "agentEndpoint": "x"})),
    ] {
        house.host().post(&at("/activate"), &body).refused(400, field);
    }
    let active = house.host().post(&at("/activate"), &activation()).expect(200);
    assert_eq!(active["status"], "running");
    assert_eq!(active["vmId"], "vm-1");
    house.host().post(&at("/activate"), &activation()).refused(400, "");

    let own = house.anybody().bearer(guest["authToken"].as_str().unwrap());
    let own = own.get("/couch/status").expect(200);
    assert_eq!(own["agentEndpoint"], "http://127.0.0.1:9");
    assert_eq!(own["status"], "running");
    let status = house.host().get(&at("/status")).expect(200);
    assert_eq!(status["limitsExceeded"], false);
    assert_eq!(status["violations"], json!([]));
    assert!(status.get("stoppedAt").is_none());

    let killed = house.host().delete(&at("")).expect(200);
    assert_eq!(killed["status"], "revoked");
    assert_eq!(killed["receipt"]["machines"], json!([]));
    assert!(killed["receipt"]["elapsedMs"].is_u64());
    assert_eq!(killed["receipt"]["hash"].as_str().unwrap().len(), 64);
    assert_eq!(house.host().get(&at("/status")).expect(200)["stoppedAt"], killed["stoppedAt"]);
    assert_eq!(house.host().delete(&at("")).refused(400, "")["error"], "guest already revoked");
    house.host().post(&at("/activate"), &activation()).refused(400, "");
    for unknown in ["01ARZ3NDEKTSV4RRFFQ69G5FAV", "x"] {
        for (method, verb, body) in [
            (Method::DELETE, "", None),
            (Method::GET, "/status", None),
            (Method::POST, "/activate", Some(activation())),
            (Method::PUT, "/usage", Some(json!({"tokensUsed": 1}))),
            (Method::POST, "/freeze", None),
            (Method::POST, "/thaw", None),
        ] {
            let path = format!("/couch/guests/{unknown}{verb}");
            house.host().ask(method, &path, body.as_ref()).unwrap().refused(404, "");
        }
    }
}

#[test]
fn a_guest_freezes_only_when_it_runs() {
    let house = House::new(MANUAL);
    let guest = house.guest(json!({}));
    let at = |verb: &str| format!("/couch/guests/{}/{verb}", id(&guest));
    house.host().act(&at("freeze")).refused(400, "");
    house.host().act(&at("thaw")).refused(400, "");
    house.host().post(&at("activate"), &activation()).expect(200);
    house.host().act(&at("thaw")).refused(400, "");
    assert_eq!(house.host().act(&at("freeze")).expect(200)["status"], "frozen");
    let own = house.anybody().bearer(guest["authToken"].as_str().unwrap());
    assert_eq!(own.get("/couch/status").expect(200)["status"], "frozen");
    assert_eq!(house.host().act(&at("thaw")).expect(200)["status"], "running");
}

#[test]
fn reported_usage_only_grows_and_is_judged() {
    let house = House::new(MANUAL);
    let limits = json!({"maxTokenBudget": 1000, "maxDiskGB": 1, "maxNetworkEgressGB": 2});
    let guest = house.guest(json!({"resourceLimits": limits}));
    let path = format!("/couch/guests/{}/usage", id(&guest));
    let put = |body: Value| house.host().put(&path, &body);
    for field in ["cpuSeconds", "memoryPeakMB", "diskUsedGB", "networkEgressGB", "tokensUsed"] {
        for bad in [json!(-1), json!("5"), json!(null), json!([])] {
            put(json!({field: bad})).refused(400, field);
        }
    }
    put(json!({"tokens": 1})).refused(400, "tokens");
    let at_limit = put(json!({"tokensUsed": 1000, "diskUsedGB": 1})).expect(200);
    assert_eq!(at_limit["limitsExceeded"], false, "at the limit is not past it");
    let past = put(json!({"tokensUsed": 1500, "diskUsedGB": 5, "networkEgressGB": 3})).expect(200);
    assert_eq!(past["limitsExceeded"], true);
    let said: Vec<&str> =
        past["violations"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    for violation in ["tokens: 1500/1000", "disk: 5GB/1GB", "network: 3GB/2GB"] {
        assert!(said.contains(&violation), "{said:?}");
    }
    put(json!({"tokensUsed": 1499})).refused(400, "tokensUsed");
    let same = put(json!({"tokensUsed": 1500})).expect(200);
    assert_eq!(same["resourceUsage"]["diskUsedGB"], 5, "absent fields stay");
    assert_eq!(house.guest_status(id(&guest))["resourceUsage"], same["resourceUsage"]);
}

#[test]
fn sixty_four_clients_race_for_one_code() {
    let house = House::new(MANUAL);
    let code = house.invite(json!({}))["code"].clone();
    let start = std::sync::Barrier::new(64);
    let mut statuses: Vec<u16> = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..64)
            .map(|n| {
                let (house, code, start) = (&house, &code, &start);
                scope.spawn(move || {
                    let ask = json!({"code": code, "name": format!("racer {n}")});
                    start.wait();
                    house.anybody().post("/couch/redeem", &ask).status
                })
            })
            .collect();
        racers.into_iter().map(|r| r.join().unwrap()).collect()
    });
    statuses.sort();
    assert_eq!(statuses[0], 201);
    assert!(statuses[1..].iter().all(|s| *s == 409), "{statuses:?}");
    assert_eq!(house.host().get("/couch/guests").expect(200)["count"], 1);
}

#[test]
fn a_retry_with_the_same_key_gets_the_same_guest() {
    let house = House::new(MANUAL);
    let ask = json!({"code": house.invite(json!({}))["code"], "name": "ty"});
    let keyed = |key: &str| {
        let name = HeaderName::from_static("idempotency-key");
        house.anybody().with(name, key).post("/couch/redeem", &ask)
    };
    let first = keyed("k1").expect(201);
    let again = keyed("k1").expect(201);
    assert_eq!(first["guestId"], again["guestId"]);
    assert_eq!(first["authToken"], again["authToken"]);
    keyed("k2").refused(409, "");
    house.anybody().post("/couch/redeem", &ask).refused(409, "");
    keyed(&"k".repeat(256)).refused(400, "Idempotency-Key");
}

#[test]
fn lists_page_newest_first() {
    let house = House::new(MANUAL);
    let made: Vec<Value> =
        (0..7).map(|n| house.invite(json!({"label": format!("n{n}")}))).collect();
    let mut seen: Vec<Value> = Vec::new();
    let mut cursor = String::new();
    loop {
        let path = format!("/couch/invites?limit=3{cursor}");
        let page = house.host().get(&path).expect(200);
        let rows = page["invites"].as_array().unwrap();
        assert_eq!(page["count"], rows.len());
        assert!(rows.len() <= 3);
        seen.extend(rows.iter().cloned());
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen.len(), made.len(), "no hole, no duplicate");
    assert!(made.iter().all(|m| seen.contains(m)));
    // Two of the same millisecond have no order that anybody could tell.
    assert!(
        seen.is_sorted_by_key(|i| std::cmp::Reverse(i["createdAt"].as_str().map(str::to_owned)))
    );
    for bad in ["limit=0", "limit=1001", "limit=x", "status=gone"] {
        let field = bad.split('=').next().unwrap();
        house.host().get(&format!("/couch/invites?{bad}")).refused(400, field);
        house.host().get(&format!("/couch/guests?{bad}")).refused(400, field);
    }
}

#[test]
fn no_list_shows_a_guests_secret() {
    let house = House::new(MANUAL);
    let guest = house.guest(json!({}));
    let token = guest["authToken"].as_str().unwrap();
    let list = house.host().get("/couch/guests").expect(200);
    let row = list["guests"][0].as_object().unwrap();
    assert!(row.keys().all(|k| !k.to_lowercase().contains("token")), "{row:?}");
    assert!(row.keys().all(|k| !k.to_lowercase().contains("hash")), "{row:?}");
    let status = house.guest_status(id(&guest));
    for text in [list.to_string(), status.to_string()] {
        assert!(!text.contains(token));
    }
    // Nor does the disk: only its hash is kept.
    for entry in std::fs::read_dir(house.home().join("data")).unwrap().flatten() {
        let bytes = std::fs::read(entry.path()).unwrap();
        let found = bytes.windows(token.len()).any(|w| w == token.as_bytes());
        assert!(!found, "{}", entry.path().display());
    }
}

#[test]
fn a_restart_forgets_nothing() {
    let mut house = House::new(MANUAL);
    let spare = house.invite(json!({"label": "spare"}));
    let guest = house.guest(json!({}));
    let usage = format!("/couch/guests/{}/usage", id(&guest));
    house.host().put(&usage, &json!({"tokensUsed": 7})).expect(200);
    let (token, before) = (house.token(), house.guest_status(id(&guest)));
    assert!(house.stop().success(), "a stop in order is a success");
    assert!(!house.home().join("data/aegisd.pid").exists());
    house.start();
    assert_eq!(house.token(), token);
    assert_eq!(house.guest_status(id(&guest)), before);
    let path = format!("/couch/status?token={}", guest["authToken"].as_str().unwrap());
    house.anybody().get(&path).expect(200);
    let codes = house.host().get("/couch/invites?status=active").expect(200);
    assert_eq!(codes["invites"][0]["code"], spare["code"]);
}

#[test]
fn what_was_answered_survives_a_kill_right_after() {
    let mut house = House::new(MANUAL);
    for round in 0..5 {
        let invite = house.invite(json!({}));
        let ask = json!({"code": invite["code"], "name": format!("guest {round}")});
        let guest = house.anybody().post("/couch/redeem", &ask).expect(201);
        house.kill9();
        house.start();
        let path = format!("/couch/status?token={}", guest["authToken"].as_str().unwrap());
        assert_eq!(house.anybody().get(&path).expect(200)["guestId"], guest["guestId"]);
        house.anybody().post("/couch/redeem", &ask).refused(409, "");
    }
}

#[test]
fn no_room_leaves_the_code_valid() {
    let house = House::new("[capacity]\nmachines = 1\nvcpus = 1\nmemory_mb = 64\n");
    let invite = house.invite(json!({}));
    let ask = json!({"code": invite["code"], "name": "ty"});
    for _ in 0..2 {
        house.anybody().post("/couch/redeem", &ask).refused(503, "");
    }
    assert_eq!(house.host().get("/couch/invites?status=active").expect(200)["count"], 1);
}
