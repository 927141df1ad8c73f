//! A child process that is waited for by its pidfd, and whose last words are kept.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::AsyncReadExt as _;
use tokio::io::unix::AsyncFd;

/// How much of a child's standard error is kept, bytes.
const LAST_WORDS_MAX: usize = 4096;

/// Tells when a process has exited; cheap to clone.
#[derive(Clone)]
pub struct Death(Arc<AsyncFd<OwnedFd>>);

impl Death {
    /// Completes when it has exited.
    pub async fn happened(&self) {
        // An error would mean that the reactor is gone, and so are we.
        let _ = self.0.readable().await;
    }
}

/// A running child. Dropping it kills it, unless it is [left](Child::leave) to itself.
pub struct Child {
    child: std::process::Child,
    left: bool,
    death: Death,
    pid: Pid,
    last_words: Arc<Mutex<Vec<u8>>>,
}

impl Child {
    /// Starts `command` with an empty environment, nothing on its standard input, and its standard
    /// error read. Must be called on the main thread when the child shall die with this process.
    pub fn spawn(mut command: Command) -> io::Result<Child> {
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        Child::spawn_as_is(command)
    }

    /// The same for a command whose standard input and error are the caller's business.
    pub fn spawn_as_is(mut command: Command) -> io::Result<Child> {
        command.env_clear().current_dir("/");
        let mut child = command.spawn()?;
        let watched = watch(&mut child);
        let (pid, death, last_words) = match watched {
            Ok(parts) => parts,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        Ok(Child { child, left: false, death, pid, last_words })
    }

    /// Lets it live on; it is only waited for, so that no zombie stays.
    pub fn leave(mut self) {
        self.left = true;
        tokio::spawn(async move { self.wait().await });
    }

    /// What it writes to its standard output, when that is a pipe.
    pub fn stdout(&mut self) -> io::Result<tokio::net::unix::pipe::Receiver> {
        let out = self.child.stdout.take().ok_or_else(|| io::Error::other("no pipe to read"))?;
        tokio::net::unix::pipe::Receiver::from_owned_fd(OwnedFd::from(out))
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// To wait for its exit with.
    pub fn death(&self) -> Death {
        self.death.clone()
    }

    /// Waits for its exit.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.death.happened().await;
        self.child.wait()
    }

    /// Sends SIGKILL.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(self.death.0.get_ref(), Signal::KILL);
    }

    /// What it said last on its standard error.
    pub fn last_words(&self) -> String {
        let bytes = self.last_words.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        self.kill();
        // Only reaps what is dead already; init reaps the rest.
        let _ = self.child.try_wait();
    }
}

type Watched = (Pid, Death, Arc<Mutex<Vec<u8>>>);

fn watch(child: &mut std::process::Child) -> io::Result<Watched> {
    let pid = i32::try_from(child.id()).ok().and_then(crate::sys::pid);
    let pid = pid.ok_or_else(|| io::Error::other("a child without a process id"))?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let pidfd = crate::sys::readable(pidfd)?;
    let last_words = Arc::new(Mutex::new(Vec::new()));
    if let Some(stderr) = child.stderr.take() {
        let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(OwnedFd::from(stderr))?;
        tokio::spawn(listen(pipe, Arc::clone(&last_words)));
    }
    Ok((pid, Death(Arc::new(pidfd)), last_words))
}

async fn listen(mut pipe: tokio::net::unix::pipe::Receiver, last_words: Arc<Mutex<Vec<u8>>>) {
    let mut chunk = vec![0; LAST_WORDS_MAX];
    while let Ok(n @ 1..) = pipe.read(&mut chunk).await {
        let mut kept = last_words.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        kept.extend_from_slice(&chunk[..n]);
        let excess = kept.len().saturating_sub(LAST_WORDS_MAX);
        kept.drain(..excess);
    }
}
