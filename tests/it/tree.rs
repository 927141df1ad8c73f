//! Machines that spawn machines: the guest API from inside real ones (contracts/aegis.md 2 to 5,
//! seeds/003). A boot costs seconds, so one machine serves many looks.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::{look, wait_for, wait_until};
use serde_json::{Value, json};

/// Where the guest API is, inside.
pub(super) const API: &str = "http://127.0.0.1:7777";

pub(super) fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name}: {value}"))
}

/// A house that also has the base image under the name that the manual's example uses.
fn house() -> House {
    let house = House::new("");
    let images = house.home().join("images");
    let base = std::fs::canonicalize(&images).unwrap().join("base");
    std::fs::remove_file(&images).unwrap();
    std::fs::create_dir(&images).unwrap();
    for name in ["base", "python:3.12"] {
        symlink(&base, images.join(name)).unwrap();
    }
    house
}

pub(super) fn rights(depth: u32) -> Value {
    json!({
        "spawn": true,
        "spawn_depth": depth,
        "max_children": 3,
        "allowed_images": ["base", "python:3.12"],
        "max_memory_mb": 512,
        "max_vcpus": 1,
        "max_expose_ports": 2,
    })
}

/// Makes an instance of the host with these capabilities.
pub(super) fn root(house: &House, handle: &str, capabilities: Value) -> String {
    let body = json!({
        "handle": handle, "command": ["sleep", "infinity"], "idle_policy": "leave-running",
        "vcpus": 1, "memory_mb": 256, "disk_gb": 0.3, "capabilities": capabilities,
        "envelope": {"vcpus": 8, "memory_mb": 2048, "disk_gb": 4},
    });
    let made = house.socket().post("/v1/instances", &body).expect(201);
    text(&made, "id").to_owned()
}

/// What curl inside a machine gets: status and body.
#[track_caller]
pub(super) fn curl(house: &House, machine: &str, words: &str) -> (u64, Value) {
    let ran = house.sh(machine, &format!("curl -sS -m 70 -w '\\n%{{http_code}}' {words}"));
    let said = ran.text();
    assert_eq!(ran.code, Some(0), "{words}: {said} {}", String::from_utf8_lossy(&ran.err));
    let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
    let body = serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned()));
    (status.parse().unwrap(), body)
}

#[track_caller]
pub(super) fn get(house: &House, machine: &str, path: &str) -> Value {
    let (status, body) = curl(house, machine, &format!("{API}{path}"));
    assert_eq!(status, 200, "{path}: {body}");
    body
}

#[track_caller]
fn post(house: &House, machine: &str, path: &str, body: &Value) -> (u64, Value) {
    curl(house, machine, &format!("-X POST {API}{path} -d '{body}'"))
}

pub(super) fn small(extra: Value) -> Value {
    let mut body = json!({"command": ["sleep", "infinity"], "vcpus": 0.5, "memory_mb": 128,
                          "disk_gb": 0.1, "idle_policy": "leave-running"});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[track_caller]
fn spawn(house: &House, machine: &str, extra: Value) -> String {
    let (status, child) = post(house, machine, "/v1/instances", &small(extra));
    assert_eq!(status, 201, "{child}");
    assert_eq!(child["state"], "starting", "{child}");
    text(&child, "id").to_owned()
}

/// A refusal that says what an agent needs to do better.
#[track_caller]
pub(super) fn denied(answer: &(u64, Value), status: u64, code: &str, rule: &str) {
    let (got, body) = answer;
    assert_eq!(*got, status, "{body}");
    assert_eq!(body["code"], code, "{body}");
    assert!(body["error"].as_str().is_some_and(|e| !e.is_empty()), "{body}");
    if !rule.is_empty() {
        assert_eq!(body["rule"], rule, "{body}");
        for name in ["requested", "allowed", "hint"] {
            assert!(!body[name].is_null(), "no {name}: {body}");
        }
    }
}

/// All events, each chain checked from its first row.
pub(super) fn trail(house: &House) -> Vec<Value> {
    use sha2::{Digest as _, Sha256};
    let events = house.socket().get("/v1/audit").lines();
    let mut last: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for event in &events {
        let previous = last.entry(text(event, "tree").to_owned()).or_insert(vec![0; 32]);
        let mut hash = Sha256::new();
        hash.update(&previous);
        let (position, at) = (event["position"].to_string(), event["at_ms"].to_string());
        for field in [
            text(event, "tree"),
            &position,
            &at,
            text(event, "actor"),
            text(event, "kind"),
            text(event, "subject"),
            text(event, "data"),
        ] {
            hash.update((field.len() as u64).to_be_bytes());
            hash.update(field.as_bytes());
        }
        *previous = hash.finalize().to_vec();
        let hex: String = previous.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(text(event, "hash"), hex, "the chain is broken at {event}");
    }
    events
}

#[test]
fn a_machine_does_what_the_manual_says() {
    let house = house();
    let bot = root(&house, "my-bot", rights(2));

    // The lines of seeds/003, word for word.
    let (status, own) = curl(&house, &bot, "http://127.0.0.1:7777/v1/self");
    assert_eq!(status, 200, "{own}");
    assert_eq!(own["id"], bot);
    assert_eq!(own["handle"], "my-bot");
    assert_eq!(own["state"], "running");
    assert_eq!(own["image"], "base");
    assert_eq!(own["parent_id"], "");
    assert_eq!(own["capabilities"]["max_children"], 3);
    assert_eq!(own["envelope"]["limit"]["memory_mb"], 2048);
    assert_eq!(own["envelope"]["spent"]["memory_mb"], 256);
    assert_eq!(own["envelope"]["left"]["memory_mb"], 1792);
    let (status, child) = curl(
        &house,
        &bot,
        r#"-X POST http://127.0.0.1:7777/v1/instances \
  -H "Content-Type: application/json" \
  -d '{"command":["python3","-m","http.server","8080"],"image_ref":"python:3.12","exposes":[8080]}'"#,
    );
    assert_eq!(status, 201, "{child}");
    assert_eq!(child["state"], "starting");
    assert_eq!(child["parent_id"], bot);
    let served = text(&child, "id").to_owned();
    let endpoint = child["endpoints"][0].clone();
    assert_eq!(endpoint["guest_port"], 8080, "{child}");
    let (_, list) = curl(&house, &bot, "http://127.0.0.1:7777/v1/instances");
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    assert_eq!(list[0]["id"], served);

    // The environment names the API, and the token is in nobody's.
    let env = house.sh(&bot, "echo $AEGIS_GUEST_API $AEGIS_INSTANCE_ID");
    assert_eq!(env.text(), format!("{API} {bot}"));
    let search = "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -c '^eyJ'";
    assert_eq!(house.sh(&bot, search).text(), "0");
    // The socket serves the same.
    let (status, same) =
        curl(&house, &bot, "--unix-socket /run/aegis/guestd.sock http://aegis/v1/self");
    assert_eq!((status, &same["id"]), (200, &own["id"]));

    // Its own child, by id and by handle, as a host sees it too.
    let listed = house.socket().get(&format!("/v1/instances?parent_id={bot}")).expect(200);
    assert_eq!(listed[0]["id"], served);
    let worker = spawn(
        &house,
        &bot,
        json!({"handle": "work-1", "env": {"COLOR": "blue"},
        "command": ["sh", "-c", "echo hello $COLOR; sleep infinity"]}),
    );
    assert_eq!(get(&house, &bot, "/v1/instances/work-1")["id"], worker);
    let exec = json!({"command": ["sh", "-c", "echo out; cat >&2; exit 3"], "stdin": "err\n"});
    let (status, lines) = post(&house, &bot, "/v1/instances/work-1/exec", &exec);
    assert_eq!(status, 200);
    let lines: Vec<Value> =
        lines.as_str().unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ran = aegis_tests::house::Ran::of(&lines);
    assert_eq!((ran.out, ran.err, ran.code), (b"out\n".to_vec(), b"err\n".to_vec(), Some(3)));
    assert!(lines[1..lines.len() - 1].iter().all(|l| l["instance_id"] == worker), "{lines:?}");
    let (status, logs) = curl(&house, &bot, &format!("'{API}/v1/instances/work-1/logs?tail=10'"));
    assert!(status == 200 && logs.to_string().contains("hello blue"), "{logs}");

    // What the outside reaches by the child's endpoint is the child.
    let address = text(&endpoint, "url").strip_prefix("http://").unwrap().parse().unwrap();
    let page = wait_for("the child's page", Duration::from_secs(60), || {
        let ask = aegis_tests::http::Client::tcp(address).ask(hyper::Method::GET, "/", None);
        ask.ok().filter(|a| a.status == 200)
    });
    assert!(String::from_utf8_lossy(&page.body).contains("Directory listing"));

    // A lease, and ports of its own.
    let (status, lease) =
        post(&house, &bot, "/v1/self/keepalive", &json!({"ttl_ms": 30000, "reason": "building"}));
    assert_eq!((status, &lease["lease_held"]), (200, &json!(true)), "{lease}");
    let seen = house.socket().get(&format!("/v1/instances/{bot}")).expect(200);
    assert_eq!(seen["lease_reason"], "building");
    let (status, gone) = curl(&house, &bot, &format!("-X DELETE {API}/v1/self/keepalive"));
    assert_eq!((status, &gone["lease_held"]), (200, &json!(false)), "{gone}");
    let (status, open) = post(&house, &bot, "/v1/self/expose", &json!({"guest_port": 9090}));
    assert_eq!((status, &open["guest_port"]), (200, &json!(9090)), "{open}");
    post(&house, &bot, "/v1/self/expose", &json!({"port": 9091, "protocol": "tcp"}));
    denied(
        &post(&house, &bot, "/v1/self/expose", &json!({"port": 9092})),
        403,
        "capability_denied",
        "max_expose_ports",
    );
    assert_eq!(get(&house, &bot, "/v1/self")["endpoints"].as_array().unwrap().len(), 2);
    let (status, _) = curl(&house, &bot, &format!("-X DELETE {API}/v1/self/expose/9091"));
    assert_eq!(status, 200);
    assert_eq!(get(&house, &bot, "/v1/self")["endpoints"].as_array().unwrap().len(), 1);

    // What it may not.
    let no = |extra: Value, status: u64, code: &str, rule: &str| {
        denied(&post(&house, &bot, "/v1/instances", &small(extra)), status, code, rule);
    };
    no(json!({"memory_mb": 4096}), 403, "capability_denied", "max_memory_mb");
    no(json!({"vcpus": 2}), 403, "capability_denied", "max_vcpus");
    no(json!({"image_ref": "node:22"}), 403, "capability_denied", "allowed_images");
    no(json!({"exposes": [1, 2, 3]}), 403, "capability_denied", "max_expose_ports");
    no(json!({"secrets": ["KEY"]}), 403, "capability_denied", "allowed_secrets");
    no(json!({"workspace": "/etc"}), 403, "capability_denied", "allowed_workspaces");
    no(json!({"disk_gb": 60}), 409, "envelope_exhausted", "envelope.disk_gb");
    no(json!({"handle": "my-bot"}), 409, "handle_taken", "");
    for (bad, field) in [
        (json!({"handle": "-x"}), "handle"),
        (json!({"memory_mb": -1}), "memory_mb"),
        (json!({"exposes": [0]}), "exposes[0]"),
        (json!({"attach": true}), "attach"),
    ] {
        let (status, body) = post(&house, &bot, "/v1/instances", &small(bad));
        assert_eq!((status, &body["field"]), (400, &json!(field)), "{body}");
    }
    let (status, body) =
        post(&house, &bot, "/v1/instances", &small(json!({"parent_id": "inst-x"})));
    assert_eq!(status, 400, "{body}");

    // The host opens and closes ports, and sees what is left.
    let at = |path: &str| format!("/v1/instances/my-bot{path}");
    let open = house.socket().post(&at("/expose"), &json!({"port": 9095})).expect(200);
    let public = open["public_port"].as_u64().unwrap();
    let again = house.socket().post(&at("/expose"), &json!({"guest_port": 9095})).expect(200);
    assert_eq!(again["public_port"], public, "a repeat is fine");
    let taken = json!({"guest_port": 9096, "public_port": public});
    house.socket().post(&at("/expose"), &taken).refused(400, "public_port");
    house.socket().delete(&at("/expose/9095")).expect(200);
    house.socket().delete(&at("/expose/9095")).refused(404, "");
    assert!(std::net::TcpStream::connect(("127.0.0.1", public as u16)).is_err());
    let room = house.socket().get(&at("/envelope")).expect(200);
    assert_eq!(room["limit"]["memory_mb"], 2048, "{room}");
    let seen = house.socket().get(&at("")).expect(200);
    assert_eq!(seen["envelope"]["spent"]["memory_mb"], room["spent"]["memory_mb"], "{seen}");
    let by_handle = house.socket().get("/v1/instances?parent_id=my-bot").expect(200);
    assert_eq!(by_handle.as_array().unwrap().len(), 2, "{by_handle}");

    // Its end, synchronous with the answer.
    let (status, body) =
        curl(&house, &bot, &format!("-X POST http://127.0.0.1:7777/v1/instances/{served}/stop"));
    assert_eq!((status, body), (200, json!({"status": "stopped"})));
    assert_eq!(get(&house, &bot, &format!("/v1/instances/{served}"))["state"], "stopped");
    let (status, body) = curl(&house, &bot, &format!("-X POST {API}/v1/instances/{served}/start"));
    assert_eq!((status, body), (200, json!({"status": "starting"})));
    let (status, body) = curl(&house, &bot, &format!("-X DELETE {API}/v1/instances/{served}"));
    assert_eq!((status, body), (200, json!({"status": "deleted"})));
    house.assert_no_trace(&served, &[]);
    let (status, _) = curl(&house, &bot, &format!("{API}/v1/instances/{served}"));
    assert_eq!(status, 404);

    // The host's stop of the parent is answered when all below it have stopped.
    assert_eq!(
        house.socket().act(&format!("/v1/instances/{bot}/stop")).expect(200)["status"],
        "stopped"
    );
    let child = house.socket().get(&format!("/v1/instances/{worker}")).expect(200);
    assert_eq!(child["state"], "stopped", "{child}");
    assert_eq!(house.machine_processes(), vec![]);
    house.socket().act(&format!("/v1/instances/{worker}/start")).refused(409, "");

    let own = house.socket().get(&format!("/v1/audit?tree={bot}&after=1")).lines();
    assert!(own.len() > 5 && own.iter().all(|e| e["tree"] == bot && e["seq"].as_u64() > Some(1)));
    house.socket().get("/v1/audit?tree=x").refused(400, "tree");
    let kinds: Vec<String> = trail(&house).iter().map(|e| text(e, "kind").to_owned()).collect();
    for kind in ["instance.spawned", "instance.denied", "instance.exec", "instance.exposed"] {
        assert!(kinds.iter().any(|k| k == kind), "{kind}: {kinds:?}");
    }
    house.socket().delete(&format!("/v1/instances/{bot}")).expect(200);
    assert_eq!(house.socket().get("/v1/instances").expect(200), json!([]));
    assert_eq!(look::disks(house.home()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_tree_is_as_deep_as_it_may_be_and_sees_only_downwards() {
    let mut house = House::new("");
    let top = root(&house, "top", rights(2));
    let (first, second) = (spawn(&house, &top, json!({})), spawn(&house, &top, json!({})));
    let below = spawn(&house, &first, json!({}));
    // Three deep; the fourth is refused with what would pass.
    let own = get(&house, &below, "/v1/self");
    assert_eq!(own["parent_id"], first);
    assert_eq!(own["capabilities"]["spawn"], false, "{own}");
    let answer = post(&house, &below, "/v1/instances", &small(json!({})));
    assert_eq!((answer.0, &answer.1["code"]), (403, &json!("capability_denied")), "{answer:?}");
    assert!(answer.1["hint"].is_string(), "{answer:?}");

    // Nobody sees upwards or sideways, and nobody learns whether it exists.
    let missing =
        curl(&house, &first, &format!("{API}/v1/instances/inst-01ARZ3NDEKTSV4RRFFQ69G5FAV"));
    assert_eq!(missing.0, 404);
    for foreign in [&top, &second, &first, &"top".to_owned()] {
        for words in [
            format!("{API}/v1/instances/{foreign}"),
            format!("-X POST {API}/v1/instances/{foreign}/stop"),
            format!("-X DELETE {API}/v1/instances/{foreign}"),
            format!("-X POST {API}/v1/instances/{foreign}/exec -d '{{\"command\":[\"id\"]}}'"),
            format!("{API}/v1/instances/{foreign}/logs"),
        ] {
            let (status, body) = curl(&house, &first, &words);
            assert_eq!((status, &body), (404, &missing.1), "{words}");
        }
    }
    // A grandchild is its parent's.
    let (status, _) = curl(&house, &top, &format!("{API}/v1/instances/{below}"));
    assert_eq!(status, 404);
    assert_eq!(get(&house, &second, "/v1/instances"), json!([]));
    assert_eq!(get(&house, &first, "/v1/instances")[0]["id"], below);

    // As many as may be, also when all come at once.
    let race = "for i in 1 2 3 4 5 6; do curl -s -o /dev/null -w '%{http_code}\\n' -X POST \
                http://127.0.0.1:7777/v1/instances -d '{\"command\":[\"sleep\",\"9\"],\
                \"memory_mb\":128,\"vcpus\":0.5,\"disk_gb\":0.1}' & done; wait";
    let codes = house.sh(&top, race).text();
    assert_eq!(codes.lines().filter(|c| *c == "201").count(), 1, "{codes}");
    assert_eq!(codes.lines().filter(|c| *c == "403").count(), 5, "{codes}");

    // Another daemon serves the same machines, with the tokens that they have.
    house.kill9();
    house.start();
    assert_eq!(get(&house, &first, "/v1/instances")[0]["id"], below);
    assert_eq!(get(&house, &top, "/v1/self")["state"], "running");
    assert!(!house.log().contains("could not be renewed"), "{}", house.log());

    // Whatever ends the parent ends all below it.
    let before = house.machine_processes();
    let (status, body) = curl(&house, &top, &format!("-X POST {API}/v1/instances/{first}/stop"));
    assert_eq!((status, &body["status"]), (200, &json!("stopped")), "{body}");
    let state = |id: &str| {
        text(&house.socket().get(&format!("/v1/instances/{id}")).expect(200), "state").to_owned()
    };
    assert_eq!((state(&first), state(&below)), ("stopped".to_owned(), "stopped".to_owned()));
    assert_eq!(state(&second), "running");
    let deleted = house.socket().delete(&format!("/v1/instances/{top}")).expect(200);
    assert_eq!(deleted["status"], "deleted");
    for id in [&top, &first, &second, &below] {
        house.assert_no_trace(id, &before);
    }
    assert_eq!(house.socket().get("/v1/instances").expect(200), json!([]));
    trail(&house);
}

#[test]
fn a_kit_gets_no_more_than_the_host_lets_kits_have() {
    let house = House::new("[kits]\nmax_children = 2\n[capacity]\nmachines = 1\n");
    let mut body = json!({"kit": "bot", "command": ["sleep", "infinity"], "memory_mb": 256,
        "vcpus": 1, "disk_gb": 0.3, "capabilities": rights(1)});
    let refused = house.socket().post("/v1/instances", &body).refused(403, "");
    assert_eq!(refused["code"], "capability_denied");
    assert_eq!(refused["rule"], "max_children");
    assert_eq!((&refused["requested"], &refused["allowed"]), (&json!(3), &json!(2)));
    assert!(text(&refused, "hint").contains("[kits]") && text(&refused, "error").contains("bot"));
    assert_eq!(house.socket().get("/v1/instances").expect(200), json!([]));
    body["capabilities"]["max_children"] = json!(2);
    house.socket().post("/v1/instances", &body).expect(201);
}

#[test]
fn a_guests_children_live_within_its_invite_and_end_with_it() {
    let house = House::new("[rate_limit]\nper_second = 0\n");
    let guest = house.guest(json!({
        "resourceLimits": {"maxCpuCores": 2, "maxMemoryMB": 640, "maxDiskGB": 1},
        "permissions": {"canSpawnSubAgents": true},
        "maxChildren": 4,
    }));
    let id = text(&guest, "guestId");
    let machine = text(&house.until(id, "running"), "vmId").to_owned();
    let own = get(&house, &machine, "/v1/self");
    assert_eq!(own["capabilities"]["spawn"], true, "{own}");
    assert_eq!(own["envelope"]["limit"]["memory_mb"], 640, "{own}");
    assert_eq!(own["envelope"]["left"]["memory_mb"], 320, "{own}");
    let first = spawn(&house, &machine, json!({"vcpus": 0.25}));
    let second = spawn(&house, &machine, json!({"vcpus": 0.25, "memory_mb": 192}));
    let answer = post(&house, &machine, "/v1/instances", &small(json!({"vcpus": 0.25})));
    denied(&answer, 409, "envelope_exhausted", "envelope.memory_mb");
    house.until_instance(&first, "running");
    // What an ended one held is there again.
    let (status, _) = curl(&house, &machine, &format!("-X DELETE {API}/v1/instances/{second}"));
    assert_eq!(status, 200);
    let second = spawn(&house, &machine, json!({}));
    // A child's end is not the guest's.
    house.until_instance(&second, "running");
    house.sh(&second, "kill -9 -1 || true");
    let (status, _) = curl(&house, &machine, &format!("-X POST {API}/v1/instances/{second}/stop"));
    assert_eq!(status, 200);
    assert_eq!(house.guest_status(id)["status"], "running");

    let before = house.machine_processes();
    let killed = house.socket().delete(&format!("/couch/guests/{id}")).expect(200);
    let machines: Vec<&str> = killed["receipt"]["machines"]
        .as_array()
        .unwrap_or_else(|| panic!("no receipt: {killed}"))
        .iter()
        .map(|m| text(m, "id"))
        .collect();
    for id in [&machine, &first, &second] {
        assert!(machines.contains(&id.as_str()), "{id}: {killed}");
        house.assert_no_trace(id, &before);
    }
    trail(&house);
}

#[test]
fn an_unused_machine_sleeps_and_a_connection_wakes_it() {
    let house = House::new("[idle]\npause_after_secs = 3\nsuspend_after_secs = 2\n");
    let body = json!({"command": ["python3", "-m", "http.server", "9090"], "exposes": [9090],
        "handle": "idler", "vcpus": 1, "memory_mb": 256, "disk_gb": 0.3});
    let made = house.socket().post("/v1/instances", &body).expect(201);
    let id = text(&made, "id").to_owned();
    let look = "cat /proc/sys/kernel/random/boot_id; pgrep python3";
    let before = house.sh(&id, look).text();
    house.until_instance(&id, "paused");
    // Later its memory is on disk, and its process gone; to the outside it still sleeps.
    wait_until("its memory is freed", Duration::from_secs(60), || {
        house.machine_processes().iter().all(|p| !p.command.contains("qemu"))
    });
    let now = house.socket().get(&format!("/v1/instances/{id}")).expect(200);
    assert_eq!(now["state"], "paused");
    let address = text(&now["endpoints"][0], "url").strip_prefix("http://").unwrap();
    let page = aegis_tests::http::Client::tcp(address.parse().unwrap()).get("/");
    assert_eq!(page.status, 200);
    assert_eq!(house.sh(&id, look).text(), before, "the same boot, the same process");
    // A lease holds it off.
    let lease = json!({"ttl_ms": 12_000, "reason": "thinking"});
    assert_eq!(post(&house, &id, "/v1/self/keepalive", &lease).0, 200);
    std::thread::sleep(Duration::from_secs(6));
    let now = house.socket().get(&format!("/v1/instances/{id}")).expect(200);
    assert_eq!((&now["state"], &now["lease_held"]), (&json!("running"), &json!(true)));
    house.until_instance(&id, "paused");
    // A stopped one is started by a connection, unless it was disabled.
    house.socket().act(&format!("/v1/instances/{id}/stop")).expect(200);
    wait_for("the page of a fresh start", Duration::from_secs(60), || {
        let client = aegis_tests::http::Client::tcp(address.parse().unwrap());
        client.ask(hyper::Method::GET, "/", None).ok().filter(|a| a.status == 200)
    });
    house.socket().act(&format!("/v1/instances/{id}/disable")).expect(200);
    wait_until("its port is closed", Duration::from_secs(10), || {
        std::net::TcpStream::connect(address).is_err()
    });
}
