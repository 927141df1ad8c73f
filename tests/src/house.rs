//! A house: a home directory of its own with a real daemon in it. Nothing of it stays.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use aegis_wire::door::Knock;
use aegis_wire::worker::run_dir;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::http::Client;
use crate::{golden, look, programs};

/// Settings of a house whose guests are activated by hand: no machine is ever made. Clients are not
/// counted.
pub const MANUAL: &str = "provisioner = \"manual\"\n[rate_limit]\nper_second = 0\n";
/// Settings of a house whose guests serve the agent port, and whose clients are not counted.
pub const SERVING: &str = "[guest]\ncommand = [\"python3\", \"-m\", \"http.server\", \"8080\"]\n\
                           [rate_limit]\nper_second = 0\n";

/// A daemon answers this long after its start at the latest.
const READY: Duration = Duration::from_secs(30);
/// Whatever a house still has is reaped within this.
const REAP_MS: u64 = 10_000;

/// A home, and the daemon in it while it runs.
pub struct House {
    home: TempDir,
    no_auth: bool,
    /// Whether the settings speak of spare machines; else none are made, as no test counts them.
    spares: bool,
    /// What is in the daemon's environment, beside the path.
    env: Vec<(String, String)>,
    daemon: Option<Child>,
    address: Option<SocketAddr>,
}

impl House {
    /// A house whose host routes ask for the host's token.
    pub fn new(settings: &str) -> House {
        House::build(settings, false, &[])
    }

    /// A house whose daemon has this in its environment.
    pub fn with_env(settings: &str, env: &[(&str, &str)]) -> House {
        House::build(settings, false, env)
    }

    /// A house that asks nobody who they are.
    pub fn without_auth(settings: &str) -> House {
        House::build(settings, true, &[])
    }

    fn build(settings: &str, no_auth: bool, env: &[(&str, &str)]) -> House {
        let home = tempfile::Builder::new().prefix("aegis-it-").tempdir_in("/tmp").unwrap();
        std::fs::write(home.path().join("aegis.toml"), settings).unwrap();
        std::fs::create_dir(home.path().join("data")).unwrap();
        let makes_machines = !["\"manual\"", "\"vers\""].iter().any(|w| settings.contains(w));
        if makes_machines {
            let assets = crate::assets();
            for name in ["kernel", "images"] {
                symlink(assets.join(name), home.path().join(name)).unwrap();
            }
            symlink(golden::directory(), home.path().join("golden")).unwrap();
        }
        let mut house = House {
            home,
            no_auth,
            spares: settings.contains("spares"),
            env: env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            daemon: None,
            address: None,
        };
        house.start();
        house
    }

    /// The home directory.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Starts the daemon and waits until its API answers.
    pub fn start(&mut self) {
        assert!(self.daemon.is_none(), "it runs already");
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = Command::new(programs().join("aegisd"));
        command.arg("--home").arg(self.home()).args(["--listen", "127.0.0.1:0"]);
        if self.no_auth {
            command.arg("--no-auth");
        }
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if !self.spares {
            command.env("AEGIS_SPARES", "0");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let data = self.home().join("data");
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&watch, &data, WatchFlags::MOVED_TO).unwrap();
        let child = command.spawn().unwrap();
        let pid = child.id();
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        self.daemon = Some(child);
        // A dead daemon's file may lie there: only one with the new id counts.
        let answers = || {
            std::fs::read_to_string(data.join("aegisd.pid"))
                .is_ok_and(|text| text.trim() == pid.to_string())
        };
        while !answers() {
            let mut fds = [PollFd::new(&watch, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
            let wait = Timespec { tv_sec: READY.as_secs() as i64, tv_nsec: 0 };
            let n = poll(&mut fds, Some(&wait)).unwrap();
            assert!(n > 0, "aegisd does not answer within {READY:?}:\n{}", self.log());
            assert!(fds[1].revents().is_empty(), "aegisd ended at once:\n{}", self.log());
            let _ = rustix::io::read(&watch, &mut [0_u8; 4096]);
        }
        let status = self.socket().get("/v1/status").expect(200);
        self.address = Some(status["listen"].as_str().unwrap().parse().unwrap());
    }

    /// Kills the daemon as a power cut would: it can do nothing about it.
    pub fn kill9(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    /// Asks the daemon to stop, and waits for its end.
    pub fn stop(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().unwrap();
        rustix::process::kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
        daemon.wait().unwrap()
    }

    /// The daemon's id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.daemon.as_ref().unwrap())
    }

    /// Where TCP is bound now.
    pub fn address(&self) -> SocketAddr {
        self.address.unwrap()
    }

    /// Over the host's own socket.
    pub fn socket(&self) -> Client {
        Client::unix(self.home().join("aegisd.sock"))
    }

    /// Over TCP, as anybody.
    pub fn anybody(&self) -> Client {
        Client::tcp(self.address())
    }

    /// Through a machine's hatch.
    pub fn knock(&self, instance: &str, knock: &Knock) -> Client {
        Client::hatch(self.hatch(instance), knock)
    }

    /// A knock at a machine's hatch that nobody answers, whatever TLS is said after it.
    #[track_caller]
    pub fn knocks_in_vain(&self, instance: &str, knock: &Knock) {
        let mut stream = UnixStream::connect(self.hatch(instance)).unwrap();
        stream.set_read_timeout(Some(READY)).unwrap();
        let line = serde_json::to_string(knock).unwrap();
        // The other side may be gone already. These are the first bytes of a hello.
        let _ = stream.write_all(format!("{line}\n\x16\x03\x01").as_bytes());
        let mut said = Vec::new();
        let ended = stream.read_to_end(&mut said);
        let reset = ended.as_ref().is_err_and(|e| e.kind() == ErrorKind::ConnectionReset);
        assert!(ended.is_ok() || reset, "{ended:?}");
        assert!(said.is_empty(), "{said:?}");
    }

    /// Where a machine's hatch is.
    pub fn hatch(&self, instance: &str) -> PathBuf {
        self.home().join("run").join(instance).join(run_dir::DOOR)
    }

    /// The host's token.
    pub fn token(&self) -> String {
        let text = std::fs::read_to_string(self.home().join("host-token")).unwrap();
        text.trim().to_owned()
    }

    /// Over TCP, with the host's token.
    pub fn host(&self) -> Client {
        self.anybody().bearer(&self.token())
    }

    fn log_path(&self) -> PathBuf {
        self.home().join("aegisd.log")
    }

    /// All that the daemon wrote to its log.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Makes an invite; `body` gets a `createdBy`. Returns it.
    #[track_caller]
    pub fn invite(&self, mut body: Value) -> Value {
        body["createdBy"] = json!("noah");
        self.socket().post("/couch/invites", &body).expect(201)
    }

    /// Makes an invite and redeems it. Returns the answer to the redeem.
    #[track_caller]
    pub fn guest(&self, invite: Value) -> Value {
        let invite = self.invite(invite);
        let ask = json!({"code": invite["code"], "name": "ty"});
        self.socket().post("/couch/redeem", &ask).expect(201)
    }

    /// A guest as the host sees it.
    #[track_caller]
    pub fn guest_status(&self, id: &str) -> Value {
        self.socket().get(&format!("/couch/guests/{id}/status")).expect(200)
    }

    /// Waits until a guest has this status. Returns it.
    #[track_caller]
    pub fn until(&self, id: &str, status: &str) -> Value {
        let found = crate::wait_for(
            &format!("guest {id} becomes {status}"),
            Duration::from_secs(120),
            || {
                let now = self.guest_status(id);
                if let Some(error) = now.get("provisionError") {
                    panic!("{error}\n{}", self.log());
                }
                (now["status"] == status || now.get("stoppedAt").is_some()).then_some(now)
            },
        );
        assert_eq!(found["status"], status, "{found}\n{}", self.log());
        found
    }

    /// Runs a shell script in an instance.
    #[track_caller]
    pub fn sh(&self, instance: &str, script: &str) -> Ran {
        let body = json!({"command": ["sh", "-c", script]});
        let answer = self.socket().post(&format!("/v1/instances/{instance}/exec"), &body);
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
        Ran::of(&answer.lines())
    }

    /// Runs a shell script in an instance that must end well; returns its output, else fails with it.
    #[track_caller]
    pub fn ok(&self, instance: &str, script: &str) -> String {
        let ran = self.sh(instance, script);
        assert_eq!(ran.code, Some(0), "{script}: {ran:?}");
        ran.text()
    }

    /// Waits until an instance has this state. Returns it.
    #[track_caller]
    pub fn until_instance(&self, id: &str, state: &str) -> Value {
        crate::wait_for(&format!("instance {id} is {state}"), Duration::from_secs(120), || {
            let now = self.socket().get(&format!("/v1/instances/{id}")).expect(200);
            (now["state"] == state).then_some(now)
        })
    }

    /// Nothing of this machine is on the host any more.
    #[track_caller]
    pub fn assert_no_trace(&self, id: &str, before: &[look::Process]) {
        for process in before {
            // A keeper serves later machines too; just forked it looked like the worker it is of.
            let now = look::Process::of(process.pid).filter(|now| now.start == process.start);
            let now = now.filter(|now| !now.command.contains(" keeper "));
            assert!(now.is_none(), "still there: {process:?}, now {now:?}");
        }
        let group = format!("{}/{id}", look::cgroup_of_home(self.home()));
        assert_eq!(look::cgroup_directories(&group), Vec::<PathBuf>::new());
        assert!(!look::run_directories(self.home()).contains(&id.to_owned()));
        assert!(!self.home().join("instances").join(id).join("disk.img").exists());
    }

    /// The processes of all machines here.
    pub fn machine_processes(&self) -> Vec<look::Process> {
        look::machine_processes(self.home())
    }
}

/// How a command inside went.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code, when it had one.
    pub code: Option<i64>,
    /// Its standard output, byte for byte.
    pub out: Vec<u8>,
    /// Its standard error, byte for byte.
    pub err: Vec<u8>,
    /// Why there is no exit code.
    pub error: Value,
}

impl Ran {
    /// Reads the NDJSON of an exec.
    pub fn of(lines: &[Value]) -> Ran {
        let first = lines.first().unwrap();
        let last = lines.last().unwrap();
        assert!(first["exec_id"].is_string() && first["started_at"].is_string(), "{first}");
        assert!(last["done"] == true && last["exec_id"] == first["exec_id"], "{last}");
        let bytes = |stream: &str| {
            let entries = lines[1..lines.len() - 1].iter().filter(|l| l["stream"] == stream);
            entries.flat_map(entry_bytes).collect()
        };
        Ran {
            code: last["exit_code"].as_i64(),
            out: bytes("stdout"),
            err: bytes("stderr"),
            error: last["error"].clone(),
        }
    }

    /// Standard output as text, without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).trim_end().to_owned()
    }
}

fn entry_bytes(entry: &Value) -> Vec<u8> {
    serde_json::from_value::<aegis_wire::logs::Entry>(entry.clone()).unwrap().bytes()
}

impl Drop for House {
    /// Nothing stays, also when the test failed. Says so where something does, and does not hide
    /// why the test failed.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(8000);
            let from = (from..log.len()).find(|i| log.is_char_boundary(*i)).unwrap_or(0);
            eprintln!("--- the end of the daemon's log ---\n{}", &log[from..]);
        }
        self.kill9();
        let group = look::cgroup_of_home(self.home());
        std::thread::scope(|scope| {
            for id in look::run_directories(self.home()) {
                let ask = json!({
                    "run_dir": self.home().join("run").join(&id),
                    "cgroup": format!("{group}/{id}"),
                    "disk": null,
                    "deadline_ms": REAP_MS,
                });
                scope.spawn(move || reap(&ask));
            }
        });
        for directory in look::cgroup_directories(&group) {
            let _ = std::fs::remove_dir(directory);
        }
    }
}

fn reap(ask: &Value) {
    let child = Command::new(programs().join("aegis-worker"))
        .arg("reap")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if let Ok(mut child) = child {
        if let Some(mut stdin) = child.stdin.take() {
            let _ = stdin.write_all(ask.to_string().as_bytes());
        }
        let _ = child.wait();
    }
}
