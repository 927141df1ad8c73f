//! All processes: each ends here, the harness's own children and every orphan.
//!
//! Starting, reaping and signalling share one lock, so that no signal reaches a process that has
//! taken over the number of one that was reaped.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aegis_wire::channel::ProcessExit;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use crate::sys::{self, Birth, Stillborn};

/// So many are reaped in a row before others get their turn.
const BATCH: usize = 64;
/// Room for some of the kernel's descriptions of a signal, bytes.
const SIGNALS_LEN: usize = 4 * 128;

/// Starts, reaps, signals.
pub struct Reaper {
    waiting: Mutex<HashMap<Pid, oneshot::Sender<ProcessExit>>>,
    alone: watch::Sender<bool>,
}

/// A process that the harness started.
pub struct Child {
    /// Its id, and that of its group and session.
    pub pid: Pid,
    /// How it ended, once it has.
    pub exit: oneshot::Receiver<ProcessExit>,
}

impl Reaper {
    /// Nobody is there yet.
    pub fn new() -> Reaper {
        Reaper { waiting: Mutex::default(), alone: watch::Sender::new(true) }
    }

    /// Starts a process.
    pub fn spawn(&self, birth: &Birth<'_>) -> Result<Child, Stillborn> {
        let mut waiting = self.lock();
        let pid = sys::spawn(birth)?;
        let (tell, exit) = oneshot::channel();
        waiting.insert(pid, tell);
        self.alone.send_replace(false);
        Ok(Child { pid, exit })
    }

    /// Signals the group of a process that the harness started. False when it has ended.
    pub fn signal_group(&self, pid: Pid, signal: Signal) -> bool {
        let waiting = self.lock();
        waiting.contains_key(&pid) && rustix::process::kill_process_group(pid, signal).is_ok()
    }

    /// Completes when no other process is left.
    pub async fn alone(&self) {
        let mut alone = self.alone.subscribe();
        // Its sender lives as long as `self`.
        let _ = alone.wait_for(|alone| *alone).await;
    }

    /// Reaps for ever, whenever `ends` (see [`sys::children`]) tells that somebody ended.
    pub async fn run(&self, ends: OwnedFd) -> io::Result<()> {
        let ends: AsyncFd<OwnedFd> = sys::watch(ends)?;
        loop {
            let mut ready = ends.readable().await?;
            // One signal stands for many children: it is forgotten before they are looked for.
            let mut signals = [0; SIGNALS_LEN];
            while rustix::io::read(&ends, &mut signals).is_ok() {}
            ready.clear_ready();
            while !self.reap_some() {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Reaps up to [`BATCH`]; true when nobody else waits to be reaped.
    fn reap_some(&self) -> bool {
        let mut waiting = self.lock();
        for _ in 0..BATCH {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(tell) = waiting.remove(&pid) {
                        // Who asked may be gone.
                        let _ = tell.send(exit_of(status));
                    }
                }
                Ok(None) => return true,
                Err(Errno::CHILD) => {
                    self.alone.send_replace(true);
                    return true;
                }
                Err(_) => return true,
            }
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pid, oneshot::Sender<ProcessExit>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn exit_of(status: WaitStatus) -> ProcessExit {
    let signal = status.terminating_signal();
    let code = match signal {
        Some(signal) => 128 + signal,
        None => status.exit_status().unwrap_or(-1),
    };
    ProcessExit { code, signal, timed_out: false }
}
