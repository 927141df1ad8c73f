//! Spare machines: nobody's until they are launched, and as much a machine of its own then as any.

use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::look::{self, Process};
use aegis_tests::{wait_for, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SETTINGS: &str = "[machines]\nspares = 1\n[rate_limit]\nper_second = 0\n";

fn small() -> Value {
    json!({"resourceLimits": {"maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.3}})
}

fn spare_is_ready(house: &House) {
    wait_until("a spare is ready", Duration::from_secs(60), || {
        house.socket().get("/v1/status").expect(200)["tasks"]["spares"] == "1"
    });
}

/// The one run directory without a record.
fn spare(house: &House) -> String {
    let known = house.socket().get("/v1/instances").expect(200);
    let is_known = |id: &String| known.as_array().unwrap().iter().any(|i| i["id"] == id.as_str());
    let mut spares = look::run_directories(house.home());
    spares.retain(|id| !is_known(id));
    assert_eq!(spares.len(), 1, "{spares:?} {known}");
    spares.remove(0)
}

/// What a machine's worker wrote down of it.
fn record(house: &House, id: &str) -> Value {
    let path = house.home().join("run").join(id).join("machine.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn running(house: &House, guest: &Value) -> String {
    let id = guest["guestId"].as_str().unwrap();
    house.until(id, "running")["vmId"].as_str().unwrap().to_owned()
}

#[test]
fn a_spare_becomes_a_machine_like_any_other() {
    let mut house = House::new(SETTINGS);
    let cold = running(&house, &house.guest(small()));
    spare_is_ready(&house);
    let qemu = record(&house, &spare(&house))["qemu"].clone();

    let guest = house.guest(small());
    let warm = running(&house, &guest);
    assert_eq!(record(&house, &warm)["qemu"], qemu, "it was not the spare that was launched");
    let own = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; hostname; head -c 16 \
               /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid";
    let (a, b) = (house.sh(&cold, own).text(), house.sh(&warm, own).text());
    for (a, b) in a.lines().zip(b.lines()) {
        assert_ne!(a, b, "twins");
    }
    // A disk of its size, and nothing of the rehearsal on it, nor a process of it.
    let sectors = "cat /sys/block/vd?/size | tail -1";
    assert_eq!(house.sh(&warm, sectors).text(), house.sh(&cold, sectors).text());
    let files = "find / -xdev -newer /proc/1/exe -type f 2>/dev/null | grep -v -e ^/etc -e ^/run \
                 -e ^/proc -e ^/sys | wc -l";
    assert_eq!(house.sh(&warm, files).text(), house.sh(&cold, files).text());
    let processes = "readlink /proc/[0-9]*/exe | sort";
    assert_eq!(house.sh(&warm, processes).text(), house.sh(&cold, processes).text());
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let (before, inside) = (now(), house.sh(&warm, "date +%s").text().parse::<u64>().unwrap());
    assert!((before - 1..=now() + 1).contains(&inside), "its clock shows {inside} at {before}");
    // It pays only for what it did since it is somebody's.
    let used = house.guest_status(guest["guestId"].as_str().unwrap());
    assert!(used["resourceUsage"]["uptimeSeconds"].as_f64().unwrap() < 60.0, "{used}");

    // A restart goes on with its disk; the daemon may die meanwhile.
    spare_is_ready(&house);
    let body = json!({"command": ["sleep", "infinity"], "vcpus": 1, "memory_mb": 256,
                      "disk_gb": 0.3});
    let made = house.socket().post("/v1/instances", &body).expect(201);
    let own = made["id"].as_str().unwrap().to_owned();
    house.until_instance(&own, "running");
    house.sh(&own, "echo kept > /root/kept && sync");
    house.kill9();
    house.start();
    let known = [cold.clone(), warm.clone(), own.clone()];
    wait_until("the spare of the dead daemon is gone", Duration::from_secs(10), || {
        let dirs = look::run_directories(house.home());
        dirs.iter().all(|id| known.contains(id)) && house.machine_processes().len() == 6
    });
    let path = format!("/v1/instances/{own}");
    house.socket().act(&format!("{path}/stop")).expect(200);
    house.until_instance(&own, "stopped");
    house.socket().act(&format!("{path}/start")).expect(200);
    house.until_instance(&own, "running");
    assert_eq!(house.sh(&own, "cat /root/kept").text(), "kept");
    house.socket().delete(&path).expect(200);
    // Nothing is left of either, and no spare outlives an orderly stop.
    for guest in house.socket().get("/couch/guests").expect(200)["guests"].as_array().unwrap() {
        let path = format!("/couch/guests/{}", guest["id"].as_str().unwrap());
        house.socket().delete(&path).expect(200);
    }
    assert!(house.stop().success());
    assert_eq!(look::run_directories(house.home()), Vec::<String>::new());
    assert_eq!(house.machine_processes(), vec![]);
    let group = look::cgroup_of_home(house.home());
    assert_eq!(look::cgroups_below(&group), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_spare_that_died_or_does_not_fit_is_not_missed() {
    let house = House::new(SETTINGS);
    running(&house, &house.guest(small()));
    spare_is_ready(&house);
    let id = spare(&house);
    let pid = record(&house, &id)["qemu"]["pid"].as_i64().unwrap();
    let worker = record(&house, &id)["worker"]["pid"].as_i64().unwrap();
    let worker = Process::of(worker as i32).unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    wait_until("its worker sees it", Duration::from_secs(10), || !worker.lives());
    let machine = running(&house, &house.guest(small()));
    assert_eq!(house.sh(&machine, "echo here").text(), "here");
    spare_is_ready(&house);

    // Another size has a spare of its own; the kill of the one that took it proves it gone.
    let mut larger = small();
    larger["resourceLimits"]["maxDiskGB"] = json!(0.4);
    running(&house, &house.guest(larger.clone()));
    wait_until("each size has its spare", Duration::from_secs(60), || {
        house.socket().get("/v1/status").expect(200)["tasks"]["spares"] == "2"
    });
    let guest = house.guest(larger);
    let machine = running(&house, &guest);
    let group = record(&house, &machine)["group"]["directories"].clone();
    let before = look::machine_processes(house.home());
    let worker = record(&house, &machine)["worker"]["pid"].as_i64().unwrap() as i32;
    let path = format!("/couch/guests/{}", guest["guestId"].as_str().unwrap());
    let killed = house.socket().delete(&path).expect(200);
    let verified = &killed["receipt"]["machines"][0]["verified"];
    assert_eq!(*verified, json!(["process", "cgroup", "network", "disk"]));
    for directory in group.as_array().unwrap() {
        let path = std::path::Path::new(directory.as_str().unwrap());
        assert!(!path.exists(), "{directory}");
    }
    let gone = before.iter().find(|p| p.pid == worker);
    assert!(!gone.unwrap().lives());
    wait_for("it is gone", Duration::from_secs(5), || {
        (!look::run_directories(house.home()).contains(&machine)).then_some(())
    });
}
