//! This host as a vers cloud for others: what a client of that cloud would do, with a real machine.

use std::time::Duration;

use aegis_tests::house::{House, MANUAL};
use aegis_tests::http::{Answer, Client};
use aegis_tests::{wait_for, wait_until};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::Method;
use hyper::header::CONTENT_TYPE;
use serde_json::{Value, json};

/// A machine that was asked for runs within this, without KVM too.
const SOON: Duration = Duration::from_secs(120);
const UNKNOWN: &str = "0b9cf0ad-8d4e-4a4b-9c4b-3f3d1f0a6a01";

fn key(house: &House) -> String {
    house.socket().act("/v1/vers/key").expect(200)["api_key"].as_str().unwrap().to_owned()
}

fn raw(client: &Client, method: Method, path: &str, body: &str) -> Answer {
    client.send(method, path, Bytes::from(body.to_owned())).unwrap()
}

#[test]
fn it_is_closed_until_it_is_opened_and_takes_one_key() {
    let closed = House::new(MANUAL);
    assert_eq!(closed.anybody().get("/api/v1/vms").expect(404)["code"], "unknown_route");
    assert_eq!(closed.socket().act("/v1/vers/key").expect(409)["code"], "vers_api_closed");

    let house = House::new(&format!("{MANUAL}[vers_api]\nenabled = true\n"));
    assert_eq!(house.anybody().get("/health").status, 200);
    let refused = |client: &Client| {
        let refused = client.get("/api/v1/vms");
        assert_eq!((refused.status, &refused.body[..]), (403, &b"403 Forbidden"[..]));
        assert!(!refused.headers.contains_key(CONTENT_TYPE));
    };
    refused(&house.anybody());
    refused(&house.host());
    let first = key(&house);
    let client = house.anybody().bearer(&first);
    assert_eq!(client.get("/api/v1/vms").expect(200), json!([]));
    let second = key(&house);
    refused(&client);
    assert_eq!(first[..36], second[..36], "its owner stays");
    assert_eq!(house.anybody().bearer(&second).get("/api/v1/vms").status, 200);
    // It opens nothing else.
    assert_eq!(house.anybody().bearer(&second).get("/v1/instances").status, 401);
    assert!(!house.log().contains(&second[36..]));
    let kept = std::fs::read_to_string(house.home().join("vers-key")).unwrap();
    assert!(!kept.contains(&second[36..]), "only its hash is kept");
}

#[test]
fn a_client_of_the_cloud_finds_what_it_knows() {
    let house = House::new("[vers_api]\nenabled = true\n[rate_limit]\nper_second = 0\n");
    let client = house.anybody().bearer(&key(&house));
    // A machine that it did not make is not there for it.
    let own = json!({"command": ["sleep", "infinity"], "memory_mb": 256});
    let own = house.socket().post("/v1/instances", &own).expect(201)["id"].clone();

    let labels = json!({"purpose": "test"});
    let config = json!({"vm_config": {"mem_size_mib": 256, "fs_size_mib": 512, "labels": labels}});
    let made = client.post("/api/v1/vm/new_root?wait_boot=true", &config).expect(201);
    let id = made["vm_id"].as_str().unwrap();
    let vm = format!("/api/v1/vm/{id}");
    let status = || client.get(&format!("{vm}/status")).expect(200);
    let running = status();
    assert_eq!((&running["state"], &running["labels"]), (&json!("running"), &labels));
    assert_eq!(client.get("/api/v1/vms").expect(200), json!([running]));
    assert_eq!(client.get(&format!("{vm}/metadata")).expect(200)["state"], "running");
    assert_eq!(client.get(&vm).status, 404);
    let patch = |what: &str, body: &str| raw(&client, Method::PATCH, &format!("{vm}/{what}"), body);
    let labelled = patch("label", "{\"labels\":{}}");
    assert_eq!((labelled.status, labelled.body.len()), (200, 0));
    assert!(status().get("labels").is_none());

    let script = "echo out; echo err >&2; pwd; echo $X; exit 3";
    let body = json!({"command": ["sh", "-c", script], "env": {"X": "y"}, "working_dir": "/tmp"});
    let ran = client.post(&format!("{vm}/exec"), &body).expect(200);
    assert_eq!(ran["stdout"], "out\n/tmp\ny\n");
    assert_eq!((&ran["stderr"], &ran["exit_code"]), (&json!("err\n"), &json!(3)));
    let body = json!({"command": ["head", "-c", "1048576", "/dev/zero"]});
    let lines = client.post(&format!("{vm}/exec/stream"), &body).lines();
    let bytes: usize = lines
        .iter()
        .filter(|line| line["stream"] == "stdout")
        .map(|line| STANDARD.decode(line["data_b64"].as_str().unwrap()).unwrap().len())
        .sum();
    assert_eq!(bytes, 1 << 20);
    let cursors: Vec<u64> = lines.iter().map(|line| line["cursor"].as_u64().unwrap()).collect();
    assert!(cursors.is_sorted() && lines.last().unwrap()["exit_code"] == 0);
    // What a command reads: also much, also where it reads nothing of it.
    let much = "x".repeat(1 << 20);
    for (command, said) in [("wc -c", "1048576\n"), ("exit 0", "")] {
        let body = json!({"command": ["sh", "-c", command], "stdin": much});
        let ran = client.post(&format!("{vm}/exec"), &body).expect(200);
        assert_eq!((&ran["stdout"], &ran["exit_code"]), (&json!(said), &json!(0)));
    }
    let body = json!({"command": ["cat"], "stdin": "as it came\n"});
    let lines = client.post(&format!("{vm}/exec/stream"), &body).lines();
    assert_eq!(lines[0]["data_b64"], STANDARD.encode("as it came\n"));
    let body = json!({"command": ["cat"], "stdin": format!("{much}x")});
    assert_eq!(client.post(&format!("{vm}/exec"), &body).expect(400)["success"], false);

    let files = format!("{vm}/files");
    let every: Vec<u8> = (0..=255).collect();
    let file = json!({"path": "/root/a/b", "content_b64": STANDARD.encode(&every), "mode": 0o600});
    assert_eq!(client.put(&files, &file).expect(404)["success"], false, "no such directory");
    let mut made_too = file.clone();
    made_too["create_dirs"] = json!(true);
    let written = client.put(&files, &made_too);
    assert_eq!((written.status, written.body.len()), (200, 0));
    let read = client.get(&format!("{files}?path=/root/a/b")).expect(200);
    assert_eq!(read["content_b64"], file["content_b64"]);
    let body = json!({"command": ["stat", "-c", "%a %s", "/root/a/b"]});
    assert_eq!(client.post(&format!("{vm}/exec"), &body).expect(200)["stdout"], "600 256\n");
    assert_eq!(client.get(&format!("{files}?path=/root/none")).expect(404)["success"], false);
    assert_eq!(client.get(&format!("{files}?path=relative")).expect(400)["success"], false);

    assert_eq!(patch("state", "{\"state\":\"paused\"}").status, 422);
    assert_eq!(patch("state", "{\"state\":\"Paused\"}").status, 200);
    assert_eq!(status()["state"], "paused");
    assert_eq!(patch("state", "{\"state\":\"Running\"}").status, 200);
    assert_eq!(status()["state"], "running");

    // What is not served is said to be.
    let said = |answer: Answer| {
        let body: Value = answer.expect(501);
        assert!(
            body["success"] == false && body["error"].as_str().unwrap().contains("does not serve")
        );
    };
    said(client.get(&format!("{vm}/ssh_key")));
    let named = json!({"command": ["true"], "exec_id": UNKNOWN});
    said(client.post(&format!("{vm}/exec"), &named));
    let create = |body: &str| raw(&client, Method::POST, "/api/v1/vm/from_commit", body);
    for body in ["{}", "x", &format!("{{\"commit_id\":\"{UNKNOWN}\",\"ref\":\"a:b\"}}")] {
        let refused = create(body);
        let text = String::from_utf8_lossy(&refused.body).into_owned();
        assert_eq!(refused.status, 400, "{text}");
        assert!(text.starts_with("Failed to parse the request body as JSON: "), "{text}");
    }

    assert_eq!(client.delete(&vm).expect(200), made);
    for gone in [&vm, &format!("/api/v1/vm/{UNKNOWN}"), &of(&own)] {
        let refused = client.delete(gone).expect(403);
        assert_eq!(refused, json!({"error": "Forbidden", "success": false}), "{gone}");
    }
    assert_eq!(client.get(&format!("{vm}/status")).expect(404)["error"], "not found");
    assert_eq!(client.get("/api/v1/vms").expect(200), json!([]));
    let own = own.as_str().unwrap();
    assert_eq!(house.socket().get(&format!("/v1/instances/{own}")).status, 200, "it is there");
}

/// One host lends to another by that API: its golden commit is taken here, its guest's machine runs here,
/// and is gone from here when the receipt there says so.
#[test]
fn a_host_lives_in_the_cloud_of_another() {
    let lender = House::new("[vers_api]\nenabled = true\n[rate_limit]\nper_second = 0\n");
    let key = key(&lender);
    let client = lender.anybody().bearer(&key);
    let config = json!({"vm_config": {"mem_size_mib": 256, "fs_size_mib": 512}});
    let first = client.post("/api/v1/vm/new_root?wait_boot=true", &config).expect(201);
    let path = |vm: &Value| format!("/api/v1/vm/{}", vm["vm_id"].as_str().unwrap());
    let sh = |vm: &Value, script: &str| {
        let body = json!({"command": ["sh", "-c", script]});
        let ran = client.post(&format!("{}/exec", path(vm)), &body).expect(200);
        assert_eq!(ran["exit_code"], 0, "{ran}");
        ran["stdout"].as_str().unwrap().trim().to_owned()
    };
    sh(&first, "echo golden > /root/mark; sleep 1000 > /dev/null 2>&1 &");
    let commit = client.act(&format!("{}/commit", path(&first))).expect(201);
    let golden = commit["commit_id"].as_str().unwrap();
    let listed = client.get("/api/v1/commits").expect(200);
    assert_eq!(listed["commits"][0]["commit_id"], golden);
    assert_eq!(listed["commits"][0]["parent_vm_id"], first["vm_id"]);

    // What was not lent is nobody's golden.
    let own = json!({"command": ["sleep", "infinity"], "memory_mb": 256, "disk_gb": 0.3});
    let own = lender.socket().post("/v1/instances", &own).expect(201)["id"].clone();
    lender.until_instance(own.as_str().unwrap(), "running");
    let keep = format!("/v1/instances/{}/commit", own.as_str().unwrap());
    let kept = lender.socket().post(&keep, &json!({}));
    let kept = kept.expect(201)["id"].as_str().unwrap().replace("commit-", "inst-");
    let hidden = of(&json!(kept)).replace("/api/v1/vm/", "");
    let refused = client.post("/api/v1/vm/from_commit", &json!({"commit_id": hidden}));
    assert_eq!(refused.expect(404)["error"], "commit not found");
    assert_eq!(client.get("/api/v1/commits").expect(200)["total"], 1);

    // Machines from one, and from a commit.
    let branch =
        client.act(&format!("/api/v1/vm/branch/by_vm/{}", first["vm_id"].as_str().unwrap()));
    let branch = branch.expect(201)["vms"][0].clone();
    wait_until("it runs", SOON, || state(&client, &path(&branch)) == "running");
    assert_eq!(sh(&branch, "cat /root/mark; pgrep -c sleep").lines().next(), Some("golden"));
    client.delete(&path(&branch)).expect(200);
    let many = client.act(&format!("/api/v1/vm/branch/by_vm/{UNKNOWN}")).expect(404);
    assert_eq!(many["vms"], json!([]));
    let tag = client.post("/api/v1/vm/from_commit", &json!({"tag_name": "x"})).expect(404);
    assert_eq!(tag["error"], "tag not found");

    let url = format!("http://{}", lender.address());
    let env =
        [("VERS_BASE_URL", url.as_str()), ("VERS_API_KEY", &key), ("GOLDEN_COMMIT_ID", golden)];
    let house = House::with_env(aegis_tests::vers::SETTINGS, &env);
    let guest = house.guest(json!({}));
    let id = guest["guestId"].as_str().unwrap();
    let vm = wait_for("the guest runs", SOON, || {
        let now = house.guest_status(id);
        (now["status"] == "running").then(|| now["vmId"].clone())
    });
    let vm = json!({"vm_id": vm});
    assert_eq!(sh(&vm, "cat /root/mark"), "golden");
    let metadata = client.get(&format!("{}/metadata", path(&vm))).expect(200);
    assert_eq!(metadata["parent_commit_id"], golden);
    assert_eq!(metadata["grandparent_vm_id"], first["vm_id"]);
    wait_until("it has its labels", SOON, || {
        let now = client.get(&format!("{}/status", path(&vm))).expect(200);
        now["labels"]["aegis-guest"] == id
    });
    let held = client.delete(&format!("/api/v1/commits/{golden}")).expect(409);
    assert_eq!(held["error"], "commit still has 1 active VM(s)");
    house.socket().act(&format!("/couch/guests/{id}/freeze")).expect(200);
    wait_until("it stands still", SOON, || state(&client, &path(&vm)) == "paused");
    house.socket().act(&format!("/couch/guests/{id}/thaw")).expect(200);
    wait_until("it goes on", SOON, || state(&client, &path(&vm)) == "running");
    let killed = house.socket().delete(&format!("/couch/guests/{id}")).expect(200);
    assert_eq!(killed["receipt"]["machines"][0]["verified"], json!(["provider"]), "{killed}");
    assert_eq!(client.get(&format!("{}/status", path(&vm))).status, 404);
    assert_eq!(client.get("/api/v1/vms").expect(200).as_array().unwrap().len(), 1, "the first one");
    assert_eq!(client.delete(&format!("/api/v1/commits/{golden}")).status, 204);
}

fn state(client: &Client, path: &str) -> Value {
    client.get(&format!("{path}/status")).expect(200)["state"].clone()
}

/// What an instance that was not made by that API would be called there: its ULID, bit by bit.
fn of(instance: &Value) -> String {
    const DIGITS: &str = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let ulid = instance.as_str().unwrap().strip_prefix("inst-").unwrap();
    let bits = ulid.chars().fold(0_u128, |n, c| n << 5 | DIGITS.find(c).unwrap() as u128);
    let hex = format!("{bits:032x}");
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    format!("/api/v1/vm/{}", parts.join("-"))
}
