//! A machine's writable disk, of exactly the promised size: a sparse raw file with an empty ext4, or an
//! overlay of a commit's disk.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use aegis_wire::worker::Disk;
use anyhow::Context as _;

use crate::child::Child;
use crate::sys::{self, Confine};
use crate::{overlay, snapshot};

/// A disk counts whole sectors of this size, bytes.
const SECTOR: u64 = 512;
/// Making a file system of any size takes some milliseconds.
const MAKE_DEADLINE: Duration = Duration::from_secs(30);
/// Where distributions put it; none of these is on every user's PATH.
const MKE2FS: [&str; 4] =
    ["/usr/sbin/mke2fs", "/sbin/mke2fs", "/usr/local/sbin/mke2fs", "/usr/bin/mke2fs"];

/// A disk that can be handed to QEMU; its file system may still be in the making.
pub struct Opened {
    /// The file, open for reading and writing.
    pub file: OwnedFd,
    /// The whole disk that it lies over, if it does.
    pub under: Option<OwnedFd>,
    /// Its size as the machine sees it, bytes: whole sectors.
    pub bytes: u64,
    /// Size that the file may have, bytes.
    pub file_max: u64,
    making: Option<Making>,
}

struct Making {
    child: Option<Child>,
    /// Something is to be made in it.
    empty: bool,
    temporary: PathBuf,
    path: PathBuf,
}

/// Opens the disk, or makes an empty file for it. `uid` becomes its owner. With `under`, the path of a
/// commit's disk, it lies over that one.
pub fn open(disk: &Disk, under: Option<&Path>, uid: Option<u32>) -> anyhow::Result<Opened> {
    let wanted = whole_sectors(disk)?;
    let under = under.map(snapshot::open_shared).transpose()?;
    let file_max = if under.is_some() { overlay::size_max(wanted) } else { wanted };
    if let Some(directory) = disk.path.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("can't make {}", directory.display()))?;
    }
    let mut options = File::options();
    options.read(true).write(true).mode(0o600).custom_flags(no_follow());
    match options.open(&disk.path) {
        Ok(file) => {
            let bytes = match &under {
                None => file.metadata()?.len(),
                Some(_) => overlay::size(&file).context("the disk can't be read")?,
            };
            anyhow::ensure!(
                bytes <= wanted && bytes > 0 && bytes.is_multiple_of(SECTOR),
                "{} has {bytes} bytes; {wanted} are allowed",
                disk.path.display(),
            );
            own(&file, uid)?;
            Ok(Opened { file: file.into(), under, bytes, file_max, making: None })
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let temporary = temporary(&disk.path);
            // What an earlier worker left half made is worth nothing.
            let _ = std::fs::remove_file(&temporary);
            let file = options
                .create_new(true)
                .open(&temporary)
                .with_context(|| format!("can't make {}", temporary.display()))?;
            let empty = under.is_none();
            let made = if empty { file.set_len(wanted) } else { overlay::write(&file, wanted) };
            made.with_context(|| format!("can't make a disk of {wanted} bytes"))?;
            own(&file, uid)?;
            let making = Making { child: None, empty, temporary, path: disk.path.clone() };
            Ok(Opened { file: file.into(), under, bytes: wanted, file_max, making: Some(making) })
        }
        Err(e) => Err(e).with_context(|| format!("can't open {}", disk.path.display())),
    }
}

fn whole_sectors(disk: &Disk) -> anyhow::Result<u64> {
    let wanted = disk.bytes.0 - disk.bytes.0 % SECTOR;
    anyhow::ensure!(wanted > 0, "a disk of {} bytes is smaller than a sector", disk.bytes.0);
    Ok(wanted)
}

/// The name under which a disk is made before it is one.
pub fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// Bytes that a disk file takes on the host; 0 when it is not there.
pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.blocks() * SECTOR)
}

impl Opened {
    /// Gives the disk of a spare machine, which lies at `from`, its place.
    pub fn settle(&self, from: &Path, to: &Path) -> anyhow::Result<()> {
        anyhow::ensure!(!to.exists(), "{} is there already", to.display());
        if let Some(directory) = to.parent() {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("can't make {}", directory.display()))?;
        }
        std::fs::rename(from, to).with_context(|| format!("can't make {}", to.display()))
    }

    /// Begins to make the file system where there is none.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        if let Some(making) = &mut self.making
            && making.empty
        {
            making.child = Some(format(&making.temporary)?);
        }
        Ok(())
    }

    /// Whether it was not there before.
    pub fn is_new(&self) -> bool {
        self.making.is_some()
    }

    /// Waits until the file system is whole, and gives the disk its name.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        let Some(making) = self.making.take() else { return Ok(()) };
        if making.empty {
            let mut child = making.child.context("its file system was never begun")?;
            let status = tokio::time::timeout(MAKE_DEADLINE, child.wait())
                .await
                .context("mke2fs did not finish in time")??;
            anyhow::ensure!(status.success(), "mke2fs failed ({status}): {}", child.last_words());
        }
        std::fs::rename(&making.temporary, &making.path)
            .with_context(|| format!("can't name the disk {}", making.path.display()))
    }
}

fn format(path: &Path) -> anyhow::Result<Child> {
    let program = MKE2FS
        .iter()
        .find(|p| Path::new(p).exists())
        .context("mke2fs is not installed: install e2fsprogs")?;
    let mut command = Command::new(program);
    command
        .args(["-q", "-F", "-t", "ext4", "-O", "^resize_inode", "-m", "0", "-E"])
        .arg("lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0")
        .arg(path)
        .stdout(Stdio::null());
    sys::confine(&mut command, Confine { die_with_parent: true, ..Confine::default() });
    Child::spawn(command).context("can't start mke2fs")
}

/// Gives a file to a machine's user.
pub fn own(file: &File, uid: Option<u32>) -> anyhow::Result<()> {
    if let Some(id) = uid {
        std::os::unix::fs::fchown(file, Some(id), Some(id))
            .context("can't give the disk to the machine's user")?;
    }
    Ok(())
}

/// The last part of a disk's path must be the disk itself.
fn no_follow() -> i32 {
    i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use aegis_wire::words::DiskBytes;

    use super::*;

    #[tokio::test]
    async fn a_disk_is_made_once_and_has_its_exact_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/disk.raw");
        let disk = Disk { path: path.clone(), bytes: DiskBytes(1_500_000_100) };
        let mut first = open(&disk, None, None).unwrap();
        first.begin().unwrap();
        assert!(!path.exists(), "it has no name before it is whole");
        first.finish().await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1_500_000_100 / 512 * 512);
        assert!(allocated(&path) < 100 << 20, "it is sparse");
        let inode = std::fs::metadata(&path).unwrap().ino();
        open(&disk, None, None).unwrap().finish().await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode, "it is reused");
        let smaller = Disk { path: path.clone(), bytes: DiskBytes(1 << 20) };
        assert!(open(&smaller, None, None).is_err(), "larger than allowed");
    }

    #[tokio::test]
    async fn a_spare_disk_gets_its_place_once() {
        let dir = tempfile::tempdir().unwrap();
        let spare = Disk { path: dir.path().join("spare"), bytes: DiskBytes(500_000_000) };
        let own = dir.path().join("deep/disk");
        for free in [true, false] {
            let mut disk = open(&spare, None, None).unwrap();
            disk.begin().unwrap();
            disk.finish().await.unwrap();
            assert_eq!(disk.settle(&spare.path, &own).is_ok(), free);
            assert_eq!(spare.path.exists(), !free);
        }
        let check = Command::new("/usr/sbin/e2fsck").args(["-fn"]).arg(&own).output();
        assert!(check.unwrap().status.success());
    }
}
