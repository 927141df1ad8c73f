//! The six limits and three permissions of an invite, what was used, and what was passed.

use std::fmt;

use super::{CpuMillis, DiskBytes, DurationMs, EgressBytes, LlmTokens, MemoryMb, Number, Share};
use crate::refusal::Refusal;

/// The six numbers of an invite (seeds/000 "Create Invite").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `maxCpuCores`
    pub cpu: CpuMillis,
    /// `maxMemoryMB`
    pub memory: MemoryMb,
    /// `maxDiskGB`
    pub disk: DiskBytes,
    /// `maxNetworkEgressGB`
    pub egress: EgressBytes,
    /// `maxDurationHours`
    pub duration: DurationMs,
    /// `maxTokenBudget`
    pub tokens: LlmTokens,
}

impl Default for Limits {
    /// The numbers of the seed's own example (contracts/couch.md 2).
    fn default() -> Limits {
        Limits {
            cpu: CpuMillis(2000),
            memory: MemoryMb(4096),
            disk: DiskBytes(20_000_000_000),
            egress: EgressBytes(10_000_000_000),
            duration: DurationMs(72 * DurationMs::HOUR),
            tokens: LlmTokens(50_000_000),
        }
    }
}

/// Disks are made of whole blocks of this many bytes.
const DISK_BLOCK: u64 = 4096;

/// One of the six limits, by its name on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// CPU cores, fractions allowed.
    Cpu,
    /// Memory in MiB.
    Memory,
    /// Disk in GB of 10^9 bytes, fractions allowed.
    Disk,
    /// Egress in GB of 10^9 bytes, fractions allowed.
    Egress,
    /// Hours, fractions allowed.
    Duration,
    /// LLM tokens.
    Tokens,
}

impl Limit {
    /// All of them, in the order of the seed.
    pub const ALL: [Limit; 6] =
        [Limit::Cpu, Limit::Memory, Limit::Disk, Limit::Egress, Limit::Duration, Limit::Tokens];

    /// The field's name in `resourceLimits`.
    pub fn field(self) -> &'static str {
        match self {
            Limit::Cpu => "maxCpuCores",
            Limit::Memory => "maxMemoryMB",
            Limit::Disk => "maxDiskGB",
            Limit::Egress => "maxNetworkEgressGB",
            Limit::Duration => "maxDurationHours",
            Limit::Tokens => "maxTokenBudget",
        }
    }

    /// The smallest and the largest value that is taken, in the field's own unit.
    pub fn range(self) -> (f64, f64) {
        match self {
            Limit::Cpu => (0.05, 64.0),
            Limit::Memory => (128.0, 1_048_576.0),
            Limit::Disk => (0.02, 65_536.0),
            // One byte is the least that can be counted.
            Limit::Egress => (1e-9, 1_000_000.0),
            Limit::Duration => (1e-6, 720.0),
            Limit::Tokens => (1.0, 1e15),
        }
    }
}

impl Limits {
    /// Sets one limit from a number in the field's own unit; refuses what is not finite or out of
    /// range, naming field and range (contracts/couch.md 2).
    pub fn set(&mut self, limit: Limit, value: f64) -> Result<(), Refusal> {
        let (least, most) = limit.range();
        // NaN fails both comparisons.
        if !(value >= least && value <= most) {
            return Err(Refusal::out_of_range(
                format!("resourceLimits.{}", limit.field()),
                Number(value).to_string(),
                format!("a number from {least} to {most}"),
            ));
        }
        match limit {
            Limit::Cpu => self.cpu = CpuMillis((value * 1000.0).round() as u32),
            Limit::Memory => self.memory = MemoryMb(value.floor() as u32),
            // Whole 4 KiB blocks, as a block device is made of them.
            Limit::Disk => self.disk = DiskBytes((value * 1e9) as u64 / DISK_BLOCK * DISK_BLOCK),
            Limit::Egress => self.egress = EgressBytes((value * 1e9).round() as u64),
            Limit::Duration => {
                self.duration =
                    DurationMs(((value * DurationMs::HOUR as f64).round() as u64).max(1))
            }
            Limit::Tokens => self.tokens = LlmTokens(value.floor() as u64),
        }
        Ok(())
    }

    /// The part of CPU, memory and disk that one machine gets of them, not less than the least that
    /// a machine can be made of, and not more than all.
    pub fn share(&self, share: Share) -> (CpuMillis, MemoryMb, DiskBytes) {
        let least = |limit: Limit, unit: f64| (limit.range().0 * unit) as u64;
        let part = |all: u64, least: u64| share.of(all).max(least).min(all);
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let disk = part(self.disk.0, least(Limit::Disk, 1e9)) / DISK_BLOCK * DISK_BLOCK;
        (
            CpuMillis(small(part(self.cpu.0.into(), least(Limit::Cpu, 1e3)))),
            MemoryMb(small(part(self.memory.0.into(), least(Limit::Memory, 1.0)))),
            DiskBytes(disk),
        )
    }

    /// One limit as a number in the field's own unit.
    pub fn get(&self, limit: Limit) -> f64 {
        match limit {
            Limit::Cpu => self.cpu.cores(),
            Limit::Memory => f64::from(self.memory.0),
            // Back to what was asked for: the block rounding is below the fourth decimal.
            Limit::Disk => (self.disk.gb() * 1e4).round() / 1e4,
            Limit::Egress => self.egress.gb(),
            Limit::Duration => self.duration.hours(),
            Limit::Tokens => self.tokens.0 as f64,
        }
    }
}

/// What a guest may do besides computing (seeds/000 "Permissions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// `canAccessInternet`
    pub internet: bool,
    /// `canSpawnSubAgents`
    pub spawn: bool,
    /// `canAccessHostServices`
    pub host_services: bool,
}

impl Default for Permissions {
    fn default() -> Permissions {
        Permissions { internet: true, spawn: false, host_services: false }
    }
}

/// What the host does when a limit is passed (contracts/couch.md 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLimit {
    /// Slow the machine down.
    Throttle,
    /// Stop its clock until the host thaws it.
    Freeze,
    /// End it.
    Kill,
}

impl OnLimit {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            OnLimit::Throttle => "throttle",
            OnLimit::Freeze => "freeze",
            OnLimit::Kill => "kill",
        }
    }

    /// From the word on the wire.
    pub fn parse(word: &str) -> Option<OnLimit> {
        [OnLimit::Throttle, OnLimit::Freeze, OnLimit::Kill].into_iter().find(|o| o.word() == word)
    }
}

/// What was used over a guest's whole tree of machines, measured on the host
/// (contracts/couch.md 5). It never goes down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in nanoseconds.
    pub cpu_ns: u64,
    /// Highest memory seen, bytes.
    pub memory_peak_bytes: u64,
    /// Most disk seen allocated, bytes.
    pub disk_bytes: u64,
    /// Payload sent to outside addresses.
    pub egress: EgressBytes,
    /// LLM tokens spent.
    pub tokens: LlmTokens,
    /// How long machines ran.
    pub uptime: DurationMs,
}

impl Usage {
    /// Two machines', or two boots', usage together: sums, and the higher of two peaks.
    pub fn and(self, other: Usage) -> Usage {
        Usage {
            cpu_ns: self.cpu_ns.saturating_add(other.cpu_ns),
            memory_peak_bytes: self.memory_peak_bytes.max(other.memory_peak_bytes),
            disk_bytes: self.disk_bytes.max(other.disk_bytes),
            egress: EgressBytes(self.egress.0.saturating_add(other.egress.0)),
            tokens: LlmTokens(self.tokens.0.saturating_add(other.tokens.0)),
            uptime: DurationMs(self.uptime.0.saturating_add(other.uptime.0)),
        }
    }

    /// Field by field the higher one: a later sample of the same thing never lowers a count.
    pub fn at_least(self, other: Usage) -> Usage {
        Usage {
            cpu_ns: self.cpu_ns.max(other.cpu_ns),
            memory_peak_bytes: self.memory_peak_bytes.max(other.memory_peak_bytes),
            disk_bytes: self.disk_bytes.max(other.disk_bytes),
            egress: self.egress.max(other.egress),
            tokens: self.tokens.max(other.tokens),
            uptime: self.uptime.max(other.uptime),
        }
    }

    /// Highest memory seen, in MiB, rounded up.
    pub fn memory_peak_mb(&self) -> u64 {
        self.memory_peak_bytes.div_ceil(1 << 20)
    }

    /// Every limit that was passed: usage > limit. `alive_for` is the time since redeem.
    pub fn violations(&self, limits: &Limits, alive_for: DurationMs) -> Vec<Violation> {
        let mut found = Vec::new();
        let mut check = |limit: Limit, used: f64, passed: bool| {
            if passed {
                found.push(Violation { limit, used, allowed: limits.get(limit) });
            }
        };
        check(Limit::Tokens, self.tokens.0 as f64, self.tokens > limits.tokens);
        // The limit was cut down to whole blocks: what was asked for is not past it.
        let over = self.disk_bytes.saturating_sub(limits.disk.0) >= DISK_BLOCK;
        check(Limit::Disk, self.disk_bytes as f64 / 1e9, over);
        check(Limit::Egress, self.egress.gb(), self.egress > limits.egress);
        check(Limit::Duration, alive_for.hours(), alive_for > limits.duration);
        let memory_mb = self.memory_peak_mb();
        check(Limit::Memory, memory_mb as f64, memory_mb > u64::from(limits.memory.0));
        // More CPU time than the quota could have given in that time.
        let quota_ns = u128::from(limits.cpu.0) * u128::from(self.uptime.0) * 1000;
        // A tenth on top: boot runs before the quota bites, and samples are not taken at one instant.
        let passed = u128::from(self.cpu_ns) > quota_ns + quota_ns / 10 + 5_000_000_000;
        let cores = self.cpu_ns as f64 / 1e6 / (self.uptime.0.max(1)) as f64;
        check(Limit::Cpu, cores, passed);
        found
    }
}

/// A limit that was passed; its text form is the seed's (`tokens: 1500/1000`, `disk: 5GB/1GB`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Violation {
    /// Which limit.
    pub limit: Limit,
    /// What was used, in the limit's own unit.
    pub used: f64,
    /// What was allowed, in the same unit.
    pub allowed: f64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = match self.limit {
            Limit::Cpu => ("cpu", ""),
            Limit::Memory => ("memory", "MB"),
            Limit::Disk => ("disk", "GB"),
            Limit::Egress => ("network", "GB"),
            Limit::Duration => ("duration", "h"),
            Limit::Tokens => ("tokens", ""),
        };
        write!(f, "{name}: {}{unit}/{}{unit}", Number(self.used), Number(self.allowed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_refuses_what_is_not_in_its_range() {
        for limit in Limit::ALL {
            let mut limits = Limits::default();
            for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300] {
                let refusal = limits.set(limit, bad).unwrap_err();
                assert!(refusal.field.unwrap().ends_with(limit.field()));
            }
            assert_eq!(limits, Limits::default());
            let (least, most) = limit.range();
            limits.set(limit, least).unwrap();
            limits.set(limit, most).unwrap();
        }
    }

    #[test]
    fn what_was_set_is_what_is_read() {
        let mut limits = Limits::default();
        for (limit, value) in [
            (Limit::Cpu, 0.5),
            (Limit::Memory, 512.0),
            (Limit::Disk, 0.1),
            (Limit::Egress, 0.01),
            (Limit::Duration, 0.25),
            (Limit::Tokens, 1000.0),
        ] {
            limits.set(limit, value).unwrap();
            assert_eq!(limits.get(limit), value, "{limit:?}");
        }
    }

    #[test]
    fn violations_speak_as_the_seed_does() {
        let mut limits = Limits::default();
        limits.set(Limit::Tokens, 1000.0).unwrap();
        limits.set(Limit::Disk, 1.0).unwrap();
        limits.set(Limit::Egress, 2.0).unwrap();
        limits.set(Limit::Duration, 1.0).unwrap();
        let usage = Usage {
            tokens: LlmTokens(1500),
            disk_bytes: 5_000_000_000,
            egress: EgressBytes(3_000_000_000),
            ..Usage::default()
        };
        let words: Vec<String> = usage
            .violations(&limits, DurationMs(5_400_000))
            .iter()
            .map(Violation::to_string)
            .collect();
        assert_eq!(
            words,
            ["tokens: 1500/1000", "disk: 5GB/1GB", "network: 3GB/2GB", "duration: 1.5h/1h"]
        );
        let exact = Usage { tokens: LlmTokens(1000), ..Usage::default() };
        assert!(exact.violations(&limits, DurationMs(3_600_000)).is_empty());
    }
}
