//! Images of others, from an archive to a process in a machine: an image with one static binary, run
//! as its configuration says, pinned, counted, refused, removed.

use std::os::unix::fs::symlink;

use aegis_tests::house::House;
use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::cli::aegis;

const SETTINGS: &str = "[images]\npull = 'never'\n[rate_limit]\nper_second = 0\n";

/// A house with images of its own: the others' are shared by all tests.
fn house(settings: &str) -> House {
    let house = House::new(settings);
    let images = house.home().join("images");
    let base = std::fs::canonicalize(&images).unwrap().join("base");
    std::fs::remove_file(&images).unwrap();
    std::fs::create_dir(&images).unwrap();
    symlink(&base, images.join("base")).unwrap();
    house
}

/// One entry of a tar: POSIX ustar, as anybody writes it.
fn entry(out: &mut Vec<u8>, name: &str, mode: u32, kind: u8, link: &str, data: &[u8]) {
    let mut head = [0u8; 512];
    let mut put = |at: usize, text: &[u8]| head[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{:011o}", data.len()).as_bytes());
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[kind]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = head.iter().map(|b| u32::from(*b)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.extend(head);
    out.extend(data);
    out.resize(out.len().next_multiple_of(512), 0);
}

fn ended(mut tar: Vec<u8>) -> Vec<u8> {
    tar.resize(tar.len() + 1024, 0);
    tar
}

/// An archive of `docker save`: the harness's own file, which is static, is the only program. It is no
/// shell; run as a process it says that it is not the first one, and ends.
fn saved(name: &str, run: &Value, note: &str) -> Vec<u8> {
    let program = std::fs::read(aegis_tests::programs().join("aegis-mcp-guest")).unwrap();
    let mut below = Vec::new();
    entry(&mut below, "app/", 0o755, b'5', "", b"");
    entry(&mut below, "app/tool", 0o4755, b'0', "", &program);
    entry(
        &mut below,
        "etc/passwd",
        0o644,
        b'0',
        "",
        b"root:x:0:0::/root:/\nbot:x:1234:1235::/app:/\n",
    );
    entry(&mut below, "hidden", 0o644, b'0', "", b"x");
    let mut above = Vec::new();
    entry(&mut above, ".wh.hidden", 0o644, b'0', "", b"");
    entry(&mut above, "app/note", 0o644, b'0', "", note.as_bytes());
    let layers = [ended(below), ended(above)];
    let hex =
        |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let diffs: Vec<String> = layers.iter().map(|l| format!("sha256:{}", hex(l))).collect();
    let config = json!({ "os": "linux", "architecture": "amd64", "config": run,
        "rootfs": { "type": "layers", "diff_ids": diffs } });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name],
        "Layers": ["0/layer.tar", "1/layer.tar"] }]);
    let mut out = Vec::new();
    entry(&mut out, "0/layer.tar", 0o644, b'0', "", &layers[0]);
    entry(&mut out, "1/layer.tar", 0o644, b'0', "", &layers[1]);
    entry(&mut out, "config.json", 0o644, b'0', "", config.to_string().as_bytes());
    entry(&mut out, "manifest.json", 0o644, b'0', "", manifest.to_string().as_bytes());
    ended(out)
}

/// The last line of an import.
fn import(house: &House, archive: Vec<u8>) -> Value {
    let client = house.socket();
    let answer = client.send(Method::POST, "/v1/images/import", Bytes::from(archive)).unwrap();
    answer.lines().pop().unwrap()
}

fn start(house: &House, image: &str, more: Value) -> String {
    let mut body = json!({ "image_ref": image, "memory_mb": 256, "vcpus": 1, "disk_gb": 0.3 });
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    let made = house.socket().post("/v1/instances", &body).expect(201);
    made["id"].as_str().unwrap().to_owned()
}

#[test]
fn an_image_without_a_shell_runs_as_it_says() {
    let house = house(SETTINGS);
    let run = json!({ "Entrypoint": ["/app/tool"], "Env": ["WHO=image", "KEEP=image"],
        "WorkingDir": "/app", "User": "bot" });
    let done = import(&house, saved("acme/bot:1", &run, "first"));
    assert_eq!(done["event"], "done", "{done}");
    assert_eq!(done["reference"], "docker.io/acme/bot:1");
    assert_eq!(done["command"], json!(["/app/tool"]));

    // The image's own command serves MCP on stdin, which is empty: it ends well. Its user is not
    // root, and has what root's files keep from it.
    let id = start(&house, "acme/bot:1", json!({ "env": { "WHO": "mine" } }));
    let ended = house.until_instance(&id, "stopped");
    assert_eq!(ended["exit"]["code"], 0, "{ended}");
    assert_eq!(ended["command"], json!(["/app/tool"]));
    // Attached, it is asked there.
    let hello = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2024-11-05", "capabilities": {},
        "clientInfo": {"name": "x", "version": "1"}}});
    let run_it = ["run", "-i", "--memory", "256M", "--image", "acme/bot:1"];
    let out = crate::stdin::ran(&house, &run_it, format!("{hello}\n").as_bytes());
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(out.status.success() && said["id"] == 1 && said["result"].is_object(), "{said}");
    let absent = start(&house, "acme/bot:1", json!({ "command": ["sh", "-c", "true"] }));
    let ended = house.until_instance(&absent, "stopped");
    assert!(ended["exit"]["message"].as_str().unwrap().contains("sh"), "{ended}");

    // Names move; a machine that was started stays with what its disk lies on.
    let list = || house.socket().get("/v1/images").expect(200);
    let of = |reference: &str| {
        let all = list();
        let found = all.as_array().unwrap().iter().find(|i| i["reference"] == reference).cloned();
        found.unwrap_or_else(|| panic!("{reference} is not in {all}"))
    };
    assert_eq!(of("docker.io/acme/bot:1")["in_use"], 2);
    assert_eq!(of("base")["in_use"], 0);
    let again = import(&house, saved("acme/bot:1", &run, "second"));
    assert_ne!(again["digest"], done["digest"]);
    assert_eq!(of("docker.io/acme/bot:1")["in_use"], 0);
    assert_eq!(of(done["digest"].as_str().unwrap())["in_use"], 2);
    house.socket().act(&format!("/v1/instances/{id}/start")).expect(200);
    house.until_instance(&id, "stopped");

    let path = |name: &str| format!("/v1/images/{}", name.replace('/', "%2F"));
    let digest = done["digest"].as_str().unwrap();
    let refused = house.socket().delete(&path(digest)).expect(409);
    assert_eq!(refused["code"], "image_in_use");
    assert_eq!(house.socket().act("/v1/images/prune?all=true").expect(200)["pruned"], 1);
    for id in [&id, &absent] {
        house.socket().delete(&format!("/v1/instances/{id}")).expect(200);
    }
    house.socket().delete(&path(digest)).expect(200);
    house.socket().delete(&path(digest)).expect(404);
    house.socket().act("/v1/images/prune").expect(200);
    let mut left: Vec<_> = std::fs::read_dir(house.home().join("images"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["base", "blobs", "index.json"]);
    assert_eq!(std::fs::read_dir(house.home().join("images/blobs")).unwrap().count(), 0);
}

#[test]
fn an_image_is_built_of_a_directory_and_warmed() {
    let house = house(SETTINGS);
    let run = |args: &[&str]| aegis(house.home(), args);
    let dir = tempfile::Builder::new().prefix("aegis-it-").tempdir_in("/tmp").unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("app/below")).unwrap();
    std::fs::create_dir(at("etc")).unwrap();
    let program = aegis_tests::programs().join("aegis-mcp-guest");
    std::fs::copy(&program, at("app/tool")).unwrap();
    let mode = |name: &str, mode| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode("app/tool", 0o4755);
    std::fs::write(at("app/below/note"), "kept").unwrap();
    std::os::unix::fs::chown(at("app/below/note"), Some(1234), Some(1235)).unwrap();
    mode("app/below/note", 0o640);
    symlink("below/note", at("app/link")).unwrap();
    let from = dir.path().to_str().unwrap();
    let built = run(&["--json", "image", "build", "bot", "--from", from, "--", "/app/tool"]).json();
    assert_eq!(built["reference"], "docker.io/library/bot:latest", "{built}");
    assert_eq!(built["command"], json!(["/app/tool"]));
    let again = run(&["--json", "image", "build", "bot", "--from", from, "--", "/app/tool"]).json();
    assert_eq!(again["digest"], built["digest"], "the same tree is the same image");

    // The first start of such a machine makes its snapshot, unless somebody has.
    let warm =
        || run(&["--json", "image", "warm", "bot", "--memory", "256M", "--cpus", "1"]).json();
    assert_eq!((&warm()["cached"], &warm()["cached"]), (&json!(false), &json!(true)));
    let id = start(&house, "bot", json!({ "command": null }));
    let ended = house.until_instance(&id, "stopped");
    assert_eq!((&ended["exit"]["code"], &ended["command"]), (&json!(0), &json!(["/app/tool"])));

    run(&["image", "warm", "bot", "--cpus", "64"]).bad(1, &["no room", "CPU cores"]);
    run(&["image", "build", "x", "--from", "/no/such"]).bad(2, &["must be a directory"]);
    run(&["image", "build", "x", "--from", from, "--debian"]).bad(2, &["--debian"]);
    run(&["image", "build", "Upper", "--from", from]).bad(1, &["image_ref"]);
    let socket = house.socket();
    let post = |path: &str| socket.send(Method::POST, path, Bytes::from_static(b"x")).unwrap();
    post("/v1/images/import?tree=true").refused(400, "name");
    post("/v1/images/import?tree=true&name=x&command=y").refused(400, "command");
    post("/v1/images/import?command=[]").refused(400, "command");
    let broken = post("/v1/images/import?tree=true&name=x").lines().pop().unwrap();
    assert_eq!((&broken["event"], &broken["code"]), (&json!("failed"), &json!("image_broken")));
    socket.post("/v1/images/warm", &json!({ "image_ref": "none" })).refused(400, "image_ref");
    socket.post("/v1/images/warm", &json!({ "memory_mb": 1 })).refused(400, "memory_mb");
}

#[test]
fn what_is_not_there_is_said_with_what_to_do() {
    let house = house(SETTINGS);
    let body = json!({ "command": ["true"], "image_ref": "acme/none:1" });
    let refused = house.socket().post("/v1/instances", &body).refused(400, "image_ref");
    assert!(
        refused["hint"].as_str().unwrap().contains("aegis image pull acme/none:1"),
        "{refused}"
    );
    let body = json!({ "image_ref": "base" });
    house.socket().post("/v1/instances", &body).refused(400, "command");
    house.socket().post("/v1/images", &json!({ "image_ref": "Upper" })).refused(400, "image_ref");
    house.socket().post("/v1/images", &json!({ "image_ref": "base" })).refused(400, "image_ref");
    let broken = import(&house, b"no archive".repeat(100));
    assert_eq!((&broken["event"], &broken["code"]), (&json!("failed"), &json!("image_broken")));
    house.host().get("/v1/images").expect(200);
    house.anybody().get("/v1/images").expect(401);
}
