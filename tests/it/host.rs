//! The host API on real machines (contracts/aegis.md 1 and 2). A boot costs seconds, so one machine
//! serves many looks.

use std::process::Command;
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::wait_until;
use serde_json::{Value, json};

const MEMORY_MB: u64 = 256;
const DISK_BYTES: u64 = 300_000_000;

fn small() -> Value {
    json!({"command": ["sleep", "infinity"], "vcpus": 1, "memory_mb": MEMORY_MB, "disk_gb": 0.3})
}

fn create(house: &House, extra: Value) -> String {
    let mut body = small();
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    let made = house.socket().post("/v1/instances", &body).expect(201);
    assert_eq!(made["state"], "starting");
    made["id"].as_str().unwrap().to_owned()
}

fn at(id: &str, verb: &str) -> String {
    format!("/v1/instances/{id}{verb}")
}

#[test]
fn a_machine_is_what_was_promised() {
    let house = House::new("");
    // exec waits for the boot.
    let id = create(&house, json!({"handle": "box", "env": {"COLOR": "blue"}}));
    let inside = house.sh("box", "uname -a");
    assert_eq!(inside.code, Some(0));
    let outside = Command::new("uname").arg("-a").output().unwrap().stdout;
    assert_ne!(inside.out, outside, "another kernel than outside");
    let kernel =
        |text: &[u8]| String::from_utf8_lossy(text).split(' ').nth(2).map(str::to_owned).unwrap();
    assert_ne!(kernel(&inside.out), kernel(&outside));

    // Bytes, streams and the exit code survive.
    let ran = house.sh("box", r"printf 'a\nb\000\377\r\nend'; printf 'oops' >&2; exit 42");
    assert_eq!(ran.out, b"a\nb\0\xff\r\nend");
    assert_eq!(ran.err, b"oops");
    assert_eq!(ran.code, Some(42));
    let large = house.sh("box", "head -c 3000000 /dev/zero | tr '\\0' x");
    assert_eq!(large.out.len(), 3_000_000, "one line of 3 MB");
    assert!(large.out.iter().all(|b| *b == b'x'));
    assert_eq!(house.sh("box", "kill -9 $$").code, Some(137));
    let env = json!({"command": ["sh", "-c", "echo $COLOR $SIZE $PWD"], "env": {"SIZE": "9"},
                     "cwd": "/tmp"});
    let answer = house.socket().post(&at("box", "/exec"), &env);
    assert_eq!(aegis_tests::house::Ran::of(&answer.lines()).text(), "blue 9 /tmp");
    let none = json!({"command": ["/no/such/program"]});
    let answer = house.socket().post(&at("box", "/exec"), &none);
    assert!(answer.status >= 400 || answer.lines().last().unwrap()["exit_code"] != 0);
    let slow = json!({"command": ["sleep", "60"], "timeout_secs": 1});
    let answer = house.socket().post(&at("box", "/exec"), &slow);
    assert_ne!(answer.lines().last().unwrap()["exit_code"], 0, "killed at its deadline");

    // Its size, as the guest sees it.
    let disk: u64 = house
        .sh(
            "box",
            "d=$(findmnt -no SOURCE / || df --output=source / | tail -1); \
                    for b in /sys/block/vd*; do [ $(cat $b/ro) = 0 ] && cat $b/size; done",
        )
        .text()
        .lines()
        .last()
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(disk * 512, DISK_BYTES / 4096 * 4096);
    assert_eq!(house.sh("box", "nproc").text(), "1");
    let total: u64 =
        house.sh("box", "awk '/MemTotal/{print $2}' /proc/meminfo").text().parse().unwrap();
    assert!((MEMORY_MB * 1024 * 6 / 10..=MEMORY_MB * 1024).contains(&total), "{total} KiB");
    assert_eq!(house.sh("box", "hostname").text(), "box");

    // A full disk is the guest's trouble alone.
    let full = house.sh("box", "dd if=/dev/urandom of=/root/fill bs=1M count=2000");
    assert_ne!(full.code, Some(0));
    assert!(String::from_utf8_lossy(&full.err).contains("No space left"), "{full:?}");
    let there = house.home().join("instances").join(&id).join("disk.img");
    let size = std::fs::metadata(there).unwrap().len();
    assert!(size <= DISK_BYTES, "{size}");
    assert_eq!(house.sh("box", "rm /root/fill && sync && echo room").text(), "room");

    let now = house.socket().get(&at("box", "")).expect(200);
    assert_eq!(now["state"], "running");
    assert_eq!(now["id"], id);
    let boot_id = house.sh("box", "cat /proc/sys/kernel/random/boot_id").text();
    assert_eq!(now["boot_id"], boot_id);
    assert!(now["usage"]["memory_peak_mb"].as_u64().unwrap() > 0);

    // Rules of handles and verbs.
    let mut body = small();
    body["handle"] = json!("box");
    house.socket().post("/v1/instances", &body).refused(409, "");
    house.socket().act(&at("box", "/start")).refused(409, "");
    house.socket().act(&at("nobody", "/start")).refused(404, "");

    // Nothing stays.
    let before = house.machine_processes();
    assert!(before.len() >= 2, "a worker and its QEMU: {before:?}");
    assert_eq!(house.socket().delete(&at("box", "")).expect(200)["status"], "deleted");
    house.assert_no_trace(&id, &before);
    house.socket().get(&at(&id, "")).refused(404, "");
    assert!(!house.home().join("instances").join(&id).exists());
}

#[test]
fn a_machine_pauses_stops_and_comes_back() {
    let house = House::new("");
    let id = create(&house, json!({"handle": "nap"}));
    let boot_id = house.sh("nap", "echo kept > /root/kept; cat /proc/sys/kernel/random/boot_id");

    assert_eq!(house.socket().act(&at("nap", "/pause")).expect(200)["status"], "paused");
    house.until_instance("nap", "paused");
    assert_eq!(house.socket().act(&at("nap", "/resume")).expect(200)["status"], "running");
    let same = house.sh("nap", "cat /proc/sys/kernel/random/boot_id");
    assert_eq!(same.text(), boot_id.text());
    // An exec wakes a paused machine.
    house.socket().act(&at("nap", "/pause")).expect(200);
    assert_eq!(house.sh("nap", "echo awake").text(), "awake");
    house.until_instance("nap", "running");

    let before = house.machine_processes();
    assert_eq!(house.socket().act(&at("nap", "/stop")).expect(200)["status"], "stopped");
    wait_until("the machine is gone", Duration::from_secs(10), || {
        before.iter().all(|p| !p.lives())
    });
    house.socket().post(&at("nap", "/exec"), &json!({"command": ["true"]})).refused(409, "");
    house.socket().act(&at("nap", "/pause")).refused(409, "");

    // The handle of a stopped one starts it again, on its disk.
    let again = house.socket().post("/v1/instances", &json!({"handle": "nap"})).expect(200);
    assert_eq!(again["id"], id);
    assert_eq!(house.sh("nap", "cat /root/kept").text(), "kept");
    assert_ne!(house.sh("nap", "cat /proc/sys/kernel/random/boot_id").text(), boot_id.text());

    assert_eq!(house.socket().act(&at("nap", "/disable")).expect(200)["status"], "disabled");
    let disabled = house.socket().get(&at("nap", "")).expect(200);
    assert_eq!(disabled["enabled"], false);
    assert_eq!(house.socket().delete(&at("nap", "")).expect(200)["status"], "deleted");
    assert_eq!(house.socket().get("/v1/instances").expect(200), json!([]));
}

#[test]
fn a_primary_process_is_followed_to_its_end() {
    let house = House::new("");
    let script = "echo hello; echo trouble >&2; exit 7";
    let id = create(&house, json!({"command": ["sh", "-c", script]}));
    let lines = house.socket().get(&at(&id, "/logs?follow=true")).lines();
    let of = |stream: &str, line: &str| {
        lines.iter().any(|l| l["stream"] == stream && l["line"] == line && l["instance_id"] == id)
    };
    assert!(of("stdout", "hello") && of("stderr", "trouble"), "{lines:?}");
    let end = lines.iter().find(|l| {
        l["source"] == "system" && {
            l["line"].as_str().is_some_and(|l| l.contains("process exited (code=7)"))
        }
    });
    assert!(end.is_some(), "{lines:?}");
    let stopped = house.until_instance(&id, "stopped");
    assert_eq!(stopped["exit"]["code"], 7);
    // Kept, and asked for in parts.
    let tail = house.socket().get(&at(&id, "/logs?tail=1")).lines();
    assert_eq!(tail.len(), 1);
    for (field, query) in [("tail", "tail=x"), ("since", "since=y"), ("follow", "follow=z")] {
        house.socket().get(&at(&id, &format!("/logs?{query}"))).refused(400, field);
    }
    let pruned = house.socket().act("/v1/instances/prune?older_than=0s").expect(200);
    assert_eq!(pruned["ids"], json!([id]));
}

#[test]
fn a_machine_that_ends_at_once_is_stopped_and_not_stuck() {
    let house = House::new("");
    for command in [json!(["true"]), json!(["/no/such/program"])] {
        let id = create(&house, json!({"command": command}));
        let stopped = house.until_instance(&id, "stopped");
        if command[0] == "true" {
            assert_eq!(stopped["exit"]["code"], 0, "{stopped}");
        } else {
            assert_ne!(stopped["exit"]["code"], 0, "{stopped}");
        }
    }
}

#[test]
fn deleting_while_it_boots_leaves_nothing() {
    let house = House::new("");
    let id = create(&house, json!({}));
    wait_until("a worker is there", Duration::from_secs(10), || {
        !house.machine_processes().is_empty()
    });
    let before = house.machine_processes();
    assert_eq!(house.socket().delete(&at(&id, "")).expect(200)["status"], "deleted");
    house.assert_no_trace(&id, &before);
    assert_eq!(house.machine_processes(), vec![]);
}

#[test]
fn a_port_is_reached_from_outside() {
    let house = House::new("");
    let server = ["python3", "-m", "http.server", "9090"];
    let id = create(&house, json!({"command": server, "exposes": [9090]}));
    let now = house.until_instance(&id, "running");
    let url = now["endpoints"][0]["url"].as_str().unwrap();
    let address = url.strip_prefix("http://").unwrap().parse().unwrap();
    wait_until("the server inside answers", Duration::from_secs(60), || {
        let ask = aegis_tests::http::Client::tcp(address).ask(hyper::Method::GET, "/", None);
        ask.is_ok_and(|a| a.status == 200)
    });
    house.socket().delete(&at(&id, "")).expect(200);
    assert!(std::net::TcpStream::connect(address).is_err(), "the port is closed");
}

#[test]
fn bad_requests_for_instances_are_named() {
    let house = House::new(aegis_tests::house::MANUAL);
    for (field, bad) in [
        ("command", json!({"command": []})),
        ("command", json!({"handle": "new"})),
        ("handle", json!({"handle": "-x"})),
        ("handle", json!({"handle": "x".repeat(64)})),
        ("image_ref", json!({"image_ref": "../x"})),
        ("memory_mb", json!({"memory_mb": 0})),
        ("vcpus", json!({"vcpus": -1})),
        ("disk_gb", json!({"disk_gb": 1e9})),
        ("cwd", json!({"cwd": "relative"})),
        ("exposes[0]", json!({"exposes": [0]})),
        ("exposes[1]", json!({"exposes": [1, 1]})),
        ("env.A=B", json!({"env": {"A=B": "c"}})),
        ("idle_policy", json!({"idle_policy": "never"})),
    ] {
        let mut body = if bad.get("handle") == Some(&json!("new")) { json!({}) } else { small() };
        for (key, value) in bad.as_object().unwrap() {
            body[key] = value.clone();
        }
        house.socket().post("/v1/instances", &body).refused(400, field);
    }
    for unknown in ["parent_id", "surprise"] {
        let mut body = small();
        body[unknown] = json!("x");
        let said = house.socket().post("/v1/instances", &body).refused(400, "");
        assert!(said["error"].as_str().unwrap().contains(unknown), "{said}");
    }
    house.socket().get("/v1/instances?state=odd").refused(400, "state");
    house.socket().act("/v1/instances/prune?older_than=soon").refused(400, "older_than");
    assert_eq!(house.socket().get("/v1/instances").expect(200), json!([]));
}
