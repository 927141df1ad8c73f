//! A small QMP client: JSON lines over a socket pair, with descriptors where a command takes one.
//!
//! QEMU is not trusted here either: a guest that broke out of its machine sits in it. So lines are
//! bounded, and what QEMU says only ever means "done", "failed" or one of a few words.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::io::{BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::lines;

/// Longest line that is taken from QEMU, bytes.
const LINE_MAX: usize = 64 * 1024;
/// One ordinary QMP command.
pub const QMP_DEADLINE: Duration = Duration::from_secs(10);

/// Why a QMP command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused it.
    #[error("QEMU refused {command}: {text}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        text: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer {command} within {}s", QMP_DEADLINE.as_secs())]
    Deadline {
        /// The command.
        command: String,
    },
    /// QEMU is gone.
    #[error("QEMU closed its monitor before {command} was answered")]
    Closed {
        /// The command.
        command: String,
    },
    /// The command could not be written.
    #[error("{command} can't be written to QEMU")]
    Write {
        /// The command.
        command: String,
        /// What went wrong.
        #[source]
        error: io::Error,
    },
}

/// What QEMU told by events so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// The machine's processors have begun to run.
    pub resumed: bool,
    /// When they last stopped.
    pub stopped_at: Option<Instant>,
    /// State of the migration, as QEMU spells it.
    pub migration: String,
    /// State of the last job, as QEMU spells it.
    pub job: String,
    /// What went wrong with it.
    pub job_error: Option<String>,
    /// The monitor is closed.
    pub closed: bool,
}

type Answer = Result<Value, String>;
type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>;

/// A monitor connection.
pub struct Qmp {
    write: tokio::sync::Mutex<(OwnedWriteHalf, u64)>,
    pending: Pending,
    told: Arc<watch::Sender<Seen>>,
}

/// A command that was sent and is not answered yet.
pub struct Sent {
    command: &'static str,
    answer: oneshot::Receiver<Answer>,
}

impl Qmp {
    /// Speaks on this side of a socket pair whose other side is QEMU's monitor. The greeting need
    /// not have come yet.
    pub fn start(stream: UnixStream) -> Qmp {
        let (read, write) = stream.into_split();
        let pending: Pending = Arc::default();
        let told = Arc::new(watch::Sender::new(Seen::default()));
        tokio::spawn(listen(read, Arc::clone(&pending), Arc::clone(&told)));
        Qmp { write: tokio::sync::Mutex::new((write, 0)), pending, told }
    }

    /// Sends a command and waits for its answer.
    pub async fn execute(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, None).await?.answer().await
    }

    /// Sends a command, with a descriptor for commands that take one, and does not wait.
    pub async fn send(
        &self,
        command: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Sent, QmpError> {
        let write_error = |error| QmpError::Write { command: command.to_owned(), error };
        let (tell, answer) = oneshot::channel();
        let mut write = self.write.lock().await;
        write.1 += 1;
        let id = write.1;
        let mut message = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let line = lines::line(&message).map_err(write_error)?;
        lock(&self.pending).insert(id, tell);
        if self.told.borrow().closed {
            lock(&self.pending).remove(&id);
            return Err(QmpError::Closed { command: command.to_owned() });
        }
        let sending = tokio::time::timeout(QMP_DEADLINE, write_all(&write.0, &line, fd)).await;
        match sending {
            Ok(Ok(())) => Ok(Sent { command, answer }),
            Ok(Err(error)) => Err(write_error(error)),
            Err(_) => Err(QmpError::Deadline { command: command.to_owned() }),
        }
    }

    /// What QEMU told by events, to wait on.
    pub fn seen(&self) -> watch::Receiver<Seen> {
        self.told.subscribe()
    }

    /// What was said of an earlier migration does not count any more.
    pub fn forget_migration(&self) {
        self.told.send_modify(|seen| seen.migration.clear());
    }

    /// Waits until a migration that was begun is in this state.
    pub async fn migration(&self, state: &'static str) -> anyhow::Result<()> {
        // It may be further already when we look.
        let step = |word: &str| STEPS.iter().position(|step| *step == word);
        let ends = |s: &Seen| matches!(s.migration.as_str(), "failed" | "cancelled");
        let seen = self.until(|s| step(&s.migration) >= step(state) || ends(s)).await?;
        anyhow::ensure!(!ends(&seen), "QEMU could not save it: {}", seen.migration);
        Ok(())
    }

    /// Waits until a job that was begun has done what it can while the machine runs.
    pub async fn job_ready(&self) -> anyhow::Result<()> {
        let seen = self.until(|s| matches!(s.job.as_str(), "ready" | "null")).await?;
        anyhow::ensure!(seen.job == "ready", "{}", failed(&seen));
        Ok(())
    }

    /// Waits until no job is there.
    pub async fn job_gone(&self) -> anyhow::Result<()> {
        let seen = self.until(|s| matches!(s.job.as_str(), "" | "null")).await?;
        anyhow::ensure!(seen.job_error.is_none(), "{}", failed(&seen));
        Ok(())
    }

    async fn until(&self, what: impl FnMut(&Seen) -> bool) -> anyhow::Result<Seen> {
        let (mut seen, mut what) = (self.told.subscribe(), what);
        let now = seen.wait_for(|s| s.closed || what(s)).await?.clone();
        anyhow::ensure!(!now.closed, "QEMU closed its monitor");
        Ok(now)
    }
}

/// What a migration goes through, as QEMU spells it.
const STEPS: [&str; 5] = ["setup", "active", "pre-switchover", "device", "completed"];

fn failed(seen: &Seen) -> String {
    let why = seen.job_error.as_deref().unwrap_or("no reason given");
    format!("QEMU could not copy the disk: {why}")
}

impl Sent {
    /// Waits for the answer.
    pub async fn answer(self) -> Result<Value, QmpError> {
        let command = || self.command.to_owned();
        match tokio::time::timeout(QMP_DEADLINE, self.answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(text))) => Err(QmpError::Refused { command: command(), text }),
            Ok(Err(_)) => Err(QmpError::Closed { command: command() }),
            Err(_) => Err(QmpError::Deadline { command: command() }),
        }
    }
}

async fn write_all(
    to: &OwnedWriteHalf,
    mut bytes: &[u8],
    mut fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let stream: &UnixStream = to.as_ref();
    while !bytes.is_empty() {
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
                if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                    return Err(io::Error::other("no room for a descriptor"));
                }
                let part = [io::IoSlice::new(bytes)];
                rustix::net::sendmsg(stream.as_fd(), &part, &mut control, SendFlags::NOSIGNAL)
                    .map_err(io::Error::from)
            })
            .await?;
        fd = None;
        bytes = &bytes[sent..];
    }
    Ok(())
}

async fn listen(read: OwnedReadHalf, pending: Pending, told: Arc<watch::Sender<Seen>>) {
    let mut read = BufReader::new(read);
    while let Ok(Some(line)) = lines::read(&mut read, LINE_MAX).await {
        let Ok(message) = serde_json::from_slice::<Value>(&line) else { continue };
        if let Some(event) = message["event"].as_str() {
            match event {
                "RESUME" => told.send_modify(|seen| seen.resumed = true),
                "STOP" => told.send_modify(|seen| {
                    seen.resumed = false;
                    seen.stopped_at = Some(Instant::now());
                }),
                "JOB_STATUS_CHANGE" => {
                    let status = message["data"]["status"].as_str().unwrap_or_default();
                    told.send_modify(|seen| {
                        if status == "created" {
                            seen.job_error = None;
                        }
                        status.clone_into(&mut seen.job);
                    });
                }
                "SHUTDOWN" => {
                    let reason = &message["data"]["reason"];
                    tracing::warn!(%reason, "QEMU ends");
                }
                "BLOCK_JOB_COMPLETED" => {
                    let error = message["data"]["error"].as_str().map(str::to_owned);
                    told.send_modify(|seen| seen.job_error = error);
                }
                "MIGRATION" => {
                    let status = message["data"]["status"].as_str().unwrap_or_default();
                    told.send_modify(|seen| status.clone_into(&mut seen.migration));
                }
                _ => {}
            }
            continue;
        }
        let Some(id) = message["id"].as_u64() else { continue };
        let Some(asker) = lock(&pending).remove(&id) else { continue };
        let _ = asker.send(match message.get("error") {
            Some(error) => Err(error["desc"].as_str().unwrap_or("no reason given").to_owned()),
            None => Ok(message["return"].clone()),
        });
    }
    told.send_modify(|seen| seen.closed = true);
    lock(&pending).clear();
}

fn lock(pending: &Pending) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
    pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn answers_find_their_askers_and_events_are_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qmp = Qmp::start(ours);
        let first = qmp.send("qmp_capabilities", Value::Null, None).await.unwrap();
        let second = qmp.send("stop", Value::Null, None).await.unwrap();
        let (read, mut write) = theirs.into_split();
        let mut asked = BufReader::new(read).lines();
        assert!(asked.next_line().await.unwrap().unwrap().contains("qmp_capabilities"));
        write
            .write_all(
                b"{\"QMP\":{}}\n{\"event\":\"RESUME\"}\nnot json\n\
                  {\"error\":{\"desc\":\"no\"},\"id\":2}\n{\"return\":{},\"id\":1}\n",
            )
            .await
            .unwrap();
        assert!(matches!(second.answer().await, Err(QmpError::Refused { .. })));
        first.answer().await.unwrap();
        assert!(qmp.seen().borrow().resumed);
        drop((asked, write));
        qmp.seen().wait_for(|seen| seen.closed).await.unwrap();
        assert!(matches!(
            qmp.execute("cont", Value::Null).await,
            Err(QmpError::Closed { .. } | QmpError::Write { .. })
        ));
    }
}
