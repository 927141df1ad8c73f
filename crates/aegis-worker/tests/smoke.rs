//! One real machine through its worker: launch, exec, freeze, thaw, stop, start again, reap.
//!
//! Needs `AEGIS_TEST_ASSETS`, laid out as a home (kernel, base image), and the harness in
//! `AEGIS_TEST_PROGRAMS`; `make test` provides both.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

const ID: &str = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV";
const BOOT_ID: &str = "0c0ffee0-0000-4000-8000-000000000001";

struct House {
    dir: PathBuf,
    assets: PathBuf,
}

impl House {
    fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    fn start(&self) -> Child {
        std::fs::create_dir(self.run_dir()).unwrap();
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
            "instance_id": ID,
            "golden": {
                "dir": self.dir.join("golden"),
                "qemu": "/usr/bin/qemu-system-x86_64",
                "kernel": asset("kernel/vmlinux"),
                "modules": asset("kernel/modules"),
                "harness": from_env("AEGIS_TEST_PROGRAMS").join("aegis-harness"),
                "base": asset("images/base/base.erofs"),
                "vcpus": 1,
                "memory": 256,
                "accel": "auto",
            },
            "cpu": 1000,
            "disk": {"path": self.dir.join("disk.raw"), "bytes": 500_000_000u64},
            "cgroup": format!("aegis/smoke-{}/{ID}", std::process::id()),
            "require_limits": false,
            "hostname": "box",
            "boot_id": BOOT_ID,
            "run": {"command": ["sleep", "1000"]},
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
            "cgroup": format!("aegis/smoke-{}/{ID}", std::process::id()),
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

impl Drop for House {
    /// Nothing stays, also when the test failed.
    fn drop(&mut self) {
        self.reap(true);
        // A keeper ends when its directory is removed.
        let _ = std::fs::remove_dir_all(self.dir.join("golden"));
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
    let assets = from_env("AEGIS_TEST_ASSETS");
    let dir = tempfile::tempdir().unwrap();
    let house = House { dir: dir.path().to_owned(), assets };

    let mut worker = house.start();
    let mut events = house.launch();
    assert_eq!(until(&mut events, "running")["boot_id"], BOOT_ID);
    assert_eq!(house.sh("echo out; echo err >&2; exit 7"), ("out\nerr".to_owned(), json!(7)));
    assert_eq!(house.sh("cat /proc/sys/kernel/random/boot_id"), (BOOT_ID.to_owned(), json!(0)));
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
    let reaped = house.reap(true);
    assert_eq!(reaped["verified"], json!(["process", "cgroup", "network", "disk"]));
    worker.wait().unwrap();
    assert!(!house.dir.join("disk.raw").exists());
    assert_eq!(house.reap(true)["remaining"], json!([]), "again");
}
