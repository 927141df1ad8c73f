//! Kernel modules of the initramfs: `/modules/*.ko`, where the kernel has not all built in.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

const DIRECTORY: &str = "/modules";

/// Modules that others need, first; by name, with `_` for `-`. The order saves passes over the
/// rest, it is not needed.
const FIRST: [&str; 8] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "crc16",
    "crc32c_generic",
    "libcrc32c",
    "mbcache",
    "failover",
];

/// Loads every module there is. Those that the kernel refuses are reported and left out: what
/// can't be done without them fails with better words later.
pub fn load() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else { return Vec::new() };
    let found = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    let problems = load_all(ordered(found), |path| {
        let file = File::open(path).map_err(|_| Errno::IO)?;
        rustix::system::finit_module(&file, c"", 0)
    });
    // They lie in memory that nobody gets back otherwise.
    let _ = std::fs::remove_dir_all(DIRECTORY);
    problems
}

fn ordered(mut paths: Vec<PathBuf>) -> Vec<PathBuf> {
    paths.retain(|p| p.extension().is_some_and(|e| e == "ko"));
    paths.sort_by_key(|path| {
        let name = name(path);
        (FIRST.iter().position(|f| *f == name).unwrap_or(FIRST.len()), name)
    });
    paths
}

fn name(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_")
}

/// Tries again what lacked a symbol, as long as any pass loads something.
fn load_all(
    mut paths: Vec<PathBuf>,
    mut load_one: impl FnMut(&Path) -> Result<(), Errno>,
) -> Vec<String> {
    let mut problems = Vec::new();
    loop {
        let before = paths.len();
        paths.retain(|path| match load_one(path) {
            Ok(()) | Err(Errno::EXIST) => false,
            Err(Errno::NOENT) => true,
            Err(errno) => {
                problems.push(format!("module {}: {errno}", name(path)));
                false
            }
        });
        if paths.is_empty() {
            return problems;
        }
        if paths.len() == before {
            problems.extend(paths.iter().map(|p| format!("module {} lacks another", name(p))));
            return problems;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_need_comes_first() {
        let names = ["zlib.ko", "virtio-rng.ko", "virtio.ko", "virtio_ring.ko", "README"];
        let sorted = ordered(names.iter().map(PathBuf::from).collect());
        let sorted: Vec<_> = sorted.iter().map(|p| name(p)).collect();
        assert_eq!(sorted, ["virtio_ring", "virtio", "virtio_rng", "zlib"]);
    }

    #[test]
    fn any_order_ends_well_and_cycles_end() {
        let mut there: Vec<String> = vec!["base".to_owned()];
        let needs = |name: &str| match name {
            "a" => "b",
            "b" => "c",
            "lonely" => "nobody",
            _ => "base",
        };
        let paths = ["a.ko", "b.ko", "lonely.ko", "c.ko", "bad.ko"].map(PathBuf::from).to_vec();
        let problems = load_all(paths, |path| {
            let name = name(path);
            if name == "bad" {
                return Err(Errno::NOEXEC);
            }
            if !there.contains(&needs(&name).to_owned()) {
                return Err(Errno::NOENT);
            }
            there.push(name);
            Ok(())
        });
        assert_eq!(there, ["base", "c", "b", "a"]);
        assert_eq!(problems.len(), 2, "{problems:?}");
    }
}
