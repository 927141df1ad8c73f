//! Every bad value of contracts/couch.md 2 and 3 is refused, and the refusal names the field.

use aegis_tests::house::{House, MANUAL};
use bytes::Bytes;
use hyper::Method;
use hyper::header::HeaderName;
use serde_json::{Value, json};

#[test]
fn bad_values_of_an_invite_are_named() {
    let house = House::new(MANUAL);
    let refused =
        |field: &str, body: Value| house.host().post("/couch/invites", &body).refused(400, field);
    let with = |key: &str, value: Value| {
        let mut body = json!({"createdBy": "noah"});
        body[key] = value;
        body
    };
    for bad in [json!({}), json!({"createdBy": "  "}), json!({"createdBy": 7})] {
        refused("createdBy", bad);
    }
    refused("surprise", with("surprise", json!(1)));
    for bad in [json!(0), json!(-1), json!(720.1), json!("24"), json!([])] {
        refused("expiresInHours", with("expiresInHours", bad));
    }
    let limits = [
        "maxCpuCores",
        "maxMemoryMB",
        "maxDiskGB",
        "maxNetworkEgressGB",
        "maxDurationHours",
        "maxTokenBudget",
    ];
    for limit in limits {
        let field = format!("resourceLimits.{limit}");
        for bad in [json!(0), json!(-1), json!("1"), json!(1e300), json!(null), json!({})] {
            let body = refused(&field, with("resourceLimits", json!({limit: bad})));
            assert!(body["allowed"].as_str().is_some_and(|a| !a.is_empty()), "{body}");
        }
    }
    let too_long = json!({"maxDurationHours": 720.1});
    refused("resourceLimits.maxDurationHours", with("resourceLimits", too_long));
    refused("resourceLimits.maxCpu", with("resourceLimits", json!({"maxCpu": 1})));
    refused("resourceLimits", with("resourceLimits", json!([])));
    refused("permissions.root", with("permissions", json!({"root": true})));
    for name in ["canAccessInternet", "canSpawnSubAgents", "canAccessHostServices"] {
        for bad in [json!("yes"), json!(1), json!(null)] {
            refused(&format!("permissions.{name}"), with("permissions", json!({name: bad})));
        }
    }
    for (name, bad) in [
        ("agentPort", json!(0)),
        ("agentPort", json!(65536)),
        ("onLimit", json!("explode")),
        ("golden", json!("../etc")),
        ("egressAllow", json!("all")),
        ("hostServices", json!([""])),
        ("spawnDepth", json!(-1)),
        ("maxChildren", json!(1.5)),
    ] {
        refused(name, with(name, bad));
    }
    assert_eq!(house.host().get("/couch/invites").expect(200)["count"], 0);
}

#[test]
fn the_ends_of_every_range_pass() {
    let house = House::new(MANUAL);
    for hours in [json!(720), json!(0.001)] {
        house.invite(json!({"expiresInHours": hours}));
        house.invite(json!({"resourceLimits": {"maxDurationHours": hours}}));
    }
    let invite = house.invite(json!({"resourceLimits": {"maxCpuCores": 0.5, "maxDiskGB": 0.1}}));
    assert_eq!(invite["resourceLimits"]["maxCpuCores"], 0.5);
    assert_eq!(invite["resourceLimits"]["maxDiskGB"], 0.1);
}

#[test]
fn bad_values_of_a_redeem_are_named() {
    let house = House::new(MANUAL);
    let code = house.invite(json!({}))["code"].clone();
    let redeem = |body: Value| house.anybody().post("/couch/redeem", &body);
    for bad in [json!(null), json!(""), json!("  "), json!(7)] {
        redeem(json!({"code": bad, "name": "ty"})).refused(400, "code");
        redeem(json!({"code": code, "name": bad})).refused(400, "name");
    }
    redeem(json!({"name": "ty"})).refused(400, "code");
    redeem(json!({"code": code})).refused(400, "name");
    redeem(json!({"code": code, "name": "n".repeat(201)})).refused(400, "name");
    for bad in [json!("not a key"), json!(7), json!("ssh-ed25519 AAAA")] {
        let body = json!({"code": code, "name": "ty", "publicKey": bad});
        redeem(body).refused(400, "publicKey");
    }
    redeem(json!({"code": code, "name": "ty", "admin": true})).refused(400, "admin");
    for unknown in ["inv_", "inv_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "x", "' OR 1=1 --"] {
        redeem(json!({"code": unknown, "name": "ty"})).refused(404, "");
    }
    // None of it spent the code.
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";
    redeem(json!({"code": code, "name": "ty", "publicKey": key})).expect(201);
}

#[test]
fn a_status_needs_a_living_token() {
    let house = House::new(MANUAL);
    let none = house.anybody().get("/couch/status").refused(400, "");
    assert_eq!(none["error"], "token query parameter required");
    house.anybody().get("/couch/status?token=").refused(400, "");
    for token in ["guest_", "guest_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "x", "%00"] {
        let dead = house.anybody().get(&format!("/couch/status?token={token}")).refused(404, "");
        assert_eq!(dead["error"], "invalid or expired token");
    }
    // The host's token opens no guest's door.
    house.host().get("/couch/status").refused(404, "");
}

/// Each limit with the least and the most that is taken, what is just outside, and what is no number.
#[test]
fn each_limit_has_a_range_that_its_refusal_tells() {
    let house = House::new(MANUAL);
    let ask = |limit: &str, value: &Value| {
        let body = json!({"createdBy": "noah", "resourceLimits": {limit: value}});
        house.host().post("/couch/invites", &body)
    };
    for (limit, least, most) in [
        ("maxCpuCores", 0.05, 64.0),
        ("maxMemoryMB", 128.0, 1_048_576.0),
        ("maxDiskGB", 0.02, 65_536.0),
        ("maxNetworkEgressGB", 1e-9, 1e6),
        ("maxDurationHours", 1e-6, 720.0),
        ("maxTokenBudget", 1.0, 1e15),
    ] {
        for good in [least, most] {
            ask(limit, &json!(good)).expect(201);
        }
        let outside = [least * 0.99, most * 1.001, 0.0, -0.0, -least, f64::MAX, 5e-324];
        let outside = outside.map(|n| json!(n));
        let odd = [json!(true), json!("1"), json!([1]), json!({}), json!(null), json!(i64::MIN)];
        for bad in outside.iter().chain(&odd) {
            let answer = ask(limit, bad);
            let body = answer.refused(400, &format!("resourceLimits.{limit}"));
            let allowed = body["allowed"].as_str().unwrap_or_default();
            for end in [least, most] {
                assert!(allowed.contains(&end.to_string()), "{limit}: {allowed}");
            }
            let error = body["error"].as_str().unwrap();
            assert!(error.contains(limit), "{error}");
        }
    }
    // JSON has no such numbers.
    for text in ["NaN", "Infinity", "-Infinity", "1e999", "01", "+1", "0x1", "1."] {
        let body = format!("{{\"createdBy\":\"n\",\"resourceLimits\":{{\"maxCpuCores\":{text}}}}}");
        let answer = house.host().send(Method::POST, "/couch/invites", Bytes::from(body)).unwrap();
        answer.refused(400, "");
    }
}

#[test]
fn each_optional_field_of_an_invite_is_checked() {
    let house = House::new(MANUAL);
    let ask = |field: &str, value: &Value| {
        let mut body = json!({"createdBy": "noah"});
        body[field] = value.clone();
        house.host().post("/couch/invites", &body)
    };
    let long = "x".repeat(256);
    let names = |count: usize| json!(vec!["x"; count]);
    let rows: [(&str, Vec<Value>, Vec<Value>); 12] = [
        (
            "createdBy",
            vec![json!("x"), json!("n".repeat(200)), json!("é".repeat(200))],
            vec![
                json!(null),
                json!(""),
                json!("\n"),
                json!("n".repeat(201)),
                json!("a\u{0}b"),
                json!([]),
            ],
        ),
        (
            "label",
            vec![json!(null), json!(""), json!("  "), json!("l".repeat(200))],
            vec![json!(7), json!("l".repeat(201)), json!("a\u{1b}[2Jb"), json!({"a": 1})],
        ),
        (
            "expiresInHours",
            vec![json!(null), json!(1e-6), json!(720), json!(0.5)],
            vec![json!(0), json!(-0.0), json!(720.0001), json!(true), json!("1"), json!(1e300)],
        ),
        ("resourceLimits", vec![json!(null), json!({})], vec![json!("x"), json!(1), json!([1])]),
        ("permissions", vec![json!(null), json!({})], vec![json!("x"), json!(true), json!([])]),
        (
            "golden",
            vec![json!(null), json!("base")],
            vec![
                json!(""),
                json!(7),
                json!("a b"),
                json!("../x"),
                json!("/etc"),
                json!("x".repeat(5000)),
            ],
        ),
        (
            "agentPort",
            vec![json!(null), json!(1), json!(65535)],
            vec![json!(0), json!(65536), json!(-1), json!(1.5), json!("80"), json!(u64::MAX)],
        ),
        (
            "egressAllow",
            vec![json!(null), json!([]), json!(["*.example.com", "1.2.3.0/24"]), names(256)],
            vec![
                json!("all"),
                json!([7]),
                json!([" "]),
                json!(["http://a.b"]),
                json!([long]),
                names(257),
                json!({}),
            ],
        ),
        (
            "hostServices",
            vec![json!(null), json!([]), json!(["git"])],
            vec![json!(true), json!([null]), json!([""]), names(257)],
        ),
        (
            "spawnDepth",
            vec![json!(null), json!(0), json!(16)],
            vec![json!(17), json!(-1), json!(0.5), json!("1"), json!(1e30)],
        ),
        (
            "maxChildren",
            vec![json!(null), json!(0), json!(10_000)],
            vec![json!(10_001), json!(-1), json!([]), json!("many")],
        ),
        (
            "onLimit",
            vec![json!(null), json!("throttle"), json!("freeze"), json!("kill")],
            vec![json!("Kill"), json!(""), json!(1), json!(["kill"])],
        ),
    ];
    for (field, good, bad) in rows {
        for value in good {
            ask(field, &value).expect(201);
        }
        for value in bad {
            let body = ask(field, &value).refused(400, field);
            let error = body["error"].as_str().unwrap();
            assert!(error.contains(field) && error.len() < 1000, "{field}: {error}");
        }
    }
    for (group, known) in [("resourceLimits", "maxDiskGB"), ("permissions", "canAccessInternet")] {
        for odd in ["x", "maxdiskgb", "__proto__", &long] {
            let said = ask(group, &json!({odd: 1})).refused(400, "");
            assert!(said["allowed"].as_str().unwrap().contains(known), "{said}");
            let named: String = odd.chars().take(64).collect();
            assert_eq!(said["field"], format!("{group}.{named}"));
        }
    }
}

#[test]
fn a_code_or_a_name_that_is_none_spends_nothing() {
    let house = House::new(MANUAL);
    let invite = house.invite(json!({}));
    let code = invite["code"].as_str().unwrap();
    let redeem = |body: &Value| house.anybody().post("/couch/redeem", body);
    for bad in [json!("a\nb"), json!("\u{7f}"), json!(["ty"]), json!({"a": 1}), json!(true)] {
        redeem(&json!({"code": code, "name": bad})).refused(400, "name");
    }
    for bad in [json!([code]), json!({}), json!(true), json!(0)] {
        redeem(&json!({"code": bad, "name": "ty"})).refused(400, "code");
    }
    let other_case = code.to_uppercase();
    let longer = format!("{code}A");
    let zero = format!("{code}\u{0}");
    for unknown in
        [&code[..code.len() - 1], &longer, &other_case, &zero, "inv_%", "\u{1f4a9}", &code[4..]]
    {
        let said = redeem(&json!({"code": unknown, "name": "ty"})).refused(404, "");
        assert!(!said.to_string().contains(code), "{said}");
    }
    let huge = "x".repeat(60_000);
    redeem(&json!({"code": huge, "name": "ty"})).refused(404, "");
    for bad in [
        "ssh-rsa",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ\nssh-rsa x",
        "command=\"id\" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ] {
        redeem(&json!({"code": code, "name": "ty", "publicKey": bad})).refused(400, "publicKey");
    }
    let keyed = |key: &str| {
        let name = HeaderName::from_static("idempotency-key");
        house.anybody().with(name, key).post("/couch/redeem", &json!({"code": code, "name": "ty"}))
    };
    for bad in ["", &"k".repeat(256)] {
        keyed(bad).refused(400, "Idempotency-Key");
    }
    assert_eq!(house.host().get("/couch/invites?status=active").expect(200)["count"], 1);
    // Blanks around a code are the pencil's, not the code's.
    redeem(&json!({"code": format!(" {code}\n"), "name": "ty"})).expect(201);
}

#[test]
fn a_guests_routes_judge_what_the_host_says() {
    let house = House::new(MANUAL);
    let guest = house.guest(json!({}));
    let at = |verb: &str| format!("/couch/guests/{}{verb}", guest["guestId"].as_str().unwrap());
    let text = "x".repeat(2049);
    for (field, bad) in [
        ("vmId", json!(text)),
        ("vmId", json!("a\u{0}")),
        ("vmId", json!(null)),
        ("agentEndpoint", json!(text)),
        ("agentEndpoint", json!(["x"])),
        ("surprise", json!("x")),
    ] {
        let mut body = json!({"vmId": "vm", "agentEndpoint": "http://x"});
        body[field] = bad;
        house.host().post(&at("/activate"), &body).refused(400, field);
    }
    for field in [
        "cpuSeconds",
        "memoryPeakMB",
        "diskUsedGB",
        "networkEgressGB",
        "tokensUsed",
        "uptimeSeconds",
    ] {
        let put = |value: Value| house.host().put(&at("/usage"), &json!({field: value}));
        for bad in [json!(-1), json!(-1e-9), json!("1"), json!(true), json!(null), json!(1e300)] {
            put(bad).refused(400, field);
        }
        assert_eq!(put(json!(7)).expect(200)["resourceUsage"][field], 7);
        put(json!(6)).refused(400, field);
        assert_eq!(put(json!(7)).expect(200)["resourceUsage"][field], 7);
    }
    for empty in [json!(null), json!([]), json!(7)] {
        house.host().put(&at("/usage"), &empty).refused(400, "");
        house.host().post(&at("/activate"), &empty).refused(400, "");
    }
    for word in ["status=", "status=Running", "status=active", "status=%20"] {
        house.host().get(&format!("/couch/guests?{word}")).refused(400, "status");
    }
    for word in ["status=", "status=running", "status=ACTIVE"] {
        house.host().get(&format!("/couch/invites?{word}")).refused(400, "status");
    }
}
