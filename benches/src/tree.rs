//! What machines do with their own API: spawn from inside, its round trip, and the end of a tree.

use std::time::Instant;

use aegis_tests::house::House;
use serde_json::{Value, json};

use crate::figures::Figures;

/// Children that are spawned one after the other.
const SPAWNS: usize = 15;
/// Calls of the guest API.
const CALLS: usize = 300;
/// Trees that are killed, and how many machines each has.
const TREES: usize = 3;
const TREE: usize = 50;

const SETTINGS: &str = "[machines]\nspares = 1\n[rate_limit]\nper_second = 0\n\
                        [capacity]\nvcpus = 64\nmachines = 300\nmemory_mb = 1000000\n\
                        disk_gb = 10000.0\n";

/// Runs inside: spawns a child, waits until it runs, runs a command in it, deletes it.
const SPAWNER: &str = r#"
import http.client, json, sys, time
api = http.client.HTTPConnection("127.0.0.1", 7777)
def call(method, path, body=None):
    api.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    answer = api.getresponse()
    text = answer.read()
    assert answer.status < 300, (answer.status, text)
    return text
for _ in range(int(sys.argv[1])):
    began = time.monotonic()
    child = json.loads(call("POST", "/v1/instances", {"command": ["sleep", "infinity"],
        "vcpus": 1, "memory_mb": 256, "disk_gb": 0.5}))["id"]
    while json.loads(call("GET", "/v1/instances/" + child))["state"] != "running":
        time.sleep(0.005)
    running = time.monotonic()
    call("POST", "/v1/instances/" + child + "/exec", {"command": ["true"]})
    print((running - began) * 1e3, (time.monotonic() - began) * 1e3, flush=True)
    call("DELETE", "/v1/instances/" + child)
    time.sleep(0.5)
"#;

/// Runs inside: asks who it is, over one connection; beside the whole time, the control call's.
/// By curl: an interpreter's own time would be most of what is measured.
const CALLER: &str = "curl -s -o /dev/null -w '%{time_pretransfer} %{time_total} \
                      %header{server-timing}\\n' 'http://127.0.0.1:7777/v1/self#[1-CALLS]'";

/// Runs inside: spawns so many children of these many rights.
const PLANTER: &str = r#"
import http.client, json, sys
api = http.client.HTTPConnection("127.0.0.1", 7777)
for _ in range(int(sys.argv[1])):
    api.request("POST", "/v1/instances", json.dumps({"command": ["sleep", "infinity"],
        "vcpus": 1, "memory_mb": 256, "disk_gb": 0.1}), {"Content-Type": "application/json"})
    answer = api.getresponse()
    text = answer.read()
    assert answer.status == 201, (answer.status, text)
"#;

/// Measures all of it.
pub fn measure(figures: &mut Figures) {
    let house = House::new(SETTINGS);
    let parent = house.guest(json!({
        "resourceLimits": {"maxCpuCores": 2, "maxMemoryMB": 1024, "maxDiskGB": 4},
        "permissions": {"canSpawnSubAgents": true},
    }));
    let vm = running(&house, &parent);
    let spawns = pairs(&house, &vm, SPAWNER, SPAWNS);
    figures.samples("spawn from inside to child running", column(&spawns, 0));
    figures.samples("spawn from inside to its first exec answer", column(&spawns, 1));
    let calls = calls(&house, &vm);
    figures.samples("guest API round trip", column(&calls, 0));
    figures.samples("of that, the control call", column(&calls, 1));
    let own: Vec<f64> = calls.iter().map(|[whole, control]| whole - control).collect();
    figures.samples("guest API over its control call", own);
    drop(house);

    let house = House::new(SETTINGS);
    let kills: Vec<f64> = (0..TREES).map(|_| plant_and_kill(&house)).collect();
    figures.samples(&format!("kill of a tree of {TREE} to verified answer"), kills);
}

fn plant_and_kill(house: &House) -> f64 {
    // A tenth is the root's; each child takes one.
    let cpu = 1.2 * TREE as f64;
    let root = house.guest(json!({
        "resourceLimits": {"maxCpuCores": cpu, "maxMemoryMB": 256 * 2 * TREE, "maxDiskGB": cpu},
        "permissions": {"canSpawnSubAgents": true},
        "spawnDepth": 1, "maxChildren": TREE, "rootShare": 0.1,
    }));
    let vm = running(house, &root);
    let planted = python(house, &vm, PLANTER, TREE - 1);
    assert_eq!(planted, "");
    aegis_tests::wait_until("the whole tree runs", std::time::Duration::from_secs(300), || {
        let all = house.socket().get("/v1/instances?state=running").expect(200);
        all.as_array().unwrap().len() == TREE
    });
    let path = format!("/couch/guests/{}", root["guestId"].as_str().unwrap());
    let began = Instant::now();
    let killed = house.socket().delete(&path).expect(200);
    let ms = began.elapsed().as_secs_f64() * 1e3;
    assert_eq!(killed["receipt"]["machines"].as_array().unwrap().len(), TREE, "{killed}");
    ms
}

fn running(house: &House, guest: &Value) -> String {
    let id = guest["guestId"].as_str().unwrap();
    house.until(id, "running")["vmId"].as_str().unwrap().to_owned()
}

fn python(house: &House, vm: &str, script: &str, n: usize) -> String {
    let body = json!({"command": ["python3", "-c", script, n.to_string()]});
    let answer = house.socket().post(&format!("/v1/instances/{vm}/exec"), &body);
    let ran = aegis_tests::house::Ran::of(&answer.lines());
    assert_eq!(ran.code, Some(0), "{}", String::from_utf8_lossy(&ran.err));
    ran.text()
}

fn pairs(house: &House, vm: &str, script: &str, n: usize) -> Vec<[f64; 2]> {
    let text = python(house, vm, script, n);
    let pair = |line: &str| {
        let (a, b) = line.split_once(' ').unwrap();
        [a.parse().unwrap(), b.parse().unwrap()]
    };
    text.lines().map(pair).collect()
}

/// Milliseconds of each call, and of its control call.
fn calls(house: &House, vm: &str) -> Vec<[f64; 2]> {
    let text = house.sh(vm, &CALLER.replace("CALLS", &CALLS.to_string())).text();
    let pair = |line: &str| {
        let (times, control) = line.split_once(" host;dur=").unwrap();
        let (before, total) = times.split_once(' ').unwrap();
        let seconds = |text: &str| text.parse::<f64>().unwrap();
        [(seconds(total) - seconds(before)) * 1e3, seconds(control)]
    };
    text.lines().map(pair).collect()
}

fn column(pairs: &[[f64; 2]], at: usize) -> Vec<f64> {
    pairs.iter().map(|pair| pair[at]).collect()
}
