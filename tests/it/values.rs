//! Every bad value of contracts/couch.md 2 and 3 is refused, and the refusal names the field.

use aegis_tests::house::{House, MANUAL};
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
