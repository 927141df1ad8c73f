//! The first file system of a golden machine: a `newc` cpio archive, uncompressed (unpacking
//! would cost more than reading).

use std::path::Path;

use aegis_wire::channel::guest::{LAYER, MCP_PATH};
use anyhow::Context as _;

const DIRECTORY: u32 = 0o040755;
const FILE: u32 = 0o100644;
const PROGRAM: u32 = 0o100755;
const CHARACTER_DEVICE: u32 = 0o020600;

/// Largest kernel module that is taken, and largest program, bytes.
const MEMBER_MAX: u64 = 64 << 20;

/// An archive with the harness as `/init`, the modules in `/modules`, empty directories to mount
/// on, and below [`LAYER`] what every machine has whatever its image is.
pub fn initramfs(
    harness: &Path,
    mcp: &Path,
    modules: &[std::path::PathBuf],
) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for name in ["dev", "proc", "sys", "run", "tmp", "newroot", "modules"] {
        archive.add(name, DIRECTORY, (0, 0), &[]);
    }
    // The kernel opens it for init before anything is mounted.
    archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    archive.add("dev/null", CHARACTER_DEVICE, (1, 3), &[]);
    archive.add("init", PROGRAM, (0, 0), &read(harness)?);
    for module in modules {
        let name =
            module.file_name().and_then(|n| n.to_str()).context("a module without a name")?;
        archive.add(&format!("modules/{name}"), FILE, (0, 0), &read(module)?);
    }
    // The unpacker makes no directory by itself.
    let inside = format!("{LAYER}{MCP_PATH}");
    for (at, _) in inside.match_indices('/') {
        archive.add(&inside[..at], DIRECTORY, (0, 0), &[]);
    }
    archive.add(&inside, PROGRAM, (0, 0), &read(mcp)?);
    Ok(archive.finish())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let size = std::fs::metadata(path).with_context(|| format!("{}", path.display()))?.len();
    anyhow::ensure!(size <= MEMBER_MAX, "{} is larger than {MEMBER_MAX} bytes", path.display());
    std::fs::read(path).with_context(|| format!("can't read {}", path.display()))
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime: the same inputs make the same archive
            u32::try_from(content.len()).unwrap_or(u32::MAX),
            0,
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_aligned_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let (init, mcp, module) =
            (dir.path().join("h"), dir.path().join("m"), dir.path().join("a.ko"));
        std::fs::write(&mcp, b"#!").unwrap();
        std::fs::write(&init, b"#!").unwrap();
        std::fs::write(&module, b"ELF").unwrap();
        let bytes = initramfs(&init, &mcp, &[module]).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let heads = bytes.windows(6).enumerate().filter(|(_, w)| *w == b"070701");
        assert!(heads.clone().all(|(at, _)| at % 4 == 0));
        assert_eq!(heads.count(), 7 + 2 + 1 + 1 + (3 + 1) + 1);
        let text = String::from_utf8_lossy(&bytes);
        let layer =
            ["aegis\0", "aegis/usr\0", "aegis/usr/bin\0", "aegis/usr/bin/aegis-mcp-guest\0"];
        assert!(layer.iter().all(|name| text.contains(name)));
        assert!(text.contains("modules/a.ko\0") && text.contains("TRAILER!!!\0"));
    }
}
