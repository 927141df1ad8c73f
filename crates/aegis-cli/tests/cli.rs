//! The program as a process, against a daemon that says what a test tells it to say.
#![allow(clippy::unwrap_used, reason = "a test: what goes wrong here should end it")]

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

const INSTANCE: &str = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV";

/// One request as the daemon saw it.
#[derive(Clone, Debug)]
struct Asked {
    line: String,
    headers: String,
    body: Value,
}

/// What the daemon says to the next request; nothing = it hangs up.
type Answer = Option<(u16, String)>;

struct Daemon {
    home: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Daemon {
    fn saying(answers: Vec<Answer>) -> Daemon {
        let home = tempfile::Builder::new().prefix("aegis").tempdir().unwrap();
        let listener = UnixListener::bind(home.path().join("aegisd.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, mut answers) = (asked.clone(), VecDeque::from(answers));
        std::thread::spawn(move || {
            while let Some(answer) = answers.pop_front() {
                let Ok((stream, _)) = listener.accept() else { return };
                log.lock().unwrap().push(read(&stream));
                reply(stream, answer);
            }
        });
        Daemon { home, asked }
    }

    fn aegis(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_aegis"))
            .args(args)
            .env("AEGIS_HOME", self.home.path())
            .env_remove("AEGIS_URL")
            .env_remove("AEGIS_TOKEN")
            .output()
            .unwrap()
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

fn read(stream: &UnixStream) -> Asked {
    let mut reader = BufReader::new(stream);
    let (mut line, mut headers, mut length) = (String::new(), String::new(), 0);
    reader.read_line(&mut line).unwrap();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        if header.trim().is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        headers += &header;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Asked { line: line.trim().to_owned(), headers, body }
}

/// Answers in chunks of five bytes, as a network may.
fn reply(mut stream: UnixStream, answer: Answer) {
    let Some((status, body)) = answer else { return };
    let mut text = format!(
        "HTTP/1.1 {status} Word\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    .into_bytes();
    for piece in body.as_bytes().chunks(5) {
        text.extend(format!("{:x}\r\n", piece.len()).bytes());
        text.extend(piece);
        text.extend(b"\r\n");
    }
    text.extend(b"0\r\n\r\n");
    // A client that has what it wants may have left.
    let _ = stream.write_all(&text);
}

fn ok(body: Value) -> Answer {
    Some((200, body.to_string()))
}

fn entry(stream: &str, source: &str, line: &str, more: Value) -> Value {
    let mut entry = json!({ "ts": "2026-02-18T00:00:00.000Z", "stream": stream, "source": source,
        "line": line, "instance_id": INSTANCE });
    entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    entry
}

fn lines(lines: &[Value]) -> Answer {
    Some((200, lines.iter().map(|line| format!("{line}\n")).collect()))
}

#[test]
fn exec_passes_bytes_and_exit_code() {
    let daemon = Daemon::saying(vec![lines(&[
        json!({ "exec_id": "e", "started_at": "2026-02-18T00:00:00.000Z" }),
        entry("stdout", "exec", "one", json!({})),
        entry("stderr", "exec", "why", json!({})),
        entry("stdout", "exec", "?", json!({ "data_b64": "/wD+", "partial": true })),
        json!({ "exec_id": "e", "exit_code": 7, "done": true }),
    ])]);
    let args = ["exec", "web", "--env", "A=b=c", "--timeout", "1m", "--", "sh", "-c", "x"];
    let output = daemon.aegis(&args);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(output.stdout, b"one\n\xff\x00\xfe");
    assert_eq!(output.stderr, b"why\n");
    let asked = &daemon.asked()[0];
    assert_eq!(asked.line, "POST /v1/instances/web/exec HTTP/1.1");
    assert_eq!(
        asked.body,
        json!({ "command": ["sh", "-c", "x"], "env": { "A": "b=c" }, "timeout_secs": 60 })
    );
}

#[test]
fn an_exec_that_breaks_off_is_no_success() {
    let daemon = Daemon::saying(vec![lines(&[entry("stdout", "exec", "half", json!({}))])]);
    let output = daemon.aegis(&["exec", "web", "--", "true"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("ended before the command did"));
}

#[test]
fn run_shows_output_ends_alike_and_deletes() {
    let daemon = Daemon::saying(vec![
        Some((201, json!({ "id": INSTANCE, "state": "starting" }).to_string())),
        lines(&[
            entry("stdout", "server", "hello", json!({})),
            entry("stderr", "system", "process exited (code=3)", json!({})),
        ]),
        ok(json!({ "id": INSTANCE, "state": "running" })),
        ok(json!({ "id": INSTANCE, "state": "stopped", "exit": { "code": 3, "message": "m" } })),
        ok(json!({ "status": "deleted" })),
    ]);
    let output = daemon.aegis(&["run", "--memory", "1G", "--", "echo", "hello"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout, b"hello\n");
    let asked = daemon.asked();
    assert_eq!(asked[0].body, json!({ "command": ["echo", "hello"], "memory_mb": 1024 }));
    let last = asked.last().unwrap();
    assert_eq!(last.line, format!("DELETE /v1/instances/{INSTANCE} HTTP/1.1"));
}

#[test]
fn a_failed_boot_is_told_and_deleted() {
    let daemon = Daemon::saying(vec![
        Some((201, json!({ "id": INSTANCE, "state": "starting" }).to_string())),
        lines(&[]),
        ok(json!({ "id": INSTANCE, "state": "stopped", "error": "there is no kernel" })),
        ok(json!({ "status": "deleted" })),
    ]);
    let output = daemon.aegis(&["run", "--", "true"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no kernel"));
    assert_eq!(daemon.asked().len(), 4);
}

#[test]
fn interrupted_runs_leave_no_machine() {
    // Its log goes on for ever: the stream is held open by this pair.
    let home = tempfile::Builder::new().prefix("aegis").tempdir().unwrap();
    let listener = UnixListener::bind(home.path().join("aegisd.sock")).unwrap();
    let mut aegis = Command::new(env!("CARGO_BIN_EXE_aegis"))
        .args(["run", "--", "sleep", "infinity"])
        .env("AEGIS_HOME", home.path())
        .spawn()
        .unwrap();
    let (stream, _) = listener.accept().unwrap();
    read(&stream);
    reply(stream, Some((201, json!({ "id": INSTANCE }).to_string())));
    let (logs, _) = listener.accept().unwrap();
    read(&logs);
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&aegis),
        rustix::process::Signal::INT,
    )
    .unwrap();
    let (stream, _) = listener.accept().unwrap();
    assert!(read(&stream).line.starts_with("DELETE "));
    reply(stream, ok(json!({ "status": "deleted" })));
    assert_eq!(aegis.wait().unwrap().code(), Some(130));
}

#[test]
fn scripts_can_read_what_start_and_restart_say() {
    let daemon = Daemon::saying(vec![
        Some((201, json!({ "id": INSTANCE, "state": "starting", "handle": "web" }).to_string())),
        ok(json!({ "status": "starting" })),
    ]);
    let output = daemon.aegis(&["instance", "start", "--name", "web", "--", "sleep", "9"]);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("Instance started: {INSTANCE}\nHandle: web\n")
    );
    assert_eq!(daemon.aegis(&["instance", "restart", "web"]).stdout, b"restarting\n");
}

#[test]
fn a_redeem_whose_answer_got_lost_is_the_same_redeem() {
    let daemon = Daemon::saying(vec![
        None,
        Some((
            201,
            json!({ "guestId": "g", "status": "provisioning", "authToken": "guest_x" }).to_string(),
        )),
    ]);
    let output = daemon.aegis(&["redeem", "inv_x", "--name", "ty", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["authToken"], "guest_x");
    let keys: Vec<String> = daemon
        .asked()
        .iter()
        .map(|a| a.headers.lines().find(|h| h.starts_with("idempotency-key")).unwrap().to_owned())
        .collect();
    assert_eq!(keys.len(), 2);
    assert_eq!(keys[0], keys[1]);
}

#[test]
fn refusals_are_shown_with_code_and_hint() {
    let body = json!({ "error": "no such instance", "code": "instance_not_found", "hint": "list" });
    let answer = || Some((404, body.to_string()));
    let daemon = Daemon::saying(vec![answer(), answer()]);
    let output = daemon.aegis(&["instance", "info", "../x"]);
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains("error: no such instance"), "{words}");
    assert!(words.contains("instance_not_found") && words.contains("hint: list"), "{words}");
    assert_eq!(daemon.asked()[0].line, "GET /v1/instances/..%2Fx HTTP/1.1");
    let output = daemon.aegis(&["--json", "instance", "info", "x"]);
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error, body);
    assert!(output.stdout.is_empty());
}

#[test]
fn a_kit_becomes_a_machine_and_its_children_stand_below_it() {
    let list = json!([
        { "id": "inst-2", "parent_id": "inst-1", "handle": "kid", "state": "running" },
        { "id": "inst-1", "parent_id": "", "handle": "bot", "state": "running" },
    ]);
    let started = json!({ "id": "inst-1", "handle": "bot" });
    let there = json!({ "event": "done", "reference": "base", "bytes": 1 });
    let answers = [(200, there), (201, started), (200, list.clone()), (200, json!([list[0]]))];
    let daemon = Daemon::saying(answers.map(|(code, body)| Some((code, body.to_string()))).into());
    let kit = daemon.home.path().join("kit.toml");
    let text = "name = 'bot'\nimage = 'base'\ncommand = ['bot']\n[capabilities]\nspawn = true\n";
    std::fs::write(&kit, text).unwrap();
    let kit = kit.to_str().unwrap();
    let out = daemon.aegis(&["instance", "start", "--kit", kit, "--name", "bot"]);
    assert_eq!(out.stdout, b"Instance started: inst-1\nHandle: bot\n");
    let rows = String::from_utf8(daemon.aegis(&["instance", "list"]).stdout).unwrap();
    let rows: Vec<_> = rows.lines().collect();
    assert!(rows[1].starts_with("inst-1  -       bot"), "{rows:?}");
    assert!(rows[2].starts_with("inst-2  inst-1  \u{2514} kid"), "{rows:?}");
    daemon.aegis(&["instance", "list", "--parent", "bot", "--state", "running"]);
    let asked = daemon.asked();
    assert_eq!(asked[0].body, json!({ "image_ref": "base", "if_missing": true }));
    assert_eq!(
        asked[1].body,
        json!({ "kit": "bot", "handle": "bot", "image_ref": "base", "command": ["bot"],
            "capabilities": { "spawn": true } })
    );
    assert!(asked[3].line.contains("/v1/instances?state=running&parent_id=bot"));
    // Nothing is asked of the daemon when the kit is wrong.
    std::fs::write(kit, "name = 'bot'\ncomand = ['bot']\n").unwrap();
    let out = daemon.aegis(&["instance", "start", "--kit", kit]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("comand"));
    assert_eq!(daemon.asked().len(), 4);
}

#[test]
fn an_unverified_kill_is_no_success() {
    let killed = json!({ "id": "g", "status": "revoked", "stoppedAt": null, "destroying": true });
    let daemon = Daemon::saying(vec![Some((202, killed.to_string()))]);
    assert_eq!(daemon.aegis(&["guest", "kill", "g"]).status.code(), Some(1));
}
