//! What machines reach and spend: real clients inside real machines, real servers outside
//! (contracts/couch.md 6).

use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::outside::{ECHO, Outside, SINK};
use aegis_tests::wait_until;
use serde_json::{Value, json};

/// A house whose machines ask the outside for names.
fn house(outside: &Outside) -> House {
    House::new(&format!(
        "[rate_limit]\nper_second = 0\n[egress]\nresolvers = [\"{}\"]\n[capacity]\nvcpus = 4\n",
        outside.resolver()
    ))
}

fn limits(egress_gb: f64) -> Value {
    json!({"maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.3, "maxNetworkEgressGB": egress_gb})
}

/// A guest that runs; its id, and its machine's.
fn guest(house: &House, mut invite: Value) -> (String, String) {
    if invite.get("resourceLimits").is_none() {
        invite["resourceLimits"] = limits(1.0);
    }
    let guest = house.guest(invite);
    let id = guest["guestId"].as_str().unwrap().to_owned();
    let machine = house.until(&id, "running")["vmId"].as_str().unwrap().to_owned();
    (id, machine)
}

/// `curl` fails, and soon: a connection that hangs is no refusal.
#[track_caller]
fn refused(house: &House, machine: &str, what: &str) {
    let ran = house.sh(machine, &format!("curl -sS -o /dev/null --max-time 8 {what} 2>&1"));
    // 28 is curl's own time limit.
    assert!(!matches!(ran.code, Some(0 | 28)), "{what}: {ran:?}");
}

fn denials(house: &House, guest: &str) -> Vec<Value> {
    let found = house.socket().get(&format!("/couch/guests/{guest}/denials")).expect(200);
    found["denials"].as_array().unwrap().clone()
}

/// Waits until a denial by this rule shows what was asked for.
#[track_caller]
fn shows(house: &House, guest: &str, rule: &str, requested: &str) {
    wait_until(&format!("{rule} shows {requested}"), Duration::from_secs(20), || {
        denials(house, guest).iter().any(|denial| {
            denial["rule"] == rule && denial["requested"].as_str().unwrap().contains(requested)
        })
    });
}

#[test]
fn real_clients_reach_what_is_public_and_nothing_else() {
    let outside = Outside::new();
    let house = house(&outside);
    let (id, vm) = guest(&house, json!({}));
    let ca = std::fs::read_to_string(outside.authority()).unwrap();
    house.ok(&vm, &format!("cat > /tmp/ca.pem <<'END'\n{ca}END"));

    // By name and by address, over IPv4 and IPv6, plain and with TLS, by several programs.
    house.ok(&vm, "curl -sSf -o /dev/null http://allowed.test/");
    house.ok(&vm, "curl -sSf --cacert /tmp/ca.pem -o /dev/null https://allowed.test/");
    house.ok(&vm, &format!("curl -sSf -o /dev/null http://{}/", outside.v4()));
    house.ok(&vm, &format!("curl -sSf -g -o /dev/null 'http://[{}]/'", outside.v6()));
    house.ok(&vm, "curl -sSf -6 -o /dev/null http://allowed.test/");
    house.ok(&vm, "curl -sSf -o /dev/null http://v6only.test/");
    let get = "import urllib.request as u; print(u.urlopen('http://cname.test/').status)";
    assert_eq!(house.ok(&vm, &format!("python3 -c \"{get}\"")), "200");
    let (path, commit) = outside.repository();
    house.ok(&vm, &format!("git clone -q http://git.test{path} /root/repo"));
    assert_eq!(house.ok(&vm, "git -C /root/repo rev-parse HEAD"), commit);
    house.ok(
        &vm,
        "cd /root/repo && echo x > new && git add new && git -c user.name=a -c user.email=a@b \
         commit -qm new && git push -q origin HEAD",
    );
    // Datagrams.
    let echo = format!(
        "import socket as s; u=s.socket(s.AF_INET,s.SOCK_DGRAM); u.settimeout(5); \
         u.sendto(b'hello',('{}',{ECHO})); print(u.recv(99).decode())",
        outside.v4()
    );
    assert_eq!(house.ok(&vm, &format!("python3 -c \"{echo}\"")), "hello");

    // What leads inwards, however it is written.
    let host = outside.host();
    for what in [
        "http://127.0.0.2/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://172.17.0.1/",
        "http://100.64.0.1/",
        "http://0251.0376.0251.0376/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "-g 'http://[::ffff:10.0.0.1]/'",
        "-g 'http://[fd00::1]/'",
        "-g 'http://[64:ff9b::a00:1]/'",
        &format!("http://{host}/"),
        &format!("-g 'http://[{}]/'", outside.host6()),
        "http://rebind.test/",
        "http://inward.test/",
        "-6 http://mapped.test/",
        "http://host.test/",
    ] {
        refused(&house, &vm, what);
    }
    shows(&house, &id, "never_reachable", "169.254.169.254");
    shows(&house, &id, "rebinding", "rebind.test");
    // A name that changes its mind: what was resolved once and is private now is refused.
    house.ok(&vm, "curl -sSf -o /dev/null http://turns.test/");
    refused(&house, &vm, "--resolve turns.test:80:127.0.0.2 http://turns.test/");
    // Answers that mix inside and outside lose the inside.
    house.ok(&vm, "curl -sSf -o /dev/null http://mixed.test/");
    // The gateway answers pings of itself, and the host is nowhere.
    house.ok(&vm, "getent hosts allowed.test > /dev/null");
}

#[test]
fn a_list_holds_by_name_and_by_address_and_against_lies() {
    let outside = Outside::new();
    let house = house(&outside);
    let allow = json!({"egressAllow": ["allowed.test:80", "allowed.test:443", "git.test"]});
    let (id, vm) = guest(&house, allow);
    let ca = std::fs::read_to_string(outside.authority()).unwrap();
    house.ok(&vm, &format!("cat > /tmp/ca.pem <<'END'\n{ca}END"));
    house.ok(&vm, "curl -sSf -o /dev/null http://allowed.test/");
    house.ok(&vm, "curl -sSf --cacert /tmp/ca.pem -o /dev/null https://allowed.test/");
    let (path, _) = outside.repository();
    house.ok(&vm, &format!("git clone -q http://git.test{path} /root/repo"));

    let v4 = outside.v4();
    for what in [
        // Not on the list, by name, port or address.
        "http://other.test/".to_owned(),
        "http://allowed.test:8080/".to_owned(),
        format!("http://{}/", outside.other()),
        // Another name at an address that is.
        format!("--resolve beside.test:80:{v4} http://beside.test/"),
        format!("--resolve beside.test:443:{v4} -k https://beside.test/"),
        format!("-H 'Host: beside.test' http://{v4}/"),
        // SNI of one, Host of the other: TLS hides the Host, so the name in the hello must do.
        format!("--connect-to allowed.test:443:{v4}:443 -k https://beside.test/"),
        // No name at all.
        format!("-k https://{v4}/"),
    ] {
        refused(&house, &vm, &what);
    }
    let before = outside.questions().len();
    refused(&house, &vm, "http://data-in-a-name.other.test/");
    assert!(
        !outside.questions()[before..].iter().any(|q| q.name.contains("data-in-a-name")),
        "a name that is not allowed is not asked for"
    );
    shows(&house, &id, "egress_allow", "other.test");
    shows(&house, &id, "tls_name", "beside.test");
    // Another resolver is an address like any other, over UDP and TCP.
    let ask = |kind: &str| {
        format!(
            "import socket as s; k=s.socket(s.AF_INET,s.{kind}); k.settimeout(3); \
             k.connect(('{v4}',53)); k.send(b'x'*20); k.recv(9)"
        )
    };
    for kind in ["SOCK_DGRAM", "SOCK_STREAM"] {
        assert_ne!(house.sh(&vm, &format!("python3 -c \"{}\"", ask(kind))).code, Some(0));
    }
    assert!(!outside.requests().iter().any(|r| r.host.as_deref() == Some("beside.test")));
}

#[test]
fn a_host_changes_what_is_reached_at_once_and_grants_what_is_asked_for() {
    let outside = Outside::new();
    let mut house = house(&outside);
    let (id, vm) = guest(&house, json!({"permissions": {"canAccessInternet": false}}));
    refused(&house, &vm, "http://allowed.test/");
    refused(&house, &vm, &format!("http://{}/", outside.v4()));
    shows(&house, &id, "can_access_internet", "allowed.test");

    // Asked for from inside, granted outside.
    let ask = "curl -sS -X POST http://127.0.0.1:7777/v1/self/requests \
               -H 'Content-Type: application/json' \
               -d '{\"egress\":[\"allowed.test\"],\"reason\":\"to look\"}'";
    let answer: Value = serde_json::from_str(&house.ok(&vm, ask)).unwrap();
    assert_eq!(answer["requests"][0]["status"], "open", "{answer}");
    let path = format!("/couch/guests/{id}/requests");
    let listed = house.socket().get(&path).expect(200);
    assert_eq!(listed["requests"][0]["egress"], json!(["allowed.test"]), "{listed}");
    house.socket().post(&format!("{path}/1/grant"), &json!({})).expect(200);
    wait_until("what was granted is reached", Duration::from_secs(20), || {
        house.sh(&vm, "curl -sSf -o /dev/null http://allowed.test/").code == Some(0)
    });
    refused(&house, &vm, "http://other.test/");
    assert_eq!(house.socket().post(&format!("{path}/1/grant"), &json!({})).status, 400);

    // Taken back: what is open is reset.
    let egress = format!("/couch/guests/{id}/egress");
    house.socket().put(&egress, &json!({"internet": true})).expect(200);
    let hold = format!(
        "import socket as s, sys; k=s.create_connection(('{}',{ECHO})); k.send(b'x'); k.recv(1); \
         print('open', flush=True); k.settimeout(30); print(len(k.recv(1)))",
        outside.v4()
    );
    wait_until("all public is reached", Duration::from_secs(20), || {
        house.sh(&vm, "curl -sSf -o /dev/null http://other.test/").code == Some(0)
    });
    let held = std::thread::scope(|scope| {
        let held = scope.spawn(|| house.sh(&vm, &format!("python3 -c \"{hold}\" 2>&1")));
        wait_until("it is connected", Duration::from_secs(20), || outside.connections_at(ECHO) > 0);
        house.socket().put(&egress, &json!({"internet": false})).expect(200);
        held.join().unwrap()
    });
    assert!(held.text().contains("reset"), "{held:?}");
    refused(&house, &vm, "http://other.test/");
    let bad = house.socket().put(&egress, &json!({"allow": ["http://x"]}));
    assert_eq!(bad.status, 400);

    // It holds over the daemon's death, also while nobody is there, and after.
    house.kill9();
    house.start();
    refused(&house, &vm, &format!("http://{}/", outside.v4()));
    house.socket().put(&egress, &json!({"allow": ["allowed.test"]})).expect(200);
    wait_until("the list is in force", Duration::from_secs(20), || {
        house.sh(&vm, "curl -sSf -o /dev/null http://allowed.test/").code == Some(0)
    });
    refused(&house, &vm, "http://other.test/");
}

fn send(outside: &Outside, bytes: u64) -> String {
    format!(
        "timeout 60 python3 -c \"import socket as s; k=s.create_connection(('{}',{SINK})); \
         k.sendall(b'x'*{bytes}); k.settimeout(60); k.shutdown(1); print(k.recv(99).decode())\" 2>&1",
        outside.v4()
    )
}

#[test]
fn the_limit_holds_at_the_byte_and_freezes() {
    let outside = Outside::new();
    let mut house = house(&outside);
    let (id, vm) = guest(&house, json!({"resourceLimits": limits(0.01)}));
    // What is counted is what arrived.
    house.ok(&vm, &send(&outside, 3_000_000));
    assert_eq!(outside.received_at(SINK), 3_000_000);
    let used = |house: &House| {
        (house.guest_status(&id)["resourceUsage"]["networkEgressGB"].as_f64().unwrap() * 1e9)
            .round() as u64
    };
    wait_until("it is counted", Duration::from_secs(20), || used(&house) >= 3_000_000);
    let arrived = outside.received();
    assert!(used(&house) <= arrived + arrived / 100, "{} {arrived}", used(&house));
    // Also over the daemon's death.
    house.kill9();
    house.start();
    wait_until("it is still counted", Duration::from_secs(20), || used(&house) >= 3_000_000);

    let house = &house;
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| house.sh(&vm, &send(&outside, 60_000_000)));
        house.until(&id, "frozen");
        let arrived = outside.received();
        assert!((9_900_000..=10_000_000).contains(&arrived), "{arrived}");
        let status = house.guest_status(&id);
        assert_eq!(status["limitsExceeded"], true);
        wait_until("all is counted", Duration::from_secs(20), || used(house) == 10_000_000);
        // More of it thaws; the connection was reset, and the next one passes.
        let more = json!({"maxNetworkEgressGB": 0.02});
        house.socket().put(&format!("/couch/guests/{id}/limits"), &more).expect(200);
        house.until(&id, "running");
        let sent = sending.join().unwrap();
        assert_ne!(sent.text(), "60000000", "{sent:?}");
    });
    house.ok(&vm, &send(&outside, 1_000_000));
    assert!(outside.received() <= 11_000_000);
    // The kill, and nothing more arrives.
    house.socket().delete(&format!("/couch/guests/{id}")).expect(200);
}

#[test]
fn a_tree_shares_its_limit_to_the_byte() {
    let outside = Outside::new();
    let house = house(&outside);
    let invite = json!({
        "resourceLimits": {"maxCpuCores": 2, "maxMemoryMB": 1024, "maxDiskGB": 1.5,
            "maxNetworkEgressGB": 0.01},
        "permissions": {"canSpawnSubAgents": true, "canAccessInternet": true},
        "onLimit": "throttle", "rootShare": 0.3,
    });
    let (id, root) = guest(&house, invite);
    let spawn = |egress: Value| {
        let body = json!({"command": ["sleep", "infinity"], "vcpus": 0.5, "memory_mb": 256,
            "disk_gb": 0.3, "egress": egress});
        let script = format!(
            "curl -sS -X POST http://127.0.0.1:7777/v1/instances -H 'Content-Type: application/json' \
             -d '{body}'"
        );
        let child: Value = serde_json::from_str(&house.ok(&root, &script)).unwrap();
        let child = child["id"].as_str().unwrap().to_owned();
        house.until_instance(&child, "running");
        child
    };
    let free = spawn(json!({}));
    let narrow = spawn(json!({"allow": ["allowed.test:9"]}));
    // A child's own list narrows, and can't widen.
    let wide = send(&outside, 1000);
    assert_ne!(house.sh(&narrow, &wide).code, Some(0), "only a name is on the list");
    refused(&house, &narrow, "http://allowed.test/");
    let by_name = wide.replace(&outside.v4().to_string(), "allowed.test");
    house.ok(&narrow, &by_name);

    // All three at once want more than there is.
    let by_name = send(&outside, 8_000_000).replace(&outside.v4().to_string(), "allowed.test");
    std::thread::scope(|scope| {
        for machine in [&root, &free, &narrow] {
            scope.spawn(|| house.sh(machine, &by_name));
        }
    });
    let arrived = outside.received();
    assert!((9_700_000..=10_000_000).contains(&arrived), "{arrived}");
    // Throttled: it still runs, and what is spent is shut at once.
    assert_eq!(house.guest_status(&id)["status"], "running");
    refused(&house, &root, "http://allowed.test/");
    shows(&house, &id, "egress_limit", "");
    let status = house.guest_status(&id);
    assert_eq!(status["limitsExceeded"], true, "{status}");
    assert!(status["violations"].is_array());
}
