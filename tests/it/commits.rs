//! Commits and forks of real machines (contracts/aegis.md 7): taken, started from, handed out by
//! invites, made from inside, and gone.

use std::collections::BTreeSet;
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::wait_until;
use serde_json::{Value, json};

use super::tree::{API, curl, rights, root, text};

/// What no two machines may have in common.
const NAMES: &str = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; hostname; \
                     head -c16 /dev/urandom | od -An -tx1";
/// Something that goes on, and says so.
const BEATS: &str = "echo kept > /root/kept; \
                     (while :; do echo x >> /tmp/beats; sleep 0.05; done) > /dev/null 2>&1 & echo $!";

#[track_caller]
fn goes_on(house: &House, id: &str, pid: &str) {
    let script = format!(
        "kill -0 {pid} && n=$(wc -l < /tmp/beats) && sleep 0.4 && test $(wc -l < /tmp/beats) -gt $n \
         && cat /root/kept"
    );
    assert_eq!(house.ok(id, &script), "kept");
}

fn commits(house: &House) -> Vec<Value> {
    house.socket().get("/v1/commits").expect(200).as_array().unwrap().clone()
}

#[track_caller]
fn make(house: &House, body: &Value) -> String {
    text(&house.socket().post("/v1/instances", body).expect(201), "id").to_owned()
}

#[test]
fn machines_are_kept_forked_handed_out_and_gone() {
    let mut house = House::new("");
    let web = root(&house, "web", rights(1));
    let pid = house.ok(&web, BEATS);
    let ask = |path: &str, body: Value| house.socket().post(path, &body);

    // Kept: by a name, with its memory.
    let golden = ask("/v1/instances/web/commit", json!({"name": "golden"})).expect(201);
    assert_eq!((&golden["memory"], &golden["in_use"]), (&json!(true), &json!(0)), "{golden}");
    assert_eq!((&golden["instance_id"], &golden["memory_mb"]), (&json!(web), &json!(256)));
    goes_on(&house, &web, &pid);

    // Started from: it goes on, as itself, and neither sees the other's files.
    let second = make(&house, &json!({"commit": "golden", "handle": "second"}));
    goes_on(&house, &second, &pid);
    house.ok(&second, "echo own > /root/own");
    assert_ne!(house.sh(&web, "cat /root/own").code, Some(0));
    assert_eq!(house.ok(&second, "hostname"), "second");
    assert_eq!(house.ok(&second, "echo $AEGIS_INSTANCE_ID"), second);
    let own = house.ok(&second, "curl -s http://127.0.0.1:7777/v1/self");
    let own: Value = serde_json::from_str(&own).unwrap();
    assert_eq!((&own["id"], &own["capabilities"]["spawn"]), (&json!(second), &json!(false)));
    let shown = house.socket().get("/v1/instances/second").expect(200);
    assert_eq!(shown["commit"], golden["id"]);
    // What does not go with saved memory is refused by name.
    for (extra, field) in [
        (json!({"memory_mb": 512}), "memory_mb"),
        (json!({"command": ["true"]}), "command"),
        (json!({"disk_gb": 1}), "disk_gb"),
        (json!({"image_ref": "other"}), "image_ref"),
        (json!({"from": "self"}), "from"),
        (json!({"attach": true}), "attach"),
    ] {
        let mut body = extra;
        body["commit"] = json!("golden");
        ask("/v1/instances", body).refused(400, field);
    }
    let absent = json!({"commit": "commit-01ARZ3NDEKTSV4RRFFQ69G5FAV"});
    assert_eq!(ask("/v1/instances", absent).refused(404, "")["code"], "commit_not_found");

    // Its disk alone serves machines of any size, with any command.
    let cold = json!({
        "commit": golden["id"], "disk_only": true, "memory_mb": 384, "command": ["sleep", "900"],
    });
    let cold = make(&house, &cold);
    assert_eq!(house.ok(&cold, "cat /root/kept"), "kept");
    // Its memory began anew, and with it what lies there.
    house.ok(&cold, "! test -e /tmp/beats");

    // Stopped and started again it boots from its own disk; in between the daemon was killed.
    house.socket().post("/v1/instances/second/stop", &json!({})).expect(200);
    house.kill9();
    house.start();
    house.socket().post("/v1/instances/second/start", &json!({})).expect(200);
    assert_eq!(house.ok("second", "cat /root/own /root/kept"), "own\nkept");
    let ask = |path: &str, body: Value| house.socket().post(path, &body);

    // Forked: all at once, each as itself.
    let forked = ask("/v1/instances/web/fork", json!({"count": 3, "handle": "try"})).expect(201);
    let ids: Vec<String> = forked["instances"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| text(one, "id").to_owned())
        .collect();
    let mut names: Vec<String> = Vec::new();
    for id in ids.iter().chain([&web, &second, &cold]) {
        names.extend(house.ok(id, NAMES).lines().map(str::to_owned));
    }
    let distinct: BTreeSet<&String> = names.iter().collect();
    assert_eq!(distinct.len(), names.len(), "{names:?}");
    ids.iter().for_each(|id| goes_on(&house, id, &pid));
    let card = |id: &String| house.ok(id, "cat /sys/class/net/eth0/address");
    let cards: BTreeSet<String> = ids.iter().chain([&web]).map(card).collect();
    assert_eq!(cards.len(), ids.len() + 1, "{cards:?}");
    let temporary = text(&forked["commit"], "id").to_owned();
    assert!(commits(&house).iter().any(|c| c["id"] == temporary && c["temporary"] == true));

    // Nobody takes away what machines lie on; with the last of them a temporary commit goes.
    let path = format!("/v1/commits/{}", text(&golden, "id"));
    assert_eq!(house.socket().delete(&path).refused(409, "")["code"], "commit_in_use");
    for id in &ids {
        house.socket().delete(&format!("/v1/instances/{id}")).expect(200);
    }
    wait_until("the temporary commit is swept", Duration::from_secs(30), || {
        !house.home().join("commits").join(&temporary).exists()
    });

    // Handed out: an invite's golden, which fits or is refused when it is made.
    let small = json!({
        "createdBy": "noah", "golden": golden["id"], "resourceLimits": {"maxMemoryMB": 128},
    });
    ask("/couch/invites", small).refused(400, "golden");
    let limits = json!({"maxMemoryMB": 512, "maxCpuCores": 1, "maxDiskGB": 1});
    let guest = house.guest(json!({"golden": golden["id"], "resourceLimits": limits}));
    let running = house.until(text(&guest, "guestId"), "running");
    goes_on(&house, text(&running, "vmId"), &pid);
    house.socket().delete(&format!("/couch/guests/{}", text(&guest, "guestId"))).expect(200);

    for id in ["second", &cold] {
        house.socket().delete(&format!("/v1/instances/{id}")).expect(200);
    }
    house.socket().delete(&path).expect(200);
    assert!(commits(&house).is_empty());
    let left: Vec<_> = std::fs::read_dir(house.home().join("commits")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    from_inside(&house, &web, &pid);
    secrets_stay(&house);
}

/// A machine forks itself, and its child; what it may not is refused before anything stands still.
fn from_inside(house: &House, web: &str, pid: &str) {
    let spawn = |body: &Value| curl(house, web, &format!("-X POST {API}/v1/instances -d '{body}'"));
    let (status, child) = spawn(&json!({"from": "self", "handle": "twin"}));
    assert_eq!(status, 201, "{child}");
    let child = text(&child, "id").to_owned();
    goes_on(house, &child, pid);
    let (_, own) = curl(house, &child, &format!("{API}/v1/self"));
    assert_eq!((&own["id"], &own["parent_id"]), (&json!(child), &json!(web)), "{own}");
    assert_eq!(own["capabilities"]["spawn"], false, "one level was given");
    house.ok(&child, "echo twin > /root/twin");
    let (status, grandchild) = spawn(&json!({"from": "twin", "disk_only": true}));
    assert_eq!(status, 201, "{grandchild}");
    assert_eq!(house.ok(text(&grandchild, "id"), "cat /root/twin /root/kept"), "twin\nkept");
    let (status, refused) = spawn(&json!({"commit": "golden"}));
    assert_eq!((status, &refused["field"]), (400, &json!("commit")), "{refused}");
    let (status, _) = spawn(&json!({"from": "web"}));
    assert_eq!(status, 404, "not its child");
    let before = commits(house).len();
    let (status, refused) = spawn(&json!({"from": "self"}));
    assert_eq!(status, 201, "{refused}");
    let (status, refused) = spawn(&json!({"from": "self"}));
    assert_eq!((status, &refused["rule"]), (403, &json!("max_children")), "{refused}");
    assert_eq!(commits(house).len(), before + 1, "a refused fork keeps nothing");
    // With the machine goes all that came from it.
    house.socket().delete(&format!("/v1/instances/{web}")).expect(200);
    wait_until("its forks' commits are swept", Duration::from_secs(30), || {
        commits(house).is_empty()
    });
}

/// Memory that has a secret is not given to others.
fn secrets_stay(house: &House) {
    let secret = json!({"value": "hunter2hunter2"});
    house.socket().put("/v1/secrets/PLAIN", &secret).expect(200);
    let body = json!({"command": ["sleep", "infinity"], "secrets": ["PLAIN"], "memory_mb": 256,
                      "disk_gb": 0.3, "handle": "keeper"});
    let id = make(house, &body);
    assert_eq!(house.ok(&id, "echo $PLAIN"), "hunter2hunter2");
    // Also when the record says no more that it has it.
    house.socket().put("/v1/instances/keeper/secrets", &json!({"secrets": []})).expect(200);
    let refused = house.socket().post("/v1/instances/keeper/commit", &json!({}));
    assert_eq!(refused.refused(409, "")["rule"], "secrets");
    let disk = house.socket().post("/v1/instances/keeper/commit", &json!({"disk_only": true}));
    assert_eq!(disk.expect(201)["memory"], false);
    house.socket().post("/v1/instances/keeper/stop", &json!({})).expect(200);
    let stopped = house.socket().post("/v1/instances/keeper/commit", &json!({}));
    assert_eq!(stopped.refused(409, "")["code"], "instance_state");
}
