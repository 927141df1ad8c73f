//! `up`, `down`, `status`: the daemon itself.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Timespec, inotify};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use super::{Ask, items, text};
use crate::failure::{Failure, Result};
use crate::home::sibling;
use crate::output::{Work, fields, plain, say};
use aegis_wire::path::escape;

/// How long a daemon may take until it answers: it adopts what machines it finds first.
const UP_DEADLINE: Duration = Duration::from_secs(60);
/// How long it may take to end: it drains its connections first.
const DOWN_DEADLINE: Duration = Duration::from_secs(60);
/// How long a snapshot's keeper may take to end.
const KEEPER_DEADLINE: Duration = Duration::from_secs(2);
/// Bytes of the log that a failed start repeats at most.
const LOG_TAIL: u64 = 4096;
/// Name of the daemon's program and process.
const DAEMON: &str = "aegisd";

/// What `aegis up` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
The daemon listens on HOME/aegisd.sock for this program, and on TCP for guests and curl. Its words \
go to HOME/data/aegisd.log. If it runs already, that is said, and all is well.

Examples:
  aegis up
  aegis up --listen 127.0.0.1:3100
  aegis up --no-auth                loopback only: host routes without a token, for development
  aegis up --foreground             for a service manager")]
pub struct UpArgs {
    /// TCP address [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Serve host routes without a token, on loopback only
    #[arg(long)]
    no_auth: bool,
    /// Who makes guests' machines: local, manual or vers
    #[arg(long, value_name = "WHO", value_parser = ["local", "manual", "vers"])]
    provisioner: Option<String>,
    /// Become the daemon instead of starting it in the background
    #[arg(long)]
    foreground: bool,
}

/// What `aegis down` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
Machines outlive the daemon: the next `aegis up` finds them running. With --all they are stopped \
first; their disks stay, and `aegis instance start NAME` brings them back.")]
pub struct DownArgs {
    /// Stop all machines first
    #[arg(long)]
    all: bool,
}

/// Starts the daemon and waits until it answers.
pub async fn up(ask: &Ask, args: UpArgs) -> Result<()> {
    if ask.remote {
        return Err(Failure::Usage("up starts the daemon of this home: leave out --url".into()));
    }
    ask.home.check_length()?;
    if let Ok(status) = ask.client.get("/v1/status").await {
        say("aegisd runs already");
        return answer_up(ask, &status);
    }
    let mut command = Command::new(sibling(DAEMON)?);
    command.arg("--home").arg(ask.home.root());
    if let Some(listen) = &args.listen {
        command.args(["--listen", listen]);
    }
    if args.no_auth {
        command.arg("--no-auth");
    }
    if let Some(provisioner) = &args.provisioner {
        command.args(["--provisioner", provisioner]);
    }
    if args.foreground {
        return Err(Failure::because("cannot become aegisd", command.exec()));
    }
    start(ask, command).await?;
    if !rustix::process::geteuid().is_root() {
        say("aegisd does not run as root: see `aegis doctor` for what machines lack without it");
    }
    let status = ask.client.get("/v1/status").await?;
    answer_up(ask, &status)
}

fn answer_up(ask: &Ask, status: &Value) -> Result<()> {
    let url = format!("http://{}", text(status, "listen"));
    ask.format.answer(&json!({ "url": url, "status": status }), || format!("{url}\n"))
}

async fn start(ask: &Ask, mut command: Command) -> Result<()> {
    let log_path = ask.home.daemon_log();
    let data = log_path.parent().unwrap_or(Path::new("/"));
    private_dir(ask.home.root())?;
    private_dir(data)?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(|e| Failure::file("write", &log_path, e))?;
    let log_begin = log.metadata().map(|m| m.len()).unwrap_or(0);
    let log_too = log.try_clone().map_err(|e| Failure::file("write", &log_path, e))?;

    // Watched before it starts, so that its pid file can't be missed.
    let watch = watch(data)?;
    let work = Work::begin("aegisd", "starting");
    let child = command
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        // A group of its own: Ctrl-C here is not meant for it.
        .process_group(0)
        .spawn()
        .map_err(|e| Failure::because("cannot start aegisd", e))?;
    let pid = Pid::from_child(&child);
    let ended = pidfd_open(pid, PidfdFlags::empty()).map_err(watching)?;
    match ready(&ask.home.pid_file(), pid, &watch, &ended)? {
        Start::Answers => {
            work.done(&format!("runs with process id {}", pid.as_raw_nonzero()));
            Ok(())
        }
        Start::Ended => {
            drop(work);
            let words = log_since(&log_path, log_begin);
            Err(Failure::here(format!("aegisd ended while it started; it said:\n{words}"))
                .fix(format!("mend what it says; its whole log is {}", log_path.display())))
        }
        Start::Slow => Err(Failure::here("aegisd started, but does not answer yet")
            .fix(format!("look at {}, then `aegis status`", log_path.display()))),
    }
}

/// How a start went.
enum Start {
    Answers,
    Ended,
    Slow,
}

/// Waits until the pid file names the daemon, which means that its API answers.
fn ready(pid_file: &Path, pid: Pid, watch: &OwnedFd, ended: &OwnedFd) -> Result<Start> {
    let deadline = Instant::now() + UP_DEADLINE;
    loop {
        if read_pid(pid_file) == Some(pid) {
            return Ok(Start::Answers);
        }
        let mut fds = [PollFd::new(watch, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
        if !wait(&mut fds, deadline)? {
            return Ok(Start::Slow);
        }
        if !fds[1].revents().is_empty() {
            return Ok(Start::Ended);
        }
        drain(watch);
    }
}

/// Waits for one of them; false when the deadline came first.
fn wait(fds: &mut [PollFd<'_>], deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        match poll(fds, Some(&left)) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(watching(e)),
        }
    }
}

fn private_dir(dir: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| Failure::file("make", dir, e))
}

fn watching(e: rustix::io::Errno) -> Failure {
    Failure::because("cannot watch aegisd", std::io::Error::from(e))
}

/// Tells when something happens to the files of a directory.
fn watch(dir: &Path) -> Result<OwnedFd> {
    use inotify::{CreateFlags, WatchFlags};
    let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(watching)?;
    inotify::add_watch(&fd, dir, WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO)
        .map_err(watching)?;
    Ok(fd)
}

/// Throws the events away: the files themselves are looked at anew.
fn drain(watch: &OwnedFd) {
    let mut events = [0u8; 4096];
    while rustix::io::read(watch, &mut events).is_ok_and(|n| n > 0) {}
}

fn log_since(path: &Path, begin: u64) -> String {
    let tail = || {
        let mut log = File::open(path)?;
        let end = log.metadata()?.len();
        log.seek(SeekFrom::Start(begin.max(end.saturating_sub(LOG_TAIL))))?;
        let mut words = Vec::new();
        log.take(LOG_TAIL).read_to_end(&mut words)?;
        Ok::<_, std::io::Error>(words)
    };
    let words = tail().unwrap_or_default();
    let words = String::from_utf8_lossy(&words);
    let lines: Vec<String> = words.lines().map(|line| format!("    {line}")).collect();
    if lines.is_empty() { "    (nothing)".into() } else { lines.join("\n") }
}

/// The process that the pid file names.
fn read_pid(path: &Path) -> Option<Pid> {
    Pid::from_raw(fs::read_to_string(path).ok()?.trim().parse().ok()?)
}

/// The same, if it is a daemon that lives: a pid may have been given to another since.
fn running(path: &Path) -> Option<(Pid, OwnedFd)> {
    let pid = read_pid(path)?;
    let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // Read after the fd was opened: from then on the pid cannot change hands unseen.
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok()?;
    (name.trim() == DAEMON).then_some((pid, fd))
}

/// Stops the daemon and waits until it is gone.
pub async fn down(ask: &Ask, args: DownArgs) -> Result<()> {
    if ask.remote {
        return Err(Failure::Usage("down stops the daemon of this home: leave out --url".into()));
    }
    let mut stopped = Vec::new();
    let daemon = running(&ask.home.pid_file());
    if args.all {
        if daemon.is_none() {
            return Err(Failure::here("aegisd does not run, so nobody can stop the machines")
                .fix("aegis up, then aegis down --all"));
        }
        stopped = stop_all(ask).await?;
    }
    let Some((pid, fd)) = daemon else {
        say("aegisd does not run");
        return ask.format.answer(&json!({ "running": false, "stopped": stopped }), String::new);
    };
    let work = Work::begin("aegisd", "ending");
    match pidfd_send_signal(&fd, Signal::TERM) {
        // Gone already is what was wanted.
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(e) => return Err(Failure::because("cannot stop aegisd", std::io::Error::from(e))),
    }
    if !wait(&mut [PollFd::new(&fd, PollFlags::IN)], Instant::now() + DOWN_DEADLINE)? {
        return Err(Failure::here(format!(
            "aegisd (process id {}) does not end",
            pid.as_raw_nonzero()
        ))
        .fix(format!("look at {}", ask.home.daemon_log().display())));
    }
    work.done("ended");
    if args.all {
        for snapshots in ["golden", "commits"] {
            quit_keepers(&ask.home.root().join(snapshots));
        }
    }
    ask.format.answer(&json!({ "running": false, "stopped": stopped }), String::new)
}

/// Gives back the memory of snapshots: their keepers hold it beyond the daemon's end, for machines
/// that go on. The snapshots stay on disk.
fn quit_keepers(golden: &Path) {
    for entry in fs::read_dir(golden).into_iter().flatten().flatten() {
        let Ok(at) = File::open(entry.path()) else { continue };
        // By the directory's descriptor: a socket's own path may have no more than 107 bytes.
        let path = format!("/proc/self/fd/{}/keeper.sock", at.as_raw_fd());
        let Ok(mut keeper) = UnixStream::connect(path) else { continue };
        // It answers by its end; one that does not keeps its snapshot.
        let asked = keeper.set_read_timeout(Some(KEEPER_DEADLINE));
        if asked.and_then(|()| keeper.write_all(b"{\"op\":\"quit\"}\n")).is_ok() {
            let _ = keeper.read(&mut [0; 1]);
        }
    }
}

async fn stop_all(ask: &Ask) -> Result<Vec<String>> {
    let list = ask.client.get("/v1/instances").await?;
    let live: Vec<String> = items(&list, "instances")
        .iter()
        .filter(|instance| text(instance, "state") != "stopped")
        .map(|instance| text(instance, "id"))
        .collect();
    let mut work = Work::begin("machines", "stopping");
    for (n, id) in live.iter().enumerate() {
        work.now(&format!("stopping {id} ({} of {})", n + 1, live.len()));
        match ask.client.post(&format!("/v1/instances/{}/stop", escape(id)), None).await {
            Ok(_) => {}
            // It ended by itself in between, or was deleted.
            Err(Failure::Refused(refused)) if matches!(refused.status, 404 | 409) => {}
            Err(failure) => return Err(failure),
        }
    }
    work.done(&format!("{} stopped", live.len()));
    Ok(live)
}

/// Says how the daemon is.
pub async fn status(ask: &Ask) -> Result<()> {
    let status = ask.client.get("/v1/status").await?;
    ask.format.answer(&status, || {
        let inner = |name: &str, field: &str| {
            status.get(name).and_then(|v| v.get(field)).map(plain).unwrap_or_else(|| "-".into())
        };
        let network = match inner("capabilities", "network_backend").as_str() {
            "none" | "-" => "none yet: machines have no network device".to_owned(),
            backend => backend.to_owned(),
        };
        fields(&[
            ("Daemon", format!("aegisd {}", text(&status, "version"))),
            ("URL", format!("http://{}", text(&status, "listen"))),
            ("Up", super::when(&status, "started_at")),
            ("Backend", format!("{} ({})", text(&status, "backend"), text(&status, "isolation"))),
            ("Acceleration", inner("capabilities", "accel")),
            (
                "Limits",
                format!(
                    "{} ({})",
                    inner("capabilities", "limits"),
                    inner("capabilities", "cgroups")
                ),
            ),
            ("Network", network),
            ("Provisioner", text(&status, "provisioner")),
            ("Machines", inner("counts", "machines")),
            ("Instances", inner("counts", "instances")),
            ("Guests", inner("counts", "guests_live")),
            ("Invites", inner("counts", "invites_active")),
        ])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_of_somebody_else_is_no_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("aegisd.pid");
        assert!(running(&file).is_none());
        fs::write(&file, format!("{}\n", std::process::id())).unwrap();
        assert_eq!(read_pid(&file), Some(rustix::process::getpid()));
        assert!(running(&file).is_none());
        fs::write(&file, "not a number").unwrap();
        assert_eq!(read_pid(&file), None);
    }

    #[test]
    fn a_pid_file_that_is_moved_in_wakes_the_watch() {
        let dir = tempfile::tempdir().unwrap();
        let (fd, file) = (watch(dir.path()).unwrap(), dir.path().join("pid"));
        let pid = rustix::process::getpid();
        let ended = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let draft = dir.path().join("draft");
        fs::write(&draft, pid.as_raw_nonzero().to_string()).unwrap();
        let mover = std::thread::spawn({
            let file = file.clone();
            move || fs::rename(draft, file).unwrap()
        });
        assert!(matches!(ready(&file, pid, &fd, &ended), Ok(Start::Answers)));
        mover.join().unwrap();
    }
}
