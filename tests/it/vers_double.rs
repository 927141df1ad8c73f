//! The double is as the cloud is, where somebody might build on it (contracts/vers.md 4, 6 and 7).

use aegis_tests::http::{Answer, Client};
use aegis_tests::vers::Double;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::Method;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use serde_json::{Value, json};

const UNKNOWN: &str = "0b9cf0ad-8d4e-4a4b-9c4b-3f3d1f0a6a01";

fn text(answer: &Answer) -> String {
    String::from_utf8_lossy(&answer.body).into_owned()
}

fn raw(client: &Client, method: Method, path: &str, body: &str) -> Answer {
    client.send(method, path, Bytes::from(body.to_owned())).unwrap()
}

#[test]
fn its_errors_are_the_clouds() {
    let double = Double::new(0);
    let golden = double.var("GOLDEN_COMMIT_ID");
    let client = double.client();
    for wrong in [double.anybody(), double.anybody().bearer("x")] {
        let refused = wrong.get("/api/v1/vms");
        assert_eq!((refused.status, &*text(&refused)), (403, "403 Forbidden"));
        assert!(!refused.headers.contains_key(CONTENT_TYPE));
    }
    let basic = double.anybody().with(AUTHORIZATION, double.var("VERS_API_KEY"));
    assert_eq!(basic.get("/api/v1/vms").status, 403, "without Bearer");
    assert_eq!(double.anybody().get("/health").status, 200);

    let create = |body: &str| raw(&client, Method::POST, "/api/v1/vm/from_commit", body);
    let two = format!("{{\"commit_id\":\"{golden}\",\"ref\":\"a:b\"}}");
    for body in ["x", "{}", &two] {
        let refused = create(body);
        assert_eq!(refused.status, 400);
        assert!(text(&refused).starts_with("Failed to parse the request body as JSON: "), "{body}");
    }
    let refused = create("{\"commit_id\":7}");
    assert_eq!(refused.status, 422);
    let said = text(&refused);
    assert!(
        said.starts_with("Failed to deserialize the JSON body into the target type: "),
        "{said}"
    );
    let app = |answer: Answer, status, error: &str| {
        assert_eq!(answer.expect(status), json!({"error": error, "success": false}));
    };
    app(create(&format!("{{\"commit_id\":\"{UNKNOWN}\"}}")), 404, "commit not found");
    app(create("{\"tag_name\":\"x\"}"), 404, "tag not found");
    app(create("{\"ref\":\"x\"}"), 400, "Invalid ref format. Expected 'repo_name:tag_name'");
    app(client.delete(&format!("/api/v1/vm/{UNKNOWN}")), 403, "Forbidden");
    app(client.get(&format!("/api/v1/vm/{UNKNOWN}/status")), 404, "not found");
    let bad = client.get("/api/v1/vm/x/status");
    assert_eq!(bad.status, 400);
    assert!(text(&bad).starts_with("Invalid URL: Cannot parse "), "{}", text(&bad));
    let branch = client.act(&format!("/api/v1/vm/branch/by_vm/{UNKNOWN}")).expect(404);
    assert_eq!(branch, json!({"vms": [], "error": "not found"}));

    let made = client.post("/api/v1/vm/from_commit", &json!({"commit_id": golden})).expect(201);
    let vm = format!("/api/v1/vm/{}", made["vm_id"].as_str().unwrap());
    assert_eq!(client.get(&vm).status, 404, "there is no such route");
    let state = |body: &str| raw(&client, Method::PATCH, &format!("{vm}/state"), body);
    assert_eq!(state("{\"state\":\"paused\"}").status, 422);
    let paused = state("{\"state\":\"Paused\"}");
    assert_eq!((paused.status, paused.body.len()), (200, 0));
    assert_eq!(client.get(&format!("{vm}/status")).expect(200)["state"], "paused");
    double.set(made["vm_id"].as_str().unwrap(), "sleeping");
    assert_eq!(client.get(&format!("{vm}/status")).status, 409);
    assert_eq!(client.delete(&vm).status, 409);
    assert_eq!(state("{\"state\":\"Running\"}").status, 200);
    assert_eq!(client.delete(&vm).expect(200), made);
    double.faults(json!({"limited": 1, "retry_after_secs": 3}));
    let limited = client.get("/api/v1/vms");
    assert_eq!((limited.status, &limited.headers["retry-after"]), (429, &"3".parse().unwrap()));
}

#[test]
fn machines_boot_fork_run_and_keep_what_they_are_told() {
    let double = Double::new(60_000);
    let client = double.client();
    let labels = json!({"a": "b"});
    let config = json!({"vm_config": {"labels": labels}});
    let slow = client.post("/api/v1/vm/new_root", &config).expect(201);
    let path = |vm: &Value| format!("/api/v1/vm/{}", vm["vm_id"].as_str().unwrap());
    let status = client.get(&format!("{}/status", path(&slow))).expect(200);
    assert_eq!((&status["state"], &status["labels"]), (&json!("booting"), &labels));
    let quick = format!("{}?skip_wait_boot=true", path(&slow));
    client.delete(&quick).expect(200);

    let double = Double::new(0);
    let client = double.client();
    let vm =
        client.post("/api/v1/vm/new_root?wait_boot=true", &json!({"vm_config": {}})).expect(201);
    let commit = client.act(&format!("{}/commit", path(&vm))).expect(201);
    let tag = json!({"tag_name": "v1", "commit_id": commit["commit_id"]});
    client.post("/api/v1/commit_tags", &tag).expect(201);
    let two = client.act("/api/v1/vm/branch/by_tag/v1?count=2").expect(201);
    assert_eq!(two["vms"].as_array().unwrap().len(), 2);
    let one = client.post("/api/v1/vm/from_commit", &json!({"tag_name": "v1"})).expect(201);
    let metadata = client.get(&format!("{}/metadata", path(&one))).expect(200);
    assert_eq!(metadata["parent_commit_id"], commit["commit_id"]);
    assert_eq!(metadata["grandparent_vm_id"], vm["vm_id"]);
    assert!(metadata.get("labels").is_none());
    let held = client.delete(&format!("/api/v1/commits/{}", commit["commit_id"].as_str().unwrap()));
    assert_eq!(held.expect(409)["error"], "commit still has 3 active VM(s)");

    let exec = |body: Value| client.post(&format!("{}/exec", path(&vm)), &body).expect(200);
    let ran = exec(json!({"command": ["echo", "hello"]}));
    assert_eq!((&ran["stdout"], &ran["exit_code"]), (&json!("hello\n"), &json!(0)));
    assert_eq!(exec(json!({"command": ["exit", "3"]}))["exit_code"], 3);
    assert_eq!(exec(json!({"command": ["cat"], "stdin": "x"}))["stdout"], "x");
    let body = json!({"command": ["bytes", "1048576"], "exec_id": UNKNOWN});
    let lines = client.post(&format!("{}/exec/stream", path(&vm)), &body).lines();
    let bytes = |lines: &[Value]| -> Vec<u8> {
        let data = lines.iter().filter(|l| l["type"] == "chunk");
        data.flat_map(|l| STANDARD.decode(l["data_b64"].as_str().unwrap()).unwrap()).collect()
    };
    let all: Vec<u8> = (0..1 << 20).map(|i| (i % 256) as u8).collect();
    assert!(bytes(&lines) == all, "every byte");
    let end = lines.last().unwrap();
    assert_eq!((&end["type"], &end["exit_code"]), (&json!("exit"), &json!(0)));
    let attach = format!("{}/exec/stream/attach", path(&vm));
    let rest = client.post(&attach, &json!({"exec_id": UNKNOWN, "cursor": 3})).lines();
    assert_eq!(rest, lines[3..]);
    assert_eq!(rest[0]["cursor"], 4);
    let latest = client.post(&attach, &json!({"exec_id": UNKNOWN, "from_latest": true})).lines();
    assert_eq!(latest.last(), Some(end));
    assert_eq!(latest.len(), 1);

    let file = json!({"path": "/etc/x", "content_b64": "AAE="});
    assert_eq!(client.put(&format!("{}/files", path(&vm)), &file).status, 200);
    let read = client.get(&format!("{}/files?path=/etc/x", path(&vm))).expect(200);
    assert_eq!(read["content_b64"], "AAE=");
}

#[test]
fn it_can_speak_as_it_did_before() {
    let double = Double::with(&["--boot-ms", "0", "--api-version", "2025-12"]);
    let client = double.client();
    assert_eq!(client.get("/api/v1/vms").status, 404);
    let body = json!({"commit_id": double.var("GOLDEN_COMMIT_ID")});
    let vm = client.post("/vm/from_commit", &body).expect(201)["vm_id"].clone();
    let path = format!("/vm/{}", vm.as_str().unwrap());
    assert_eq!(client.get(&format!("{path}/status")).status, 404);
    let branch = client.act(&format!("{path}/branch")).expect(201);
    assert!(branch["vm_id"].is_string(), "{branch}");
    assert!(client.act(&format!("{path}/commit")).expect(201)["host_architecture"].is_string());
    assert_eq!(client.delete(&path).expect(200), json!({"deleted_ids": [vm]}));
    assert_eq!(client.get("/vms").expect(200).as_array().unwrap().len(), 1);
}
