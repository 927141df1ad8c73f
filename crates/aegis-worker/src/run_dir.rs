//! A machine's run directory: the lock that says who owns it, what was made, how it ended.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use aegis_wire::worker::{Ended, run_dir};
use anyhow::Context as _;
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cgroup::Group;

/// Memory of a suspended machine.
pub const MEMORY: &str = "memory";

/// Largest of the small JSON files here, bytes.
const FILE_MAX: u64 = 1 << 20;

/// A process, told apart from a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessName {
    /// Process id.
    pub pid: i32,
    /// When it was started, clock ticks since the host's boot.
    pub start: u64,
}

impl ProcessName {
    /// Of a process that is there.
    pub fn of(pid: i32) -> Option<ProcessName> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in brackets may hold anything, also brackets.
        let after = stat.get(stat.rfind(')')? + 2..)?;
        let start = after.split(' ').nth(19)?.parse().ok()?;
        Some(ProcessName { pid, start })
    }
}

/// What the worker made or is about to make: `machine.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The worker.
    pub worker: Option<ProcessName>,
    /// Its cgroups.
    pub group: Group,
    /// Its QEMU, once there is one.
    pub qemu: Option<ProcessName>,
    /// Its disk.
    pub disk: PathBuf,
    /// Size of its memory, bytes.
    pub memory_bytes: u64,
    /// Its clock, once it runs.
    pub clock: Option<ClockRecord>,
    /// CPU time that it took as a spare, before it was anybody's, nanoseconds.
    #[serde(default)]
    pub cpu_before_ns: u64,
}

/// When the machine ran, in milliseconds of the host's monotonic clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockRecord {
    /// When its clone was started.
    pub started_ms: u64,
    /// How long it was frozen, up to the last thaw.
    pub frozen_ms: u64,
    /// Since when it is frozen.
    pub frozen_since_ms: Option<u64>,
}

impl ClockRecord {
    /// How long it ran until `now_ms`, without frozen time, milliseconds.
    pub fn uptime_ms(self, now_ms: u64) -> u64 {
        let until = self.frozen_since_ms.unwrap_or(now_ms);
        until.saturating_sub(self.started_ms).saturating_sub(self.frozen_ms)
    }
}

/// The host's monotonic clock, milliseconds: the same in every process.
pub fn monotonic_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// A run directory that this worker owns, as long as it lives.
pub struct RunDir {
    path: PathBuf,
    lock: File,
}

impl RunDir {
    /// Takes the lock; fails when it is taken, or when the directory was given up.
    pub fn claim(path: &Path) -> anyhow::Result<RunDir> {
        let at = path.join(run_dir::LOCK);
        let lock =
            File::options().read(true).write(true).open(&at).with_context(|| {
                format!("{} is not there: this machine was given up", at.display())
            })?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("{} is taken by another worker", at.display()))?;
        // A reaper removes the lock under the lock: ours may be one that nobody looks at any more.
        let ours = lock.metadata()?;
        let there = std::fs::metadata(&at).ok().filter(|m| m.ino() == ours.ino());
        anyhow::ensure!(there.is_some(), "{} was removed: this machine was given up", at.display());
        let me = ProcessName::of(rustix::process::getpid().as_raw_nonzero().get());
        lock.write_all_at(&serde_json::to_vec(&me)?, 0)?;
        Ok(RunDir { path: path.to_owned(), lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Follows the directory, which was renamed; fails when this is another one.
    pub fn follow(&mut self, to: PathBuf) -> anyhow::Result<()> {
        let ours = self.lock.metadata()?;
        let there = std::fs::metadata(to.join(run_dir::LOCK))
            .with_context(|| format!("{} is not there", to.display()))?;
        anyhow::ensure!(there.ino() == ours.ino(), "{} is another machine's", to.display());
        self.path = to;
        Ok(())
    }

    /// Writes what was made or is about to be.
    pub fn write_record(&self, record: &Record) -> anyhow::Result<()> {
        self.write(run_dir::MACHINE, record)
    }

    /// Writes how the machine ended.
    pub fn write_ended(&self, ended: &Ended) -> anyhow::Result<()> {
        self.write(run_dir::ENDED, ended)
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> anyhow::Result<()> {
        let temporary = self.path.join(format!("{name}.new"));
        let write = || -> anyhow::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec(value)?)?;
            Ok(std::fs::rename(&temporary, self.path.join(name))?)
        };
        write().with_context(|| format!("can't write {name} in {}", self.path.display()))
    }
}

/// Reads one of the files; `None` when it is not there or not whole.
pub fn read<T: DeserializeOwned>(directory: &Path, name: &str) -> Option<T> {
    let mut text = Vec::new();
    File::open(directory.join(name)).ok()?.take(FILE_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// The process that holds a lock file, from /proc/locks.
pub fn lock_holder(lock: &File) -> io::Result<Option<i32>> {
    let inode = lock.metadata()?.ino();
    let table = std::fs::read_to_string("/proc/locks")?;
    Ok(parse_lock_holder(&table, inode))
}

fn parse_lock_holder(table: &str, inode: u64) -> Option<i32> {
    table.lines().find_map(|line| {
        // "1: FLOCK  ADVISORY  WRITE 712 08:01:1835 0 EOF"
        let mut words = line.split_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            return None;
        }
        let (pid, file) = (words.nth(2)?, words.next()?);
        (file.rsplit(':').next()?.parse::<u64>().ok()? == inode).then(|| pid.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_worker_owns_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        assert!(RunDir::claim(dir.path()).is_err(), "no lock: given up");
        File::create(dir.path().join("lock")).unwrap();
        let claimed = RunDir::claim(dir.path()).unwrap();
        assert!(RunDir::claim(dir.path()).is_err(), "taken");
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let lock = File::open(dir.path().join("lock")).unwrap();
        assert_eq!(lock_holder(&lock).unwrap(), Some(me));
        assert_eq!(read::<ProcessName>(dir.path(), "lock"), ProcessName::of(me));
        drop(claimed);
        RunDir::claim(dir.path()).unwrap();
    }

    #[test]
    fn frozen_time_does_not_count() {
        let mut clock = ClockRecord { started_ms: 1000, ..ClockRecord::default() };
        assert_eq!(clock.uptime_ms(1500), 500);
        clock.frozen_since_ms = Some(1500);
        assert_eq!(clock.uptime_ms(9000), 500);
        clock = ClockRecord { frozen_ms: 7500, frozen_since_ms: None, ..clock };
        assert_eq!(clock.uptime_ms(9100), 600);
    }

    #[test]
    fn holders_are_found() {
        let table = "1: POSIX  ADVISORY  WRITE 5 00:2d:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 712 08:01:77 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 9 08:01:77 0 EOF\n";
        assert_eq!(parse_lock_holder(table, 77), Some(712));
        assert_eq!(parse_lock_holder(table, 78), None);
    }
}
