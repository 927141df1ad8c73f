//! What a file is, and what shows that it changed.

use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{FileType, Statx};

/// Changes that are further apart have different times, on any host.
const TICK: Duration = Duration::from_millis(20);

/// What a file is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    device: (u32, u32),
    inode: u64,
    born: (i64, u32),
    kind: u16,
}

impl Key {
    /// Of the file that was looked at.
    pub fn of(stat: &Statx) -> Key {
        Key {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            born: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
            kind: stat.stx_mode & 0o170_000,
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        FileType::from_raw_mode(self.kind.into()) == FileType::Directory
    }

    /// Whether it is a plain file.
    pub fn is_plain(&self) -> bool {
        FileType::from_raw_mode(self.kind.into()) == FileType::RegularFile
    }
}

/// What changes whenever a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    mode: u16,
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl Stamp {
    /// Whether so little time passed since it changed that another change may bear the same stamp.
    pub fn is_young(&self) -> bool {
        let (seconds, nanos) = self.changed;
        let changed = u64::try_from(seconds).map(|s| UNIX_EPOCH + Duration::new(s, nanos));
        changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age < TICK))
    }

    /// Of the file that was looked at.
    pub fn of(stat: &Statx) -> Stamp {
        Stamp {
            mode: stat.stx_mode,
            size: stat.stx_size,
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        }
    }
}

/// What the machine was told of a file.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// As it was then.
    pub stamp: Stamp,
    /// It had changed just before.
    pub young: bool,
}
