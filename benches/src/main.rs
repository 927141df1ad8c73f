//! `make bench`: whole flows through the real programs. What is compared is measured in one run.
//! `PARTS="flows net"` measures only those: flows, tree, net, commits, wake, workspace, stdin, load.
//! `AEGIS_BENCH_VIRTIOFS` lets workspaces be measured beside virtiofs (`virtiofs.rs`).
#![allow(clippy::unwrap_used, reason = "a broken bench is to be seen")]

mod commits;
mod figures;
mod load;
mod net;
mod stdin;
mod tree;
mod virtiofs;
mod wake;
mod workspace;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aegis_tests::house::House;
use aegis_tests::programs;
use figures::Figures;
use serde_json::{Value, json};

const SERIAL: usize = 30;
const FREE_RATE: &str = "[rate_limit]\nper_second = 0\n[capacity]\nvcpus = 4\n";
const CLIENTS: usize = 64;
const LOAD: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let mut figures = Figures::new();
    let parts = std::env::var("PARTS").unwrap_or_default();
    let wanted = |part: &str| parts.is_empty() || parts.split_whitespace().any(|p| p == part);
    if wanted("flows") {
        flows(&mut figures)?;
    }
    if wanted("tree") {
        tree::measure(&mut figures);
    }
    if wanted("net") {
        net::measure(&mut figures);
    }
    if wanted("commits") {
        commits::measure(&mut figures);
    }
    if wanted("wake") {
        wake::measure(&mut figures)?;
    }
    if wanted("workspace") {
        workspace::measure(&mut figures);
    }
    if wanted("stdin") {
        stdin::measure(&mut figures)?;
    }
    if wanted("load") {
        let house = House::new(&format!("provisioner = \"manual\"\n{FREE_RATE}"));
        let (redeems, reads) = load::rates(&house, CLIENTS, LOAD)?;
        figures.one("durable redeems, 64 clients", redeems, "per second");
        figures.one("status reads, 64 clients", reads, "per second");
    }
    let out =
        std::env::args().nth(1).map_or_else(|| PathBuf::from("target/bench.json"), PathBuf::from);
    figures.publish(&out)?;
    Ok(())
}

/// A guest's whole way, one after the other and many at once.
fn flows(figures: &mut Figures) -> anyhow::Result<()> {
    let house = House::new(&format!("[machines]\nspares = 1\n{FREE_RATE}"));
    // The golden image exists before anything is timed, and with it the first spare.
    let first = house.guest(machine());
    house.until(id(&first), "running");
    kill(&house, &first);
    until_spare(&house);

    let floor = figures.samples("bare clone to first RPC (floor)", clone_floor(house.home())?);
    let (mut running, mut exec, mut round_trip, mut kills) = (vec![], vec![], vec![], vec![]);
    for _ in 0..SERIAL {
        until_spare(&house);
        let one = flow(&house);
        running.push(one.running_ms);
        exec.push(one.exec_ms);
        round_trip.push(one.round_trip_ms);
        kills.push(kill(&house, &one.guest));
    }
    figures.samples("redeem to running, serial", running);
    let exec = figures.samples("redeem to first exec answer, serial", exec);
    figures.one("redeem to first exec answer / floor", exec / floor, "times");
    figures.samples("exec round trip (/bin/true)", round_trip);
    figures.samples("kill to verified answer, serial", kills);
    let bare = House::new(FREE_RATE);
    let (mut running, mut exec) = (vec![], vec![]);
    for _ in 0..SERIAL {
        let one = flow(&bare);
        running.push(one.running_ms);
        exec.push(one.exec_ms);
        kill(&bare, &one.guest);
    }
    figures.samples("redeem to running, no spare", running);
    let exec = figures.samples("redeem to first exec answer, no spare", exec);
    figures.one("redeem to first exec answer / floor, no spare", exec / floor, "times");
    drop(bare);

    for at_once in [20, 50] {
        let done: Vec<Flow> = std::thread::scope(|scope| {
            let flows: Vec<_> = (0..at_once).map(|_| scope.spawn(|| flow(&house))).collect();
            flows.into_iter().map(|f| f.join().unwrap()).collect()
        });
        let name = |what: &str| format!("redeem to {what}, {at_once} at once");
        figures.samples(&name("running"), done.iter().map(|f| f.running_ms).collect());
        figures.samples(&name("first exec answer"), done.iter().map(|f| f.exec_ms).collect());
        if at_once == 20 {
            let kb: Vec<f64> = done.iter().map(|f| memory_kb(house.home(), &f.vm)).collect();
            let mean = kb.iter().sum::<f64>() / kb.len() as f64 / 1024.0;
            figures.one("memory of one of 20 idle machines (PSS, with worker)", mean, "MiB");
        }
        let kills = done.iter().map(|one| kill(&house, &one.guest)).collect();
        figures.samples(&format!("kill to verified answer, beside up to {at_once}"), kills);
    }
    Ok(())
}

struct Flow {
    guest: Value,
    vm: String,
    running_ms: f64,
    exec_ms: f64,
    round_trip_ms: f64,
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn id(guest: &Value) -> &str {
    guest["guestId"].as_str().unwrap()
}

/// The machine of every flow.
fn machine() -> Value {
    json!({"resourceLimits": {"maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.5}})
}

/// Redeem; the first exec is asked at once and waits for the machine.
fn flow(house: &House) -> Flow {
    let invite = house.invite(machine());
    let ask = json!({"code": invite["code"], "name": "bench"});
    let began = Instant::now();
    let guest = house.socket().post("/couch/redeem", &ask).expect(201);
    let list = house.socket().get("/v1/instances").expect(200);
    let mine = list.as_array().unwrap().iter().find(|i| i["guest_id"] == id(&guest)).unwrap();
    let vm = mine["id"].as_str().unwrap().to_owned();
    let (running_ms, exec_ms) = std::thread::scope(|scope| {
        let exec = scope.spawn(|| {
            assert_eq!(house.sh(&vm, "true").code, Some(0));
            ms(began)
        });
        house.until(id(&guest), "running");
        (ms(began), exec.join().unwrap())
    });
    let path = format!("/v1/instances/{vm}/exec");
    let again = Instant::now();
    house.socket().post(&path, &json!({"command": ["/bin/true"]}));
    Flow { round_trip_ms: ms(again), guest, vm, running_ms, exec_ms }
}

fn kill(house: &House, guest: &Value) -> f64 {
    let path = format!("/couch/guests/{}", id(guest));
    let began = Instant::now();
    house.socket().delete(&path).expect(200);
    ms(began)
}

/// The worker's own measurement of the floor, with the snapshot of the same machines.
fn clone_floor(home: &Path) -> anyhow::Result<Vec<f64>> {
    let ask = json!({"n": SERIAL, "golden": {
        "dir": home.join("golden"),
        "qemu": "/usr/bin/qemu-system-x86_64",
        "kernel": home.join("kernel/vmlinux"),
        "modules": home.join("kernel/modules"),
        "harness": programs().join("aegis-harness"),
        "mcp": programs().join("aegis-mcp-guest"),
        "base": home.join("images/base/base.erofs"),
        "vcpus": 1, "memory": 256, "accel": "auto",
    }});
    let mut child = Command::new(programs().join("aegis-worker"))
        .arg("floor")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().unwrap().write_all(ask.to_string().as_bytes())?;
    let out = child.wait_with_output()?;
    let told: Value = serde_json::from_slice(&out.stdout)?;
    let list = told["clone_to_rpc_ms"].as_array().unwrap();
    Ok(list.iter().filter_map(Value::as_f64).collect())
}

/// Waits for a spare machine, as a host that is not asked for one machine right after another has.
fn until_spare(house: &House) {
    while house.socket().get("/v1/status").expect(200)["tasks"]["spares"] == "0" {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Proportional memory of a machine's worker and its QEMU, KiB.
fn memory_kb(home: &Path, vm: &str) -> f64 {
    let text = std::fs::read(home.join("run").join(vm).join("machine.json")).unwrap();
    let record: Value = serde_json::from_slice(&text).unwrap();
    let processes = ["worker", "qemu"].map(|name| &record[name]["pid"]);
    let pss = processes.into_iter().map(|pid| {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let pss = rollup.lines().find_map(|l| l.strip_prefix("Pss:")).unwrap();
        pss.trim().trim_end_matches(" kB").parse::<f64>().unwrap()
    });
    pss.sum()
}
