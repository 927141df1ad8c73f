//! The two disks of a machine: the read-only base and its own.

use std::fs;
use std::path::PathBuf;

const BLOCK: &str = "/sys/block";
/// The kernel counts sectors of this size, bytes, whatever the disk's own are.
const SECTOR: u64 = 512;

/// A block device.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Its node.
    pub node: PathBuf,
    size: PathBuf,
}

impl Disk {
    /// What it shows now, bytes.
    pub fn bytes(&self) -> u64 {
        let sectors = fs::read_to_string(&self.size).unwrap_or_default();
        sectors.trim().parse::<u64>().unwrap_or(0).saturating_mul(SECTOR)
    }
}

/// Base and own disk. The order of their names depends on the machine; being read-only does not.
#[derive(Clone, Debug)]
pub struct Disks {
    /// Read-only.
    pub base: Disk,
    /// Writable.
    pub own: Disk,
}

/// Finds both, once both are there.
pub fn find() -> Option<Disks> {
    let (mut base, mut own) = (None, None);
    for entry in fs::read_dir(BLOCK).ok()?.flatten() {
        let name = entry.file_name();
        let node = PathBuf::from("/dev").join(&name);
        if !name.to_string_lossy().starts_with("vd") || !node.exists() {
            continue;
        }
        let disk = Disk { node, size: entry.path().join("size") };
        match fs::read_to_string(entry.path().join("ro")).ok()?.trim() {
            "1" => base = Some(disk),
            _ => own = Some(disk),
        }
    }
    Some(Disks { base: base?, own: own? })
}
