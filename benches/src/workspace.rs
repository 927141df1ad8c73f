//! A workspace beside the machine's own disk: the same work in both, in turns, in one machine. And
//! beside virtiofs, in a machine that has it, where the host has what that takes.

use std::collections::BTreeMap;

use aegis_tests::house::House;
use serde_json::json;

use crate::figures::Figures;
use crate::virtiofs;

/// How often each work is done in each place.
const ROUNDS: usize = 5;

/// Runs inside: name, place and milliseconds of each work, in lines.
const CLIENT: &str = r#"
import os, sys, time
chunk = bytearray(1 << 20)
def timed(name, place, work):
    began = time.monotonic()
    work()
    print(name, place, (time.monotonic() - began) * 1e3, flush=True)
def forget():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as f: f.write("3")
def write():
    with open("big", "wb", buffering=0) as f:
        for _ in range(64): f.write(chunk)
        os.fsync(f.fileno())
def read():
    with open("big", "rb", buffering=0) as f:
        while f.readinto(chunk): pass
def make(directory, count):
    os.mkdir(directory)
    for i in range(count):
        with open(f"{directory}/{i}", "w") as f: f.write("x" * 100)
def listed():
    for entry in os.scandir("many"): entry.stat(follow_symlinks=False)
def cat():
    for i in range(500):
        with open(f"many/{i}") as f: f.read()
def stats():
    for i in range(500): os.stat(f"many/{i}")
for round in range(int(sys.argv[1])):
    for place in sys.argv[2:]:
        os.chdir("/root" if place == "disk" else "/workspace")
        os.system("rm -rf big many few")
        timed("write", place, write)
        forget()
        timed("read", place, read)
        make("many", 500)
        timed("create", place, lambda: make("few", 200))
        forget()
        timed("list", place, listed)
        timed("cat", place, cat)
        timed("cat-again", place, cat)
        time.sleep(1.1)
        timed("stat", place, stats)
        timed("stat-again", place, stats)
"#;

/// Works, and what they are to people.
const WORKS: [(&str, &str); 8] = [
    ("write", "write 64 MiB, synced"),
    ("read", "read 64 MiB, cold"),
    ("create", "create 200 files"),
    ("list", "list 500 files with their attributes, cold"),
    ("cat", "read 500 files, cold"),
    ("cat-again", "read 500 files again"),
    ("stat", "look at 500 files, a second later"),
    ("stat-again", "look at 500 files again"),
];

/// Measures all places.
pub fn measure(figures: &mut Figures) {
    let mut said = ours();
    match virtiofs::said(CLIENT, &format!("{ROUNDS} virtiofs")) {
        Ok(more) => said.push_str(&more),
        Err(error) => println!("virtiofs is not measured: {error:#}"),
    }
    let mut all: BTreeMap<(&str, &str), Vec<f64>> = BTreeMap::new();
    for line in said.lines() {
        let [work, place, ms] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        all.entry((work, place)).or_default().push(ms.parse().unwrap());
    }
    for (work, words) in WORKS {
        for place in ["workspace", "disk", "virtiofs"] {
            if let Some(samples) = all.get(&(work, place)) {
                figures.samples(&format!("{place}: {words}"), samples.clone());
            }
        }
    }
}

/// What the client says in a machine of ours.
fn ours() -> String {
    let house = House::new("[rate_limit]\nper_second = 0\n");
    let body = json!({"handle": "bench", "command": ["sleep", "infinity"], "vcpus": 1,
        "memory_mb": 512, "disk_gb": 2.0, "workspace": "bench", "idle_policy": "leave-running"});
    house.socket().post("/v1/instances", &body).expect(201);
    house.until_instance("bench", "running");
    std::fs::write(house.home().join("workspaces/bench/client.py"), CLIENT).unwrap();
    house.ok("bench", &format!("python3 /workspace/client.py {ROUNDS} workspace disk")) + "\n"
}
