//! Workspaces: a folder of the host in a machine, live both ways (contracts/aegis.md 1 and 3). A boot
//! costs seconds, so one machine serves many looks.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::PathBuf;
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::{look, wait_for, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::tree::{API, curl, rights};

const SETTINGS: &str = "[rate_limit]\nper_second = 0\n";
/// Somebody of the host whose folder it is.
const OWNER: u32 = 23_456;
/// What a program inside does with files, as programs do.
const PROGRAM: &str = include_str!("workspace/program.py");

/// A folder that is lent, beside a file that is not.
struct Folder {
    dir: TempDir,
}

impl Folder {
    fn new() -> Folder {
        let dir = tempfile::Builder::new().prefix("aegis-ws-").tempdir_in("/tmp").unwrap();
        fs::create_dir(dir.path().join("lent")).unwrap();
        fs::write(dir.path().join("secret"), "the host's own").unwrap();
        Folder { dir }
    }

    /// Where it is; links on the way are none.
    fn path(&self) -> String {
        let path = fs::canonicalize(self.dir.path().join("lent")).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join("lent").join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.at(name), text).unwrap();
    }
}

fn body(workspace: &str, more: Value) -> Value {
    let mut body = json!({"command": ["sleep", "infinity"], "vcpus": 1, "memory_mb": 256,
        "disk_gb": 0.3, "workspace": workspace});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[track_caller]
fn start(house: &House, workspace: &str, more: Value) -> String {
    let made = house.socket().post("/v1/instances", &body(workspace, more)).expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    house.until_instance(&id, "running");
    id
}

#[test]
fn a_folder_is_live_both_ways() {
    let house = House::new(SETTINGS);
    let folder = Folder::new();
    let as_root = rustix::process::geteuid().is_root();
    if as_root {
        chown(folder.at(""), Some(OWNER), Some(OWNER)).unwrap();
    }
    folder.write("from-host", "hello inside\n");
    symlink(folder.dir.path().join("secret"), folder.at("out")).unwrap();
    symlink("../secret", folder.at("up")).unwrap();
    folder.write("program.py", PROGRAM);
    let id = start(&house, &folder.path(), json!({}));
    let info = house.socket().get(&format!("/v1/instances/{id}")).expect(200);
    assert_eq!(info["workspace"], folder.path());

    // Both ways, while it runs.
    assert_eq!(house.ok(&id, "cat /workspace/from-host"), "hello inside");
    house.ok(&id, "echo 'hello outside' > /workspace/from-guest; chmod 4750 /workspace/from-guest");
    assert_eq!(folder.read("from-guest"), "hello outside\n");
    let meta = fs::metadata(folder.at("from-guest")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o750, "no setuid on the host");
    assert_eq!(meta.uid(), fs::metadata(folder.at("")).unwrap().uid(), "the folder's owner's");
    assert_eq!(house.ok(&id, "stat -c %u:%g /workspace /workspace/from-guest"), "0:0\n0:0");
    for text in ["one", "two, which is longer", "3"] {
        folder.write("from-host", text);
        wait_until("the change is seen", Duration::from_secs(20), || {
            house.ok(&id, "cat /workspace/from-host") == text
        });
    }
    fs::rename(folder.at("from-host"), folder.at("renamed")).unwrap();
    wait_until("the new name is seen", Duration::from_secs(20), || {
        house.ok(&id, "cd /workspace; ls") == "from-guest\nout\nprogram.py\nrenamed\nup"
    });

    // A link means what it means inside: the host's file is not there.
    let secret = folder.dir.path().join("secret");
    assert_eq!(house.ok(&id, "readlink /workspace/out"), secret.to_str().unwrap());
    for script in ["cat /workspace/out", "cat /workspace/up", "cat /workspace/../secret"] {
        let ran = house.sh(&id, script);
        assert!(ran.code != Some(0) && ran.out.is_empty(), "{script}: {ran:?}");
    }
    house.ok(&id, "echo inside > /secret; grep -q inside /workspace/up; echo x >> /workspace/up");
    assert_eq!(fs::read_to_string(&secret).unwrap(), "the host's own");
    assert_ne!(house.sh(&id, "mknod /workspace/null c 1 3").code, Some(0));

    // Root's rights to files are those of whoever could give them to himself.
    let modes =
        "cd /workspace; (umask 333; echo a > ro); echo b >> ro; chmod 0 ro; cat ro; stat -c %a ro
        (umask 222; printf '#!/bin/sh\nexit 7\n' > script)";
    assert_eq!(house.ok(&id, modes), "a\nb\n0");
    // What was written inside can be run outside at once.
    fs::set_permissions(folder.at("script"), fs::Permissions::from_mode(0o755)).unwrap();
    let ran = std::process::Command::new(folder.at("script")).status().unwrap();
    assert_eq!(ran.code(), Some(7));

    // As programs use files: databases, locks, mappings, news of changes.
    let ran = house.sh(&id, "cd /workspace; mkdir programs; python3 program.py programs");
    assert_eq!(ran.text().lines().last(), Some("all is well"), "{ran:?}");
    let lines = folder.read("programs/appended");
    assert_eq!(lines.lines().count(), 400, "two processes appended, and nothing is lost");
    assert_eq!(fs::read_dir(folder.at("programs/many")).unwrap().count(), 2000);

    // Git, as people use it.
    let git = "cd /root; export GIT_CONFIG_COUNT=2 GIT_CONFIG_KEY_0=user.name GIT_CONFIG_VALUE_0=ty \
        GIT_CONFIG_KEY_1=user.email GIT_CONFIG_VALUE_1=ty@example.com; git init -q r; cd r; \
        for i in $(seq 20); do echo $i > f$i; done; git add .; git commit -qm one; \
        git clone -q /root/r /workspace/clone; cd /workspace/clone; echo more > f1; \
        git commit -qam two; git status --porcelain; git fsck --strict; git log --format=%s";
    assert_eq!(house.ok(&id, git), "two\none");
    assert_eq!(folder.read("clone/f1"), "more\n");

    // Gone with the machine is its process, not the folder.
    let processes = house.machine_processes();
    assert!(processes.iter().any(|p| p.command.contains("aegis-worker workspace")));
    house.socket().delete(&format!("/v1/instances/{id}")).expect(200);
    house.assert_no_trace(&id, &processes);
    assert!(folder.at("clone/f20").exists());
}

/// What is told is seen within this; what is only looked at anew, not within thrice that.
const TOLD: Duration = Duration::from_secs(20);

#[test]
fn a_machine_is_told_of_the_hosts_changes() {
    let house = House::new(SETTINGS);
    let folder = Folder::new();
    fs::create_dir_all(folder.at("sub/deep")).unwrap();
    for name in ["kept", "changed", "replaced", "removed", "sub/deep/file"] {
        folder.write(name, "before");
    }
    let id = start(&house, &folder.path(), json!({}));
    // All of it is known inside, and what is not there, too. One of them stays open.
    let known = "cd /workspace; cat kept changed replaced removed sub/deep/file > /dev/null
        stat kept changed replaced removed sub/deep/file > /dev/null; test ! -e new
        mkfifo /root/go; (setsid sh -c 'exec 3<replaced; read go < /root/go; cat <&3 > /root/old' \
            > /dev/null 2>&1 &)";
    house.ok(&id, known);
    let all = || {
        let show = "cd /workspace; for f in kept changed replaced removed new sub/deep/file moved/deep/file
            do echo $f $(cat $f 2>/dev/null || echo none); done; stat -c %a kept";
        house.ok(&id, show)
    };
    let before = all();
    assert!(
        before.contains(
            "changed before
"
        ) && before.contains("moved/deep/file none"),
        "{before}"
    );
    folder.write("changed", "after!");
    folder.write("beside", "another");
    fs::rename(folder.at("beside"), folder.at("replaced")).unwrap();
    fs::remove_file(folder.at("removed")).unwrap();
    folder.write("new", "new");
    fs::rename(folder.at("sub"), folder.at("moved")).unwrap();
    fs::set_permissions(folder.at("kept"), fs::Permissions::from_mode(0o640)).unwrap();
    wait_until("all of it is seen", TOLD, || {
        let now = all();
        let seen = [
            "kept before",
            "changed after!",
            "replaced another",
            "removed none",
            "new new",
            "sub/deep/file none",
            "moved/deep/file before",
            "640",
        ];
        now.lines().collect::<Vec<_>>() == seen
    });
    // Who had the old one open still has it.
    house.ok(&id, "echo > /root/go; until [ -s /root/old ]; do sleep 0.1; done");
    assert_eq!(house.ok(&id, "cat /root/old"), "before");

    // Both sides append, in turns, and each sees at once what the other wrote.
    for turn in 0..10 {
        house.ok(&id, &format!("echo inside {turn} >> /workspace/log"));
        let mut log = fs::File::options().append(true).open(folder.at("log")).unwrap();
        writeln!(log, "outside {turn}").unwrap();
        wait_until("the host's line is seen", TOLD, || {
            house.ok(&id, "tail -n 1 /workspace/log") == format!("outside {turn}")
        });
    }
    let lines: Vec<String> =
        (0..10).flat_map(|i| [format!("inside {i}"), format!("outside {i}")]).collect();
    assert_eq!(folder.read("log").lines().collect::<Vec<_>>(), lines);
    // What is emptied inside is emptied outside, also while it is open there.
    house.ok(&id, "printf short > /workspace/log; cd /workspace; exec 3<>log; printf S >&3");
    assert_eq!(folder.read("log"), "Short");

    // More than anybody is told of one by one.
    let many = |text: &str| {
        for i in 0..5000 {
            folder.write(&format!("moved/{i}"), text);
        }
    };
    many("1");
    let read = "cd /workspace/moved; ls | wc -l; cat 0 77 4999";
    assert_eq!(house.ok(&id, read), "5001\n111");
    many("22");
    fs::remove_file(folder.at("moved/5")).unwrap();
    wait_until("the last are seen", TOLD, || house.ok(&id, read) == "5000\n222222");
}

#[test]
fn a_machine_that_sleeps_wakes_with_its_files_open() {
    let house = House::new("[idle]\nsuspend_after_secs = 1\n[rate_limit]\nper_second = 0\n");
    let folder = Folder::new();
    let id = start(&house, &folder.path(), json!({}));
    // A writer without end, a file that is open without a name, and a reader in the middle of one.
    folder.write("long", "first\nsecond\nthird\n");
    house.ok(
        &id,
        "cd /workspace; mkfifo /root/go
         (setsid sh -c 'echo $$ > /root/writer; i=0
            while :; do i=$((i+1)); echo $i; done >> log' > /dev/null 2>&1 &)
         (setsid sh -c 'exec 3<>nameless 4<long; echo kept >&3; rm nameless; read line <&4
            echo ready > /root/ready; read go < /root/go
            cat /proc/self/fd/3 > again; cat <&4 >> again; echo after > new; echo done > /root/done' > /dev/null 2>&1 &)
         until [ -e /root/ready ]; do sleep 0.1; done",
    );
    let count = || folder.read("log").lines().count();
    wait_until("it writes", Duration::from_secs(30), || count() > 20);
    house.socket().act(&format!("/v1/instances/{id}/pause")).expect(200);
    let memory = house.home().join("run").join(&id).join("memory");
    wait_until("its memory is on disk", Duration::from_secs(60), || memory.exists());
    wait_until("its process is gone", Duration::from_secs(60), || {
        house.machine_processes().iter().all(|p| !p.command.contains("qemu"))
    });
    let asleep = count();
    folder.write("while-it-slept", "news");
    house.socket().act(&format!("/v1/instances/{id}/resume")).expect(200);
    wait_until("it writes on", Duration::from_secs(60), || count() > asleep + 20);
    house.ok(
        &id,
        "echo > /root/go; until [ -e /root/done ]; do sleep 0.1; done; kill $(cat /root/writer)",
    );
    assert_eq!(folder.read("again"), "kept\nsecond\nthird\n");
    assert_eq!(folder.read("new"), "after\n");
    assert_eq!(house.ok(&id, "cat /workspace/while-it-slept"), "news");
    // Not a line is lost, and none came twice.
    let log = folder.read("log");
    for (i, line) in log.lines().enumerate() {
        assert_eq!(line, (i + 1).to_string());
    }

    // A daemon that dies is nothing to it; a server that dies is replaced, and what was open says so.
    house.ok(&id, "cd /workspace; (setsid sh -c 'exec 3>>held; sleep infinity' > /dev/null 2>&1 &); until [ -e held ]; do sleep 0.1; done");
    let server = || {
        let all = house.machine_processes();
        all.into_iter().find(|p| p.command.contains("aegis-worker workspace")).map(|p| p.pid)
    };
    // In the middle of much that is said.
    house.ok(
        &id,
        "(setsid sh -c 'while :; do dd if=/dev/zero of=/workspace/zeros bs=1M count=8; done' \
        > /dev/null 2>&1 &)",
    );
    wait_until("it writes", Duration::from_secs(20), || folder.at("zeros").exists());
    let first = server().unwrap();
    kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
    wait_until("there is another one", Duration::from_secs(20), || {
        server().is_some_and(|pid| pid != first)
    });
    wait_until("it is mounted again", Duration::from_secs(20), || {
        house.sh(&id, "cat /workspace/new").text() == "after"
    });
    house.ok(&id, "echo again > /workspace/new");
    assert_eq!(folder.read("new"), "again\n");
}

#[test]
fn children_get_what_their_parent_may_give() {
    let house = House::new(SETTINGS);
    let folder = Folder::new();
    let other = Folder::new();
    other.write("for-children", "given");
    symlink(other.dir.path(), other.at("link")).unwrap();
    let mut may = rights(1);
    may["allowed_workspaces"] = json!([format!("{}/**", other.path()), other.path()]);
    let more = json!({"handle": "bot", "capabilities": may,
        "envelope": {"vcpus": 8, "memory_mb": 2048, "disk_gb": 4}});
    let bot = start(&house, &folder.path(), more);
    house
        .ok(&bot, "mkdir -p /workspace/sub; echo up > /workspace/top; ln -s / /workspace/sub/root");
    let spawn = |workspace: &str| {
        let ask = body(workspace, json!({}));
        curl(&house, &bot, &format!("-X POST {API}/v1/instances -d '{ask}'"))
    };
    let spawned = |workspace: &str| {
        let (status, child) = spawn(workspace);
        assert_eq!(status, 201, "{child}");
        let id = child["id"].as_str().unwrap().to_owned();
        house.until_instance(&id, "running");
        id
    };
    let ended = |id: &str| {
        let (status, body) = curl(&house, &bot, &format!("-X DELETE {API}/v1/instances/{id}"));
        assert_eq!(status, 200, "{body}");
    };

    // A part of its own: what lies beside it is not there, and each sees what the other writes.
    let child = spawned("/workspace/sub");
    assert_eq!(house.ok(&child, "ls /workspace; readlink /workspace/root"), "root\n/");
    house.ok(&child, "echo from-child > /workspace/a");
    wait_until("its parent sees it", Duration::from_secs(20), || {
        house.sh(&bot, "cat /workspace/sub/a").text() == "from-child"
    });
    assert_eq!(house.ok(&child, "cat /workspace/../top 2>/dev/null || echo none"), "none");
    ended(&child);

    // A folder of the host that is allowed; read only, if that is asked for.
    let child = spawned(&format!("{}:ro", other.path()));
    assert_eq!(house.ok(&child, "cat /workspace/for-children"), "given");
    let ran = house.sh(
        &child,
        "echo x > /workspace/new; mount -o remount,rw /workspace; \
        echo x > /workspace/new; rm /workspace/for-children; chmod 0 /workspace/for-children",
    );
    assert_ne!(ran.code, Some(0));
    assert_eq!(other.read("for-children"), "given");
    assert!(!other.at("new").exists());
    ended(&child);

    // All else is refused, and says which rule it was.
    for denied in [
        "/etc".to_owned(),
        "/".to_owned(),
        folder.path(),
        format!("{}x", other.path()),
        format!("{}/../secret", other.path()),
        format!("{}/link", other.path()),
        "../etc".to_owned(),
        "notes".to_owned(),
        house.home().to_str().unwrap().to_owned(),
    ] {
        let (status, answer) = spawn(&denied);
        assert_eq!(
            (status, &answer["rule"]),
            (403, &json!("allowed_workspaces")),
            "{denied}: {answer}"
        );
    }
    for (bad, why) in [("/workspace/sub/root/etc", "out"), ("/workspace/none", "nothing")] {
        let (status, answer) = spawn(bad);
        assert_eq!((status, &answer["field"]), (400, &json!("workspace")), "{why}: {answer}");
    }
}

#[test]
fn commits_hold_no_workspace() {
    let house = House::new(SETTINGS);
    let folder = Folder::new();
    let other = Folder::new();
    other.write("name", "other");
    let web = start(&house, &folder.path(), json!({"handle": "web"}));
    // Somebody is always in the middle of a request.
    house.ok(
        &web,
        "cd /workspace; (setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i >> /root/beats
            echo $i >> log || echo lost > /root/lost; done' > /dev/null 2>&1 &)",
    );
    let lines = || fs::read_to_string(folder.at("log")).unwrap_or_default().lines().count();
    wait_until("it writes", Duration::from_secs(30), || lines() > 20);
    house.socket().post("/v1/instances/web/commit", &json!({"name": "kept"})).expect(201);
    let then = lines();
    wait_until("it writes on", Duration::from_secs(60), || lines() > then + 20);
    assert_ne!(house.sh(&web, "cat /root/lost").code, Some(0));

    // Without one, the folder is nobody's any more; with another one, that is there.
    let goes_on = |body: Value| {
        let made = house.socket().post("/v1/instances", &body).expect(201);
        let id = made["id"].as_str().unwrap().to_owned();
        house.until_instance(&id, "running");
        house.ok(&id, "until [ -e /root/lost ]; do sleep 0.1; done");
        id
    };
    let bare = goes_on(json!({"commit": "kept"}));
    assert_ne!(house.sh(&bare, "mountpoint -q /workspace").code, Some(0));
    assert_ne!(house.sh(&bare, "cat /workspace/log").code, Some(0));
    let moved = goes_on(json!({"commit": "kept", "workspace": other.path()}));
    assert_eq!(house.ok(&moved, "cat /workspace/name"), "other");
    house.ok(&moved, "echo x > /workspace/x");
    assert_eq!(other.read("x"), "x\n");
    // The numbers in the log are one machine's.
    house.socket().delete(&format!("/v1/instances/{web}")).expect(200);
    let log = folder.read("log");
    for (i, line) in log.lines().enumerate() {
        assert_eq!(line, (i + 1).to_string());
    }
}

#[test]
fn what_a_machine_adds_counts_against_its_disk() {
    let house = House::new(SETTINGS);
    let folder = Folder::new();
    let id = start(&house, &folder.path(), json!({"disk_gb": 0.1}));
    let full = "dd if=/dev/zero of=/workspace/big bs=1M count=120 2>&1; ls /workspace/big";
    let ran = house.sh(&id, full);
    assert!(ran.text().contains("No space left on device"), "{ran:?}");
    let taken = fs::metadata(folder.at("big")).unwrap().blocks() * 512;
    assert!((50 << 20..100_000_000).contains(&taken), "{taken}");
    // It is measured, too, and its own disk goes on.
    house.ok(&id, "echo x > /root/own; sync");
    wait_for("its usage says so", Duration::from_secs(20), || {
        let info = house.socket().get(&format!("/v1/instances/{id}")).expect(200);
        (info["usage"]["disk_bytes"].as_u64()? >= taken).then_some(())
    });
    // What a name or a few bytes need is not there for long either.
    let rest = "i=0; while [ $i -lt 500 ] && head -c 4096 /dev/zero >> /workspace/small; do \
        i=$((i+1)); done 2> /dev/null; test $i -lt 500";
    house.ok(&id, rest);
    // A start anew gives nothing more; room that is given back does.
    house.socket().act(&format!("/v1/instances/{id}/restart")).expect(200);
    house.until_instance(&id, "running");
    let ran = house.sh(&id, "dd if=/dev/zero of=/workspace/more bs=1M count=10 2>&1");
    assert!(ran.text().contains("No space left on device"), "{ran:?}");
    house.ok(&id, "rm /workspace/big; dd if=/dev/zero of=/workspace/more bs=1M count=10 2>&1");
    assert_eq!(fs::metadata(folder.at("more")).unwrap().len(), 10 << 20);
}

#[test]
fn named_ones_are_the_homes_and_the_home_is_nobodys() {
    let house = House::new(SETTINGS);
    let socket = house.socket();
    let folder = Folder::new();
    let refused = |place: &str| {
        socket.post("/v1/instances", &body(place, json!({}))).refused(400, "workspace");
    };
    let home = house.home().to_str().unwrap();
    for place in [
        "/",
        "/tmp",
        home,
        &format!("{home}/data"),
        &format!("{home}/workspaces"),
        "..",
        "a b",
        "./x",
        "/nowhere/at/all",
        "",
    ] {
        refused(place);
    }
    folder.write("file", "x");
    refused(folder.at("file").to_str().unwrap());
    symlink(home, folder.at("home")).unwrap();
    refused(folder.at("home").to_str().unwrap());

    // One machine makes it, another finds what it left.
    let all = || socket.get("/v1/workspaces").expect(200)["workspaces"].clone();
    assert_eq!(all(), json!([]));
    let id = start(&house, "notes", json!({}));
    house.ok(&id, "echo left > /workspace/note");
    let one = all()[0].clone();
    assert_eq!(
        (&one["name"], &one["used_by"], &one["files"]),
        (&json!("notes"), &json!([id]), &json!(1))
    );
    let path = PathBuf::from(one["path"].as_str().unwrap());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    let used = socket.delete("/v1/workspaces/notes").expect(409);
    assert_eq!(used["code"], "workspace_in_use");
    socket.delete(&format!("/v1/instances/{id}")).expect(200);
    let id = start(&house, "notes", json!({}));
    assert_eq!(house.ok(&id, "cat /workspace/note"), "left");

    // A folder that is gone at the start, or has become a link, is missed by name.
    socket.act(&format!("/v1/instances/{id}/stop")).expect(200);
    let gone = start(&house, &folder.path(), json!({}));
    socket.act(&format!("/v1/instances/{gone}/stop")).expect(200);
    fs::rename(folder.at(""), folder.dir.path().join("moved")).unwrap();
    symlink(folder.dir.path().join("moved"), folder.dir.path().join("lent")).unwrap();
    socket.act(&format!("/v1/instances/{gone}/start")).expect(200);
    let said = wait_for("it says why", Duration::from_secs(60), || {
        let now = socket.get(&format!("/v1/instances/{gone}")).expect(200);
        now["error"].as_str().map(str::to_owned)
    });
    assert!(said.contains("workspace") && said.contains("lent"), "{said}");
    assert!(look::processes().iter().all(|p| !p.command.contains("workspace gone")));

    // Removed, with all that is in it, by its name.
    socket.delete(&format!("/v1/instances/{id}")).expect(200);
    socket.delete("/v1/workspaces/notes").expect(200);
    let absent = socket.delete("/v1/workspaces/notes").expect(404);
    assert_eq!(absent["code"], "workspace_not_found");
    assert!(!path.exists());
}
