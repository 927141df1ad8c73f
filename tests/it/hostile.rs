//! Machines that mean harm, and a daemon that dies under them: tokens that are not theirs, spawns as
//! fast as they can (contracts/aegis.md 3 and 10).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aegis_tests::house::House;
use aegis_tests::{look, wait_for};
use serde_json::{Value, json};

use super::tree::{API, curl, denied, get, rights, root, small, text, trail};

/// All instances that the host knows.
fn all(house: &House) -> Vec<Value> {
    house.socket().get("/v1/instances").expect(200).as_array().unwrap().clone()
}

fn memory_of(instances: &[Value]) -> u64 {
    let live = instances.iter().filter(|i| i["state"] != "stopped");
    live.map(|i| i["memory_mb"].as_u64().unwrap()).sum()
}

#[test]
fn a_bomb_of_spawns_stays_within_what_was_given() {
    let house = House::new("");
    let mut few = rights(2);
    few["max_children"] = json!(2);
    let top = root(&house, "bomb", few);
    // Each child does the same, as fast as it can.
    let below =
        json!({"command": ["sleep", "99"], "memory_mb": 128, "vcpus": 0.25, "disk_gb": 0.1});
    let again = "while :; do curl -s -X POST $AEGIS_GUEST_API/v1/instances -d \"$BODY\" -o /dev/null; \
                 done";
    let body = small(json!({"command": ["sh", "-c", again], "env": {"BODY": below.to_string()}}));
    let script = format!(
        "cat > /root/body <<'END'\n{body}\nEND\nfor i in 1 2 3 4; do (while :; do curl -s -X POST \
         {API}/v1/instances -d @/root/body -o /dev/null; done) >/dev/null 2>&1 & done; echo lit"
    );
    assert_eq!(house.sh(&top, &script).text(), "lit");
    let seconds = match std::env::var("AEGIS_TEST_BOMB_SECS") {
        Ok(text) => text.parse().expect("AEGIS_TEST_BOMB_SECS is a number"),
        Err(_) => 10,
    };
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut most, mut slowest) = (0, Duration::ZERO);
    while Instant::now() < until {
        let asked = Instant::now();
        let there = all(&house);
        slowest = slowest.max(asked.elapsed());
        // The host, its children, their children.
        assert!(there.len() <= 1 + 2 + 4, "{there:#?}");
        for parent in &there {
            let mine = there.iter().filter(|c| c["parent_id"] == parent["id"]).count();
            assert!(mine <= 2, "{parent}");
        }
        assert!(memory_of(&there) <= 2048, "{there:#?}");
        most = most.max(there.len());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(most >= 3, "the bomb did not go off: {most}");
    assert!(slowest < Duration::from_secs(2), "the host did not answer for {slowest:?}");
    let ids: Vec<String> = all(&house).iter().map(|i| text(i, "id").to_owned()).collect();
    let before = house.machine_processes();
    let ended = Instant::now();
    assert_eq!(
        house.socket().delete(&format!("/v1/instances/{top}")).expect(200)["status"],
        "deleted"
    );
    eprintln!("{most} machines at most, slowest answer {slowest:?}, end {:?}", ended.elapsed());
    for id in &ids {
        house.assert_no_trace(id, &before);
    }
    assert_eq!(all(&house), Vec::<Value>::new());
    assert_eq!(house.machine_processes(), vec![]);
    trail(&house);
}

#[test]
fn a_daemon_that_dies_leaves_whole_children_or_none() {
    let mut house = House::new("");
    let top = root(&house, "top", rights(1));
    let script = format!(
        "(while :; do id=$(curl -s -X POST {API}/v1/instances -d '{}' | grep -o 'inst-[0-9A-Z]*' | \
         head -1); [ -n \"$id\" ] && curl -s -X DELETE {API}/v1/instances/$id; done) \
         >/dev/null 2>&1 & echo $! > /root/loop",
        small(json!({}))
    );
    for round in 0..3 {
        house.sh(&top, &script);
        let mut noise = [0; 2];
        getrandom::fill(&mut noise).unwrap();
        let wait = 200 + u64::from(u16::from_le_bytes(noise)) % 2500;
        std::thread::sleep(Duration::from_millis(wait));
        house.kill9();
        house.start();
        house.sh(&top, "kill $(cat /root/loop); pkill curl; true");
        // What is in flight ends; then the books are exact.
        let own = wait_for("the books are exact", Duration::from_secs(30), || {
            let own = get(&house, &top, "/v1/self");
            let spent = own["envelope"]["spent"]["memory_mb"].as_u64().unwrap();
            (spent == memory_of(&all(&house))).then_some(own)
        });
        let there = all(&house);
        assert_eq!(
            own["envelope"]["left"]["memory_mb"].as_u64().unwrap() + memory_of(&there),
            2048,
            "round {round}: {own}"
        );
        // Each child is whole: it runs, or it ends when it is asked to.
        for child in there.iter().filter(|i| i["parent_id"] == json!(top)) {
            let id = text(child, "id");
            assert_eq!(house.sh(id, "echo whole").text(), "whole", "round {round}");
            let (status, body) = curl(&house, &top, &format!("-X DELETE {API}/v1/instances/{id}"));
            assert_eq!(status, 200, "{body}");
        }
        let known: Vec<String> = all(&house).iter().map(|i| text(i, "id").to_owned()).collect();
        for id in look::run_directories(house.home()) {
            assert!(known.contains(&id), "round {round}: {id} has no record");
        }
        assert_eq!(known, vec![top.clone()], "round {round}");
    }
    trail(&house);
}

/// Puts other bytes where the harness holds its token: what a hostile root of a machine can do.
const REWRITE: &str = r#"
import re, sys
old = None
def regions():
    for line in open("/proc/1/maps"):
        span, mode = line.split()[:2]
        if "rw" in mode:
            yield [int(x, 16) for x in span.split("-")]
def tokens():
    memory = open("/proc/1/mem", "rb", 0)
    for start, end in regions():
        try:
            memory.seek(start)
            data = memory.read(end - start)
        except (OSError, ValueError, OverflowError):
            continue
        for match in re.finditer(rb"eyJ[\w-]{20,}\.[\w-]{100,}\.[\w-]{43}", data):
            yield start + match.start(), match.group()
if sys.argv[1] == "show":
    found = sorted({t for _, t in tokens()}, key=len)
    print(found[-1].decode())
else:
    new = sys.argv[1].encode()
    count = 0
    for at, token in list(tokens()):
        if len(token) == len(new):
            with open("/proc/1/mem", "r+b", 0) as memory:
                memory.seek(at)
                memory.write(new)
            count += 1
    print(count)
"#;

/// All files below a directory.
fn contents(below: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(below).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            found.extend(contents(&path));
        } else if kind.is_file() {
            found.push((path.clone(), std::fs::read(path).unwrap()));
        }
    }
    found
}

#[test]
fn a_token_is_good_for_its_own_machine_only() {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let house = House::new("");
    let (a, b) = (root(&house, "a", rights(1)), root(&house, "b", rights(1)));
    let rewrite = |machine: &str, word: &str| {
        let file = format!("cat > /root/rewrite.py <<'END'\n{REWRITE}\nEND\n");
        let ran = house.sh(machine, &format!("{file}python3 /root/rewrite.py {word}"));
        assert_eq!(ran.code, Some(0), "{}", String::from_utf8_lossy(&ran.err));
        ran.text()
    };
    let own = rewrite(&a, "show");
    let stolen = rewrite(&b, "show");
    assert_eq!(own.len(), stolen.len(), "both say as much");
    let (message, signature) = own.rsplit_once('.').unwrap();
    let (header, claims) = message.split_once('.').unwrap();
    let forged = {
        let first = if signature.starts_with('A') { "B" } else { "A" };
        format!("{message}.{first}{}", &signature[1..])
    };
    let more = {
        let claims = URL_SAFE_NO_PAD.decode(claims).unwrap();
        let claims = String::from_utf8(claims).unwrap();
        let claims = claims.replace("\"max_children\":3", "\"max_children\":9");
        format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode(claims))
    };
    let unsigned = {
        let header = String::from_utf8(URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap();
        let header = header.replace("\"HS256\"", "\"none\" ");
        format!("{}.{claims}.{signature}", URL_SAFE_NO_PAD.encode(header))
    };
    let other_kid = {
        let header = String::from_utf8(URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap();
        let at = header.find("\"kid\":\"").unwrap() + 7;
        let digit = if header.as_bytes()[at] == b'0' { "1" } else { "0" };
        let header = format!("{}{digit}{}", &header[..at], &header[at + 1..]);
        format!("{}.{claims}.{signature}", URL_SAFE_NO_PAD.encode(header))
    };
    for (name, token) in [
        ("forged", &forged),
        ("with more powers", &more),
        ("unsigned", &unsigned),
        ("of another key", &other_kid),
        ("stolen", &stolen),
    ] {
        assert_eq!(token.len(), own.len(), "{name}");
        assert_ne!(rewrite(&a, token), "0", "{name}: nothing was replaced");
        for words in [
            format!("{API}/v1/self"),
            format!("-X POST {API}/v1/self/keepalive -d '{{\"ttl_ms\":1000}}'"),
            format!("-X POST {API}/v1/instances -d '{}'", small(json!({}))),
        ] {
            let answer = curl(&house, &a, &words);
            denied(&answer, 403, "capability_denied", "");
        }
        let denials = trail(&house).into_iter().filter(|e| e["kind"] == "instance.denied").count();
        assert!(denials >= 3, "{name}: {denials}");
        rewrite(&a, &own);
        assert_eq!(get(&house, &a, "/v1/self")["id"], a, "its own one is good again");
    }
    // Replayed: the token of an earlier boot.
    house.socket().act(&format!("/v1/instances/{a}/stop")).expect(200);
    house.socket().act(&format!("/v1/instances/{a}/start")).expect(200);
    assert_eq!(get(&house, &a, "/v1/self")["id"], a);
    assert_ne!(rewrite(&a, "show"), own);
    rewrite(&a, &own);
    denied(&curl(&house, &a, &format!("{API}/v1/self")), 403, "capability_denied", "");
    let log = house.log();
    let current = rewrite(&b, "show");
    for token in [&own, &stolen, &forged, &current] {
        assert!(!log.contains(token.as_str()), "a token is in the log");
        for directory in ["run", "data"] {
            for (path, bytes) in contents(&house.home().join(directory)) {
                let found = bytes.windows(token.len()).any(|w| w == token.as_bytes());
                assert!(!found, "a token is in {path:?}");
            }
        }
    }
}
