//! A guest's whole life on a real machine: invite, redeem, running, usage, kill with a receipt that
//! is checked by looking for oneself (contracts/couch.md 3 to 7).

use std::time::{Duration, Instant};

use aegis_tests::house::{House, SERVING};
use aegis_tests::http::Client;
use aegis_tests::look::{self, Process};
use aegis_tests::wait_until;
use serde_json::{Value, json};

/// Guests that need not serve anything.
const SLEEPING: &str = "[rate_limit]\nper_second = 0\n";

fn small() -> Value {
    json!({"resourceLimits": {"maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.3}})
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name}: {value}"))
}

/// The receipt says that all is gone, and it is.
fn assert_verified(house: &House, killed: &Value, machine: &str, before: &[Process]) {
    let machines = killed["receipt"]["machines"].as_array().unwrap_or_else(|| panic!("{killed}"));
    assert_eq!(machines.len(), 1, "{killed}");
    assert_eq!(machines[0]["id"], machine);
    assert_eq!(machines[0]["verified"], json!(["process", "cgroup", "network", "disk"]));
    assert_eq!(killed["receipt"]["hash"].as_str().unwrap().len(), 64);
    house.assert_no_trace(machine, before);
}

#[test]
fn a_friend_redeems_an_invite_and_the_host_ends_it() {
    let house = House::new(SERVING);
    let guest = house.guest(small());
    let id = text(&guest, "guestId");
    let token = text(&guest, "authToken");
    assert_eq!(guest["agentEndpoint"], Value::Null);
    let running = house.until(id, "running");
    let (machine, endpoint) = (text(&running, "vmId"), text(&running, "agentEndpoint"));
    let own = house.anybody().bearer(token).get("/couch/status").expect(200);
    assert_eq!(own["agentEndpoint"], endpoint);
    assert_eq!(own["vmId"], machine);

    // `running` was only said once the agent's port accepts.
    let address = endpoint.strip_prefix("http://").unwrap().parse().unwrap();
    let page = Client::tcp(address).get("/");
    assert_eq!(page.status, 200);
    assert!(String::from_utf8_lossy(&page.body).contains("<html"));

    // Measured on the host; it never goes down.
    house.sh(machine, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done");
    wait_until("usage is seen", Duration::from_secs(10), || {
        let usage = &house.guest_status(id)["resourceUsage"];
        usage["cpuSeconds"].as_f64().unwrap() > 0.0
            && usage["memoryPeakMB"].as_f64().unwrap() > 0.0
            && usage["uptimeSeconds"].as_f64().unwrap() > 0.0
    });
    let put = |body: Value| house.socket().put(&format!("/couch/guests/{id}/usage"), &body);
    put(json!({"cpuSeconds": 1e6})).refused(400, "cpuSeconds");
    assert_eq!(put(json!({"tokensUsed": 5})).expect(200)["resourceUsage"]["tokensUsed"], 5);

    // Its machine is not the host's to delete while the guest lives.
    house.socket().delete(&format!("/v1/instances/{machine}")).refused(409, "");

    // Frozen: its clock stands still; thawed: the same machine goes on.
    let act = |verb: &str| house.socket().act(&format!("/couch/guests/{id}/{verb}")).expect(200);
    let boot_id = house.sh(machine, "cat /proc/sys/kernel/random/boot_id").text();
    assert_eq!(act("freeze")["status"], "frozen");
    house.until_instance(machine, "frozen");
    let exec = json!({"command": ["true"]});
    house.socket().post(&format!("/v1/instances/{machine}/exec"), &exec).refused(409, "");
    assert_eq!(act("thaw")["status"], "running");
    house.until_instance(machine, "running");
    assert_eq!(house.sh(machine, "cat /proc/sys/kernel/random/boot_id").text(), boot_id);

    let before = house.machine_processes();
    assert!(before.iter().any(|p| p.command.contains("qemu")), "{before:?}");
    let killed = house.socket().delete(&format!("/couch/guests/{id}")).expect(200);
    assert_verified(&house, &killed, machine, &before);
    assert!(killed["receipt"]["machines"][0]["frozenAt"].is_string(), "{killed}");
    house.anybody().bearer(token).get("/couch/status").refused(404, "");
    assert!(std::net::TcpStream::connect(address).is_err(), "the endpoint is closed");
    let after = house.guest_status(id);
    assert_eq!(after["status"], "revoked");
    assert!(after["resourceUsage"]["cpuSeconds"].as_f64().unwrap() > 0.0, "usage is kept");
}

#[test]
fn a_kill_while_it_provisions_leaves_no_machine() {
    let house = House::new(SLEEPING);
    for wait_for_worker in [false, true] {
        let guest = house.guest(small());
        let id = text(&guest, "guestId");
        let mut before = Vec::new();
        if wait_for_worker {
            wait_until("a worker is there", Duration::from_secs(10), || {
                before = house.machine_processes();
                !before.is_empty()
            });
        }
        let killed = house.socket().delete(&format!("/couch/guests/{id}")).expect(200);
        let machine = killed["receipt"]["machines"][0]["id"].as_str().unwrap();
        assert_verified(&house, &killed, machine, &before);
    }
    assert_eq!(house.machine_processes(), vec![]);
    assert_eq!(look::disks(house.home()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_frozen_guest_can_be_killed() {
    let house = House::new(SLEEPING);
    let guest = house.guest(small());
    let id = text(&guest, "guestId");
    let machine = text(&house.until(id, "running"), "vmId").to_owned();
    house.socket().act(&format!("/couch/guests/{id}/freeze")).expect(200);
    let before = house.machine_processes();
    let killed = house.socket().delete(&format!("/couch/guests/{id}")).expect(200);
    assert_verified(&house, &killed, &machine, &before);
}

#[test]
fn a_guest_whose_machine_ended_by_itself_is_stopped_for_good() {
    let script = "python3 -m http.server 8080 & sleep 4";
    let house = House::new(&format!(
        "[guest]\ncommand = [\"sh\", \"-c\", \"{script}\"]\n[rate_limit]\nper_second = 0\n"
    ));
    let guest = house.guest(small());
    let id = text(&guest, "guestId");
    let stopped = house.until(id, "stopped");
    assert!(stopped["stoppedAt"].is_string(), "{stopped}");
    house.anybody().bearer(text(&guest, "authToken")).get("/couch/status").refused(404, "");
    let path = format!("/couch/guests/{id}");
    let said = house.socket().delete(&path).refused(400, "");
    assert_eq!(said["error"], "guest already stopped");
    for verb in ["freeze", "thaw"] {
        house.socket().act(&format!("{path}/{verb}")).refused(400, "");
    }
    let list = house.socket().get("/couch/guests?status=stopped").expect(200);
    assert_eq!(list["guests"][0]["id"], id);
    wait_until("nothing of it is left", Duration::from_secs(10), || {
        house.machine_processes().is_empty()
    });
}

#[test]
fn a_guest_past_its_time_is_gone_though_nobody_looks() {
    const SECONDS: f64 = 20.0;
    let house = House::new(SLEEPING);
    // The snapshot is made by another, so that the short life is not spent on it.
    let first = house.guest(small());
    house.until(text(&first, "guestId"), "running");

    let mut ask = small();
    ask["resourceLimits"]["maxDurationHours"] = json!(SECONDS / 3600.0);
    let redeemed = Instant::now();
    let guest = house.guest(ask);
    let running = house.until(text(&guest, "guestId"), "running");
    let machine = text(&running, "vmId");
    let group =
        look::cgroup_directories(&format!("{}/{machine}", look::cgroup_of_home(house.home())));
    let end = redeemed + Duration::from_secs_f64(SECONDS);
    assert!(Instant::now() < end, "it ran before its end");
    // Nobody asks the daemon anything: only files and processes are looked at.
    let run_dir = house.home().join("run").join(machine);
    wait_until("the machine is gone", (end + Duration::from_secs(1)) - Instant::now(), || {
        !run_dir.exists()
    });
    assert!(Instant::now() >= end - Duration::from_millis(50), "not before its time");
    assert!(group.iter().all(|g| !g.exists()));
    let token = text(&guest, "authToken");
    house.anybody().bearer(token).get("/couch/status").refused(404, "");
    assert_eq!(house.guest_status(text(&guest, "guestId"))["status"], "expired");
    assert_eq!(house.guest_status(text(&first, "guestId"))["status"], "running");
}

#[test]
fn a_fork_bomb_and_a_memory_hog_touch_nobody_else() {
    let house = House::new(SLEEPING);
    let (bomb, hog) = (house.guest(small()), house.guest(small()));
    let machine =
        |guest: &Value| text(&house.until(text(guest, "guestId"), "running"), "vmId").to_owned();
    let (bombed, hogged) = (machine(&bomb), machine(&hog));
    let inside = |machine: &str, script: &str| {
        house.sh(machine, &format!("setsid sh -c '{script}' >/dev/null 2>&1 & echo started"))
    };
    assert_eq!(inside(&bombed, "f() { f | f & }; f").text(), "started");
    inside(&hogged, "python3 -c \"x=[bytearray(1<<20) for _ in range(100000)]\"");
    // The host goes on: another guest comes while they rage.
    let other = house.guest(small());
    house.until(text(&other, "guestId"), "running");
    for (guest, machine) in [(&bomb, &bombed), (&hog, &hogged)] {
        // What belongs to this machine alone.
        let before: Vec<Process> = house
            .machine_processes()
            .into_iter()
            .filter(|p| p.command.contains(machine.as_str()))
            .collect();
        let path = format!("/couch/guests/{}", text(guest, "guestId"));
        let asked = Instant::now();
        let killed = house.socket().delete(&path).expect(200);
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        assert_verified(&house, &killed, machine, &before);
    }
    let machine = text(&house.guest_status(text(&other, "guestId")), "vmId").to_owned();
    assert_eq!(house.sh(&machine, "echo calm").text(), "calm");
}

#[test]
fn a_guests_life_goes_on_over_a_restart_and_a_crash() {
    let mut house = House::new(SERVING);
    let guest = house.guest(small());
    let id = text(&guest, "guestId");
    let running = house.until(id, "running");
    let machine = text(&running, "vmId");
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let boot_id = house.sh(machine, boot).text();
    let mut cpu = 0.0;
    for crash in [false, true] {
        let now = house.guest_status(id)["resourceUsage"]["cpuSeconds"].as_f64().unwrap();
        assert!(now >= cpu, "usage never goes down: {now} < {cpu}");
        cpu = now;
        if crash {
            house.kill9()
        } else {
            assert!(house.stop().success())
        }
        house.start();
        let now = house.guest_status(id)["resourceUsage"]["cpuSeconds"].as_f64().unwrap();
        assert!(now >= cpu, "usage never goes down: {now} < {cpu}");
        assert_eq!(house.until(id, "running")["agentEndpoint"], running["agentEndpoint"]);
        assert_eq!(house.sh(machine, boot).text(), boot_id);
        let address = text(&running, "agentEndpoint").strip_prefix("http://").unwrap();
        assert_eq!(Client::tcp(address.parse().unwrap()).get("/").status, 200);
    }
    let before = house.machine_processes();
    let killed = house.socket().delete(&format!("/couch/guests/{id}")).expect(200);
    assert_verified(&house, &killed, machine, &before);
}
