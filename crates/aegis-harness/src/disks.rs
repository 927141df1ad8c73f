//! The two disks of a machine: the read-only base and its own.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const BLOCK: &str = "/sys/block";
/// The kernel counts sectors of this size, bytes, whatever the disk's own are.
const SECTOR: u64 = 512;
/// Longest number in a file of the kernel, bytes.
const NUMBER_MAX: usize = 24;

/// A block device.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Its node.
    pub node: PathBuf,
    // Held open: this is all that a clone has to look at.
    size: Arc<File>,
}

impl Disk {
    /// Leaves out what is done for disks with moving heads, or behind a queue that others share: the
    /// host orders what reaches a real one. Under software emulation it only costs.
    pub fn simplify(&self) {
        let Some(name) = self.node.file_name() else { return };
        let queue = Path::new(BLOCK).join(name).join("queue");
        for (setting, value) in [("scheduler", "none"), ("wbt_lat_usec", "0"), ("add_random", "0")]
        {
            // A kernel without it does without it.
            let _ = fs::write(queue.join(setting), value);
        }
    }

    /// What it shows now, bytes.
    pub fn bytes(&self) -> u64 {
        let mut text = [0; NUMBER_MAX];
        let n = self.size.read_at(&mut text, 0).unwrap_or(0);
        let digits = text[..n].iter().take_while(|b| b.is_ascii_digit());
        let sectors =
            digits.fold(0u64, |n, b| n.saturating_mul(10).saturating_add((b - b'0').into()));
        sectors.saturating_mul(SECTOR)
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
        let Ok(size) = File::open(entry.path().join("size")) else { continue };
        let disk = Disk { node, size: Arc::new(size) };
        match fs::read_to_string(entry.path().join("ro")).ok()?.trim() {
            "1" => base = Some(disk),
            _ => own = Some(disk),
        }
    }
    Some(Disks { base: base?, own: own? })
}
