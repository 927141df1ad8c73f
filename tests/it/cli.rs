//! The program `aegis`, end to end against a real daemon (contracts/aegis.md 1). What a daemon may
//! say, and what the program makes of it, is tested beside it; here both are real. A boot costs
//! seconds, so one house serves many commands.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use aegis_tests::house::{House, MANUAL};
use aegis_tests::wait_until;
use serde_json::{Value, json};

/// How one command went.
pub(super) struct Said {
    command: String,
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    fn of(command: String, output: Output) -> Said {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        Said { command, code: output.status.code(), out, err }
    }

    /// Its standard output, of a command that must end well.
    #[track_caller]
    pub(super) fn good(self) -> String {
        assert_eq!(self.code, Some(0), "{}: {}{}", self.command, self.out, self.err);
        self.out
    }

    /// Its standard output as JSON, of a command that must end well.
    #[track_caller]
    pub(super) fn json(self) -> Value {
        let command = self.command.clone();
        let out = self.good();
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{command}: {e}: {out}"))
    }

    /// Its words, of a command that must end with this code and say all of these.
    #[track_caller]
    pub(super) fn bad(self, code: i32, words: &[&str]) -> String {
        assert_eq!(self.code, Some(code), "{}: {}{}", self.command, self.out, self.err);
        for word in words {
            assert!(self.err.contains(word), "{}: no {word:?} in {}", self.command, self.err);
        }
        self.err
    }
}

/// The program, as the host of a home.
pub(super) fn program(home: &Path) -> Command {
    let mut command = Command::new(aegis_tests::programs().join("aegis"));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("AEGIS_HOME", home).env("AEGIS_SPARES", "0").env("USER", "noah");
    command
}

pub(super) fn aegis(home: &Path, args: &[&str]) -> Said {
    Said::of(args.join(" "), program(home).args(args).output().unwrap())
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name}: {value}"))
}

/// A daemon that the program itself started ends with the test, also with one that failed.
struct Down<'a>(&'a Path);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        let _ = program(self.0).arg("down").output();
    }
}

#[test]
fn invites_and_guests_are_led_from_the_command_line() {
    let house = House::new(MANUAL);
    let home = house.home();
    let aegis = |args: &[&str]| aegis(home, args);

    let made = aegis(&[
        "invite",
        "create",
        "--label",
        "for ty",
        "--cpus",
        "0.5",
        "--memory",
        "512M",
        "--disk",
        "2G",
        "--egress",
        "1G",
        "--hours",
        "1",
        "--tokens",
        "1000",
        "--expires-in",
        "10m",
        "--internet",
        "no",
        "--on-limit",
        "kill",
        "--agent-port",
        "9000",
        "--json",
    ])
    .json();
    assert_eq!((text(&made, "createdBy"), text(&made, "label")), ("noah", "for ty"));
    assert_eq!(
        made["resourceLimits"],
        json!({"maxCpuCores": 0.5, "maxMemoryMB": 512, "maxDiskGB": 2, "maxNetworkEgressGB": 1,
               "maxDurationHours": 1, "maxTokenBudget": 1000})
    );
    assert_eq!(made["permissions"]["canAccessInternet"], false);
    let code = text(&made, "code").to_owned();
    let words = aegis(&["invite", "create", "--by", "ty", "--label", "spare"]).good();
    assert!(words.contains("inv_") && words.contains("spare"), "{words}");

    let list = aegis(&["invite", "list", "--json"]).json();
    assert_eq!(list["count"], 2);
    let table = aegis(&["invite", "ls", "--status", "active"]).good();
    assert!(table.starts_with("ID ") && table.contains("for ty") && table.lines().count() == 3);
    aegis(&["invite", "list", "--status", "gone"]).bad(2, &["active", "redeemed"]);
    let spare = text(&list["invites"][0], "id").to_owned();
    assert!(aegis(&["invite", "revoke", &spare]).good().contains("revoked"));
    aegis(&["invite", "revoke", &spare])
        .bad(1, &["cannot revoke invite with status 'revoked'", "invite_state", "400"]);
    aegis(&["invite", "revoke", "nobody"]).bad(1, &["invite not found"]);
    aegis(&["invite", "create", "--memory", "1M"]).bad(1, &["maxMemoryMB", "allowed: ", "128"]);
    aegis(&["invite", "create", "--memory", "much"]).bad(2, &["--memory"]);
    aegis(&["invite", "create", "--hours", "0"]).bad(1, &["maxDurationHours", "720"]);

    // Waiting ends when somebody made the machine.
    let guest = std::thread::scope(|scope| {
        let waits = scope.spawn(|| aegis(&["redeem", &code, "--name", "ty", "--wait", "--json"]));
        let mut id = String::new();
        wait_until("the code is redeemed", Duration::from_secs(20), || {
            let list = aegis(&["guest", "list", "--json"]).json();
            id = list["guests"][0]["id"].as_str().unwrap_or_default().to_owned();
            !id.is_empty()
        });
        let vm = ["--vm-id", "vm-1", "--agent-endpoint", "http://127.0.0.1:9"];
        let active = aegis(&[&["guest", "activate", &id][..], &vm].concat()).good();
        assert!(active.contains("running") && active.contains("vm-1"), "{active}");
        waits.join().unwrap().json()
    });
    assert_eq!(guest["status"]["status"], "running");
    let id = text(&guest["redeemed"], "guestId");
    assert!(text(&guest["redeemed"], "authToken").starts_with("guest_"));
    aegis(&["redeem", &code, "--name", "me too"]).bad(1, &["already_redeemed", "409"]);
    aegis(&["redeem", "inv_x", "--name", "me too"]).bad(1, &["unknown", "404"]);
    aegis(&["redeem", &code]).bad(2, &["--name"]);

    // A code comes by standard input too, and a key from a file.
    let code = text(&aegis(&["invite", "create", "--json"]).json(), "code").to_owned();
    let key = home.join("key.pub");
    std::fs::write(&key, "not a key\n").unwrap();
    let key = key.to_str().unwrap();
    aegis(&["redeem", &code, "--name", "x", "--public-key-file", key]).bad(1, &["publicKey"]);
    aegis(&["redeem", &code, "--name", "x", "--public-key-file", "/no/such"])
        .bad(1, &["cannot read /no/such"]);
    let mut child = program(home)
        .args(["redeem", "-", "--name", "by pipe"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(format!("{code}\n").as_bytes()).unwrap();
    let words = Said::of("redeem -".to_owned(), child.wait_with_output().unwrap()).good();
    assert!(words.contains("guest_") && words.contains("provisioning"), "{words}");

    let status = aegis(&["guest", "status", id, "--json"]).json();
    assert_eq!(text(&status, "status"), "running");
    assert!(aegis(&["guest", "status", id]).good().contains("0.5 cores at most"));
    aegis(&["guest", "status", "nobody"]).bad(1, &["guest not found"]);
    let table = aegis(&["guest", "list", "--status", "running"]).good();
    assert!(table.contains(id) && table.lines().count() == 2, "{table}");
    assert_eq!(aegis(&["guest", "freeze", id]).good(), "frozen\n");
    aegis(&["guest", "freeze", id]).bad(1, &["guest_state"]);
    assert_eq!(aegis(&["guest", "thaw", id]).good(), "running\n");
    let killed = aegis(&["guest", "kill", id]).good();
    assert!(killed.contains("revoked") && killed.contains("Receipt hash"), "{killed}");
    aegis(&["guest", "kill", id]).bad(1, &["guest already revoked"]);
    // With --json an error is JSON, on standard error.
    let said = aegis(&["--json", "guest", "kill", id]).bad(1, &[]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["error"], "guest already revoked");

    // Over TCP: with the token of the home, of the environment, or none.
    let url = format!("http://{}", house.address());
    assert_eq!(aegis(&["--url", &url, "guest", "list", "--json"]).json()["count"], 2);
    let empty = tempfile::tempdir().unwrap();
    let remote = |token: Option<&str>| {
        let mut command = program(empty.path());
        command.args(["--url", &url, "guest", "list", "--json"]);
        if let Some(token) = token {
            command.env("AEGIS_TOKEN", token);
        }
        Said::of("guest list, from afar".to_owned(), command.output().unwrap())
    };
    remote(None).bad(1, &["AEGIS_TOKEN"]);
    remote(Some("wrong")).bad(1, &["unauthorized"]);
    assert_eq!(remote(Some(&house.token())).json()["count"], 2);
}

#[test]
fn the_daemon_is_started_and_stopped_from_the_command_line() {
    let home = tempfile::Builder::new().prefix("aegis-it-").tempdir_in("/tmp").unwrap();
    let home = home.path();
    std::fs::write(home.join("aegis.toml"), MANUAL).unwrap();
    let aegis = |args: &[&str]| aegis(home, args);
    // Without a daemon each command says how to get one.
    for args in [
        &["status"][..],
        &["guest", "list"],
        &["instance", "list"],
        &["redeem", "x", "--name", "y"],
    ] {
        aegis(args).bad(1, &["aegisd does not run", "fix: start it: aegis up"]);
    }
    assert_eq!(aegis(&["down"]).good(), "");
    aegis(&["down", "--all"]).bad(1, &["fix: aegis up, then aegis down --all"]);

    let _down = Down(home);
    let up = aegis(&["up", "--listen", "127.0.0.1:0"]);
    let url = up.good().trim().to_owned();
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    let again = aegis(&["up", "--json"]);
    assert!(again.err.contains("runs already"), "{}", again.err);
    assert_eq!(again.json()["url"], url);
    let status = aegis(&["status"]).good();
    assert!(status.contains(&url) && status.contains("manual"), "{status}");
    assert_eq!(aegis(&["status", "--json"]).json()["provisioner"], "manual");
    // A second one cannot have its address, and says what can be done.
    let other = tempfile::Builder::new().prefix("aegis-it-").tempdir_in("/tmp").unwrap();
    let taken = url.strip_prefix("http://").unwrap();
    std::fs::write(other.path().join("aegis.toml"), MANUAL).unwrap();
    let refused = program(other.path()).args(["up", "--listen", taken]).output().unwrap();
    Said::of("up, twice".to_owned(), refused).bad(1, &["--listen", "fix: "]);
    std::fs::write(other.path().join("aegis.toml"), "provisioner = \"nobody\"\n").unwrap();
    let refused = program(other.path()).arg("up").output().unwrap();
    Said::of("up, badly set".to_owned(), refused).bad(1, &["provisioner", "fix: "]);

    assert_eq!(aegis(&["down", "--json"]).json()["running"], false);
    aegis(&["status"]).bad(1, &["aegis up"]);
    assert!(!home.join("data/aegisd.pid").exists());

    // What makes no sense is a wrong invocation, whatever runs.
    for args in [
        &[][..],
        &["nothing"],
        &["guest"],
        &["up", "--listen"],
        &["up", "--url", "http://127.0.0.1:1"],
        &["down", "--url", "http://127.0.0.1:1"],
        &["--url", "https://localhost", "status"],
        &["--url", "localhost:3000", "status"],
        &["exec", "web", "ls"],
        &["instance", "start"],
        &["completion", "tcsh"],
    ] {
        aegis(args).bad(2, &[]);
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = aegis(&["completion", shell]).good();
        for word in ["aegis", "invite", "redeem", "prune"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    assert!(aegis(&["--help"]).good().contains("aegis redeem inv_"));
    for command in ["setup", "up", "run", "exec", "logs", "redeem"] {
        assert!(aegis(&[command, "--help"]).good().contains("Examples:"), "{command}");
    }
    assert!(aegis(&["--version"]).good().starts_with("aegis "));
}

#[test]
fn machines_are_led_from_the_command_line() {
    const SMALL: [&str; 6] = ["--memory", "256M", "--cpus", "1", "--disk", "300M"];
    let house = House::new("[images]\npull = 'never'\n[rate_limit]\nper_second = 0\n");
    let home = house.home();
    let aegis = |args: &[&str]| aegis(home, args);
    let with = |head: &[&str], tail: &[&str]| aegis(&[head, &SMALL, tail].concat());

    // A machine for one command: its streams, its exit code, and nothing of it stays.
    let ran =
        with(&["run", "--env", "WHO=me"], &["--", "sh", "-c", "echo $WHO; echo e >&2; exit 3"]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (Some(3), "me\n", "e\n"));
    let ran = with(&["run", "--json"], &["--", "echo", "out"]);
    assert!(ran.err.contains("out"), "{}", ran.err);
    assert_eq!(ran.json()["exit_code"], 0);
    assert_ne!(with(&["run"], &["--", "/no/such/program"]).code, Some(0));
    aegis(&["run", "--image", "none", "--", "true"]).bad(1, &["none", "aegis image pull"]);
    assert_eq!(aegis(&["instance", "list", "--json"]).json(), json!([]));

    let serve = ["--", "python3", "-u", "-m", "http.server", "8080"];
    let started = with(&["instance", "start", "--name", "web", "--expose", "8080"], &serve).good();
    let id = started.lines().next().unwrap().strip_prefix("Instance started: ").unwrap();
    assert_eq!(started, format!("Instance started: {id}\nHandle: web\n"));
    with(&["instance", "start", "--name", "web"], &serve).bad(1, &["handle_taken"]);

    let exec = |args: &[&str]| aegis(&[&["exec", "web"], args].concat());
    let ran = exec(&["--", "sh", "-c", "printf 'a\\nb'; printf no >&2; exit 42"]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (Some(42), "a\nb", "no"));
    let ran = exec(&["--env", "A=b c", "--cwd", "/tmp", "--", "sh", "-c", "echo $A $PWD"]);
    assert_eq!(ran.good(), "b c /tmp\n");
    assert_eq!(exec(&["--", "sh", "-c", "kill -9 $$"]).code, Some(137));
    let late = exec(&["--timeout", "1s", "--", "sleep", "60"]);
    assert!(late.code != Some(0) && late.err.contains("deadline"), "{:?} {}", late.code, late.err);
    assert_ne!(exec(&["--", "/no/such/program"]).code, Some(0));
    let lines = exec(&["--json", "--", "echo", "hi"]).good();
    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!((&last["done"], &last["exit_code"]), (&json!(true), &json!(0)));

    let info = aegis(&["instance", "info", "web", "--json"]).json();
    assert_eq!((text(&info, "id"), text(&info, "state")), (id, "running"));
    let url = text(&info["endpoints"][0], "url").to_owned();
    let words = aegis(&["instance", "info", id]).good();
    assert!(words.contains(&url) && words.contains("256 MB memory"), "{words}");
    let table = aegis(&["instance", "ls", "--state", "running"]).good();
    assert!(table.contains("python3 -u -m http.server 8080"), "{table}");
    aegis(&["instance", "list", "--state", "odd"]).bad(2, &["running"]);
    aegis(&["instance", "info", "nobody"]).bad(1, &["instance_not_found", "404"]);

    // Its log: what the primary process said, and what execs said.
    wait_until("the server says that it serves", Duration::from_secs(60), || {
        aegis(&["logs", "web"]).good().contains("Serving HTTP")
    });
    let logs = aegis(&["logs", "web", "--tail", "1", "--json"]).good();
    let entry: Value = serde_json::from_str(logs.trim()).unwrap();
    assert_eq!(entry["instance_id"], id);
    let by_exec = aegis(&["logs", "web", "--exec", text(&last, "exec_id")]).good();
    assert_eq!(by_exec, "hi\n");
    assert_eq!(aegis(&["logs", "web", "--since", "2100-01-01T00:00:00Z"]).good(), "");
    aegis(&["logs", "web", "--since", "some day"]).bad(2, &["--since"]);
    aegis(&["logs", "nobody"]).bad(1, &["instance_not_found"]);

    assert_eq!(aegis(&["instance", "pause", "web"]).good(), "paused\n");
    assert_eq!(aegis(&["instance", "resume", "web"]).good(), "running\n");
    exec(&["--", "sh", "-c", "echo kept > /root/kept"]).good();
    assert_eq!(aegis(&["instance", "restart", "web"]).good(), "restarting\n");
    assert_eq!(exec(&["--", "cat", "/root/kept"]).good(), "kept\n");
    // Whoever follows hears the end.
    std::thread::scope(|scope| {
        let follows = scope.spawn(|| aegis(&["logs", "web", "--follow", "--tail", "1"]));
        assert_eq!(aegis(&["instance", "stop", "web"]).good(), "stopped\n");
        follows.join().unwrap().good();
    });
    exec(&["--", "true"]).bad(1, &["instance_state", "409"]);
    assert_eq!(
        aegis(&["instance", "start", "web"]).good(),
        format!("Instance started: {id}\nHandle: web\n")
    );
    assert_eq!(exec(&["--", "cat", "/root/kept"]).good(), "kept\n");
    assert_eq!(aegis(&["instance", "disable", "web"]).good(), "disabled\n");
    assert!(aegis(&["instance", "prune"]).good().contains("0 pruned"));
    aegis(&["instance", "prune", "--older-than", "soon"]).bad(2, &["--older-than"]);
    let pruned = aegis(&["instance", "prune", "--older-than", "0s", "--json"]).json();
    assert_eq!(pruned["ids"], json!([id]));

    // A guest's machine, and its end.
    let code = with(&["invite", "create", "--json"], &[]).json();
    let guest = aegis(&["redeem", text(&code, "code"), "--name", "ty", "--wait", "--json"]).json();
    let machine = text(&guest["status"], "vmId");
    assert!(!aegis(&["exec", machine, "--", "hostname"]).good().trim().is_empty());
    aegis(&["instance", "delete", machine]).bad(1, &["409", "kill the guest"]);
    let guest = text(&guest["redeemed"], "guestId");
    assert_eq!(aegis(&["guest", "freeze", guest]).good(), "frozen\n");
    let killed = aegis(&["guest", "kill", guest, "--json"]).json();
    let verified = &killed["receipt"]["machines"][0]["verified"];
    assert_eq!(*verified, json!(["process", "cgroup", "network", "disk"]));

    // The daemon ends and machines go on; the next one finds them; --all ends them too.
    let sleep = ["--", "sleep", "infinity"];
    with(&["instance", "start", "--name", "nap"], &sleep).good();
    let boot = ["exec", "nap", "--", "cat", "/proc/sys/kernel/random/boot_id"];
    let boot_id = aegis(&boot).good();
    let _down = Down(home);
    assert_eq!(aegis(&["down"]).good(), "");
    assert!(house.machine_processes().iter().any(|p| p.command.contains("qemu")));
    aegis(&["up", "--listen", "127.0.0.1:0"]).good();
    assert_eq!(aegis(&boot).good(), boot_id);
    let down = aegis(&["down", "--all", "--json"]).json();
    assert_eq!(down["stopped"].as_array().unwrap().len(), 1, "{down}");
    assert_eq!(house.machine_processes(), vec![]);
    aegis(&["up", "--listen", "127.0.0.1:0"]).good();
    assert_eq!(text(&aegis(&["instance", "info", "nap", "--json"]).json(), "state"), "stopped");
    assert_eq!(aegis(&["instance", "rm", "nap"]).good(), "nap: deleted\n");
}
