//! Secrets of the host: kept sealed, listed by name, given by name (contracts/aegis.md 1).

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use aegis_tests::house::{House, MANUAL};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::tree;

const VALUE: &str = "hush-7f3a91c2-do-not-tell";

#[track_caller]
fn set(house: &House, name: &str, body: Value) -> Value {
    house.socket().put(&format!("/v1/secrets/{name}"), &body).expect(200)
}

/// No file below a directory holds this text; sockets and disks' holes are passed over.
#[track_caller]
pub(super) fn nowhere_below(directory: &Path, text: &str) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            nowhere_below(&path, text);
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            let found = memchr::memmem::find(&bytes, text.as_bytes());
            assert_eq!(found, None, "{} holds the secret", path.display());
        }
    }
}

#[test]
fn a_secret_goes_in_and_does_not_come_out() {
    let mut house = House::new(MANUAL);
    let kept = set(&house, "PLAIN", json!({"value": VALUE}));
    assert_eq!((&kept["name"], &kept["proxy"]), (&json!("PLAIN"), &json!(false)));
    set(&house, "PROXY", json!({"value": VALUE, "proxy": true, "hosts": ["API.example.com"]}));
    // A later value takes the place of an earlier one.
    set(&house, "PLAIN", json!({"value": format!("{VALUE}-2")}));
    house.stop();
    house.start();
    let listed = house.socket().get("/v1/secrets");
    let names: Vec<Value> = listed.json()["secrets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| json!([s["name"], s["proxy"], s["hosts"]]))
        .collect();
    assert_eq!(names, [json!(["PLAIN", false, null]), json!(["PROXY", true, ["api.example.com"]])]);
    let one = house.socket().get("/v1/secrets/PROXY");
    assert!(one.json()["updated_at"].as_str().is_some_and(|t| t.ends_with('Z')));
    for answer in [&listed, &one] {
        assert!(!String::from_utf8_lossy(&answer.body).contains(VALUE));
    }
    house.socket().get("/v1/secrets/NONE").refused(404, "");
    house.socket().delete("/v1/secrets/NONE").refused(404, "");
    house.socket().delete("/v1/secrets/PROXY").expect(200);
    house.socket().get("/v1/secrets/PROXY").refused(404, "");

    let trail = tree::trail(&house);
    let noted: Vec<(&str, &str)> = trail
        .iter()
        .filter(|e| e["tree"] == "host")
        .map(|e| (e["kind"].as_str().unwrap(), e["subject"].as_str().unwrap()))
        .collect();
    let set = "secret.set";
    assert_eq!(
        noted,
        [(set, "PLAIN"), (set, "PROXY"), (set, "PLAIN"), ("secret.deleted", "PROXY")]
    );
    house.stop();
    nowhere_below(house.home(), VALUE);
}

#[test]
fn what_can_be_no_secret_is_refused_without_being_repeated() {
    let house = House::new(MANUAL);
    let put = |name: &str, body: Value| house.socket().put(&format!("/v1/secrets/{name}"), &body);
    for name in ["lower", "9A", "A-B", "A%20B", &"A".repeat(65)] {
        put(name, json!({"value": VALUE})).refused(400, "name");
    }
    for (body, field) in [
        (json!({"value": ""}), "value"),
        (json!({"value": "x\u{0}"}), "value"),
        (json!({"value": "x".repeat(32 * 1024 + 1)}), "value"),
        (json!({"value": [VALUE]}), "value"),
        (json!({"value": VALUE, "surprise": VALUE}), "value"),
        (json!({}), "value"),
        (json!({"value": VALUE, "proxy": true}), "hosts"),
        (json!({"value": VALUE, "hosts": ["a.example"]}), "hosts"),
        (json!({"value": VALUE, "proxy": true, "hosts": ["http://a.example"]}), "hosts"),
    ] {
        let answer = put("A", body);
        answer.refused(400, field);
        assert!(!String::from_utf8_lossy(&answer.body).contains(VALUE), "{answer:?}");
    }
    assert_eq!(house.socket().get("/v1/secrets").json()["secrets"], json!([]));
    assert!(!house.log().contains(VALUE));
    // Whoever names one that is not there learns which.
    set(&house, "KEPT", json!({"value": VALUE}));
    let ask = |secrets: Value| {
        let body = json!({"command": ["true"], "secrets": secrets});
        house.socket().post("/v1/instances", &body)
    };
    let refusal = ask(json!(["KEPT", "LOST"])).refused(400, "secrets");
    assert_eq!(refusal["requested"], "LOST");
    ask(json!(["*", "KEPT"])).refused(400, "secrets");
    ask(json!(["kept"])).refused(400, "secrets");
}

/// What a variable holds inside.
#[track_caller]
fn inside(house: &House, machine: &str, name: &str) -> String {
    house.sh(machine, &format!("printf %s \"${{{name}-unset}}\"")).text()
}

/// Whether a variable holds this inside, without its being printed: what is printed is logged.
#[track_caller]
fn holds(house: &House, machine: &str, name: &str, value: &str) {
    let digest: String =
        Sha256::digest(value.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
    let script = format!("printf %s \"${{{name}-unset}}\" | sha256sum | cut -d' ' -f1");
    assert_eq!(house.sh(machine, &script).text(), digest, "{name}");
}

#[test]
fn a_machine_gets_what_it_names_at_its_start() {
    let house = House::new("");
    set(&house, "PLAIN", json!({"value": VALUE}));
    set(&house, "MULTI", json!({"value": "two\nlines = \"x\""}));
    set(&house, "PROXY", json!({"value": VALUE, "proxy": true, "hosts": ["api.example.com"]}));
    let body = json!({
        "handle": "bot", "command": ["sleep", "infinity"], "idle_policy": "leave-running",
        "vcpus": 1, "memory_mb": 256, "disk_gb": 0.3, "secrets": ["PLAIN", "PROXY"],
        "env": {"OWN": "1"}, "envelope": {"vcpus": 4, "memory_mb": 1024, "disk_gb": 2},
        "capabilities": {
            "spawn": true, "spawn_depth": 1, "max_children": 1, "allowed_images": ["*"],
            "max_memory_mb": 256, "max_vcpus": 1, "allowed_secrets": ["MULTI"],
        },
    });
    let made = house.socket().post("/v1/instances", &body).expect(201);
    let bot = tree::text(&made, "id").to_owned();
    house.until_instance(&bot, "running");
    holds(&house, &bot, "PLAIN", VALUE);
    assert_eq!(inside(&house, &bot, "OWN"), "1");
    assert_eq!(inside(&house, &bot, "MULTI"), "unset");
    let placeholder = inside(&house, &bot, "PROXY");
    assert!(placeholder.starts_with("aegis-secret-PROXY-") && !placeholder.contains(VALUE));
    let info = house.socket().get("/v1/instances/bot");
    assert_eq!(info.json()["secret_keys"], json!(["PLAIN", "PROXY"]));
    assert!(!String::from_utf8_lossy(&info.body).contains(VALUE));

    // Its child gets what is allowed, and no more.
    let ask = tree::small(json!({"secrets": ["MULTI"], "memory_mb": 256, "vcpus": 1}));
    let post = |ask: &Value| {
        tree::curl(&house, &bot, &format!("-X POST {}/v1/instances -d '{ask}'", tree::API))
    };
    let refused = tree::small(json!({"secrets": ["PLAIN"], "memory_mb": 256, "vcpus": 1}));
    tree::denied(&post(&refused), 403, "capability_denied", "allowed_secrets");
    let (status, child) = post(&ask);
    assert_eq!(status, 201, "{child}");
    let child = tree::text(&child, "id").to_owned();
    house.until_instance(&child, "running");
    assert_eq!(inside(&house, &child, "MULTI"), "two\nlines = \"x\"");
    assert_eq!(inside(&house, &child, "PLAIN"), "unset");

    // Another choice holds from the next start on, and so does another value.
    let path = "/v1/instances/bot/secrets";
    house.socket().put(path, &json!({"secrets": ["LOST"]})).refused(400, "secrets");
    house.socket().put(path, &json!({"secrets": ["PLAIN", "PLAIN"]})).expect(200);
    set(&house, "PLAIN", json!({"value": format!("{VALUE}-2")}));
    holds(&house, &bot, "PLAIN", VALUE);
    house.socket().act("/v1/instances/bot/restart").expect(200);
    house.until_instance(&bot, "running");
    holds(&house, &bot, "PLAIN", &format!("{VALUE}-2"));
    assert_eq!(inside(&house, &bot, "PROXY"), "unset");

    // What is not kept any more, no machine starts with.
    house.socket().delete("/v1/secrets/PLAIN").expect(200);
    house.socket().act("/v1/instances/bot/restart").expect(200);
    let ended = house.until_instance(&bot, "stopped");
    assert!(ended["exit"]["message"].as_str().unwrap().contains("PLAIN"), "{ended}");
    house.socket().put(path, &json!({"secrets": []})).expect(200);
    house.socket().act("/v1/instances/bot/start").expect(200);
    house.until_instance(&bot, "running");
    for directory in ["data", "run", "instances"] {
        nowhere_below(&house.home().join(directory), VALUE);
    }
    assert!(!house.log().contains(VALUE));
}

#[test]
fn the_command_line_keeps_secrets_and_shows_none() {
    let house = House::new(MANUAL);
    let aegis = |args: &[&str], stdin: &str| {
        let mut command = Command::new(aegis_tests::programs().join("aegis"));
        command.env_clear().env("AEGIS_HOME", house.home()).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // Who is used wrongly ends before it reads.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(!out.contains(VALUE) && !err.contains(VALUE), "{args:?}: {out}{err}");
        (output.status.code(), out, err)
    };
    let (code, out, _) = aegis(&["secret", "set", "PLAIN"], &format!("{VALUE}\n"));
    assert_eq!((code, out.as_str()), (Some(0), "Secret kept: PLAIN\n"));
    let proxy = ["secret", "set", "PROXY", "--proxy", "--host", "a.example", "--json"];
    let (code, out, _) = aegis(&proxy, VALUE);
    assert_eq!(code, Some(0));
    let kept: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&kept["proxy"], &kept["hosts"]), (&json!(true), &json!(["a.example"])));
    let (_, out, _) = aegis(&["secret", "list"], "");
    assert!(out.contains("PLAIN") && out.contains("a placeholder for a.example"), "{out}");
    let (_, out, _) = aegis(&["secret", "list", "--json"], "");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["secrets"][0]["name"], "PLAIN");
    for (args, code, word) in [
        (&["secret", "set", "lower"][..], 1, "A-Z"),
        (&["secret", "set", "PLAIN", VALUE], 2, "unexpected argument"),
        (&["secret", "set", "PLAIN", "--proxy"], 2, "--host"),
        (&["secret", "delete", "NONE"], 1, "no secret NONE"),
    ] {
        // A value on the command line is the shell's to forget, and clap says it again.
        let args: Vec<&str> = args.iter().map(|a| if *a == VALUE { "other" } else { a }).collect();
        let (got, _, err) = aegis(&args, VALUE);
        assert_eq!(got, Some(code), "{args:?}: {err}");
        assert!(err.contains(word), "{args:?}: {err}");
    }
    let (code, out, _) = aegis(&["secret", "delete", "PLAIN"], "");
    assert_eq!((code, out.as_str()), (Some(0), "deleted\n"));
    let (_, out, err) = aegis(&["instance", "start", "--secret", "GONE", "--", "true"], "");
    assert!(err.contains("GONE"), "{out}{err}");
}
