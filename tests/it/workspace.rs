//! Workspaces: a folder of the host in a machine, live both ways (contracts/aegis.md 1 and 3).

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::{wait_for, wait_until};
use serde_json::{Value, json};

const SETTINGS: &str = "[rate_limit]\nper_second = 0\n";

fn start(house: &House, workspace: &str, mut body: Value) -> String {
    body["command"] = json!(["sleep", "infinity"]);
    body["vcpus"] = json!(1);
    body["memory_mb"] = json!(256);
    if body["disk_gb"].is_null() {
        body["disk_gb"] = json!(0.3);
    }
    body["workspace"] = json!(workspace);
    let made = house.socket().post("/v1/instances", &body).expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    house.until_instance(&id, "running");
    id
}

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("aegis-ws-").tempdir_in("/tmp").unwrap()
}

#[test]
fn a_folder_is_live_both_ways() {
    let house = House::new(SETTINGS);
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("from-host"), "hello inside\n").unwrap();
    let id = start(&house, folder.path().to_str().unwrap(), json!({}));

    assert_eq!(house.ok(&id, "cat /workspace/from-host"), "hello inside");
    house.ok(&id, "echo 'hello outside' > /workspace/from-guest");
    assert_eq!(fs::read_to_string(at("from-guest")).unwrap(), "hello outside\n");
}
