//! Guests in the vers cloud: the real daemon, and the cloud's double with every fault that it knows. No
//! machine is left, none is made twice, none is said to be gone that is not.

use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::vers::{Double, SETTINGS};
use aegis_tests::{wait_for, wait_until};
use serde_json::{Value, json};

/// A verdict of the daemon's is there within this.
const SOON: Duration = Duration::from_secs(30);

fn house(double: &Double) -> House {
    House::with_env(SETTINGS, &double.env())
}

fn guest(house: &House) -> String {
    house.guest(json!({}))["guestId"].as_str().unwrap().to_owned()
}

/// Waits for a status, whatever went wrong before it.
#[track_caller]
fn until(house: &House, id: &str, status: &str) -> Value {
    wait_for(&format!("guest {id} is {status}"), SOON, || {
        let now = house.guest_status(id);
        (now["status"] == status).then_some(now)
    })
}

/// Kills a guest; returns its receipt, which comes at once or later.
#[track_caller]
fn kill(house: &House, id: &str) -> Value {
    let answer = house.socket().delete(&format!("/couch/guests/{id}"));
    assert!(answer.status == 200 || answer.status == 202, "{}", answer.status);
    receipt(house, id)
}

#[track_caller]
fn receipt(house: &House, id: &str) -> Value {
    wait_for("a receipt", SOON, || {
        let now = house.guest_status(id);
        now["receipt"]["hash"].is_string().then(|| now["receipt"].clone())
    })
}

/// The one machine there is, which is this instance's.
#[track_caller]
fn only(double: &Double, vm: &Value) -> Value {
    let vms = double.vms();
    assert_eq!(vms.len(), 1, "{vms:?}");
    assert_eq!(vms[0]["vm_id"], *vm);
    assert!(vms[0]["labels"]["aegis-instance"].is_string(), "{vms:?}");
    vms[0].clone()
}

#[test]
fn a_guest_lives_in_the_cloud_and_ends_there() {
    let double = Double::new(50);
    double.faults(json!({"foreign": 2}));
    let house = house(&double);
    assert_eq!(house.socket().get("/v1/status").expect(200)["provisioner"], "vers");
    let invite = house.invite(json!({}));
    let ask = json!({"code": invite["code"], "name": "ty"});
    let redeemed = house.socket().post("/couch/redeem", &ask).expect(201);
    assert_eq!(redeemed["agentEndpoint"], Value::Null);
    let id = redeemed["guestId"].as_str().unwrap();
    let running = until(&house, id, "running");
    let vm = &running["vmId"];
    assert_eq!(running["agentEndpoint"], format!("https://{}.vm.127.0.0.1", vm.as_str().unwrap()));
    wait_until("it has its labels", SOON, || double.vms()[0]["labels"]["aegis-guest"] == id);
    let labels = only(&double, vm)["labels"].clone();
    assert_eq!(double.vms()[0]["parent_commit_id"], double.var("GOLDEN_COMMIT_ID"));

    // Its clock.
    let act = |verb: &str| house.socket().act(&format!("/couch/guests/{id}/{verb}")).expect(200);
    assert_eq!(act("freeze")["status"], "frozen");
    wait_until("it stands still", SOON, || double.vms()[0]["state"] == "paused");
    assert_eq!(act("thaw")["status"], "running");
    wait_until("it goes on", SOON, || double.vms()[0]["state"] == "running");

    // What can't be measured here is reported.
    let usage = json!({"cpuSeconds": 5, "diskUsedGB": 1, "tokensUsed": 7});
    let used = house.socket().put(&format!("/couch/guests/{id}/usage"), &usage).expect(200);
    assert_eq!(used["resourceUsage"]["cpuSeconds"], 5.0);

    // What passes a limit by that stands still.
    let more = json!({"tokensUsed": 50_000_001});
    let passed = house.socket().put(&format!("/couch/guests/{id}/usage"), &more).expect(200);
    assert_eq!(passed["limitsExceeded"], true);
    wait_until("it is frozen there too", SOON, || double.vms()[0]["state"] == "paused");
    assert_eq!(house.guest_status(id)["status"], "frozen");

    // What is no machine of this host is not reached as one.
    let instance = labels["aegis-instance"].as_str().unwrap();
    let exec = json!({"command": ["true"]});
    let refused = house.socket().post(&format!("/v1/instances/{instance}/exec"), &exec);
    assert_eq!(refused.expect(409)["code"], "instance_state");
    let port = json!({"guest_port": 80});
    let refused = house.socket().post(&format!("/v1/instances/{instance}/expose"), &port);
    assert_eq!(refused.expect(503)["code"], "not_enforceable");
    house
        .socket()
        .put(&format!("/couch/guests/{id}/egress"), &json!({"internet": false}))
        .expect(400);

    let killed = kill(&house, id);
    assert_eq!(killed["machines"][0]["verified"], json!(["provider"]));
    assert_eq!(double.vms(), Vec::<Value>::new());
    let state = double.state();
    assert_eq!((state["creates"].as_u64(), state["deleted"].as_u64()), (Some(1), Some(1)));
    assert_eq!(state["vms"].as_array().unwrap().len(), 2, "those of others are there");
    let secret = &double.var("VERS_API_KEY")[36..];
    assert!(!house.log().contains(secret), "the key is in the log");
    assert!(!house.log().contains("panicked"));
}

/// The key may lie in a file; what is wrong with the account is told at the start.
#[test]
fn an_account_is_opened_or_the_daemon_says_why_not() {
    let double = Double::new(0);
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("key");
    std::fs::write(&file, format!("{}\n", double.var("VERS_API_KEY"))).unwrap();
    let (url, golden) = (double.var("VERS_BASE_URL"), double.var("GOLDEN_COMMIT_ID"));
    let settings = format!(
        "{SETTINGS}base_url = \"{url}/\"\ngolden_commit = \"{golden}\"\napi_key_file = {file:?}\n\
         vm_domain = \"vm.test\"\n"
    );
    let house = House::new(&settings);
    let id = guest(&house);
    let endpoint = until(&house, &id, "running")["agentEndpoint"].clone();
    assert!(endpoint.as_str().unwrap().ends_with(".vm.test"), "{endpoint}");
    drop(house);
    let refused = |settings: &str| {
        std::fs::write(home.path().join("aegis.toml"), settings).unwrap();
        let daemon = std::process::Command::new(aegis_tests::programs().join("aegisd"))
            .arg("--home")
            .arg(home.path())
            .args(["--listen", "127.0.0.1:0"])
            .env_clear()
            .output()
            .unwrap();
        assert!(!daemon.status.success());
        String::from_utf8_lossy(&daemon.stderr).into_owned()
    };
    let none = refused("provisioner = \"vers\"\n");
    assert!(none.contains("VERS_API_KEY"), "{none}");
    let none = refused(&settings.replace(&format!("golden_commit = \"{golden}\"\n"), ""));
    assert!(none.contains("GOLDEN_COMMIT_ID"), "{none}");
    std::fs::write(&file, "no key").unwrap();
    let bad = refused(&settings);
    assert!(bad.contains("API key must be") && !bad.contains("no key"), "{bad}");
}

#[test]
fn what_the_cloud_can_not_hold_is_not_promised() {
    let double = Double::new(0);
    let house = house(&double);
    for (invite, field) in [
        (json!({"permissions": {"canAccessInternet": false}}), "permissions.canAccessInternet"),
        (json!({"permissions": {"canSpawnSubAgents": true}}), "permissions.canSpawnSubAgents"),
        (
            json!({"permissions": {"canAccessHostServices": true}}),
            "permissions.canAccessHostServices",
        ),
        (json!({"egressAllow": ["example.com"]}), "egressAllow"),
    ] {
        let mut body = invite;
        body["createdBy"] = json!("noah");
        let refused = house.socket().post("/couch/invites", &body).expect(503);
        assert_eq!(
            (&refused["code"], &refused["field"]),
            (&json!("not_enforceable"), &json!(field))
        );
    }
    let body = json!({"createdBy": "noah", "golden": "base"});
    house.socket().post("/couch/invites", &body).refused(400, "golden");
}

/// Whatever is said, or not said, to a create: one machine in the end, and never two.
#[test]
fn a_create_without_a_clear_answer_makes_one_machine() {
    std::thread::scope(|scope| {
        for (fault, creates) in [
            // What was made is found, and no other is asked for.
            (json!({"creates_500_made": 1}), 1),
            (json!({"creates_hang_made": 1}), 1),
            (json!({"creates_late": 1, "late_ms": 2200}), 1),
            // Nothing was made, as a look shows: so another is.
            (json!({"creates_500": 1}), 2),
            (json!({"creates_hang": 1}), 2),
            // Its label fails too.
            (json!({"creates_500_made": 1, "labels_500": 4}), 1),
            (json!({"limited": 5, "retry_after_secs": 0.2}), 1),
        ] {
            scope.spawn(move || {
                let double = Double::new(0);
                let house = house(&double);
                double.faults(fault.clone());
                let id = guest(&house);
                let vm = until(&house, &id, "running")["vmId"].clone();
                wait_until("it has its labels", SOON, || {
                    double.vms()[0]["labels"]["aegis-guest"] == *id
                });
                only(&double, &vm);
                assert_eq!(double.count("creates"), creates, "{fault}\n{}", house.log());
                kill(&house, &id);
                assert_eq!(double.vms(), Vec::<Value>::new(), "{fault}");
            });
        }
    });
}

/// What comes up when it was given up for long is swept away.
#[test]
fn what_comes_too_late_is_swept_away() {
    let double = Double::new(0);
    let house = house(&double);
    double.faults(json!({"creates_late": 1, "late_ms": 5000}));
    let id = guest(&house);
    let vm = until(&house, &id, "running")["vmId"].clone();
    wait_until("the late one was made", SOON, || double.count("made") == 2);
    wait_until("and is gone", SOON, || double.vms().len() == 1);
    only(&double, &vm);
    assert_eq!(until(&house, &id, "running")["vmId"], vm, "its own is not");
    kill(&house, &id);
    assert_eq!(double.count("creates"), 2);
    assert_eq!(double.vms(), Vec::<Value>::new());
}

/// A kill in the midst of it: the receipt comes when it is known that nothing is there.
#[test]
fn a_kill_meets_a_create_that_is_not_answered() {
    std::thread::scope(|scope| {
        for fault in [
            json!({"creates_500_made": 1}),
            json!({"creates_hang_made": 1}),
            json!({"creates_hang": 1}),
            json!({"creates_late": 1, "late_ms": 2200}),
        ] {
            scope.spawn(move || {
                let double = Double::new(0);
                let house = house(&double);
                double.faults(fault.clone());
                let id = guest(&house);
                wait_until("it was asked for", SOON, || double.count("creates") == 1);
                let killed = kill(&house, &id);
                assert_eq!(double.vms(), Vec::<Value>::new(), "{fault}: {killed}");
                assert_eq!(killed["machines"][0]["verified"], json!(["provider"]));
                assert_eq!(double.count("creates"), 1, "nobody wants another");
            });
        }
    });
}

/// Nothing is gone because somebody says so.
#[test]
fn a_receipt_is_for_what_is_gone() {
    std::thread::scope(|scope| {
        for fault in [
            json!({"deletes_lie": 2}),
            json!({"deletes_asleep": 1}),
            json!({"deletes_500": 4}),
            json!({"limited": 4, "retry_after_secs": 1}),
            json!({"hangs": 2}),
        ] {
            scope.spawn(move || {
                let double = Double::new(0);
                let house = house(&double);
                let id = guest(&house);
                until(&house, &id, "running");
                double.faults(fault.clone());
                let killed = kill(&house, &id);
                assert_eq!(double.vms(), Vec::<Value>::new(), "{fault}: {killed}");
            });
        }
        // Keys and nodes that fail for a while.
        for fault in ["reject_key", "node_down"] {
            scope.spawn(move || {
                let double = Double::new(0);
                let house = house(&double);
                let id = guest(&house);
                until(&house, &id, "running");
                double.faults(json!({fault: true}));
                let answer = house.socket().delete(&format!("/couch/guests/{id}")).expect(202);
                assert_eq!(answer["destroying"], true);
                assert!(answer["receipt"].is_null(), "{answer}");
                assert_eq!(double.vms().len(), 1);
                let events = house.socket().get("/couch/events?from=start&follow=false");
                let text = String::from_utf8_lossy(&events.body).into_owned();
                assert!(text.contains("couch.kill.unverified"), "{text}");
                double.faults(json!({fault: false}));
                receipt(&house, &id);
                assert_eq!(double.vms(), Vec::<Value>::new());
            });
        }
    });
}

#[test]
fn a_machine_that_dies_or_vanishes_ends_its_guest() {
    let double = Double::new(0);
    let house = house(&double);
    let (dies, vanishes, sleeps) = (guest(&house), guest(&house), guest(&house));
    let vm = |id: &str| until(&house, id, "running")["vmId"].as_str().unwrap().to_owned();
    double.set(&vm(&dies), "dead");
    double.anybody().delete(&format!("/_double/vms/{}", vm(&vanishes)));
    let sleeping = vm(&sleeps);
    double.set(&sleeping, "sleeping");
    until(&house, &dies, "stopped");
    until(&house, &vanishes, "stopped");
    wait_until("the sleeping one is woken", SOON, || {
        double.vms().len() == 1 && double.vms()[0]["state"] == "running"
    });
    only(&double, &json!(sleeping));
    assert_eq!(until(&house, &sleeps, "running")["vmId"], *sleeping);
}

/// A machine that does not come up is ended, and another asked for; the guest is told why.
#[test]
fn a_machine_that_never_runs_is_not_left() {
    let double = Double::new(0);
    let house = house(&double);
    double.faults(json!({"node_down": true}));
    let id = guest(&house);
    let told = wait_for("it is told", SOON, || {
        let now = house.guest_status(&id);
        now["provisionError"].as_str().map(str::to_owned)
    });
    assert!(told.contains("node failure"), "{told}");
    double.faults(json!({"node_down": false}));
    let vm = until(&house, &id, "running")["vmId"].clone();
    only(&double, &vm);
    assert!(house.guest_status(&id).get("provisionError").is_none());
}

#[test]
fn the_clock_ends_it_and_strangers_are_left_alone() {
    let double = Double::new(0);
    let golden = double.var("GOLDEN_COMMIT_ID");
    let add =
        |body: Value| double.anybody().post("/_double/vms", &body).expect(201)["vm_id"].clone();
    let stranger = add(json!({"parent_commit_id": golden, "labels": {"a": "b"}}));
    let unlabelled = add(json!({}));
    let house = house(&double);
    let hours = 3.0 / 3600.0;
    let redeemed = house.guest(json!({"resourceLimits": {"maxDurationHours": hours}}));
    let id = redeemed["guestId"].as_str().unwrap();
    wait_until("it has a machine with labels", SOON, || {
        double.vms().iter().any(|vm| vm["labels"]["aegis-guest"] == *id)
    });
    let of_ours = double.vms().into_iter().find(|vm| vm["labels"]["aegis-guest"] == *id).unwrap();
    until(&house, id, "expired");
    let others = || {
        let vms = double.vms();
        let ids: Vec<&Value> = vms.iter().map(|vm| &vm["vm_id"]).collect();
        ids == [&stranger, &unlabelled]
    };
    wait_until("its machine is gone, and nothing else", SOON, others);

    // One that bears our mark and is in no ledger.
    let lost = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV";
    let mut labels = of_ours["labels"].clone();
    labels["aegis-instance"] = json!(lost);
    add(json!({"parent_commit_id": golden, "labels": labels}));
    wait_until("it is swept away", SOON, others);
}

/// kill -9 where it hurts most: while a create is under way, made or not.
#[test]
fn a_crash_in_the_midst_of_a_create_makes_no_second_machine() {
    std::thread::scope(|scope| {
        for (fault, creates) in [
            (json!({"creates_hang_made": 1}), 1),
            (json!({"creates_hang": 1}), 2),
            (json!({"creates_late": 1, "late_ms": 1500}), 1),
        ] {
            scope.spawn(move || {
                let double = Double::new(0);
                let mut house = house(&double);
                double.faults(fault.clone());
                let id = guest(&house);
                wait_until("it was asked for", SOON, || double.count("creates") == 1);
                house.kill9();
                house.start();
                let vm = until(&house, &id, "running")["vmId"].clone();
                only(&double, &vm);
                assert_eq!(double.count("creates"), creates, "{fault}");
                // And while it is ended.
                double.faults(json!({"hangs": 1}));
                let client = house.socket();
                let path = format!("/couch/guests/{id}");
                scope.spawn(move || drop(client.ask(hyper::Method::DELETE, &path, None)));
                wait_until("it is being ended", SOON, || double.state()["faults"]["hangs"] == 0);
                house.kill9();
                house.start();
                let found = house.guest_status(&id);
                if found["status"] != "revoked" {
                    // The hang met a look; the kill was not written yet.
                    kill(&house, &id);
                }
                receipt(&house, &id);
                assert_eq!(double.vms(), Vec::<Value>::new());
            });
        }
    });
}

/// kill -9 at random instants, with guests coming and going.
#[test]
fn crashes_leave_nothing_in_the_cloud() {
    let double = Double::new(20);
    let mut house = house(&double);
    for round in 0..12_u64 {
        let codes: Vec<Value> = (0..3).map(|_| house.invite(json!({}))["code"].clone()).collect();
        let mut byte = [0];
        getrandom::fill(&mut byte).unwrap();
        let instant = Duration::from_millis(u64::from(byte[0]) * 2);
        let mut fault = json!({"creates_500_made": round % 3, "deletes_lie": round % 2});
        fault["creates_fine"] = json!(round % 4);
        double.faults(fault);
        eprintln!("round {round}: the daemon dies after {instant:?}");
        std::thread::scope(|scope| {
            for code in &codes {
                let client = house.socket();
                scope.spawn(move || {
                    let ask = json!({"code": code, "name": "ty"});
                    let Ok(answer) = client.ask(hyper::Method::POST, "/couch/redeem", Some(&ask))
                    else {
                        return;
                    };
                    let id = answer.expect(201)["guestId"].as_str().unwrap().to_owned();
                    if id.as_bytes()[id.len() - 1].is_multiple_of(2) {
                        let path = format!("/couch/guests/{id}");
                        drop(client.ask(hyper::Method::DELETE, &path, None));
                    }
                });
            }
            std::thread::sleep(instant);
            rustix::process::kill_process(house.pid(), rustix::process::Signal::KILL).unwrap();
        });
        house.kill9();
        house.start();
    }
    let all = house.socket().get("/couch/guests").expect(200)["guests"].as_array().unwrap().clone();
    let live: Vec<&Value> = all.iter().filter(|g| g["status"] != "revoked").collect();
    for guest in &live {
        until(&house, guest["id"].as_str().unwrap(), "running");
    }
    wait_until("a machine for each that lives, and no other", SOON, || {
        double.vms().len() == live.len()
            && double.vms().iter().all(|vm| vm["labels"]["aegis-guest"].is_string())
    });
    for guest in &live {
        kill(&house, guest["id"].as_str().unwrap());
    }
    assert_eq!(double.vms(), Vec::<Value>::new());
    for guest in all {
        receipt(&house, guest["id"].as_str().unwrap());
    }
}
