//! The root of user processes: the machine's own disk over the read-only base.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsPickFlags, MountFlags, fsconfig_reconfigure, fsconfig_set_flag, fspick, mount, mount_move,
};

use crate::disks::Disks;
use crate::names::Names;
use crate::sys;

/// Where the read-only base is mounted before the root changes.
pub const BASE: &str = "/base";
/// Where the machine's own disk is mounted before the root changes.
pub const OWN: &str = "/own";
/// Where both together become a root.
pub const ROOT: &str = "/newroot";
/// The layers of [`ROOT`]: what every machine has (`aegis_wire::channel::guest::LAYER`) lies over
/// the base.
const LAYERS: &CStr = c"lowerdir=/aegis:/base,upperdir=/own/upper,workdir=/own/work";
/// No thread that fills unused inode tables or reads all block bitmaps ahead: it would work on a
/// disk that hardly anybody uses.
const EXT4: &CStr = c"noinit_itable,no_prefetch_block_bitmaps,discard";
/// Mounts that move along, with all that is mounted below them.
const MOVED: [&str; 5] = ["proc", "sys", "dev", "run", "tmp"];

/// Mounts the base, for all clones.
pub fn mount_base(disks: &Disks) -> io::Result<()> {
    fs::create_dir_all(BASE)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    mount(&disks.base.node, BASE, "erofs", flags, None::<&CStr>)
        .map_err(|e| named(e, "can't mount the base"))
}

/// Mounts the machine's own disk and makes base and disk the root of this process and all later
/// ones. Gives a descriptor of the disk's root, by which it can be made clean in the end.
pub fn assemble(disks: &Disks, names: &Names<'_>) -> io::Result<OwnedFd> {
    let own = mount_own(disks)?;
    names.write(&own);
    mount_layers()?;
    for name in MOVED {
        let target = format!("{ROOT}/{name}");
        if let Err(e) = mount_move(format!("/{name}"), &target) {
            // Perhaps the base has no such directory, or the machine lost it.
            let _ = fs::remove_file(&target);
            fs::create_dir_all(&target).map_err(|_| named(e, &target))?;
            mount_move(format!("/{name}"), &target).map_err(|e| named(e, &target))?;
        }
    }
    // Not chroot alone: processes that take it for a jail must be able to make their own.
    rustix::process::chdir(ROOT)?;
    mount_move(".", "/").map_err(|e| named(e, "can't change the root"))?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(own)
}

/// Mounts the machine's own disk with its two layer directories.
pub fn mount_own(disks: &Disks) -> io::Result<OwnedFd> {
    fs::create_dir_all(OWN)?;
    let flags = MountFlags::NOATIME;
    mount(&disks.own.node, OWN, "ext4", flags, EXT4)
        .map_err(|e| named(e, "can't mount the disk"))?;
    make_layers()?;
    Ok(File::open(OWN)?.into())
}

/// Makes the directories that [`mount_layers`] needs below [`OWN`].
pub fn make_layers() -> io::Result<()> {
    for (name, mode) in [("upper", 0o755), ("work", 0o700)] {
        match fs::DirBuilder::new().mode(mode).create(format!("{OWN}/{name}")) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Mounts the layers on [`ROOT`].
pub fn mount_layers() -> io::Result<()> {
    fs::create_dir_all(ROOT)?;
    mount("overlay", ROOT, "overlay", MountFlags::empty(), LAYERS)
        .map_err(|e| named(e, "can't mount the layers"))
}

/// Writes a file below a directory that user code may have filled with links.
pub fn write_below(own: impl AsFd, path: &str, bytes: &[u8]) -> io::Result<()> {
    open_below(own, path, OFlags::CREATE | OFlags::WRONLY | OFlags::TRUNC)?.write_all(bytes)
}

/// Opens a file below a directory that user code may have filled with links.
pub fn open_below(own: impl AsFd, path: &str, how: OFlags) -> io::Result<File> {
    // A whiteout or a pipe in its place is refused, not waited for.
    let flags = how | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let made = how.contains(OFlags::CREATE);
    let mode = Mode::from_raw_mode(if made { 0o644 } else { 0 });
    Ok(rustix::fs::openat2(own, path, flags, mode, inside)?.into())
}

/// Makes the disk clean, whoever still holds files on it, and forbids later writes.
pub fn seal(own: &OwnedFd) -> io::Result<()> {
    rustix::fs::syncfs(own)?;
    let read_only = || -> rustix::io::Result<()> {
        let disk = fspick(own, "", FsPickFlags::FSPICK_EMPTY_PATH)?;
        fsconfig_set_flag(&disk, "ro")?;
        fsconfig_reconfigure(&disk)
    };
    // A file that is open for writing, as under a loop device, forbids it; freezing does not mind.
    read_only().map_err(io::Error::from).or_else(|_| sys::freeze(own))
}

fn named(e: impl Into<io::Error>, what: &str) -> io::Error {
    let e = e.into();
    io::Error::new(e.kind(), format!("{what}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_not_followed() {
        let dir = std::env::temp_dir().join(format!("aegis-harness-links-{}", std::process::id()));
        fs::create_dir_all(dir.join("upper/etc")).unwrap();
        std::os::unix::fs::symlink("/", dir.join("upper/out")).unwrap();
        std::os::unix::fs::symlink(dir.join("stolen"), dir.join("upper/etc/hostname")).unwrap();
        let own: OwnedFd = File::open(&dir).unwrap().into();
        assert!(write_below(&own, "upper/etc/hostname", b"x").is_err());
        assert!(write_below(&own, "upper/out/tmp/aegis-never", b"x").is_err());
        assert!(!dir.join("stolen").exists());
        write_below(&own, "upper/etc/machine-id", b"abc").unwrap();
        assert_eq!(fs::read(dir.join("upper/etc/machine-id")).unwrap(), b"abc");
        fs::remove_dir_all(&dir).unwrap();
    }
}
