//! cgroups of one machine: limits, measures, the end of everything in them. Version 1 (a tree per
//! controller, also beside a v2 tree that has none) and version 2.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use aegis_wire::words::CpuMillis;
use rustix::process::{PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::sys;

/// Period of the CPU quota, microseconds: short, so that a throttled machine still answers.
const CPU_PERIOD_US: u64 = 20_000;
/// The kernel's least quota and longest period, microseconds.
const CPU_QUOTA_MIN_US: u64 = 1000;
const CPU_PERIOD_MAX_US: u64 = 1_000_000;
/// How often a group is made anew when its parents vanish meanwhile.
const MAKE_ATTEMPTS: usize = 8;
/// v1 tells nobody that a group became empty: so often it is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// What each controller is needed for, v1.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuacct", "memory", "pids"];

/// Why a machine's limits can't be enforced.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has no (usable) cgroups.
    #[error("{missing}; {fix}")]
    Unusable {
        /// What is missing.
        missing: String,
        /// What to do about it.
        fix: &'static str,
    },
    /// A name that leads elsewhere.
    #[error("{0:?} is not a cgroup name")]
    Name(String),
    /// The group of an earlier boot is still there.
    #[error("{} is still there; it must be reaped first", .0.display())]
    StillThere(PathBuf),
}

const FIX: &str = "run aegisd as root, or as a systemd service with Delegate=yes";

/// Where this host's cgroups are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// One tree per controller: its name and where it is mounted.
    V1(Vec<(String, PathBuf)>),
    /// One tree; directories below which groups may be made, best first.
    V2(Vec<PathBuf>),
    /// None.
    None,
}

/// Limits of a machine's processes, as far as they hold from its start.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// All memory of the machine's QEMU.
    pub memory_bytes: u64,
    /// Threads of the machine's QEMU.
    pub pids: u32,
}

/// The groups of one machine: one directory per v1 tree, or one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    v2: bool,
    directories: Vec<PathBuf>,
}

impl Host {
    /// Looks at this host.
    pub fn detect() -> Host {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Host::parse(&mounts, &own)
    }

    /// The same from the texts of /proc/self/mountinfo and /proc/self/cgroup.
    pub fn parse(mountinfo: &str, own: &str) -> Host {
        let mut v1: Vec<(String, PathBuf)> = Vec::new();
        let mut v2 = None;
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let Some(point) = left.split(' ').nth(4) else { continue };
            let mut right = right.split(' ');
            let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
            match kind {
                Some("cgroup") => {
                    for name in options.split(',').filter(|o| CONTROLLERS.contains(o)) {
                        v1.push((name.to_owned(), PathBuf::from(point)));
                    }
                }
                Some("cgroup2") => v2 = Some(PathBuf::from(point)),
                _ => {}
            }
        }
        if !v1.is_empty() {
            v1.sort();
            v1.dedup_by(|a, b| a.0 == b.0);
            return Host::V1(v1);
        }
        let Some(root) = v2 else { return Host::None };
        // Root of the tree, else the highest of our own groups that was delegated to us.
        let mut bases = vec![root.clone()];
        let path = own.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
        let mut at = root;
        for part in path.split('/').filter(|p| !p.is_empty()) {
            at.push(part);
            bases.push(at.clone());
        }
        Host::V2(bases)
    }

    /// `v1`, `v2` or `none`.
    pub fn name(&self) -> &'static str {
        match self {
            Host::V1(_) => "v1",
            Host::V2(_) => "v2",
            Host::None => "none",
        }
    }

    /// Every place where a group of this name can be.
    pub fn places(&self, name: &str) -> Result<Group, CgroupError> {
        let name = checked(name)?;
        let (v2, mut directories) = match self {
            Host::V1(trees) => (false, trees.iter().map(|(_, at)| at.join(name)).collect()),
            Host::V2(bases) => (true, bases.iter().map(|at| at.join(name)).collect()),
            Host::None => (false, Vec::new()),
        };
        directories.dedup();
        Ok(Group { v2, directories })
    }

    /// Makes a machine's groups with all limits but the CPU quota, or says why that can't be.
    pub fn make(&self, name: &str, limits: Limits) -> Result<Group, CgroupError> {
        let unusable = |missing: String| CgroupError::Unusable { missing, fix: FIX };
        let group = match self {
            Host::None => return Err(unusable("no cgroups are mounted".to_owned())),
            Host::V1(trees) => {
                let there = |n: &&&str| trees.iter().any(|(t, _)| t == *n);
                if let Some(missing) = CONTROLLERS.iter().find(|n| !there(n)) {
                    return Err(unusable(format!("the {missing} cgroup is not mounted")));
                }
                self.places(name)?
            }
            Host::V2(bases) => {
                let base = v2_base(bases).map_err(|e| unusable(e.to_string()))?;
                Group { v2: true, directories: vec![base.join(checked(name)?)] }
            }
        };
        let made = group.make(self, limits);
        match made {
            Ok(()) => Ok(group),
            Err(Problem::StillThere(at)) => Err(CgroupError::StillThere(at)),
            Err(Problem::Io(at, e)) => {
                group.remove(Instant::now());
                Err(unusable(format!("{} can't be set: {e}", at.display())))
            }
        }
    }
}

enum Problem {
    StillThere(PathBuf),
    Io(PathBuf, io::Error),
}

impl Group {
    fn make(&self, host: &Host, limits: Limits) -> Result<(), Problem> {
        for directory in &self.directories {
            self.make_one(host, directory)?;
        }
        let memory = limits.memory_bytes.to_string();
        let pids = limits.pids.to_string();
        if self.v2 {
            self.set("memory.max", &memory)?;
            // Where swap accounting is off there is nothing to forbid.
            let _ = self.set("memory.swap.max", "0");
            self.set("memory.oom.group", "1")?;
        } else {
            self.set("memory.limit_in_bytes", &memory)?;
            if self.set("memory.memsw.limit_in_bytes", &memory).is_err() {
                self.set("memory.swappiness", "0")?;
            }
        }
        self.set("pids.max", &pids)?;
        // Nobody is in it yet; this proves that the quota can be set later.
        self.set_cpu(CpuMillis(u32::MAX))
    }

    /// Sets another limit of its memory, bytes.
    pub fn limit_memory(&self, bytes: u64) -> io::Result<()> {
        let text = bytes.to_string();
        let set = |file| {
            self.set(file, &text).map_err(|problem| match problem {
                Problem::StillThere(at) => io::Error::other(at.display().to_string()),
                Problem::Io(_, error) => error,
            })
        };
        if self.directories.is_empty() {
            return Ok(());
        }
        if self.v2 {
            return set("memory.max");
        }
        // With swap it is never less than without: which comes first depends on the way.
        let first = set("memory.memsw.limit_in_bytes");
        set("memory.limit_in_bytes")?;
        first.or_else(|_| set("memory.memsw.limit_in_bytes")).or(Ok(()))
    }

    fn make_one(&self, host: &Host, directory: &Path) -> Result<(), Problem> {
        let problem = |e| Problem::Io(directory.to_owned(), e);
        let mut last = io::Error::other("its parents vanish");
        for _ in 0..MAKE_ATTEMPTS {
            if let Some(parent) = directory.parent() {
                // Another machine that ends takes empty parents with it: then once more.
                match std::fs::create_dir_all(parent) {
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(problem(e)),
                }
                if let Host::V2(bases) = host {
                    let _ = delegate(bases, parent);
                }
            }
            match std::fs::create_dir(directory) {
                Ok(()) => return Ok(()),
                // An empty leftover would go on counting where its last machine stopped.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    if std::fs::remove_dir(directory).is_err() {
                        return Err(Problem::StillThere(directory.to_owned()));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => last = e,
                Err(e) => return Err(problem(e)),
            }
        }
        Err(problem(last))
    }

    /// Puts the CPU quota in force; the greatest value stands for none.
    pub fn set_quota(&self, cpu: CpuMillis) -> io::Result<()> {
        if self.directories.is_empty() {
            return Ok(());
        }
        self.set_cpu(cpu).map_err(|p| match p {
            Problem::StillThere(_) => io::Error::other("the group is in a strange state"),
            Problem::Io(at, e) => io::Error::new(e.kind(), format!("{}: {e}", at.display())),
        })
    }

    fn set_cpu(&self, cpu: CpuMillis) -> Result<(), Problem> {
        let quota = (cpu.0 != u32::MAX).then(|| quota(cpu));
        if self.v2 {
            return self.set(
                "cpu.max",
                &match quota {
                    Some((quota, period)) => format!("{quota} {period}"),
                    None => "max".to_owned(),
                },
            );
        }
        let Some((quota, period)) = quota else { return self.set("cpu.cfs_quota_us", "-1") };
        self.set("cpu.cfs_period_us", &period.to_string())?;
        self.set("cpu.cfs_quota_us", &quota.to_string())
    }

    fn set(&self, file: &str, value: &str) -> Result<(), Problem> {
        let Some(path) = self.find(file) else {
            let e = io::Error::new(io::ErrorKind::NotFound, "there is no such limit");
            return Err(Problem::Io(PathBuf::from(file), e));
        };
        std::fs::write(&path, value).map_err(|e| Problem::Io(path, e))
    }

    fn find(&self, file: &str) -> Option<PathBuf> {
        self.directories.iter().map(|d| d.join(file)).find(|p| p.exists())
    }

    fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.find(file)?).ok()
    }

    /// Files that take a process in when it writes "0" to them.
    ///
    /// v1: `tasks`, not `cgroup.procs`: for one thread the kernel needs no lock over all threads of
    /// the host, whose grace period costs 5 to 10 ms. The joiner is single-threaded.
    pub fn doors(&self) -> io::Result<Vec<OwnedFd>> {
        let name = if self.v2 { "cgroup.procs" } else { "tasks" };
        let open = |d: &PathBuf| File::options().write(true).open(d.join(name)).map(OwnedFd::from);
        self.directories.iter().map(open).collect()
    }

    /// CPU time of all that ever ran in it, nanoseconds.
    pub fn cpu_ns(&self) -> Option<u64> {
        if let Some(text) = self.read("cpuacct.usage") {
            return text.trim().parse().ok();
        }
        let text = self.read("cpu.stat")?;
        let us = text.lines().find_map(|l| l.strip_prefix("usage_usec "))?;
        us.trim().parse::<u64>().ok()?.checked_mul(1000)
    }

    /// Whether the kernel killed something in it because the memory limit was reached.
    pub fn out_of_memory(&self) -> bool {
        let file = if self.v2 { "memory.events" } else { "memory.oom_control" };
        let text = self.read(file).unwrap_or_default();
        let kills = text.lines().find_map(|l| l.strip_prefix("oom_kill "));
        kills.is_some_and(|n| n.trim() != "0")
    }

    /// Processes in it.
    pub fn processes(&self) -> Vec<i32> {
        let mut found: Vec<i32> = Vec::new();
        for directory in &self.directories {
            let text = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Kills all that is in it; true when it is empty.
    pub fn kill(&self, deadline: Instant) -> bool {
        // Nobody in it may multiply any more.
        let _ = self.set("pids.max", "0");
        let _ = self.set("cgroup.kill", "1");
        loop {
            let there = self.processes();
            if there.is_empty() {
                return true;
            }
            for pid in there {
                end(pid, deadline);
            }
            if Instant::now() >= deadline {
                return self.processes().is_empty();
            }
            if !self.processes().is_empty() {
                std::thread::sleep(LOOK_AGAIN);
            }
        }
    }

    /// Removes its directories, and parents that are empty then. What is still there is told.
    pub fn remove(&self, deadline: Instant) -> Vec<String> {
        let mut remaining = Vec::new();
        for directory in &self.directories {
            loop {
                match std::fs::remove_dir(directory) {
                    Ok(()) => break,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                    Err(e) if Instant::now() >= deadline => {
                        remaining.push(format!("the cgroup {}: {e}", directory.display()));
                        break;
                    }
                    Err(_) => std::thread::sleep(LOOK_AGAIN),
                }
            }
            for parent in directory.ancestors().skip(1).take(2) {
                // Fails where another machine's group is, and at the tree's root.
                if std::fs::remove_dir(parent).is_err() {
                    break;
                }
            }
        }
        remaining
    }

    /// Whether none of its directories is there.
    pub fn gone(&self) -> bool {
        self.directories.iter().all(|d| !d.exists())
    }

    /// This group and another one's directories.
    pub fn and(mut self, other: Group) -> Group {
        self.v2 |= other.v2;
        self.directories.extend(other.directories);
        self.directories.sort();
        self.directories.dedup();
        self
    }
}

/// Kills one process and waits for its end.
fn end(pid: i32, deadline: Instant) {
    let Some(pid) = sys::pid(pid) else { return };
    let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return };
    let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
    sys::wait_readable(&pidfd, deadline);
}

/// Quota and period, microseconds.
fn quota(cpu: CpuMillis) -> (u64, u64) {
    let millis = u64::from(cpu.0.max(1));
    let quota = CPU_PERIOD_US * millis / 1000;
    if quota >= CPU_QUOTA_MIN_US {
        return (quota, CPU_PERIOD_US);
    }
    let period = (CPU_QUOTA_MIN_US * 1000 / millis).min(CPU_PERIOD_MAX_US);
    (CPU_QUOTA_MIN_US, period)
}

fn checked(name: &str) -> Result<&Path, CgroupError> {
    let path = Path::new(name);
    let plain = |part| matches!(part, Component::Normal(_));
    if name.is_empty() || !path.components().all(plain) {
        return Err(CgroupError::Name(name.to_owned()));
    }
    Ok(path)
}

/// The first directory below which groups with all controllers can be made.
fn v2_base(bases: &[PathBuf]) -> io::Result<PathBuf> {
    let mut last = io::Error::other("no cgroup is delegated to this user");
    for base in bases {
        match enable(base) {
            Ok(()) => return Ok(base.clone()),
            Err(e) => last = io::Error::new(e.kind(), format!("{}: {e}", base.display())),
        }
    }
    Err(last)
}

/// Hands the controllers down to the children of every directory between a base and `to`.
fn delegate(bases: &[PathBuf], to: &Path) -> io::Result<()> {
    let Some(base) = bases.iter().rev().find(|b| to.starts_with(b)) else { return Ok(()) };
    let mut way: Vec<&Path> = to.ancestors().take_while(|a| a.starts_with(base)).collect();
    way.reverse();
    way.into_iter().try_for_each(enable)
}

fn enable(directory: &Path) -> io::Result<()> {
    let file = directory.join("cgroup.subtree_control");
    let on = std::fs::read_to_string(&file)?;
    let wanted = ["cpu", "memory", "pids"];
    if wanted.iter().all(|w| on.split_whitespace().any(|o| o == *w))
        && rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_ok()
    {
        return Ok(());
    }
    std::fs::write(file, "+cpu +memory +pids")
}

#[cfg(test)]
mod tests;
