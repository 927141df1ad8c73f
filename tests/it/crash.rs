//! kill -9 of the daemon at random instants under load. `AEGIS_TEST_ROUNDS` says how often.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use aegis_tests::house::{House, Ran};
use aegis_tests::{look, wait_until};
use hyper::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

const ROUNDS: u64 = 8;
/// Codes that a round redeems at most: each becomes a machine.
const CODES: usize = 3;
/// The daemon dies within this of the start of the load.
const LATEST: Duration = Duration::from_millis(1500);

const SETTINGS: &str = "[machines]\nspares = 1\n[rate_limit]\nper_second = 0\n";

fn small() -> Value {
    json!({"resourceLimits": {"maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.3}})
}

/// What was answered before the daemon died: none of it may be untrue afterwards.
#[derive(Default)]
struct Answered {
    redeemed: Mutex<Vec<Value>>,
    killed: Mutex<Vec<Value>>,
    appended: Mutex<u64>,
}

/// One round's load: all of it until the daemon is gone.
fn load(house: &House, vm: &str, codes: &[Value], answered: &Answered) {
    let host = house.host();
    std::thread::scope(|scope| {
        for code in codes {
            let host = host.clone();
            scope.spawn(move || {
                let ask = json!({"code": code, "name": "ty"});
                let Ok(answer) = host.ask(Method::POST, "/couch/redeem", Some(&ask)) else {
                    return;
                };
                let guest = answer.expect(201);
                let id = guest["guestId"].as_str().unwrap().to_owned();
                answered.redeemed.lock().unwrap().push(guest);
                // Every other one is ended right away.
                if id.as_bytes()[id.len() - 1].is_multiple_of(2) {
                    let path = format!("/couch/guests/{id}");
                    if let Ok(answer) = host.ask(Method::DELETE, &path, None) {
                        answered.killed.lock().unwrap().push(answer.json());
                    }
                }
            });
        }
        scope.spawn(|| {
            let path = format!("/v1/instances/{vm}/exec");
            let ask = json!({"command": ["sh", "-c", "echo x >> /root/count"]});
            while let Ok(answer) = host.ask(Method::POST, &path, Some(&ask)) {
                if answer.status == 200 && Ran::of(&answer.lines()).code == Some(0) {
                    *answered.appended.lock().unwrap() += 1;
                }
            }
        });
    });
}

fn random_below(most: Duration) -> Duration {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).unwrap();
    Duration::from_micros(u64::from_le_bytes(bytes) % most.as_micros() as u64)
}

#[test]
fn nothing_answered_is_lost_and_nothing_leaks() {
    let rounds = match std::env::var("AEGIS_TEST_ROUNDS") {
        Ok(text) => text.parse().expect("AEGIS_TEST_ROUNDS is a number"),
        Err(_) => ROUNDS,
    };
    let mut house = House::new(SETTINGS);
    let steady = house.guest(small());
    let steady_id = steady["guestId"].as_str().unwrap();
    let vm = house.until(steady_id, "running")["vmId"].as_str().unwrap().to_owned();
    let boot_id = house.sh(&vm, "cat /proc/sys/kernel/random/boot_id").text();
    let mut appended = 0;
    for round in 0..rounds {
        let codes: Vec<Value> = (0..CODES).map(|_| house.invite(small())["code"].clone()).collect();
        let answered = Answered::default();
        let instant = random_below(LATEST);
        eprintln!("round {round}: the daemon dies after {instant:?}");
        std::thread::scope(|scope| {
            scope.spawn(|| load(&house, &vm, &codes, &answered));
            std::thread::sleep(instant);
            rustix::process::kill_process(house.pid(), Signal::KILL).unwrap();
        });
        house.kill9();
        house.start();
        appended += *answered.appended.lock().unwrap();
        check(&house, &vm, &boot_id, appended, &codes, &answered);
        sweep(&house, steady_id, &vm);
    }
}

/// All that was answered still holds.
fn check(
    house: &House,
    vm: &str,
    boot_id: &str,
    appended: u64,
    codes: &[Value],
    answered: &Answered,
) {
    let redeemed = answered.redeemed.lock().unwrap();
    for guest in redeemed.iter() {
        let now = house.guest_status(guest["guestId"].as_str().unwrap());
        let killed = answered.killed.lock().unwrap().iter().any(|k| k["id"] == now["id"]);
        if killed {
            assert_eq!(now["status"], "revoked");
        }
        let token = guest["authToken"].as_str().unwrap();
        let own = house.anybody().bearer(token).get("/couch/status").status;
        let dead = now["status"] == "revoked";
        assert_eq!(own, if dead { 404 } else { 200 }, "{now}");
    }
    for killed in answered.killed.lock().unwrap().iter() {
        let path = format!("/couch/guests/{}/status", killed["id"].as_str().unwrap());
        let now = house.host().get(&path).expect(200);
        if !killed["receipt"].is_null() {
            assert_eq!(now["receipt"], killed["receipt"], "a receipt is final");
        }
    }
    // One guest per code at most, whatever was answered.
    let guests = house.host().get("/couch/guests").expect(200);
    let invites: Vec<&str> = guests["guests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| g["inviteId"].as_str().unwrap())
        .collect();
    assert_eq!(invites.iter().collect::<BTreeSet<_>>().len(), invites.len());
    for code in codes {
        let again = || {
            let ask = json!({"code": code, "name": "late"});
            house.host().post("/couch/redeem", &ask).status
        };
        let first = again();
        assert!(first == 409 || first == 201, "{first}");
        assert_eq!(again(), 409);
    }
    assert_eq!(house.sh(vm, "cat /proc/sys/kernel/random/boot_id").text(), boot_id);
    let lines = house.sh(vm, "wc -l < /root/count || echo 0").text();
    assert!(lines.parse::<u64>().unwrap() >= appended, "{lines} < {appended}");
}

/// Ends all guests but the steady one; then nothing but its machine is on the host.
fn sweep(house: &House, steady: &str, vm: &str) {
    // No machine without a record.
    let known: BTreeSet<String> = house
        .host()
        .get("/v1/instances")
        .expect(200)
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["id"].as_str().unwrap().to_owned())
        .collect();
    wait_until(
        "every run directory has its record, but a spare's",
        Duration::from_secs(10),
        || {
            let there = look::run_directories(house.home());
            there.iter().filter(|id| !known.contains(*id)).count() <= 1
        },
    );
    let guests = house.host().get("/couch/guests").expect(200);
    for guest in guests["guests"].as_array().unwrap() {
        let id = guest["id"].as_str().unwrap();
        if id != steady && !["revoked", "stopped"].contains(&guest["status"].as_str().unwrap()) {
            let killed = house.host().delete(&format!("/couch/guests/{id}")).expect(200);
            assert!(killed["receipt"]["hash"].is_string(), "{killed}");
        }
    }
    wait_until("only the steady machine is left", Duration::from_secs(15), || {
        let there = look::run_directories(house.home());
        // A spare, or two while one is given up, is nobody's.
        let spares = there.iter().filter(|id| !known.contains(*id)).count();
        there.contains(&vm.to_owned())
            && there.len() == 1 + spares
            && look::disks(house.home()).len() == 1
            && house.machine_processes().len() <= 2 + 2 * spares
            && look::cgroups_below(&look::cgroup_of_home(house.home()))
                .iter()
                .all(|c| there.iter().any(|id| c.ends_with(id)))
    });
    for guest in
        house.host().get("/couch/guests?status=revoked").expect(200)["guests"].as_array().unwrap()
    {
        let now = house.guest_status(guest["id"].as_str().unwrap());
        assert!(now["receipt"]["hash"].is_string(), "no kill without its proof: {now}");
    }
}
