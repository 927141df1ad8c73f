//! What a machine used, measured on the host.

use std::io::Read as _;
use std::path::Path;

use aegis_wire::worker::{Sample, workspace_book};

use crate::disk;
use crate::run_dir::{Record, monotonic_ms};

/// The memory of a machine is looked at again when QEMU's grew by this much, bytes.
const GROWTH: u64 = 1 << 20;
/// Name of golden memory in /proc/PID/smaps.
const GOLDEN_NAME: &str = "/memfd:golden";

/// Measures one machine.
#[derive(Default)]
pub struct Meter {
    last: Sample,
    // QEMU's whole resident memory at the last look at its mappings, bytes.
    looked_at: u64,
}

impl Meter {
    /// Usage so far; no number is ever smaller than before.
    ///
    /// *Memory* is what of the machine's own memory is resident: pages that it wrote, and golden
    /// pages that it read. A machine gives nothing back, so that this only grows and the last look
    /// is the peak; memory of QEMU itself and the host's cache of the disk do not count. *CPU* is
    /// all of QEMU's, because emulation is what a machine costs.
    pub fn sample(&mut self, record: &Record) -> Sample {
        let pid = record.qemu.map(|q| q.pid);
        let cpu_ns = record.group.cpu_ns().or_else(|| process_cpu_ns(pid?)).unwrap_or(0);
        let cpu_ns = cpu_ns.saturating_sub(record.cpu_before_ns);
        let resident = pid.and_then(resident).unwrap_or(0);
        let mut memory = 0;
        if resident > self.looked_at + GROWTH {
            self.looked_at = resident;
            memory = pid.and_then(machine_memory).unwrap_or(0).min(record.memory_bytes);
        }
        let uptime_ms = record.clock.map_or(0, |clock| clock.uptime_ms(monotonic_ms()));
        self.last = Sample {
            cpu_ns: self.last.cpu_ns.max(cpu_ns),
            memory_peak_bytes: self.last.memory_peak_bytes.max(memory),
            disk_bytes: self.last.disk_bytes.max(disk_bytes(&record.disk)),
            uptime_ms: self.last.uptime_ms.max(uptime_ms),
            // The gateway counts that.
            egress_bytes: None,
            ingress_bytes: 0,
        };
        self.last
    }
}

/// The greater of each number.
pub fn greater(a: Sample, b: Sample) -> Sample {
    Sample {
        cpu_ns: a.cpu_ns.max(b.cpu_ns),
        memory_peak_bytes: a.memory_peak_bytes.max(b.memory_peak_bytes),
        disk_bytes: a.disk_bytes.max(b.disk_bytes),
        uptime_ms: a.uptime_ms.max(b.uptime_ms),
        egress_bytes: a.egress_bytes.max(b.egress_bytes),
        ingress_bytes: a.ingress_bytes.max(b.ingress_bytes),
    }
}

/// What the machine's disk takes, and what it added to its workspace.
fn disk_bytes(path: &Path) -> u64 {
    let mut added = [0; 8];
    let book = std::fs::File::open(workspace_book(path));
    let added = match book.and_then(|mut book| book.read_exact(&mut added)) {
        Ok(()) => u64::from_le_bytes(added),
        Err(_) => 0,
    };
    disk::allocated(path).saturating_add(added)
}

/// Resident memory of a process, bytes.
fn resident(pid: i32) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// CPU time of a process where no cgroup counts it, nanoseconds.
fn process_cpu_ns(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.get(stat.rfind(')')? + 2..)?.split(' ').skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks * 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

fn machine_memory(pid: i32) -> Option<u64> {
    Some(parse_machine_memory(&std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?))
}

fn parse_machine_memory(smaps: &str) -> u64 {
    let mut inside = false;
    let mut kilobytes = 0;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if !first.ends_with(':') {
            inside = line.contains(GOLDEN_NAME);
        } else if inside && first == "Rss:" {
            let number = line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
            kilobytes += number.unwrap_or(0);
        }
    }
    kilobytes * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_machines_own_memory_counts() {
        let smaps = "\
7f0000000000-7f0010000000 rw-p 00000000 00:01 5   /memfd:golden (deleted)
Size:             262144 kB
Rss:               40000 kB
Pss:               20000 kB
7f0020000000-7f0020100000 rw-p 00000000 00:00 0
Rss:                1000 kB
7f0030000000-7f0040000000 rw-p 10000000 00:01 5   /memfd:golden (deleted)
Rss:                   5 kB
";
        assert_eq!(parse_machine_memory(smaps), 40005 * 1024);
    }

    #[test]
    fn processes_are_measured() {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        assert!(resident(me).unwrap() > 100_000);
        assert!(process_cpu_ns(me).is_some());
        assert_eq!(machine_memory(me), Some(0));
    }
}
