//! What is really there, whatever a daemon says: processes, cgroups, files.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// A process, told apart from a later one with the same id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// When it started, clock ticks since boot.
    pub start: u64,
    /// Its parent's id.
    pub parent: i32,
    /// Its words.
    pub command: String,
}

impl Process {
    /// A process that is there and no zombie.
    pub fn of(pid: i32) -> Option<Process> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in brackets may hold anything, also brackets.
        let fields: Vec<&str> = stat.get(stat.rfind(')')? + 2..)?.split(' ').collect();
        if matches!(*fields.first()?, "Z" | "X") {
            return None;
        }
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some(Process {
            pid,
            start: fields.get(19)?.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            command: String::from_utf8_lossy(&words).replace('\0', " "),
        })
    }

    /// Whether this very process still is.
    pub fn lives(&self) -> bool {
        Process::of(self.pid).is_some_and(|p| p.start == self.start)
    }
}

/// The largest resident set that a process ever had, KiB; `None` when it is gone.
pub fn peak_kb(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// All processes but zombies.
pub fn processes() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|e| Process::of(e.file_name().to_str()?.parse().ok()?)).collect()
}

/// Name of the cgroup below which all machines of a home are.
pub fn cgroup_of_home(home: &Path) -> String {
    let hash = Sha256::digest(home.to_string_lossy().as_bytes());
    let hex: String = hash[..4].iter().map(|b| format!("{b:02x}")).collect();
    format!("aegis/{hex}")
}

/// The directories of a cgroup, one per v1 tree, or one.
pub fn cgroup_directories(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let trees = std::fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path());
    let mut found: Vec<PathBuf> =
        trees.chain([root.to_owned()]).map(|t| t.join(name)).filter(|d| d.is_dir()).collect();
    // `cpu` and `cpuacct` may be two names of one tree.
    found.sort();
    found
}

/// The machines below a home's cgroup.
pub fn cgroups_below(name: &str) -> Vec<PathBuf> {
    cgroup_directories(name)
        .iter()
        .flat_map(|d| std::fs::read_dir(d).into_iter().flatten().flatten())
        .map(|e| e.path())
        .filter(|p| p.is_dir())
        .collect()
}

/// The processes of all machines of a home: workers, what they started, and what is in their
/// cgroups.
pub fn machine_processes(home: &Path) -> Vec<Process> {
    let all = processes();
    let run = home.join("run").to_string_lossy().into_owned() + "/";
    let group = format!("/{}/", cgroup_of_home(home));
    let worker = |p: &Process| p.command.contains(" machine ") && p.command.contains(&run);
    let workers: Vec<i32> = all.iter().filter(|p| worker(p)).map(|p| p.pid).collect();
    let inside = |p: &Process| {
        std::fs::read_to_string(format!("/proc/{}/cgroup", p.pid))
            .is_ok_and(|text| text.contains(&group))
    };
    all.into_iter()
        // A keeper serves later machines too, whoever happened to start it.
        .filter(|p| !p.command.contains(" keeper "))
        .filter(|p| workers.contains(&p.pid) || workers.contains(&p.parent) || inside(p))
        .collect()
}

/// Ids of the machines that have a run directory in a home.
pub fn run_directories(home: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(home.join("run")).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

/// The disks in a home.
pub fn disks(home: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(home.join("instances")).into_iter().flatten().flatten();
    entries.map(|e| e.path().join("disk.img")).filter(|p| p.exists()).collect()
}
