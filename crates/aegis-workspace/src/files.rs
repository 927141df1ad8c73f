//! Files: read, written, changed.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use aegis_wire::bounds::WORKSPACE_TRANSFER_MAX;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, Statx, Timespec, Timestamps,
    UTIME_NOW, UTIME_OMIT, chmodat, fallocate, fchmod, ftruncate, utimensat,
};
use rustix::io::{Errno, ReadWriteFlags};

use crate::abi::{FSYNC_DATA, Reader, WRITE_CACHE, set};
use crate::folder::{Answer, Folder};
use crate::names::permissions;
use crate::nodes::{self, Stamp};
use crate::quota::{WRITE_MARGIN, taken};
use crate::reply::Reply;

/// What a change of a file added.
fn added(before: &Statx, after: &Statx) -> i64 {
    let [before, after] = [before, after].map(|s| i64::try_from(taken(s)).unwrap_or(i64::MAX));
    after - before
}

/// What a write of so many bytes there may add: nothing, where all of it is in blocks already.
fn most_added(stat: &Statx, offset: u64, len: u64) -> u64 {
    let whole = stat.stx_blocks.saturating_mul(512) >= stat.stx_size;
    match offset.checked_add(len) {
        Some(end) if whole && end <= stat.stx_size => 0,
        _ => len.saturating_add(WRITE_MARGIN),
    }
}

/// A file's mode, with the rights that it gives to others by being run.
fn whole_mode(file: &OwnedFd) -> Result<Mode, Errno> {
    Ok(Mode::from_raw_mode(nodes::stat(file)?.stx_mode.into()))
}

impl Folder {
    /// A plain file, open to be read.
    pub(crate) fn readable(&self, node: u64) -> Result<Arc<File>, Errno> {
        if let Some(file) = self.opened.get(node) {
            return Ok(file);
        }
        let file = self.opened.keep(node, self.open_plain(node, OFlags::RDONLY)?);
        // Who forgot it meanwhile closed what was there before.
        if !self.nodes.is_known(node) {
            self.opened.close(node);
        }
        Ok(file)
    }

    /// A plain file, open to be written, and closed again at once: nobody on the host could run what
    /// is open to be written.
    pub(crate) fn writable(&self, node: u64) -> Result<File, Errno> {
        self.open_plain(node, OFlags::RDWR)
    }

    fn open_plain(&self, node: u64, flags: OFlags) -> Result<File, Errno> {
        let found = self.nodes.fd(node)?;
        let stat = nodes::stat(&*found)?;
        match nodes::kind(&stat) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            // Opening a device or a pipe of the host would do something to it.
            _ => return Err(Errno::NXIO),
        }
        match self.open_found(&found, flags) {
            Err(Errno::ACCESS) => self.open_nevertheless(&found, flags),
            opened => opened,
        }
        .map(File::from)
    }

    /// Opens what its owner may not, but may give itself the right to: the machine's kernel has judged
    /// who may, and perhaps before the right went. A folder to look at is not changed for it.
    fn open_nevertheless(&self, found: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        if self.read_only {
            return Err(Errno::ACCESS);
        }
        let _alone = self.change_modes();
        // Not as it was before this thread's turn: another one's moment may have been seen.
        let mode = whole_mode(found)?;
        self.set_mode(found, mode | Mode::RUSR | Mode::WUSR).map_err(|_| Errno::ACCESS)?;
        // The host may have taken a right away that not everybody can give.
        let widened = whole_mode(found);
        let file = self.open_found(found, flags);
        // Who changed it meanwhile meant what is there now.
        if widened.is_err() || whole_mode(found) == widened {
            self.restore_mode(found, file.as_ref().ok(), mode);
        }
        file
    }

    /// Gives a file its mode back: what was asked for is done by now, and does not fail for it.
    fn restore_mode(&self, found: &OwnedFd, file: Option<&OwnedFd>, mode: Mode) {
        let done = file.map_or(Err(Errno::BADF), |file| fchmod(file, mode));
        if done.is_err()
            && let Err(error) = self.set_mode(found, mode)
        {
            tracing::warn!(%error, mode = mode.bits(), "a file's mode was widened, and stays so");
        }
    }

    fn set_mode(&self, found: &OwnedFd, mode: Mode) -> Result<(), Errno> {
        chmodat(self.descriptors(), Folder::link_name(found), mode, AtFlags::empty())
    }

    pub(crate) fn read(&self, node: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        body.skip(8)?;
        let offset = body.u64()?;
        let size = (body.u32()? as usize).min(WORKSPACE_TRANSFER_MAX);
        let file = self.readable(node)?;
        let buffer = reply.buffer();
        let start = buffer.len();
        buffer.resize(start + size, 0);
        let read = read_all(&file, &mut buffer[start..], offset)?;
        reply.cut(read);
        Ok(())
    }

    pub(crate) fn write(&self, node: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        body.skip(8)?;
        let (offset, size, flags) = (body.u64()?, body.u32()? as usize, body.u32()?);
        body.skip(8)?;
        let opened_with = OFlags::from_bits_retain(body.u32()?);
        body.skip(4)?;
        let bytes = body.rest();
        if bytes.len() != size || size > WORKSPACE_TRANSFER_MAX {
            return Err(Errno::INVAL);
        }
        let file = self.writable(node)?;
        // To the system call the largest offset is another word for "here".
        i64::try_from(offset).map_err(|_| Errno::FBIG)?;
        let append = opened_with.contains(OFlags::APPEND) && flags & WRITE_CACHE == 0;
        let _alone = (self.alone(node), self.modes_stay());
        // The kernel believes nothing of what it knew before.
        self.nodes.untold(node);
        let before = nodes::stat(&file)?;
        let offset = if append { before.stx_size } else { offset };
        let most = most_added(&before, offset, size as u64);
        let written = self.quota.grow(most, || {
            let written = write_all(&file, bytes, offset, append)?;
            let after = nodes::stat(&file)?;
            self.nodes.set_own(node, Stamp::of(&after));
            Ok((written, added(&before, &after)))
        })?;
        reply.u32(u32::try_from(written).unwrap_or(u32::MAX)).u32(0);
        Ok(())
    }

    pub(crate) fn sync(&self, node: u64, mut body: Reader<'_>) -> Answer {
        body.skip(8)?;
        let file = self.readable(node)?;
        match body.u32()? & FSYNC_DATA {
            0 => rustix::fs::fsync(&file),
            _ => rustix::fs::fdatasync(&file),
        }
    }

    pub(crate) fn allocate(&self, node: u64, mut body: Reader<'_>) -> Answer {
        body.skip(8)?;
        let (offset, len) = (body.u64()?, body.u64()?);
        let mode = FallocateFlags::from_bits_retain(body.u32()?);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Blocks behind a file's end would not be counted.
        let takes = mode.is_empty();
        if !takes && mode != punch {
            return Err(Errno::OPNOTSUPP);
        }
        let file = self.writable(node)?;
        let _alone = (self.alone(node), self.modes_stay());
        self.nodes.untold(node);
        let most = if takes { len.saturating_add(WRITE_MARGIN) } else { 0 };
        self.measured(&file, most, || fallocate(&file, mode, offset, len))
    }

    /// Does what may add so many bytes to a file, and counts what it does.
    fn measured(&self, file: &File, most: u64, work: impl FnOnce() -> Result<(), Errno>) -> Answer {
        let before = nodes::stat(file)?;
        self.quota.grow(most, || {
            work()?;
            Ok(((), added(&before, &nodes::stat(file)?)))
        })
    }

    /// Cuts a file, or lets it grow by nothing but a hole.
    pub(crate) fn resize(&self, node: u64, size: u64) -> Answer {
        let _alone = self.alone(node);
        self.resize_alone(node, size)
    }

    fn resize_alone(&self, node: u64, size: u64) -> Answer {
        let file = &self.writable(node)?;
        let _modes = self.modes_stay();
        self.measured(file, 0, || ftruncate(file, size))
    }

    pub(crate) fn seek(&self, node: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        body.skip(8)?;
        let (offset, whence) = (body.u64()?, body.u32()?);
        // What is left is the kernel's own affair.
        let to = match whence {
            3 => SeekFrom::Data(offset),
            4 => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        reply.u64(rustix::fs::seek(&*self.readable(node)?, to)?);
        Ok(())
    }

    pub(crate) fn get_attributes(&self, node: u64, reply: &mut Reply) -> Answer {
        let stat = nodes::stat(&*self.nodes.fd(node)?)?;
        self.tell_attributes(node, &stat, reply)
    }

    fn tell_attributes(&self, node: u64, stat: &Statx, reply: &mut Reply) -> Answer {
        self.nodes.set_told(node, Stamp::of(stat));
        reply.attr_out(stat, self.owner(), self.believed(node, stat).attributes);
        Ok(())
    }

    /// Permissions, size and times change; an owner is taken and means nothing: all belongs to one.
    pub(crate) fn set_attributes(
        &self,
        node: u64,
        mut body: Reader<'_>,
        reply: &mut Reply,
    ) -> Answer {
        let valid = body.u32()?;
        body.skip(4)?;
        body.skip(8)?;
        let size = body.u64()?;
        body.skip(8)?;
        let (atime, mtime) = (body.u64()?, body.u64()?);
        body.skip(8)?;
        let (atime_nsec, mtime_nsec) = (body.u32()?, body.u32()?);
        body.skip(4)?;
        let mode = body.u32()?;
        let fd = self.nodes.fd(node)?;
        let _alone = self.alone(node);
        let before = nodes::stat(&*fd)?;
        let kind = nodes::kind(&before);
        let unheard = kind == FileType::RegularFile && self.changed_unheard(node, &before);
        let name = Folder::link_name(&fd);
        if valid & set::MODE != 0 {
            if kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            let _alone = self.change_modes();
            self.set_mode(&fd, permissions(mode))?;
        }
        if valid & set::SIZE != 0 {
            if kind != FileType::RegularFile {
                return Err(Errno::INVAL);
            }
            self.resize_alone(node, size)?;
        }
        let time = |given: u32, now: u32, sec: u64, nsec: u32| {
            let nsec = match valid {
                v if v & now != 0 => UTIME_NOW,
                v if v & given != 0 => i64::from(nsec.min(999_999_999)),
                _ => UTIME_OMIT,
            };
            Timespec { tv_sec: sec as i64, tv_nsec: nsec as _ }
        };
        if valid & (set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW) != 0 {
            let times = Timestamps {
                last_access: time(set::ATIME, set::ATIME_NOW, atime, atime_nsec),
                last_modification: time(set::MTIME, set::MTIME_NOW, mtime, mtime_nsec),
            };
            utimensat(self.descriptors(), &name, &times, AtFlags::empty())?;
        }
        let mut stat = nodes::stat(&*fd)?;
        if unheard {
            // What was told stays noted, so that news come. Should they be late, the kernel asks
            // again at once, finds another time than this one, and so drops its pages.
            stat.stx_mtime.tv_nsec ^= 1;
            reply.attr_out(&stat, self.owner(), 0);
            return Ok(());
        }
        self.nodes.set_own(node, Stamp::of(&stat));
        self.tell_attributes(node, &stat, reply)
    }

    /// Whether the host may have written to a file since the machine looked at it or changed it: an
    /// answer that has the new time would have the kernel take its old pages for new ones.
    fn changed_unheard(&self, node: u64, stat: &Statx) -> bool {
        let now = Stamp::of(stat);
        let told = self.nodes.told_of(node);
        !self.nodes.is_own(node, now) && told.is_none_or(|told| told.young || told.stamp != now)
    }
}

/// Reads until the buffer is full or the file ends.
fn read_all(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buffer.len() {
        let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
        match rustix::io::pread(file, &mut buffer[done..], at) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// Writes as much as there is room for; an error only when it is nothing.
fn write_all(file: &File, bytes: &[u8], offset: u64, append: bool) -> Result<usize, Errno> {
    let flags = if append { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
    let mut done = 0;
    while done < bytes.len() {
        let at = offset.checked_add(done as u64).ok_or(Errno::FBIG)?;
        let slice = [IoSlice::new(&bytes[done..])];
        match rustix::io::pwritev2(file, &slice, at, flags) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(done)
}
