//! One real machine through its worker: launch, exec, freeze, thaw, stop, start again, reap.
//!
//! Needs `AEGIS_TEST_ASSETS`, laid out as a home (kernel, base image), and the harness in
//! `AEGIS_TEST_PROGRAMS`; `make test` provides both.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

const ID: &str = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV";
const TOKEN: &str = "as-it-was-minted";
const BOOT_ID: &str = "0c0ffee0-0000-4000-8000-000000000001";

struct House {
    dir: PathBuf,
    golden: PathBuf,
    assets: PathBuf,
    id: String,
    from: Value,
}

impl House {
    fn new(dir: &Path, id: &str) -> House {
        House {
            dir: dir.join(id),
            golden: dir.join("golden"),
            assets: from_env("AEGIS_TEST_ASSETS"),
            id: id.to_owned(),
            from: Value::Null,
        }
    }

    fn cgroup(&self) -> String {
        format!("aegis/smoke-{}/{}", std::process::id(), self.id)
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    fn start(&self) -> Child {
        std::fs::create_dir_all(self.run_dir()).unwrap();
        std::fs::File::create(self.run_dir().join("lock")).unwrap();
        let listener = UnixListener::bind(self.run_dir().join("worker.sock")).unwrap();
        Command::new(env!("CARGO_BIN_EXE_aegis-worker"))
            .arg("machine")
            .arg(self.run_dir())
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn say(&self, request: &Value) -> impl Iterator<Item = Value> + use<> {
        let mut stream = UnixStream::connect(self.run_dir().join("worker.sock")).unwrap();
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        let lines = BufReader::new(stream).lines().map_while(Result::ok);
        lines.map(|line| serde_json::from_str(&line).unwrap())
    }

    fn launch(&self) -> impl Iterator<Item = Value> + use<> {
        let asset = |name: &str| self.assets.join(name);
        self.say(&json!({
            "op": "launch",
            "generation": 1,
            "instance_id": self.id,
            "golden": {
                "dir": self.golden,
                "qemu": "/usr/bin/qemu-system-x86_64",
                "kernel": asset("kernel/vmlinux"),
                "modules": asset("kernel/modules"),
                "harness": from_env("AEGIS_TEST_PROGRAMS").join("aegis-harness"),
                "mcp": from_env("AEGIS_TEST_PROGRAMS").join("aegis-mcp-guest"),
                "base": asset("images/base/base.erofs"),
                "vcpus": 1,
                "memory": 256,
                "accel": "auto",
            },
            "cpu": 1000,
            "disk": {"path": self.dir.join("disk.raw"), "bytes": 500_000_000u64},
            "cgroup": self.cgroup(),
            "require_limits": false,
            "from": self.from,
            "hostname": "box",
            "boot_id": BOOT_ID,
            "egress": {
                "policy": {"internet": false, "lists": [], "services": [], "llm": false},
                "ceiling": 0, "last": false, "version": 0, "resolvers": [],
            },
            "run": {"command": ["sleep", "1000"], "capability_token": TOKEN},
            "await_port": null,
            "log_dir": self.dir.join("log"),
        }))
    }

    fn reap(&self, disk: bool) -> Value {
        let mut child = Command::new(env!("CARGO_BIN_EXE_aegis-worker"))
            .arg("reap")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let ask = json!({
            "run_dir": self.run_dir(),
            "cgroup": self.cgroup(),
            "disk": disk.then(|| self.dir.join("disk.raw")),
            "deadline_ms": 10_000,
        });
        child.stdin.take().unwrap().write_all(ask.to_string().as_bytes()).unwrap();
        serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap()
    }

    fn sh(&self, script: &str) -> (String, Value) {
        let start = json!({"command": ["sh", "-c", script]});
        let lines: Vec<Value> =
            self.say(&json!({"op": "exec", "exec_id": "e1", "start": start})).collect();
        let text = lines.iter().filter_map(|l| l["line"].as_str()).collect::<Vec<_>>().join("\n");
        (text, lines.last().unwrap()["exit_code"].clone())
    }
}

impl House {
    /// A machine that stands still gives its memory back, and goes on with every process.
    fn sleeps_and_wakes(&self) {
        let ok = json!({"ok": true});
        let ask = |op: &str| self.say(&json!({ "op": op })).last().unwrap();
        assert_ne!(ask("suspend"), ok, "it runs");
        let count =
            "(while :; do echo x >> /tmp/count; sleep 0.05; done) > /dev/null 2>&1 & echo $!";
        let pid = self.sh(count).0;
        for _ in 0..2 {
            assert_eq!(ask("freeze"), ok);
            let qemu = self.record()["qemu"]["pid"].as_u64().unwrap();
            assert_eq!(ask("suspend"), ok);
            assert_eq!(ask("suspend"), ok, "again");
            assert!(!PathBuf::from(format!("/proc/{qemu}")).exists(), "its process goes on");
            assert!(self.record()["qemu"].is_null());
            let saved = std::fs::metadata(self.run_dir().join("memory")).unwrap().len();
            assert!((1 << 20..256 << 20).contains(&saved), "{saved}");
            assert_eq!(ask("thaw"), ok);
            assert!(!self.run_dir().join("memory").exists());
            assert_eq!(self.sh("cat /proc/sys/kernel/random/boot_id").0, BOOT_ID);
            let counted = |script: &str| self.sh(script).0.parse::<u64>().unwrap();
            let before = counted("wc -l < /tmp/count");
            let script = format!("kill -0 {pid} && sleep 0.5; wc -l < /tmp/count");
            assert!(counted(&script) > before, "the process does not go on");
            let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
            let (before, inside) = (now(), counted("date +%s"));
            assert!((before - 1..=now() + 1).contains(&inside), "its clock shows {inside}");
        }
        // Its end may come while it sleeps.
        assert_eq!(ask("freeze"), ok);
        assert_eq!(ask("suspend"), ok);
    }

    fn record(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.run_dir().join("machine.json")).unwrap())
            .unwrap()
    }
}

impl Drop for House {
    /// Nothing stays, also when the test failed.
    fn drop(&mut self) {
        self.reap(true);
        // A keeper ends when its directory is removed.
        let _ = std::fs::remove_dir_all(&self.golden);
    }
}

fn until(events: &mut dyn Iterator<Item = Value>, state: &str) -> Value {
    for event in events {
        if event["state"] == state {
            return event;
        }
        assert_ne!(event["state"], "ended", "{event}");
    }
    panic!("no more events before {state}");
}

/// What the test run names; without it the test fails, so that nothing passes untested.
fn from_env(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(path) => PathBuf::from(path),
        None => panic!("{name} is not set: run this test by `make test`"),
    }
}

#[test]
fn a_machine_lives_and_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let house = House::new(dir.path(), ID);

    let mut worker = house.start();
    let mut events = house.launch();
    assert_eq!(until(&mut events, "running")["boot_id"], BOOT_ID);
    assert_eq!(house.sh("echo out; echo err >&2; exit 7"), ("out\nerr".to_owned(), json!(7)));
    assert_eq!(house.sh("cat /proc/sys/kernel/random/boot_id"), (BOOT_ID.to_owned(), json!(0)));
    assert_eq!(house.sh("/usr/bin/aegis-mcp-guest --version").1, json!(0), "over every image");
    assert_eq!(house.sh("echo kept > /root/kept && sync").1, json!(0));
    let ok = json!({"ok": true});
    assert_eq!(house.say(&json!({"op": "freeze"})).last().unwrap(), ok);
    assert_eq!(house.say(&json!({"op": "thaw"})).last().unwrap(), ok);
    assert_eq!(house.say(&json!({"op": "stop", "grace_ms": 1000})).last().unwrap(), ok);
    let ended = events.last().unwrap();
    assert_eq!(ended["reason"], "stopped", "{ended}");
    worker.wait().unwrap();
    let reaped = house.reap(false);
    assert_eq!(reaped["remaining"], json!([]));
    assert!(reaped["usage"]["cpu_ns"].as_u64().unwrap() > 0);
    assert!(!house.run_dir().exists() && house.dir.join("disk.raw").exists());

    let mut worker = house.start();
    until(&mut house.launch(), "running");
    assert_eq!(house.sh("cat /root/kept"), ("kept".to_owned(), json!(0)), "the disk is its own");
    asks_its_host(&house);
    house.sleeps_and_wakes();
    let reaped = house.reap(true);
    assert_eq!(reaped["verified"], json!(["process", "cgroup", "network", "disk"]));
    worker.wait().unwrap();
    assert!(!house.dir.join("disk.raw").exists());
    assert_eq!(house.reap(true)["remaining"], json!([]), "again");
}

/// A machine that runs is kept, and others start from that: with its processes, or with its disk
/// alone.
#[test]
fn a_machine_is_kept_and_goes_on_twice() {
    let dir = tempfile::tempdir().unwrap();
    let house = House::new(dir.path(), ID);
    let mut worker = house.start();
    let _watch = house.launch();
    until(&mut house.say(&json!({"op": "watch"})), "running");
    let counting = "echo kept > /root/kept; (while :; do date +%s%N >> /tmp/beats; sleep 0.02; done) \
                    > /dev/null 2>&1 & echo $!";
    let (pid, _) = house.sh(counting);
    let commit = |name: &str, memory: bool| {
        let to = dir.path().join(name);
        std::fs::create_dir(&to).unwrap();
        let ask = json!({"op": "commit", "dir": to, "memory": memory});
        let said: Vec<Value> = house.say(&ask).collect();
        assert_eq!(said[0], json!({"ok": true}), "{said:?}");
        let stopped = said[1]["stopped_us"].as_u64().unwrap();
        eprintln!("{name}: stood still for {stopped} us, takes {} bytes", said[1]["bytes"]);
        to
    };
    let whole = commit("whole", true);
    let disk = commit("disk", false);
    // One that stands still is not kept; a second commit finds nothing of the first in its way.
    assert_eq!(house.say(&json!({"op": "freeze"})).last().unwrap(), json!({"ok": true}));
    let ask = json!({"op": "commit", "dir": dir.path().join("none"), "memory": true});
    assert_eq!(house.say(&ask).last().unwrap()["error"]["code"], -32004);
    assert_eq!(house.say(&json!({"op": "thaw"})).last().unwrap(), json!({"ok": true}));
    let again = commit("again", true);
    // The source goes on as if nothing had been.
    let beats = |house: &House| house.sh("wc -l < /tmp/beats").0.parse::<u64>().unwrap();
    let before = beats(&house);
    assert_eq!(house.sh(&format!("sleep 0.3; kill -0 {pid}")).1, json!(0));
    assert!(beats(&house) > before);
    assert_eq!(house.sh("echo later > /root/later; cat /root/kept").0, "kept");

    let names = "cat /proc/sys/kernel/random/boot_id /etc/machine-id /sys/class/net/eth0/address; \
                 echo $AEGIS_INSTANCE_ID; head -c8 /dev/urandom | od -An -tx1";
    let mut seen = vec![house.sh(names).0];
    for (at, (from, memory)) in [(&whole, true), (&again, true), (&disk, false)].iter().enumerate()
    {
        let id = format!("inst-01ARZ3NDEKTSV4RRFFQ69G5F0{at}");
        let mut fork = House::new(dir.path(), &id);
        fork.from = json!({"dir": from, "memory": memory});
        let mut worker = fork.start();
        until(&mut fork.launch(), "running");
        assert_eq!(fork.sh("cat /root/kept; cat /root/later 2>&1 | wc -l").0, "kept\n1");
        // What lies in memory is there where the processes are.
        assert_eq!(fork.sh("test -e /tmp/beats").1 == json!(0), *memory);
        if *memory {
            assert_eq!(fork.sh(&format!("kill -0 {pid}")).1, json!(0));
            let before = beats(&fork);
            assert_eq!(fork.sh("sleep 0.3").1, json!(0));
            assert!(beats(&fork) > before);
            assert!(fork.sh("echo $AEGIS_INSTANCE_ID").0 == id, "{id}");
        }
        fork.sh("echo own > /root/own; sync");
        let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let inside: u64 = fork.sh("date +%s").0.parse().unwrap();
        assert!((now() - 2..=now() + 2).contains(&inside), "its clock shows {inside}");
        seen.push(fork.sh(names).0);
        // Its next start is from its own disk.
        let stop = json!({"op": "stop", "grace_ms": 1000});
        assert_eq!(fork.say(&stop).last().unwrap(), json!({"ok": true}));
        worker.wait().unwrap();
        assert_eq!(fork.reap(false)["remaining"], json!([]));
        // What the commit's memory fits does not matter any more.
        let kept = from.join("kept.json");
        let text = std::fs::read_to_string(&kept).unwrap();
        std::fs::write(&kept, text.replace("\"fits\":\"", "\"fits\":\"0")).unwrap();
        let mut worker = fork.start();
        until(&mut fork.launch(), "running");
        std::fs::write(&kept, text).unwrap();
        assert_eq!(fork.sh("cat /root/own /root/kept").0, "own\nkept");
        assert_ne!(fork.sh("test -e /tmp/beats").1, json!(0), "that was the first life");
        assert_eq!(fork.reap(true)["remaining"], json!([]));
        worker.wait().unwrap();
        std::mem::forget(fork);
    }
    assert_eq!(house.sh("ls /root/own 2>&1 | grep -c 'No such'").0, "1", "forks are apart");
    let lines: Vec<&str> = seen.iter().flat_map(|s| s.lines()).collect();
    let mut unique = lines.clone();
    unique.sort_unstable();
    unique.dedup();
    // The boot id is what this test gives all of them, and who boots has the card that all have.
    assert_eq!(unique.len(), lines.len() - 4, "{seen:?}");

    // Memory that another QEMU saved is refused, and said why.
    let kept = whole.join("kept.json");
    let text = std::fs::read_to_string(&kept).unwrap();
    std::fs::write(&kept, text.replace("\"fits\":\"", "\"fits\":\"0")).unwrap();
    let mut fork = House::new(dir.path(), "inst-01ARZ3NDEKTSV4RRFFQ69G5F09");
    fork.from = json!({"dir": whole, "memory": true});
    let mut other = fork.start();
    let ended = fork.launch().last().unwrap();
    assert_eq!(ended["reason"], "boot_failed", "{ended}");
    assert!(ended["message"].as_str().unwrap().contains("without its memory"), "{ended}");
    other.wait().unwrap();
    assert_eq!(house.reap(true)["remaining"], json!([]));
    worker.wait().unwrap();
}

/// What processes inside ask of their host, with a host that is played.
fn asks_its_host(house: &House) {
    let mut line = UnixStream::connect(house.run_dir().join("worker.sock")).unwrap();
    line.write_all(b"{\"op\":\"broker\"}\n").unwrap();
    let mut calls = BufReader::new(line.try_clone().unwrap()).lines();
    assert_eq!(calls.next().unwrap().unwrap(), r#"{"ok":true}"#);
    let socket = house.run_dir().join("worker.sock");
    let answering = std::thread::spawn(move || {
        for call in calls.map_while(Result::ok) {
            let call: Value = serde_json::from_str(&call).unwrap();
            let mut bulk = None;
            let mut answer = match call["method"].as_str().unwrap() {
                "guest.self_info" => json!({"result": {"told": call["params"]}}),
                "guest.exec_child" => {
                    let mut stream = UnixStream::connect(&socket).unwrap();
                    stream.write_all(b"{\"op\":\"guest_stream\",\"ticket\":\"t1\"}\n").unwrap();
                    let mut reply = String::new();
                    BufReader::new(&stream).read_line(&mut reply).unwrap();
                    assert_eq!(reply, "{\"ok\":true}\n");
                    bulk = Some(stream);
                    json!({"result": {"ticket": "t1"}})
                }
                _ => json!({"error": {
                    "code": -32001, "message": "no",
                    "data": {"error": "no", "code": "capability_denied", "rule": "spawn"},
                }}),
            };
            answer["id"] = call["id"].clone();
            line.write_all(format!("{answer}\n").as_bytes()).unwrap();
            if let Some(mut stream) = bulk {
                stream.write_all(b"{\"line\":\"one\"}\n{\"line\":\"two\"}\n").unwrap();
            }
        }
    });
    let told = |token: &str| (format!(r#"{{"told":{{"token":"{token}"}}}}"#), json!(0));
    let ask = "curl -sS --max-time 20";
    let myself = format!("{ask} $AEGIS_GUEST_API/v1/self");
    assert_eq!(house.sh(&myself), told(TOKEN));
    let socket = "--unix-socket /run/aegis/guestd.sock http://aegis/v1/self";
    assert_eq!(house.sh(&format!("{ask} {socket}")), told(TOKEN));
    let spawn = format!("{ask} -w ' %{{http_code}}' -d '{{}}' $AEGIS_GUEST_API/v1/instances");
    let (text, _) = house.sh(&spawn);
    assert!(text.contains(r#""rule":"spawn""#) && text.ends_with(" 403"), "{text}");
    let exec = format!("{ask} -d '{{\"command\":[\"a\"]}}' $AEGIS_GUEST_API/v1/instances/kid/exec");
    let lines = "{\"line\":\"one\"}\n{\"line\":\"two\"}";
    assert_eq!(house.sh(&exec), (lines.to_owned(), json!(0)));
    assert_eq!(house.sh("echo $AEGIS_INSTANCE_ID").0, ID);
    // The token is in no environment and in no file that a process could read.
    let environ = "cat /proc/1/environ /proc/1/cmdline /proc/self/environ | grep -ac as-it-was";
    assert_eq!(house.sh(environ).0, "0");
    let files = "grep -rals as-it-was-m[i]nted /run /tmp /etc /root /var";
    assert_eq!(house.sh(files).0, "");
    let renew = json!({"op": "renew_token", "token": "as-it-was-renewed"});
    assert_eq!(house.say(&renew).last().unwrap(), json!({"ok": true}));
    assert_eq!(house.sh(&myself), told("as-it-was-renewed"));
    let outside = house.say(&json!({"op": "port", "port": 7777})).last().unwrap();
    assert_eq!(outside["error"]["code"], -32003, "nobody outside may speak as the machine");
    // It floods, and lives.
    let flood = "python3 -c 'import socket\n\
        all = [socket.create_connection((\"127.0.0.1\", 7777)) for _ in range(300)]\n\
        ask = b\"GET /v1/self HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n\"\n\
        for one in all: one.send(ask)\n\
        heard = [one.recv(4096)[:9] for one in all]\n\
        print(set(heard) == {b\"HTTP/1.1 \"} and \"over\")'";
    assert_eq!(house.sh(flood).0, "over");
    assert_eq!(house.sh(&myself).1, json!(0));
    // Without a daemon it is told so.
    assert_eq!(house.say(&json!({"op": "broker"})).next(), Some(json!({"ok": true})));
    answering.join().unwrap();
    let (text, _) = house.sh(&myself);
    assert!(text.contains(r#""code":"unavailable""#), "{text}");
}
