//! A machine whose harness turns against its host over the control channel: garbage, lies, floods,
//! silence. Whatever it does, the daemon answers others, nothing of the host grows, and a kill is a
//! kill. The harness is `tests/hostile`; the daemon, the workers and the VMs are the real ones.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use aegis_tests::house::{House, Ran};
use aegis_tests::look::{self, Process};
use aegis_tests::pipes::flood;
use aegis_tests::{wait_for, wait_until};
use aegis_wire::bounds::{FILE_ENTRIES_MAX, LOG_FILE_MAX, STREAMS_MAX};
use hyper::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The most that the daemon or a worker may ever have had in memory, KiB.
const PEAK_MAX_KB: u64 = 200 * 1024;
/// Readers of a machine's log that do not read.
const READERS: usize = 20;
/// Longest reason that is told of a machine's end, bytes.
const REASON_MAX: usize = 4096;
/// What no machine may read or change.
const SECRET: &str = "the host's own";

/// A house where the harness can be exchanged. One machine has the real one: it is the neighbour,
/// that must never notice anything.
struct Street {
    house: House,
    programs: TempDir,
    neighbour: Process,
    boot_id: String,
}

impl Street {
    fn new(settings: &str) -> Street {
        let programs = tempfile::Builder::new().prefix("aegis-it-").tempdir_in("/tmp").unwrap();
        let real = aegis_tests::programs();
        for name in ["aegis-worker", "aegis-harness", "aegis-mcp-guest"] {
            symlink(real.join(name), programs.path().join(name)).unwrap();
        }
        let settings = format!(
            "{settings}[machines]\nprograms = \"{}\"\n[rate_limit]\nper_second = 0\n",
            programs.path().display()
        );
        let house = House::new(&settings);
        let body = json!({"handle": "neighbour", "command": ["sleep", "infinity"], "vcpus": 1,
                          "memory_mb": 256, "disk_gb": 0.3});
        house.socket().post("/v1/instances", &body).expect(201);
        let boot_id = house.sh("neighbour", "cat /proc/sys/kernel/random/boot_id").text();
        let worker = workers(&house).into_values().next().unwrap();
        let harness = programs.path().join("aegis-harness");
        std::fs::remove_file(&harness).unwrap();
        symlink(aegis_tests::hostile().join("aegis-hostile"), harness).unwrap();
        Street { house, programs, neighbour: worker, boot_id }
    }

    /// A machine with this handle, that misbehaves in this way once it runs.
    fn evil(&self, handle: &str, command: &str) -> String {
        let mut body = json!({"handle": handle, "command": [command], "vcpus": 0.25,
            "memory_mb": 128, "disk_gb": 0.02, "exposes": [1, 2, 3, 4, 5]});
        if command.starts_with("ws-") {
            body["workspace"] = json!(self.lent());
        }
        let made = self.house.socket().post("/v1/instances", &body).expect(201);
        made["id"].as_str().unwrap().to_owned()
    }

    /// A folder, beside a file that is nobody's business, and with a link to it.
    fn lent(&self) -> PathBuf {
        let lent = self.programs.path().join("lent");
        if !lent.exists() {
            std::fs::create_dir(&lent).unwrap();
            std::fs::write(self.programs.path().join("secret"), SECRET).unwrap();
            symlink("..", lent.join("out")).unwrap();
        }
        lent
    }

    /// The daemon does for others what it does on any day.
    fn assert_calm(&self) {
        let socket = self.house.socket();
        socket.get("/v1/status").expect(200);
        socket.get("/v1/instances").expect(200);
        self.house.invite(json!({}));
        let ran = self.house.sh("neighbour", "cat /proc/sys/kernel/random/boot_id");
        assert_eq!(ran.text(), self.boot_id, "the neighbour was moved");
    }

    /// Nobody grew, ever.
    fn assert_small(&self) {
        let mut peaks = BTreeMap::new();
        peaks.insert("aegisd".to_owned(), look::peak_kb(self.house.pid().as_raw_nonzero().get()));
        for (id, worker) in workers(&self.house) {
            peaks.insert(id, look::peak_kb(worker.pid));
        }
        let lenders = self.house.machine_processes();
        for lender in lenders.iter().filter(|p| p.command.contains("aegis-worker workspace")) {
            peaks.insert(format!("workspace of {}", lender.parent), look::peak_kb(lender.pid));
        }
        assert!(peaks.values().flatten().all(|kb| *kb <= PEAK_MAX_KB), "KiB: {peaks:?}");
    }

    fn delete(&self, id: &str) {
        let own = |p: &Process| p.command.contains(id);
        let mut before = self.house.machine_processes();
        before.retain(own);
        let path = format!("/v1/instances/{id}");
        assert_eq!(self.house.socket().delete(&path).expect(200)["status"], "deleted", "{id}");
        self.house.assert_no_trace(id, &before);
    }

    /// The end: it is the same daemon and the same neighbour as at the beginning.
    fn assert_untouched(self) {
        self.assert_calm();
        assert!(self.neighbour.lives());
        assert!(Process::of(self.house.pid().as_raw_nonzero().get()).is_some());
        drop(self.house);
        drop(self.programs);
    }
}

/// The machines' workers, by instance.
fn workers(house: &House) -> BTreeMap<String, Process> {
    let all = house.machine_processes();
    let workers = all.into_iter().filter(|p| p.command.contains(" machine "));
    workers
        .map(|p| (p.command.trim_end().rsplit('/').next().unwrap_or_default().to_owned(), p))
        .collect()
}

/// Waits until an instance runs, or has ended again.
fn began(house: &House, id: &str) -> Value {
    wait_for(&format!("{id} began"), Duration::from_secs(120), || {
        let now = house.socket().get(&format!("/v1/instances/{id}")).expect(200);
        (now["state"] != "starting").then_some(now)
    })
}

/// The reason of an end is told, and in few words.
fn assert_reason(now: &Value) {
    let reasons = [&now["exit"]["message"], &now["error"]];
    let said: Vec<&str> = reasons.iter().filter_map(|r| r.as_str()).collect();
    assert!(!said.is_empty() && said.iter().all(|r| r.len() <= REASON_MAX), "{now}");
}

#[test]
fn floods_and_silence_on_the_channel_harm_nobody_else() {
    let street = Street::new("");
    let house = &street.house;
    // The first of its kind makes the snapshot; a good one, to show that the rest is not refused
    // for a trifle.
    let good = street.evil("good", "polite");
    assert_eq!(began(house, &good)["state"], "running");
    // All at once on a small host would only show how slow it is.
    for group in GROUPS {
        let ids: Vec<String> = group.iter().map(|(mode, _)| street.evil(mode, mode)).collect();
        for id in &ids {
            began(house, id);
        }
        // What it is asked for must not hold up anybody either: nobody waits for the answers.
        let mut asks: Vec<UnixStream> =
            ids.iter().flat_map(|id| ask_and_leave(house, id)).collect();
        street.assert_calm();
        for ((mode, sign), id) in group.iter().zip(&ids) {
            wait_until(&format!("{mode} does its worst"), Duration::from_secs(120), || {
                let now = house.socket().get(&format!("/v1/instances/{id}")).expect(200);
                if now["state"] == "stopped" {
                    assert_reason(&now);
                    return true;
                }
                match sign {
                    Sign::Ends => false,
                    Sign::Work => worked_ms(house, id) > 500,
                    Sign::Log => logged(house, id) > LOG_FILE_MAX,
                    Sign::Silence => true,
                }
            });
        }
        // Once more, now that there is something in the logs.
        asks.extend(ids.iter().flat_map(|id| ask_and_leave(house, id)));
        for _ in 0..5 {
            street.assert_calm();
            street.assert_small();
        }
        drop(asks);
        for ((mode, _), id) in group.iter().zip(&ids) {
            let size = logged(house, id);
            assert!(size <= 2 * LOG_FILE_MAX, "{mode}: {size} bytes of log");
            street.delete(id);
        }
        street.assert_small();
    }
    // What lies beside a workspace is as it was, and nothing came to lie there.
    let secret = street.programs.path().join("secret");
    assert_eq!(std::fs::read_to_string(secret).unwrap(), SECRET);
    let beside = std::fs::read_dir(street.programs.path()).unwrap();
    assert_eq!(beside.count(), 5, "programs, a folder, and a file");
    // It did nothing wrong, and nothing else since: on a slow host that is long enough to be paused.
    let now = began(house, &good);
    assert!(now["state"] == "running" || now["state"] == "paused", "{now}");
    street.delete(&good);
    street.assert_untouched();
}

/// How one sees that an attack takes place.
enum Sign {
    /// The machine is given up.
    Ends,
    /// Its worker has something to do.
    Work,
    /// Its log grows.
    Log,
    /// Not at all.
    Silence,
}

/// Which machines misbehave together.
const GROUPS: [&[(&str, Sign)]; 8] = [
    &[("garbage", Sign::Work), ("frames", Sign::Work), ("calls", Sign::Work)],
    &[("heavy", Sign::Work), ("mux", Sign::Ends), ("streams", Sign::Work)],
    &[("oversized", Sign::Silence), ("slow", Sign::Silence), ("deaf", Sign::Silence)],
    &[("log-lines", Sign::Log), ("log-bytes", Sign::Log), ("log-garbage", Sign::Silence)],
    &[("ws-noise", Sign::Work), ("ws-deaf", Sign::Silence), ("ws-frames", Sign::Silence)],
    &[("ws-lies", Sign::Silence), ("ws-long", Sign::Silence), ("ws-mute", Sign::Silence)],
    &[("ws-talks", Sign::Silence)],
    &[("log-oversized", Sign::Silence), ("log-ends", Sign::Silence), ("liar", Sign::Ends)],
];

/// CPU time of a machine's worker, milliseconds.
fn worked_ms(house: &House, id: &str) -> u64 {
    let Some(worker) = workers(house).remove(id) else { return 0 };
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", worker.pid)).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    (ticks(11) + ticks(12)) * 10
}

/// Bytes of a machine's log.
fn logged(house: &House, id: &str) -> u64 {
    let logs = house.home().join("instances").join(id).join("logs");
    let files = std::fs::read_dir(logs).into_iter().flatten().flatten();
    files.map(|f| f.metadata().map_or(0, |m| m.len())).sum()
}

/// Execs and logs, asked for by somebody who does not wait for an answer.
fn ask_and_leave(house: &House, id: &str) -> Vec<UnixStream> {
    let exec = "{\"command\":[\"polite\"]}";
    let asks = [
        format!(
            "POST /v1/instances/{id}/exec HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{exec}",
            exec.len()
        ),
        format!("GET /v1/instances/{id}/logs?follow=true HTTP/1.1\r\nHost: x\r\n\r\n"),
    ];
    let asks = std::iter::once(&asks[0]).chain(std::iter::repeat_n(&asks[1], READERS));
    let open = |ask: &String| {
        let mut stream = UnixStream::connect(house.home().join("aegisd.sock")).unwrap();
        stream.write_all(ask.as_bytes()).unwrap();
        stream
    };
    asks.map(open).collect()
}

#[test]
fn bad_answers_to_execs_and_connections_end_only_themselves() {
    let street = Street::new("");
    let house = &street.house;
    let id = street.evil("answers", "polite");
    assert_eq!(began(house, &id)["state"], "running");
    let exec = |word: &str| {
        let body = json!({"command": [word]});
        let answer = house.socket().post(&format!("/v1/instances/{id}/exec"), &body);
        assert_eq!(answer.status, 200, "{word}: {:?}", answer.body);
        let lines = answer.lines();
        let ends = lines.iter().filter(|line| line["done"] == true).count();
        assert_eq!(ends, 1, "{word}: one end, and nothing after it: {:?}", lines.last());
        Ran::of(&lines)
    };
    assert_eq!((exec("polite").code, exec("polite").text()), (Some(0), "ok".to_owned()));
    for word in ["leaves", "garbage", "oversized", "stdin", "deep", "utf8", "huge-code", "loud"] {
        let ran = exec(word);
        assert_eq!(ran.code, None, "{word}: {ran:?}");
        assert!(ran.error.as_str().is_some_and(|e| !e.is_empty()), "{word}: {ran:?}");
        assert!(ran.error.to_string().len() <= REASON_MAX, "{word}: {}", ran.error);
    }
    // What is printed is never taken for the end of the command.
    let forged = exec("forged");
    assert_eq!(forged.code, Some(3));
    assert!(forged.out.ends_with(b"\xff\0\n\"\\") && forged.out.starts_with(b"{\"exec_id\""));
    // Who talks without end is heard as long as somebody listens; who is silent costs a slot.
    let begin = |word: &str| {
        let body = format!("{{\"command\":[\"{word}\"]}}");
        let mut stream = UnixStream::connect(house.home().join("aegisd.sock")).unwrap();
        let ask = format!(
            "POST /v1/instances/{id}/exec HTTP/1.1\r\nHost: x\r\nContent-Type: \
             application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(ask.as_bytes()).unwrap();
        stream
    };
    let words = ["endless", "newlines", "empty", "silent", "half"];
    let open: Vec<UnixStream> = words.iter().flat_map(|word| [word; 4]).map(|w| begin(w)).collect();
    street.assert_calm();
    // More than there is room for is refused, not queued.
    let crowd: Vec<UnixStream> = (0..150).map(|_| begin("silent")).collect();
    let is_refused = |mut stream: &UnixStream| {
        let mut begin = [0; 12];
        stream.read_exact(&mut begin).unwrap();
        begin == *b"HTTP/1.1 503"
    };
    assert!(crowd.iter().filter(|stream| is_refused(stream)).count() >= 150 - STREAMS_MAX);
    street.assert_calm();
    street.assert_small();
    drop((open, crowd));
    street.assert_calm();
    street.delete(&id);

    // The same to clients that are attached; who takes no input holds them up, and nobody keeps it.
    let id = street.evil("attached", "polite");
    assert_eq!(began(house, &id)["state"], "running");
    let attach = |word: &str| {
        let mut command = Command::new(aegis_tests::programs().join("aegis"));
        command.args(["exec", "-i", &id, "--", word]).env("AEGIS_HOME", house.home());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    for word in
        ["leaves", "half", "garbage", "oversized", "stdin", "deep", "loud", "overcount", "miscount"]
    {
        let mut child = attach(word);
        let open = child.stdin.take();
        let out = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{word}: {said}");
        assert!(said.starts_with("error: ") && said.len() < 2 * REASON_MAX, "{word}: {said}");
        drop(open);
    }
    let mut held = ["silent", "newlines", "endless", "silent"].map(attach);
    for child in &held {
        let taken = flood(child.stdin.as_ref().unwrap(), 64 << 20);
        assert!(taken < 8 << 20, "{taken} bytes are somewhere");
    }
    street.assert_calm();
    street.assert_small();
    for child in &mut held {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    street.assert_calm();
    street.delete(&id);

    let id = street.evil("ports", "polite");
    let now = began(house, &id);
    let endpoints = now["endpoints"].as_array().unwrap();
    let connect = |port: u64| {
        let at = endpoints.iter().find(|e| e["guest_port"] == port).unwrap();
        let url = at["url"].as_str().unwrap().strip_prefix("http://").unwrap();
        let stream = TcpStream::connect(url).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    };
    for port in [1, 2, 4] {
        let mut heard = Vec::new();
        let _ = connect(port).read_to_end(&mut heard);
        assert_eq!(heard, b"", "port {port}");
    }
    let mut talks = connect(3);
    let mut heard = vec![0; 1 << 20];
    talks.read_exact(&mut heard).unwrap();
    assert!(heard.iter().all(|b| *b == b'x'));
    let mut swallows = connect(5);
    swallows.write_all(&heard).unwrap();
    swallows.shutdown(Shutdown::Write).unwrap();
    // Nobody reads what this one says; its connections go with it.
    let unread: Vec<TcpStream> = (0..20).map(|_| connect(3)).collect();
    street.assert_calm();
    street.assert_small();
    street.delete(&id);
    drop(unread);
    street.assert_untouched();
}

#[test]
fn lies_about_files_reach_nobody() {
    let street = Street::new("");
    let house = &street.house;
    let id = street.evil("files", "polite");
    assert_eq!(began(house, &id)["state"], "running");
    let at = |path: &str, more: &str| format!("/v1/instances/{id}/files?path={path}{more}");
    for path in ["/garbage", "/deep", "/fault", "/mode", "/leaves", "/deaf"] {
        let answer = house.socket().get(&at(path, ""));
        assert_eq!(answer.expect(502)["code"], "machine_failed", "{path}");
    }
    // A body that is not what was said of it breaks off: nobody takes it for the whole.
    for path in ["/more", "/less", "/cut", "/oversized"] {
        let asked = house.socket().ask(Method::GET, &at(path, ""), None);
        assert!(asked.is_err(), "{path}: {asked:?}");
    }
    for path in ["/up", "/slash", "/dots", "/empty", "/zero"] {
        let asked = house.socket().ask(Method::GET, &at(path, "&list=true"), None);
        assert!(asked.is_err(), "{path}: {asked:?}");
    }
    let listed = house.socket().get(&at("/endless", "&list=true")).expect(200);
    assert_eq!(listed["entries"].as_array().unwrap().len(), FILE_ENTRIES_MAX);
    assert_eq!(listed["truncated"], true);
    // Who takes nothing of what is written makes nobody hold it.
    let mut writers = Vec::new();
    for _ in 0..8 {
        let mut stream = UnixStream::connect(house.home().join("aegisd.sock")).unwrap();
        let ask = format!(
            "PUT {} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n",
            at("/deaf", "")
        );
        stream.write_all(ask.as_bytes()).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        // Until no more is taken.
        while stream.write_all(&[b'x'; 65_536]).is_ok() {}
        writers.push(stream);
    }
    street.assert_calm();
    street.assert_small();
    drop(writers);
    street.delete(&id);
    street.assert_untouched();
}

#[test]
fn a_machine_that_lies_about_itself_never_runs() {
    let street = Street::new("");
    let house = &street.house;
    let names = ["twin", "loud-twin", "loud-refusal", "wrong-shape", "half-identify"];
    let ids = names.map(|name| street.evil(name, "polite"));
    street.assert_calm();
    for (name, id) in names.iter().zip(&ids) {
        let now = wait_for(&format!("{name} is given up"), Duration::from_secs(120), || {
            let now = house.socket().get(&format!("/v1/instances/{id}")).expect(200);
            assert_ne!(now["state"], "running", "{now}");
            (now["state"] == "stopped" || !now["error"].is_null()).then_some(now)
        });
        assert_reason(&now);
    }
    street.assert_calm();
    street.assert_small();
    for id in &ids {
        street.delete(id);
    }
    street.assert_untouched();
}

#[test]
fn a_guest_that_does_everything_at_once_is_killed_with_a_receipt() {
    let street = Street::new("[guest]\ncommand = [\"everything\"]\n");
    let house = &street.house;
    let limits = json!({"maxCpuCores": 0.25, "maxMemoryMB": 128, "maxDiskGB": 0.02});
    let guests: Vec<Value> =
        (0..3).map(|_| house.guest(json!({"resourceLimits": limits}))).collect();
    let mut machines = Vec::new();
    for guest in &guests {
        let id = guest["guestId"].as_str().unwrap();
        let status = house.until(id, "running");
        machines.push(status["vmId"].as_str().unwrap().to_owned());
    }
    for (guest, machine) in guests.iter().zip(&machines) {
        wait_until("it does its worst", Duration::from_secs(120), || {
            let id = guest["guestId"].as_str().unwrap();
            worked_ms(house, machine) > 1000 || house.guest_status(id)["status"] == "stopped"
        });
    }
    for _ in 0..5 {
        street.assert_calm();
        street.assert_small();
    }
    // Its clock can be stopped and goes on, whatever it answers, unless it was given up by then.
    let first = format!("/couch/guests/{}", guests[0]["guestId"].as_str().unwrap());
    for verb in ["freeze", "thaw"] {
        let answer = house.socket().act(&format!("{first}/{verb}"));
        assert!([200, 400].contains(&answer.status), "{verb}: {answer:?}");
    }
    let mut receipts = 0;
    for (guest, machine) in guests.iter().zip(&machines) {
        let mut before = house.machine_processes();
        before.retain(|p| p.command.contains(machine.as_str()));
        let path = format!("/couch/guests/{}", guest["guestId"].as_str().unwrap());
        let killed = house.socket().delete(&path);
        if killed.status == 400 {
            // It was given up before: then it is gone already.
            let text = String::from_utf8_lossy(&killed.body).into_owned();
            assert!(text.contains("already"), "{text}");
        } else {
            let killed = killed.expect(200);
            let verified = &killed["receipt"]["machines"][0]["verified"];
            assert_eq!(*verified, json!(["process", "cgroup", "network", "disk"]), "{killed}");
            receipts += 1;
            house.assert_no_trace(machine, &before);
        }
    }
    assert!(receipts > 0, "all of them were given up before");
    assert_eq!(look::run_directories(house.home()).len(), 1, "only the neighbour's is left");
    street.assert_untouched();
}
