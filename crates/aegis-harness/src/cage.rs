//! The cgroup of all processes that are not the harness: a fork bomb or a memory hog in it leaves
//! the harness room to answer. Against accidents, not against attackers: root inside can leave it,
//! and then harms its own machine alone.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

/// How long processes may take to stand still: one in the kernel's hands does so when it is back.
const HOLD_DEADLINE: Duration = Duration::from_secs(5);
/// Where cgroup v2 is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";
const NAME: &str = "user";
/// What the kernel says of a cgroup that was removed.
const GONE: i32 = rustix::io::Errno::NODEV.raw_os_error();
/// Memory that user processes can't have: the harness's own growth, buffers of the channel and of
/// the kernel, bytes.
const MEMORY_RESERVE: u64 = 16 << 20;
/// Threads of the machine that user processes can't have.
const THREADS_RESERVE: u64 = 256;
/// Most threads that user processes get; the number of process ids is limited too.
const THREADS_MAX: u64 = 16_384;

/// The cgroup of user processes.
pub struct Cage {
    directory: OwnedFd,
    path: PathBuf,
    // Whose processes stand still: opened, so that a clone need not look for them.
    held: Mutex<Vec<File>>,
}

impl Cage {
    /// Makes the cgroup, with limits that follow from the machine's size.
    pub fn make() -> io::Result<Cage> {
        let mount = Path::new(MOUNT);
        // One by one: a kernel may lack one of them.
        for controller in ["+pids", "+memory", "+cpu"] {
            if let Err(e) = fs::write(mount.join("cgroup.subtree_control"), controller) {
                crate::note::note(&format!("cgroup {controller}: {e}"));
            }
        }
        let path = mount.join(NAME);
        fs::create_dir(&path)?;
        let directory = File::open(&path)?.into();
        let cage = Cage { directory, path, held: Mutex::default() };
        let threads = fs::read_to_string("/proc/sys/kernel/threads-max")?;
        cage.set("pids.max", pids_max(threads.trim().parse().unwrap_or(0)));
        Ok(cage)
    }

    /// Limits memory to what is available now less a reserve.
    pub fn limit_memory(&self) -> io::Result<()> {
        let info = fs::read_to_string("/proc/meminfo")?;
        let available = available_bytes(&info)
            .ok_or_else(|| io::Error::other("/proc/meminfo does not tell what is available"))?;
        self.set("memory.max", memory_max(available));
        Ok(())
    }

    /// Forbids new processes inside.
    pub fn close(&self) {
        self.set("pids.max", 0);
    }

    /// Has all processes of the machine stand still, also those that made themselves cgroups beside
    /// this one; returns when they do. Blocks.
    pub fn hold(&self) -> io::Result<()> {
        let deadline = Instant::now() + HOLD_DEADLINE;
        let held = all()?.into_iter().try_for_each(|cgroup| {
            let switch = File::options().write(true).open(cgroup.join("cgroup.freeze"))?;
            self.held.lock().unwrap_or_else(PoisonError::into_inner).push(switch.try_clone()?);
            freeze(&cgroup, &switch, deadline)
        });
        if held.is_err() {
            self.release()?;
        }
        held
    }

    /// Lets them go on. Nobody inside could make a cgroup meanwhile.
    pub fn release(&self) -> io::Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut released = Ok(());
        for switch in held.drain(..) {
            match switch.write_all_at(b"0", 0) {
                // Who was about to stand still may have removed it.
                Err(e) if e.raw_os_error() == Some(GONE) => {}
                other => released = released.and(other),
            }
        }
        released
    }

    /// What a process is born into.
    pub fn door(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    fn set(&self, file: &str, value: u64) {
        // Root inside may have unmounted it: its own loss.
        if let Err(e) = fs::write(self.path.join(file), value.to_string()) {
            crate::note::note(&format!("cgroup {file}: {e}"));
        }
    }
}

/// The cgroups below the root, in which the harness and the kernel's own threads are.
fn all() -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(MOUNT)? {
        let path = entry?.path();
        if path.join("cgroup.freeze").exists() {
            found.push(path);
        }
    }
    Ok(found)
}

fn freeze(cgroup: &Path, switch: &File, deadline: Instant) -> io::Result<()> {
    // Opened before: what happens after is not missed.
    let mut events = File::open(cgroup.join("cgroup.events"))?;
    switch.write_all_at(b"1", 0)?;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        // The kernel says by this that the file has changed.
        let mut files = [PollFd::new(&events, PollFlags::PRI)];
        if rustix::event::poll(&mut files, Some(&left))? == 0 {
            let late = "a process does not stand still";
            return Err(io::Error::new(io::ErrorKind::TimedOut, late));
        }
    }
}

fn pids_max(threads_max: u64) -> u64 {
    threads_max.saturating_sub(THREADS_RESERVE).clamp(64, THREADS_MAX)
}

fn memory_max(available: u64) -> u64 {
    available.saturating_sub(MEMORY_RESERVE).max(available / 2)
}

/// `MemAvailable` of /proc/meminfo.
fn available_bytes(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let info = "MemTotal:         236012 kB\nMemAvailable:     200000 kB\n";
        assert_eq!(available_bytes(info), Some(200_000 * 1024));
        assert_eq!(available_bytes("MemTotal: 1 kB"), None);
        assert_eq!(available_bytes("MemAvailable: many kB"), None);
    }

    #[test]
    fn something_is_left_for_everybody() {
        assert_eq!(memory_max(200 << 20), 184 << 20);
        assert_eq!(memory_max(20 << 20), 10 << 20);
        assert_eq!(pids_max(1700), 1444);
        assert_eq!(pids_max(0), 64);
        assert_eq!(pids_max(500_000), THREADS_MAX);
    }
}
