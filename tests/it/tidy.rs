//! The rules of the house that no compiler checks: who may know whom, what every file begins with,
//! how long it may be.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The largest file, in lines: a file is about one thing.
const LINES_MAX: usize = 600;
/// Files that are longer. This list may only shrink.
const LONGER: [&str; 0] = [];

/// Which crates of the house a crate may know, tests apart.
const CRATES: [(&str, &[&str]); 14] = [
    ("aegis-rules", &[]),
    ("aegis-wire", &["aegis-rules"]),
    ("aegisd", &["aegis-rules", "aegis-vers", "aegis-wire"]),
    ("aegis-vers", &["aegis-wire"]),
    ("aegis-workspace", &["aegis-wire"]),
    ("aegis-gateway", &["aegis-wire"]),
    ("aegis-images", &["aegis-wire"]),
    ("aegis-worker", &["aegis-gateway", "aegis-wire", "aegis-workspace"]),
    ("aegis-harness", &["aegis-wire"]),
    ("aegis-mcp-guest", &["aegis-wire"]),
    ("aegis-cli", &["aegis-wire"]),
    ("aegis-tests", &["aegis-wire"]),
    ("aegis-hostile", &["aegis-wire"]),
    ("aegis-bench", &["aegis-wire", "aegis-tests"]),
];

/// Which other rooms of `aegisd` a room may use. `keys`, `clock`, `config` and `ctx` hold no
/// decisions.
const ROOMS: [(&str, &[&str]); 22] = [
    ("doors", &["app", "config", "keys"]),
    ("hatch", &["app", "config", "ctx", "keys", "lifecycle", "passing", "roots"]),
    ("web", &["app", "ctx", "passing"]),
    ("passing", &[]),
    ("broker", &["app", "keys", "lifecycle", "tokens"]),
    ("app", &APP),
    ("lifecycle", &LIFECYCLE),
    ("router", &["ctx", "keys", "lifecycle"]),
    ("ledger", &["keys"]),
    ("ctx", &["clock", "cloud", "commits", "config", "keys", "ledger", "metrics", "watch"]),
    ("images", &["config", "programs"]),
    ("cloud", &["config", "keys", "roots"]),
    ("commits", &[]),
    ("workspaces", &[]),
    ("programs", &[]),
    ("roots", &[]),
    ("config", &[]),
    ("keys", &["tokens"]),
    ("tokens", &[]),
    ("clock", &[]),
    ("metrics", &[]),
    ("watch", &[]),
];

const APP: [&str; 10] = [
    "commits",
    "config",
    "ctx",
    "images",
    "keys",
    "ledger",
    "lifecycle",
    "router",
    "tokens",
    "workspaces",
];
const LIFECYCLE: [&str; 12] = [
    "cloud",
    "commits",
    "config",
    "ctx",
    "images",
    "keys",
    "ledger",
    "metrics",
    "programs",
    "router",
    "tokens",
    "workspaces",
];

/// Modules of `aegis-wire` that a room may not name: HTTP shapes belong to the doors.
const SHAPES: [(&str, &[&str]); 2] =
    [("lifecycle", &["couch", "host", "error"]), ("ledger", &["couch", "host", "error", "worker"])];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All files with this ending below a directory.
fn files(below: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![below.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<PathBuf> {
    ["crates", "tests", "benches"].iter().flat_map(|d| files(&root().join(d), ".rs")).collect()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn parsed(path: &Path) -> toml::Table {
    read(path).parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The words that follow `prefix` in a text, comments apart.
fn named(text: &str, prefix: &str) -> BTreeSet<String> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split(prefix).skip(1))
        .flat_map(|rest| match rest.strip_prefix('{') {
            // A list: its first words. No list of ours is nested at this level.
            Some(list) => list.split('}').next().unwrap_or("").split(',').collect::<Vec<_>>(),
            None => vec![rest],
        })
        .map(|rest| {
            let word = rest.trim_start();
            let end = word.find(|c: char| !(c.is_ascii_lowercase() || c == '_'));
            word[..end.unwrap_or(word.len())].to_owned()
        })
        .filter(|word| !word.is_empty())
        .collect()
}

#[test]
fn no_crate_knows_more_than_it_may() {
    let allowed: BTreeMap<_, _> = CRATES.into_iter().collect();
    let members = ["crates", "tests", "benches"];
    for manifest in members.iter().flat_map(|d| files(&root().join(d), "Cargo.toml")) {
        let table = parsed(&manifest);
        let name = table["package"]["name"].as_str().unwrap();
        let may = allowed.get(name).unwrap_or_else(|| panic!("{name} has no entry in tidy.rs"));
        let deps = table.get("dependencies").and_then(|d| d.as_table());
        for dependency in deps.into_iter().flat_map(|d| d.keys()) {
            if dependency.starts_with("aegis") {
                assert!(may.contains(&dependency.as_str()), "{name} may not know {dependency}");
            }
        }
    }
}

#[test]
fn no_room_of_the_daemon_knows_more_than_it_may() {
    let source = root().join("crates/aegisd/src");
    let rooms: BTreeSet<&str> = ROOMS.iter().map(|(room, _)| *room).collect();
    for path in files(&source, ".rs") {
        let inside = path.strip_prefix(&source).unwrap();
        let first = inside.iter().next().unwrap().to_str().unwrap();
        let room = first.strip_suffix(".rs").unwrap_or(first);
        if room == "main" {
            continue;
        }
        let (_, may) =
            ROOMS.iter().find(|(r, _)| *r == room).unwrap_or_else(|| panic!("{room} is no room"));
        let text = read(&path);
        for other in named(&text, "crate::") {
            let known = other == room || may.contains(&other.as_str());
            assert!(
                known || !rooms.contains(other.as_str()),
                "{room} may not use {other}: {path:?}"
            );
        }
        for (_, shapes) in SHAPES.iter().filter(|(r, _)| *r == room) {
            for module in named(&text, "aegis_wire::") {
                assert!(!shapes.contains(&module.as_str()), "{room} names {module}: {path:?}");
            }
        }
    }
}

#[test]
fn laws_do_nothing_but_judge() {
    for path in files(&root().join("crates/aegis-rules/src"), ".rs") {
        let text = read(&path);
        for banned in ["std::fs", "std::net", "std::env", "std::process", "std::thread", "tokio"] {
            assert!(!text.contains(banned), "{banned} in {}", path.display());
        }
    }
}

#[test]
fn every_file_says_first_what_it_is_for() {
    for path in sources() {
        // A file of unit tests is about the file beside it.
        let tests = path.ends_with("tests.rs");
        assert!(tests || read(&path).starts_with("//! "), "{} begins without //!", path.display());
    }
}

#[test]
fn no_file_is_long() {
    for path in sources() {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        let lines = read(&path).lines().count();
        let longer = LONGER.contains(&name.as_str());
        assert!(lines <= LINES_MAX || longer, "{name} has {lines} lines");
        assert!(lines > LINES_MAX || !longer, "{name} is short again: take it off the list");
    }
}

#[test]
fn unsafe_code_is_in_one_file_per_crate() {
    for path in files(&root().join("crates"), ".rs") {
        let unsafe_code = |line: &str| line.contains("unsafe {") || line.contains("unsafe fn");
        let found = read(&path).lines().any(unsafe_code);
        assert!(!found || path.ends_with("sys.rs"), "unsafe code in {}", path.display());
    }
}

#[test]
fn a_crates_bans_repeat_the_roots() {
    // clippy reads the nearest file only: one that forgot a ban would lift it.
    let bans = |path: &Path| -> BTreeSet<String> {
        let table = parsed(path);
        let list = table.get("disallowed-methods").and_then(|l| l.as_array());
        list.into_iter().flatten().map(|b| b["path"].as_str().unwrap().to_owned()).collect()
    };
    let all = bans(&root().join("clippy.toml"));
    assert!(!all.is_empty());
    for own in files(&root().join("crates"), "clippy.toml") {
        let missing: Vec<_> = all.difference(&bans(&own)).cloned().collect();
        assert!(missing.is_empty(), "{}: {missing:?}", own.display());
    }
}
