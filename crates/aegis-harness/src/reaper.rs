//! All processes: each ends here, the harness's own children and every orphan.
//!
//! Reaping and signalling share one lock, so that no signal reaches a process that has taken over
//! the number of one that was reaped.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, Ordering};
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
    known: Mutex<Known>,
    /// One birth at a time.
    turn: Mutex<()>,
    /// The id of the child that is being born; 0 as long as there is none.
    newborn: AtomicI32,
    alone: watch::Sender<bool>,
}

#[derive(Default)]
struct Known {
    waiting: HashMap<Pid, oneshot::Sender<ProcessExit>>,
    /// A birth is under way.
    birth: bool,
    /// How the child of that birth ended, if it was quicker than its parent.
    early: Option<ProcessExit>,
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
        Reaper {
            known: Mutex::default(),
            turn: Mutex::default(),
            newborn: AtomicI32::new(0),
            alone: watch::Sender::new(true),
        }
    }

    /// Starts a process. Takes as long as the machine needs for it, which is for ever where its
    /// memory is fought for: not for the runtime's thread.
    pub fn spawn(&self, birth: &Birth<'_>) -> Result<Child, Stillborn> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock().birth = true;
        self.alone.send_replace(false);
        let born = sys::spawn(birth, &self.newborn);
        let mut known = self.lock();
        known.birth = false;
        self.newborn.store(0, Ordering::Relaxed);
        let child = born.map(|pid| {
            let (tell, exit) = oneshot::channel();
            match known.early.take() {
                Some(ended) => drop(tell.send(ended)),
                None => drop(known.waiting.insert(pid, tell)),
            }
            Child { pid, exit }
        });
        known.early = None;
        drop(known);
        if child.is_err() {
            // Nothing else may ever end that would tell that nobody is there.
            self.reap_some();
        }
        child
    }

    /// Signals the group of a process that the harness started. False when it has ended.
    pub fn signal_group(&self, pid: Pid, signal: Signal) -> bool {
        let known = self.lock();
        known.waiting.contains_key(&pid) && rustix::process::kill_process_group(pid, signal).is_ok()
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
        let mut known = self.lock();
        for _ in 0..BATCH {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    match known.waiting.remove(&pid) {
                        // Who asked may be gone.
                        Some(tell) => drop(tell.send(exit_of(status))),
                        None if self.newborn.load(Ordering::Relaxed) == raw(pid) => {
                            known.early = Some(exit_of(status));
                        }
                        None => {}
                    }
                }
                Ok(None) => return true,
                Err(Errno::CHILD) => {
                    self.alone.send_replace(!known.birth);
                    return true;
                }
                Err(_) => return true,
            }
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn raw(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}

fn exit_of(status: WaitStatus) -> ProcessExit {
    let signal = status.terminating_signal();
    let code = match signal {
        Some(signal) => 128 + signal,
        None => status.exit_status().unwrap_or(-1),
    };
    ProcessExit { code, signal, timed_out: false }
}
