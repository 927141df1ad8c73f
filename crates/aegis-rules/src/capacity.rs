//! Whether the host has room for another machine. Asked in the transaction that makes the machine,
//! so that racing redeems can't pass it together.

use crate::instance::Spec;
use crate::refusal::{Code, Refusal};
use crate::words::{DiskBytes, MemoryMb};

/// What the host lends at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Machines that are not stopped.
    pub machines: u32,
    /// Their memory together.
    pub memory: MemoryMb,
    /// Their disks together, stopped ones included.
    pub disk: DiskBytes,
    /// Largest number of virtual CPUs of one machine.
    pub vcpus: u32,
}

/// What live machines hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Machines that are not stopped.
    pub machines: u32,
    /// Their memory together, MiB.
    pub memory_mb: u64,
    /// Disks together, stopped ones included, bytes.
    pub disk_bytes: u64,
}

impl Held {
    /// With one more machine.
    pub fn and(self, need: &Need) -> Held {
        Held {
            machines: self.machines.saturating_add(1),
            memory_mb: self.memory_mb.saturating_add(need.memory.0.into()),
            disk_bytes: self.disk_bytes.saturating_add(need.disk.0),
        }
    }
}

/// What one more machine would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Its memory.
    pub memory: MemoryMb,
    /// Its disk, zero when it has one already.
    pub disk: DiskBytes,
    /// Its virtual CPUs.
    pub vcpus: u32,
}

impl Need {
    /// Of a new instance.
    pub fn of(spec: &Spec) -> Need {
        Need { memory: spec.memory, disk: spec.disk, vcpus: spec.cpu.vcpus() }
    }

    /// Of another start of a stopped one: its disk is there and counted.
    pub fn again(spec: &Spec) -> Need {
        Need { disk: DiskBytes(0), ..Need::of(spec) }
    }
}

/// Says whether one more machine fits; a refusal names what is short and what would fit.
pub fn admit(capacity: &Capacity, held: &Held, need: &Need) -> Result<(), Refusal> {
    let no = |what: &str, asked: u64, left: u64, unit: &str| {
        Err(Refusal::new(
            Code::NoCapacity,
            format!("the host has no room for this machine now: {what}"),
        )
        .amounts(format!("{asked}{unit}"), format!("{left}{unit}"))
        .hint("ask again when a machine has ended, or ask for less"))
    };
    if held.machines >= capacity.machines {
        return no("all machine places are taken", 1, 0, "");
    }
    if need.vcpus > capacity.vcpus {
        return no("CPU cores", need.vcpus.into(), capacity.vcpus.into(), "");
    }
    let memory_left = u64::from(capacity.memory.0).saturating_sub(held.memory_mb);
    if u64::from(need.memory.0) > memory_left {
        return no("memory", need.memory.0.into(), memory_left, "MB");
    }
    let disk_left = capacity.disk.0.saturating_sub(held.disk_bytes);
    if need.disk.0 > disk_left {
        return no("disk", need.disk.0, disk_left, " bytes");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is admitted, one after the other, never holds more than the capacity.
        #[test]
        fn admitted_machines_fit(
            needs in prop::collection::vec((1u32..9000, 0u64..50_000_000_000, 1u32..5), 0..60),
        ) {
            let capacity = Capacity {
                machines: 20,
                memory: MemoryMb(32_000),
                disk: DiskBytes(200_000_000_000),
                vcpus: 3,
            };
            let mut held = Held::default();
            for (memory, disk, vcpus) in needs {
                let need = Need { memory: MemoryMb(memory), disk: DiskBytes(disk), vcpus };
                if admit(&capacity, &held, &need).is_ok() {
                    held.machines += 1;
                    held.memory_mb += u64::from(memory);
                    held.disk_bytes += disk;
                }
                prop_assert!(held.machines <= 20);
                prop_assert!(held.memory_mb <= 32_000);
                prop_assert!(held.disk_bytes <= 200_000_000_000);
            }
        }
    }
}
