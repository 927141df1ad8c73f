//! Which kernel modules a machine needs, with all that they need in turn.
//!
//! A package holds no `modules.dep` (that is made when it is installed), so the dependencies are
//! read where depmod reads them: from each module's own `.modinfo`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use elf::ElfBytes;
use elf::endian::LittleEndian;

use super::tool::Tool;
use crate::failure::{Failure, Result};

/// Without these no machine comes up.
const REQUIRED: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "ext4",
    "erofs",
    "overlay",
];
/// Taken along where the kernel has them.
const WELCOME: [&str; 2] = ["crc32c_generic", "fuse"];

/// Deepest directory below `lib/modules/<version>` that is looked into.
const DEPTH_MAX: usize = 16;

/// The modules of one kernel, by name.
pub struct Catalogue {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module, unpacked.
#[derive(Debug)]
pub struct Module {
    /// File name, `….ko`.
    pub file: String,
    /// The ELF file.
    pub bytes: Vec<u8>,
}

/// A module's name: `-` and `_` are the same to the kernel.
fn name_of(file: &str) -> Option<String> {
    let (name, rest) = file.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".zst" | ".gz").then(|| name.replace('-', "_"))
}

impl Catalogue {
    /// Looks through directories (`lib/modules/<version>`, or flat ones of one's own).
    pub fn of(dirs: &[PathBuf]) -> Result<Catalogue> {
        let mut catalogue = Catalogue { files: BTreeMap::new(), builtin: BTreeSet::new() };
        for dir in dirs {
            catalogue.look(dir, DEPTH_MAX)?;
            if let Ok(list) = fs::read_to_string(dir.join("modules.builtin")) {
                let names = list.lines().filter_map(|line| name_of(line.rsplit('/').next()?));
                catalogue.builtin.extend(names);
            }
        }
        Ok(catalogue)
    }

    fn look(&mut self, dir: &Path, depth: usize) -> Result<()> {
        let failed = |e| Failure::file("read", dir, e);
        for entry in fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() && depth > 0 {
                self.look(&entry.path(), depth - 1)?;
            } else if kind.is_file()
                && let Some(name) = entry.file_name().to_str().and_then(name_of)
            {
                self.files.insert(name, entry.path());
            }
        }
        Ok(())
    }

    /// Required modules that are neither built in nor there as files.
    pub fn lacking(&self) -> Vec<&'static str> {
        let there = |name: &str| self.files.contains_key(name) || self.builtin.contains(name);
        REQUIRED.into_iter().filter(|name| !there(name)).collect()
    }

    /// All that a machine needs and that is not built in, each after what it needs itself.
    pub fn take(&self) -> Result<Vec<Module>> {
        let mut taken = Vec::new();
        let mut seen = BTreeSet::new();
        for name in REQUIRED.into_iter().chain(WELCOME) {
            self.take_one(name, &mut seen, &mut taken)?;
        }
        Ok(taken)
    }

    fn take_one(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        taken: &mut Vec<Module>,
    ) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            let fine = self.builtin.contains(name) || WELCOME.contains(&name);
            return if fine {
                Ok(())
            } else {
                Err(Failure::here(format!("the kernel's package lacks the module {name}")))
            };
        };
        let bytes = unpacked(path)?;
        for dependency in dependencies(&bytes)
            .ok_or_else(|| Failure::here(format!("{} is no kernel module", path.display())))?
        {
            self.take_one(&dependency, seen, taken)?;
        }
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let stem = file.split(".ko").next().unwrap_or_default();
        taken.push(Module { file: format!("{stem}.ko"), bytes });
        Ok(())
    }
}

fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(|e| Failure::file("read", path, e))?;
    match path.extension().and_then(OsStr::to_str) {
        Some("xz") => Tool::new("xz", &["-dcq"])?.input(bytes).run(),
        Some("zst") => Tool::new("zstd", &["-dcq"])?.input(bytes).run(),
        Some("gz") => Tool::new("gzip", &["-dcq"])?.input(bytes).run(),
        _ => Ok(bytes),
    }
}

/// `depends=` of a module's `.modinfo`; nothing when the bytes are no module.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(module).ok()?;
    let section = file.section_header_by_name(".modinfo").ok()??;
    let (info, _) = file.section_data(&section).ok()?;
    Some(depends(info))
}

/// Reads `.modinfo`: `name=value` strings, each closed by a zero.
fn depends(info: &[u8]) -> Vec<String> {
    info.split(|b| *b == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="))
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_tell_dashes_from_underscores() {
        assert_eq!(name_of("virtio-rng.ko.xz").as_deref(), Some("virtio_rng"));
        assert_eq!(name_of("erofs.ko").as_deref(), Some("erofs"));
        assert_eq!(name_of("erofs.ko.txt"), None);
        assert_eq!(name_of("modules.order"), None);
    }

    #[test]
    fn modinfo_is_read() {
        let info = b"license=GPL\0depends=libcrc32c,net-failover\0retpoline=Y\0";
        assert_eq!(depends(info), ["libcrc32c", "net_failover"]);
        assert!(depends(b"depends=\0").is_empty());
        assert!(dependencies(b"not a module").is_none());
    }

    /// An ELF file with nothing but a `.modinfo`.
    fn module(depends: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let info = format!("license=GPL\0depends={depends}\0");
        let (names_at, info_at) = (64, 64 + names.len());
        let sections_at = info_at + info.len();
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend(1u16.to_le_bytes());
        file.extend(62u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend([0; 16]);
        file.extend((sections_at as u64).to_le_bytes());
        file.extend(0u32.to_le_bytes());
        for half in [64u16, 0, 0, 64, 3, 2] {
            file.extend(half.to_le_bytes());
        }
        file.extend(names);
        file.extend(info.as_bytes());
        for (name, kind, at, size) in
            [(0u32, 0u32, 0, 0), (1, 1, info_at, info.len()), (10, 3, names_at, names.len())]
        {
            file.extend(name.to_le_bytes());
            file.extend(kind.to_le_bytes());
            for word in [0u64, 0, at as u64, size as u64, 0, 1, 0] {
                file.extend(word.to_le_bytes());
            }
        }
        file
    }

    #[test]
    fn dependencies_come_first_once_and_all_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("kernel/fs/erofs");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("erofs.ko"), module("libcrc32c,netfs")).unwrap();
        fs::write(dir.path().join("libcrc32c.ko"), module("")).unwrap();
        fs::write(dir.path().join("netfs.ko"), module("libcrc32c,virtio-rng")).unwrap();
        fs::write(dir.path().join("virtio-rng.ko"), module("")).unwrap();
        fs::write(dir.path().join("unwanted.ko"), module("")).unwrap();
        let builtin = [
            "virtio_ring",
            "virtio",
            "virtio_mmio",
            "virtio_console",
            "virtio_net",
            "ext4",
            "overlay",
        ];
        let list: String = builtin.iter().map(|b| format!("kernel/{b}.ko\n")).collect();
        fs::write(dir.path().join("modules.builtin"), list).unwrap();
        let catalogue = Catalogue::of(&[dir.path().to_owned()]).unwrap();
        assert_eq!(catalogue.lacking(), ["virtio_blk"]);
        assert!(catalogue.take().unwrap_err().words().contains("virtio_blk"));

        fs::write(dir.path().join("virtio_blk.ko"), module("")).unwrap();
        let taken = Catalogue::of(&[dir.path().to_owned()]).unwrap().take().unwrap();
        let files: Vec<_> = taken.iter().map(|m| m.file.as_str()).collect();
        assert_eq!(
            files,
            ["virtio_blk.ko", "virtio-rng.ko", "libcrc32c.ko", "netfs.ko", "erofs.ko"]
        );
    }
}
