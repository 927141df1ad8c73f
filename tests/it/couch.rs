//! contracts/couch.md over TCP and the host's socket, without machines.

use std::process::Command;
use std::sync::Arc;

use aegis_tests::House;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn the_seeds_own_curl_lines() {
    let house = House::new("provisioner = \"manual\"", &["--no-auth"]).await;
    let script =
        r#"set -e
invite=$(curl -s -X POST http://ADDR/couch/invites -H "Content-Type: application/json" -d '{"createdBy":"noah","label":"test"}')
code=$(echo "$invite" | sed 's/.*"code":"\([^"]*\)".*/\1/')
guest=$(curl -s -X POST http://ADDR/couch/redeem -H "Content-Type: application/json" -d "{\"code\":\"$code\", \"name\":\"guest-1\"}")
token=$(echo "$guest" | sed 's/.*"authToken":"\([^"]*\)".*/\1/')
id=$(echo "$guest" | sed 's/.*"guestId":"\([^"]*\)".*/\1/')
curl -s "http://ADDR/couch/status?token=$token"; echo
curl -s http://ADDR/couch/guests; echo
curl -s -X DELETE http://ADDR/couch/guests/$id"#
    .replace("ADDR", &house.address().replace("127.0.0.1", "localhost"));
    let out = Command::new("sh").arg("-c").arg(script).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines[0]["status"], "provisioning");
    assert_eq!(lines[1]["count"], 1);
    assert_eq!(lines[2]["status"], "revoked");
    assert_eq!(lines[2]["receipt"]["machines"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_of_the_routes() {
    let house = House::manual().await;
    let invite = house.invite(json!({"label": "for ty"})).await;
    assert!(invite["code"].as_str().unwrap().starts_with("inv_"));
    assert_eq!(invite["status"], "active");
    let id = invite["id"].as_str().unwrap();
    let redeem = json!({"code": invite["code"], "name": "ty"});

    for (body, status) in [
        (json!({"name": "ty"}), 400),
        (json!({"code": invite["code"], "name": " "}), 400),
        (json!({"code": "inv_nope", "name": "ty"}), 404),
        (json!({"code": invite["code"], "name": "ty", "publicKey": "nonsense"}), 400),
        (json!([]), 400),
    ] {
        house.host("POST", "/couch/redeem", body).await.expect(status);
    }
    let guest = house.host("POST", "/couch/redeem", redeem.clone()).await.expect(201);
    assert_eq!(guest["agentEndpoint"], Value::Null);
    house.host("POST", "/couch/redeem", redeem).await.expect(409);
    house.host("DELETE", &format!("/couch/invites/{id}"), json!(null)).await.expect(400);

    let other = house.invite(json!({})).await;
    let path = format!("/couch/invites/{}", other["id"].as_str().unwrap());
    assert_eq!(house.host("DELETE", &path, json!(null)).await.expect(200)["status"], "revoked");
    let code = json!({"code": other["code"], "name": "ty"});
    house.host("POST", "/couch/redeem", code).await.expect(404);
    house.host("DELETE", "/couch/invites/nope", json!(null)).await.expect(404);
    house.host("GET", "/couch/invites?status=odd", json!(null)).await.expect(400);
    let revoked = house.host("GET", "/couch/invites?status=revoked", json!(null)).await.expect(200);
    assert_eq!(revoked["count"], 1);

    let gid = guest["guestId"].as_str().unwrap();
    let at = |verb: &str| format!("/couch/guests/{gid}/{verb}");
    house
        .host("POST", &at("activate"), json!({"vmId": "", "agentEndpoint": "x"}))
        .await
        .expect(400);
    house.host("POST", &at("freeze"), json!(null)).await.expect(400);
    let live = json!({"vmId": "vm-1", "agentEndpoint": "http://10.0.0.1:1"});
    let active = house.host("POST", &at("activate"), live.clone()).await.expect(200);
    assert_eq!(active["status"], "running");
    house.host("POST", &at("activate"), live).await.expect(400);

    let used = json!({"tokensUsed": 50_000_001, "cpuSeconds": 1.5});
    let usage = house.host("PUT", &at("usage"), used).await.expect(200);
    assert_eq!(usage["violations"], json!(["tokens: 50000001/50000000"]));
    assert_eq!(usage["limitsExceeded"], true);
    for bad in [json!({"tokensUsed": 1}), json!({"tokensUsed": -1}), json!({"odd": 1})] {
        house.host("PUT", &at("usage"), bad).await.expect(400);
    }
    let list = house.host("GET", "/couch/guests?status=running", json!(null)).await;
    let text = String::from_utf8(list.body.clone()).unwrap();
    assert_eq!(list.expect(200)["count"], 1);
    assert!(!text.contains("guest_") && !text.to_lowercase().contains("token\""));

    let killed =
        house.host("DELETE", &format!("/couch/guests/{gid}"), json!(null)).await.expect(200);
    assert_eq!(killed["status"], "revoked");
    house.host("DELETE", &format!("/couch/guests/{gid}"), json!(null)).await.expect(400);
    house.host("DELETE", "/couch/guests/nope", json!(null)).await.expect(404);
    let token = guest["authToken"].as_str().unwrap();
    house.host("GET", &format!("/couch/status?token={token}"), json!(null)).await.expect(404);
    house.host("GET", "/couch/status", json!(null)).await.expect(400);

    let log = house.log();
    assert!(!log.contains(token) && !log.contains(invite["code"].as_str().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn host_routes_need_the_token_and_public_ones_do_not() {
    let house = House::manual().await;
    for (method, path) in [
        ("POST", "/couch/invites"),
        ("GET", "/couch/invites"),
        ("DELETE", "/couch/invites/x"),
        ("GET", "/couch/guests"),
        ("DELETE", "/couch/guests/x"),
        ("GET", "/couch/guests/x/status"),
        ("POST", "/couch/guests/x/activate"),
        ("PUT", "/couch/guests/x/usage"),
        ("POST", "/couch/guests/x/freeze"),
        ("POST", "/couch/guests/x/thaw"),
        ("GET", "/v1/status"),
        ("POST", "/v1/instances"),
        ("GET", "/v1/instances"),
        ("POST", "/v1/instances/prune"),
        ("GET", "/v1/instances/x"),
        ("DELETE", "/v1/instances/x"),
        ("POST", "/v1/instances/x/start"),
        ("POST", "/v1/instances/x/restart"),
        ("POST", "/v1/instances/x/stop"),
        ("POST", "/v1/instances/x/disable"),
        ("POST", "/v1/instances/x/pause"),
        ("POST", "/v1/instances/x/resume"),
        ("POST", "/v1/instances/x/exec"),
        ("GET", "/v1/instances/x/logs"),
    ] {
        for header in [vec![], vec![("authorization", "Bearer host_wrong")]] {
            let answer = house.tcp(method, path, b"{}", &header).await.unwrap();
            assert_eq!(answer.status, 401, "{method} {path}");
        }
    }
    let bearer = format!("Bearer {}", house.host_token());
    let with = [("authorization", bearer.as_str())];
    house.tcp("GET", "/couch/invites", b"", &with).await.unwrap().expect(200);
    house.tcp("POST", "/couch/redeem", b"{}", &[]).await.unwrap().expect(400);
}

#[tokio::test(flavor = "multi_thread")]
async fn load_and_abuse() {
    let house = House::new(
        "provisioner = \"manual\"\n[rate_limit]\nper_second = 1\nburst = 3",
        &["--no-auth"],
    )
    .await;
    let big = vec![b' '; 65 * 1024];
    house.tcp("POST", "/couch/invites", &big, &[]).await.unwrap().expect(413);
    house.tcp("POST", "/couch/invites", b"{\"createdBy\":", &[]).await.unwrap().expect(400);
    house.tcp("POST", "/couch/invites", b"\xff\xfe", &[]).await.unwrap().expect(400);
    let deep = vec![b'['; 60_000];
    house.tcp("POST", "/couch/invites", &deep, &[]).await.unwrap().expect(400);
    house.tcp("GET", "/nowhere", b"", &[]).await.unwrap().expect(404);
    house.tcp("PATCH", "/couch/invites", b"", &[]).await.unwrap().expect(405);
    for foreign in [("host", "evil.example"), ("origin", "http://evil.example")] {
        house.tcp("GET", "/couch/invites", b"", &[foreign]).await.unwrap().expect(403);
    }
    let mut limited = None;
    for _ in 0..5 {
        let answer = house.tcp("GET", "/couch/status?token=x", b"", &[]).await.unwrap();
        if answer.status == 429 {
            limited = Some(answer);
        }
    }
    let limited = limited.expect("five at once pass a burst of three");
    assert!(limited.headers.contains("retry-after: "));
    assert!(limited.json()["allowed"].as_str().unwrap().contains("per second"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_64_racers_gets_the_invite_and_a_retry_gets_the_same_guest() {
    let mut house = House::manual().await;
    let invite = house.invite(json!({})).await;
    let ask = json!({"code": invite["code"], "name": "ty"});
    let house_ref = Arc::new(house);
    let mut racers = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let (house, ask) = (Arc::clone(&house_ref), ask.to_string());
        racers.spawn(async move {
            house.tcp("POST", "/couch/redeem", ask.as_bytes(), &[]).await.unwrap().status
        });
    }
    let mut statuses = racers.join_all().await;
    statuses.sort_unstable();
    assert_eq!(statuses[0], 201);
    assert!(statuses[1..].iter().all(|s| *s == 409), "{statuses:?}");
    house = Arc::into_inner(house_ref).unwrap();

    let invite = house.invite(json!({})).await;
    let ask = json!({"code": invite["code"], "name": "ty"}).to_string();
    let key = [("idempotency-key", "once")];
    let first = house.tcp("POST", "/couch/redeem", ask.as_bytes(), &key).await.unwrap().expect(201);
    // What was acknowledged survives the end of the daemon at that instant.
    house.kill_9();
    house.start().await;
    let again = house.tcp("POST", "/couch/redeem", ask.as_bytes(), &key).await.unwrap().expect(201);
    assert_eq!(first, again);
    let other = [("idempotency-key", "other")];
    house.tcp("POST", "/couch/redeem", ask.as_bytes(), &other).await.unwrap().expect(409);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_page_and_time_ends_things() {
    let house = House::manual().await;
    for _ in 0..7 {
        house.invite(json!({})).await;
    }
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let path = format!("/couch/invites?limit=3{cursor}");
        let page = house.host("GET", &path, json!(null)).await.expect(200);
        let rows = page["invites"].as_array().unwrap();
        seen.extend(rows.iter().map(|i| i["id"].as_str().unwrap().to_owned()));
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen.len(), 7);
    assert!(seen.windows(2).all(|w| w[0] > w[1]));
    house.host("GET", "/couch/invites?limit=0", json!(null)).await.expect(400);

    // A third of a second, in hours: over by itself, though nobody lists anything.
    let short = 0.0001;
    let invite = house.invite(json!({"expiresInHours": short})).await;
    let guest = house.guest(json!({"resourceLimits": {"maxDurationHours": short}})).await;
    let token = guest["authToken"].as_str().unwrap();
    let path = format!("/couch/status?token={token}");
    house
        .until("the token is dead", async |h: &House| {
            (h.host("GET", &path, json!(null)).await.status == 404).then_some(())
        })
        .await;
    let ask = json!({"code": invite["code"], "name": "ty"});
    house.host("POST", "/couch/redeem", ask).await.expect(404);
    let gid = guest["guestId"].as_str().unwrap();
    // An expired guest can still be killed.
    house.host("DELETE", &format!("/couch/guests/{gid}"), json!(null)).await.expect(200);
}
