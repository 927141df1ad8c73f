//! `aegis-worker reap`: ends and removes whatever a machine had, and proves it gone.
//!
//! It works from any state, also from none, and may be repeated: first nobody can start any more,
//! then the worker dies, then everything in the machine's cgroups, then the rest is removed, and
//! each thing is looked for once more. Plain system calls in one thread: this is the kill switch.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use aegis_wire::worker::{Ended, Reap, Reaped, Sample, run_dir};
use rustix::fs::FlockOperation;
use rustix::process::{PidfdFlags, Signal};

use crate::cgroup::{Group, Host};
use crate::meter::{self, Meter};
use crate::run_dir::{self as own, ProcessName, Record};
use crate::{disk, net, sys};

/// Reaps, within the deadline of `ask`.
pub fn reap(ask: &Reap) -> Reaped {
    let deadline = Instant::now() + Duration::from_millis(ask.deadline_ms);
    let mut remaining = Vec::new();
    // Usage is read while there is somebody to measure.
    let mut meter = Meter::default();
    let before = own::read::<Record>(&ask.run_dir, run_dir::MACHINE);
    let qemu = before.as_ref().and_then(|r| r.qemu);
    let ran = qemu.is_some_and(|q| ProcessName::of(q.pid) == Some(q));
    let there = ask.run_dir.is_dir();
    let mut usage = before.map(|before| meter.sample(&timed(before, ran)));
    if let Err(why) = end_worker(&ask.run_dir, deadline) {
        remaining.push(why);
    }
    // The worker wrote its record before it made anything, and writes no more.
    let record = own::read::<Record>(&ask.run_dir, run_dir::MACHINE);
    let group = match Host::detect().places(&ask.cgroup) {
        Ok(places) => places.and(record.as_ref().map(|r| r.group.clone()).unwrap_or_default()),
        Err(error) => {
            remaining.push(error.to_string());
            Group::default()
        }
    };
    let empty = group.kill(deadline);
    let qemu_gone = match record.as_ref().and_then(|r| r.qemu) {
        Some(qemu) => end(qemu, deadline),
        None => true,
    };
    if !empty || !qemu_gone {
        remaining.push("a process of the machine".to_owned());
    }
    if let Some(record) = record {
        usage = Some(meter.sample(&timed(record, ran)));
    }
    if let Some(ended) = own::read::<Ended>(&ask.run_dir, run_dir::ENDED) {
        usage = Some(meter::greater(ended.usage, usage.unwrap_or_default()));
    }
    if there {
        // No book: no gateway ever was.
        let egress_bytes = net::sent(&ask.run_dir);
        let counted = Sample { egress_bytes, ..Sample::default() };
        usage = Some(meter::greater(usage.unwrap_or_default(), counted));
    }
    let verified = remove(ask, &group, deadline, &mut remaining);
    Reaped { verified, remaining, usage }
}

/// When a machine died that nobody saw die, its clock says nothing about how long it ran.
fn timed(record: Record, ran: bool) -> Record {
    Record { clock: record.clock.filter(|_| ran), ..record }
}

/// Removes what is not a process, and looks for it.
fn remove(
    ask: &Reap,
    group: &Group,
    deadline: Instant,
    remaining: &mut Vec<String>,
) -> Vec<String> {
    let mut verified = Vec::new();
    if remaining.is_empty() {
        verified.push("process".to_owned());
    }
    let cgroups = group.remove(deadline);
    if cgroups.is_empty() && group.gone() {
        verified.push("cgroup".to_owned());
    }
    remaining.extend(cgroups);
    // The gateway lives in the worker, and the only link in QEMU: with both processes all is gone.
    if verified.iter().any(|v| v == "process") {
        verified.push("network".to_owned());
    }
    if let Some(path) = &ask.disk {
        let gone = [path.clone(), disk::temporary(path)].iter().all(|p| {
            let removed = std::fs::remove_file(p);
            let gone = matches!(std::fs::symlink_metadata(p), Err(e) if not_found(&e));
            if !gone {
                let why = removed.err().map_or_else(String::new, |e| format!(": {e}"));
                remaining.push(format!("the disk {}{why}", p.display()));
            }
            gone
        });
        if gone {
            verified.push("disk".to_owned());
        }
    }
    // Last, and only when all is gone: a repeated reap needs what is written there.
    if remaining.is_empty()
        && let Err(e) = std::fs::remove_dir_all(&ask.run_dir)
        && !not_found(&e)
    {
        remaining.push(format!("the run directory {}: {e}", ask.run_dir.display()));
    }
    verified
}

fn not_found(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound
}

/// Makes sure that no worker runs in this directory, nor ever will: a worker needs the lock file,
/// and it is removed by whoever holds the lock.
fn end_worker(directory: &Path, deadline: Instant) -> Result<(), String> {
    let path = directory.join(run_dir::LOCK);
    let lock = match File::open(&path) {
        Ok(lock) => lock,
        Err(e) if not_found(&e) => return Ok(()),
        Err(e) => return Err(format!("the worker's lock {}: {e}", path.display())),
    };
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        kill_holder(directory, &lock, deadline);
        wait_for_lock(&lock, deadline)?;
    } else if own::read::<ProcessName>(directory, run_dir::LOCK).is_none() {
        // Nobody had it ever: a worker that was started a moment ago would end by itself, but what
        // is still there is not proven gone.
        for late in late_workers(directory) {
            if !end(late, deadline) {
                return Err("a worker that was just started".to_owned());
            }
        }
    }
    match std::fs::remove_file(&path) {
        Err(e) if !not_found(&e) => Err(format!("the worker's lock {}: {e}", path.display())),
        _ => Ok(()),
    }
}

fn kill_holder(directory: &Path, lock: &File, deadline: Instant) {
    if let Some(worker) = own::read::<ProcessName>(directory, run_dir::LOCK) {
        end(worker, deadline);
        return;
    }
    // It holds the lock, and did not write its name yet.
    let holder = own::lock_holder(lock).ok().flatten();
    if let Some(worker) = holder.and_then(ProcessName::of) {
        end(worker, deadline);
    }
}

/// Workers of this directory, by their words: they wrote nothing down yet.
fn late_workers(directory: &Path) -> Vec<ProcessName> {
    let directory = directory.as_os_str().as_bytes();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: i32| {
        // The name first: should the id be another's when its words are read, this names nobody.
        let name = ProcessName::of(pid)?;
        let text = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<&[u8]> = text.split(|byte| *byte == 0).collect();
        words.windows(2).any(|pair| pair == [b"machine", directory]).then_some(name)
    })
    .collect()
}

/// Waits for the lock in a thread of its own: a lock can't be waited for with a deadline.
fn wait_for_lock(lock: &File, deadline: Instant) -> Result<(), String> {
    if rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
        return Ok(());
    }
    let theirs = lock.try_clone().map_err(|e| format!("the worker's lock: {e}"))?;
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = tell.send(rustix::fs::flock(&theirs, FlockOperation::LockExclusive));
    });
    match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(Ok(())) => Ok(()),
        _ => Err("the machine's worker".to_owned()),
    }
}

/// Kills a process, if it is still the one that was meant, and waits; true when it is gone.
fn end(name: ProcessName, deadline: Instant) -> bool {
    let Some(pid) = sys::pid(name.pid) else { return true };
    // The descriptor first, then the look: what it names can't change any more.
    let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return ProcessName::of(name.pid) != Some(name);
    };
    if ProcessName::of(name.pid) != Some(name) {
        return true;
    }
    let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
    sys::wait_readable(&pidfd, deadline)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(dir: &Path) -> Reap {
        Reap {
            run_dir: dir.join("run"),
            cgroup: "aegis/test-none/inst-none".to_owned(),
            disk: Some(dir.join("disk.raw")),
            deadline_ms: 2000,
        }
    }

    #[test]
    fn nothing_is_quickly_proven() {
        let dir = tempfile::tempdir().unwrap();
        let reaped = reap(&ask(dir.path()));
        assert_eq!(reaped.verified, ["process", "cgroup", "network", "disk"]);
        assert!(reaped.remaining.is_empty() && reaped.usage.is_none());
    }

    #[test]
    fn half_made_machines_go_and_late_workers_find_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let ask = ask(dir.path());
        std::fs::create_dir(&ask.run_dir).unwrap();
        File::create(ask.run_dir.join("lock")).unwrap();
        std::fs::write(dir.path().join("disk.raw.new"), b"half").unwrap();
        let late = File::open(ask.run_dir.join("lock")).unwrap();
        assert!(reap(&ask).remaining.is_empty());
        assert!(!ask.run_dir.exists() && !dir.path().join("disk.raw.new").exists());
        drop(late);
        assert!(own::RunDir::claim(&ask.run_dir).is_err());
        assert!(reap(&ask).remaining.is_empty(), "again");
    }

    #[test]
    fn a_worker_that_did_not_begin_yet_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let ask = ask(dir.path());
        std::fs::create_dir(&ask.run_dir).unwrap();
        File::create(ask.run_dir.join("lock")).unwrap();
        let mut late = std::process::Command::new("sh")
            .args(["-c", "read line", "sh", "machine"])
            .arg(&ask.run_dir)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        assert!(reap(&ask).remaining.is_empty());
        let ended = late.try_wait().unwrap();
        assert!(ended.is_some_and(|status| !status.success()), "{ended:?}");
    }

    #[test]
    fn the_holder_of_the_lock_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let ask = ask(dir.path());
        std::fs::create_dir(&ask.run_dir).unwrap();
        let lock = ask.run_dir.join("lock");
        File::create(&lock).unwrap();
        let mut holder = std::process::Command::new("flock")
            .arg(&lock)
            .args(["sh", "-c", "echo held; exec sleep 1000"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut held = [0; 4];
        io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut held).unwrap();
        // flock(1) forks: its child keeps the descriptor, so both must die.
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let child: i32 = std::fs::read_to_string(children).unwrap().trim().parse().unwrap();
        let text = serde_json::to_vec(&ProcessName::of(child)).unwrap();
        std::fs::write(&lock, text).unwrap();
        let reaped = reap(&ask);
        assert!(reaped.remaining.is_empty(), "{:?}", reaped.remaining);
        holder.wait().unwrap();
    }
}
