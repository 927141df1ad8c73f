//! The test kit: a [`House`] is a real aegisd in a home of its own.
//!
//! Programs come from `AEGIS_TEST_PROGRAMS`, kernel and base image from `AEGIS_TEST_ASSETS` (laid
//! out as a home). `make test` sets both; without them a test fails and says so.
#![allow(clippy::unwrap_used, reason = "a kit for tests: what goes wrong is to be seen")]

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpStream, UnixStream};

/// An answer: status, headers as text, body.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// `name: value` lines.
    pub headers: String,
    /// The raw body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The body as JSON, after checking the status.
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The body's NDJSON lines.
    pub fn lines(&self) -> Vec<Value> {
        self.body
            .split(|b| *b == b'\n')
            .filter(|l| !l.is_empty())
            .map(|l| serde_json::from_slice(l).unwrap())
            .collect()
    }
}

fn from_env(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(path) => PathBuf::from(path),
        None => panic!("{name} is not set: run these tests by `make test`"),
    }
}

/// A program of Aegis.
pub fn program(name: &str) -> PathBuf {
    let path = from_env("AEGIS_TEST_PROGRAMS").join(name);
    assert!(path.exists(), "{} is missing: run these tests by `make test`", path.display());
    path
}

/// A real aegisd in a home of its own; ended, with all its machines, when dropped.
pub struct House {
    home: tempfile::TempDir,
    daemon: Option<Child>,
    address: String,
    args: Vec<String>,
}

impl House {
    /// A house with these settings in `aegis.toml` and these arguments beside the kit's own.
    pub async fn new(settings: &str, args: &[&str]) -> House {
        // Short, because sockets' paths have to fit below it.
        let home = tempfile::Builder::new().prefix("aeg").tempdir_in("/tmp").unwrap();
        let assets = from_env("AEGIS_TEST_ASSETS");
        for part in ["kernel", "images"] {
            std::os::unix::fs::symlink(assets.join(part), home.path().join(part)).unwrap();
        }
        std::fs::write(home.path().join("aegis.toml"), settings).unwrap();
        let args = args.iter().map(|a| (*a).to_owned()).collect();
        let mut house = House { home, daemon: None, address: String::new(), args };
        house.start().await;
        house
    }

    /// A house whose guests are activated by hand: no machines, quick.
    pub async fn manual() -> House {
        House::new("provisioner = \"manual\"\n[rate_limit]\nper_second = 0\n", &[]).await
    }

    /// Starts the daemon and waits until it answers.
    pub async fn start(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.home().join("aegisd.log"))
            .unwrap();
        let pid_file = self.home().join("data/aegisd.pid");
        let _ = std::fs::remove_file(&pid_file);
        let mut command = Command::new(program("aegisd"));
        command
            .args(["--listen", "127.0.0.1:0", "--home"])
            .arg(self.home())
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0);
        self.daemon = Some(command.spawn().unwrap());
        self.until("aegisd answers", async |house: &House| {
            pid_file.exists().then_some(())?;
            let status = house.try_unix("GET", "/v1/status", None).await?;
            Some(status.json()["listen"].as_str()?.to_owned())
        })
        .await
        .clone_into(&mut self.address);
    }

    /// Ends the daemon as a power cut would; its machines go on.
    pub fn kill_9(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    /// The home directory.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// `ADDRESS:PORT` of the API.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The daemon's log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.home().join("aegisd.log")).unwrap()
    }

    /// The host's token.
    pub fn host_token(&self) -> String {
        std::fs::read_to_string(self.home().join("host-token")).unwrap().trim().to_owned()
    }

    /// Asks as the host, over the host's socket.
    pub async fn host(&self, method: &str, path: &str, body: Value) -> Answer {
        let body = if body.is_null() { None } else { Some(body.to_string()) };
        self.try_unix(method, path, body).await.expect("the daemon answers on its socket")
    }

    async fn try_unix(&self, method: &str, path: &str, body: Option<String>) -> Option<Answer> {
        let stream = UnixStream::connect(self.home().join("aegisd.sock")).await.ok()?;
        send(stream, "aegis", method, path, body.unwrap_or_default().into(), &[]).await
    }

    /// Asks over TCP with exactly these headers and bytes; `None` when there is no answer.
    pub async fn tcp(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
        headers: &[(&str, &str)],
    ) -> Option<Answer> {
        let stream = TcpStream::connect(&self.address).await.ok()?;
        send(stream, &self.address, method, path, body.to_vec(), headers).await
    }

    /// Makes an invite with these fields over the kit's own; returns it.
    pub async fn invite(&self, fields: Value) -> Value {
        let mut body = json!({
            "createdBy": "noah",
            "resourceLimits": {"maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.5},
        });
        for (key, value) in fields.as_object().unwrap() {
            body[key] = value.clone();
        }
        self.host("POST", "/couch/invites", body).await.expect(201)
    }

    /// Invites and redeems; returns the redeem's answer.
    pub async fn guest(&self, fields: Value) -> Value {
        let invite = self.invite(fields).await;
        let ask = json!({"code": invite["code"], "name": "ty"});
        self.host("POST", "/couch/redeem", ask).await.expect(201)
    }

    /// Waits until a guest has this status; returns its own view of it.
    pub async fn until_status(&self, guest: &Value, status: &str) -> Value {
        let path = format!("/couch/status?token={}", guest["authToken"].as_str().unwrap());
        self.until(&format!("the guest is {status}"), async |house: &House| {
            let answer = house.try_unix("GET", &path, None).await?;
            let now = (answer.status == 200).then(|| answer.json())?;
            (now["status"] == status).then_some(now)
        })
        .await
    }

    /// Runs a shell line in a machine: exit code, stdout, stderr.
    pub async fn sh(&self, instance: &str, line: &str) -> (i64, String, String) {
        let ask = json!({"command": ["sh", "-c", line]});
        let answer = self.host("POST", &format!("/v1/instances/{instance}/exec"), ask).await;
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
        let lines = answer.lines();
        let text = |stream: &str| -> String {
            lines
                .iter()
                .filter(|l| l["stream"] == stream)
                .map(|l| format!("{}\n", l["line"].as_str().unwrap()))
                .collect()
        };
        let last = lines.last().unwrap();
        assert_eq!(last["done"], true, "{last}");
        (last["exit_code"].as_i64().unwrap_or(-1), text("stdout"), text("stderr"))
    }

    /// Waits for a condition of the running system, at most a minute.
    pub async fn until<T>(&self, what: &str, mut look: impl AsyncFnMut(&House) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = look(self).await {
                return found;
            }
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "not within a minute: {what}\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ids of instances that have a run directory.
    pub fn run_dirs(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.home().join("run")) else { return vec![] };
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Processes, zombies left out, that have this word in their command line or open below it.
    pub fn processes_with(&self, word: &str) -> Vec<String> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(word) {
                found.push(line);
            }
        }
        found
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.kill_9();
        for id in self.run_dirs() {
            let hash = aegis_home_hash(self.home());
            let ask = json!({
                "run_dir": self.home().join("run").join(&id),
                "cgroup": format!("aegis/{hash}/{id}"),
                "disk": self.home().join("instances").join(&id).join("disk.img"),
                "deadline_ms": 10_000,
            });
            let mut reap = Command::new(program("aegis-worker"))
                .arg("reap")
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            use std::io::Write as _;
            let _ = reap.stdin.take().unwrap().write_all(ask.to_string().as_bytes());
            let _ = reap.wait();
        }
        // Keepers end when their directory goes.
        let _ = std::fs::remove_dir_all(self.home().join("golden"));
    }
}

/// The part of a cgroup's name that tells homes apart, read from where the daemon made it.
fn aegis_home_hash(home: &Path) -> String {
    let record = std::fs::read_dir(home.join("run"))
        .into_iter()
        .flatten()
        .flatten()
        .find_map(|e| std::fs::read_to_string(e.path().join("machine.json")).ok())
        .unwrap_or_default();
    record
        .split("aegis/")
        .nth(1)
        .and_then(|rest| rest.split('/').next())
        .unwrap_or("none")
        .to_owned()
}

async fn send<S>(
    stream: S,
    host: &str,
    method: &str,
    path: &str,
    body: Vec<u8>,
    headers: &[(&str, &str)],
) -> Option<Answer>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    tokio::spawn(connection);
    let mut request = hyper::Request::builder().method(method).uri(path);
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        request = request.header("host", host);
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(body))).unwrap();
    let response = sender.send_request(request).await.ok()?;
    let status = response.status().as_u16();
    let headers =
        response.headers().iter().map(|(n, v)| format!("{n}: {}\n", v.to_str().unwrap())).collect();
    let body = response.into_body().collect().await.ok()?.to_bytes().to_vec();
    Some(Answer { status, headers, body })
}
