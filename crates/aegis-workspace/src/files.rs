//! Files: opened, read, written, changed.

use std::fs::File;
use std::io::IoSlice;

use aegis_wire::bounds::WORKSPACE_TRANSFER_MAX;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, OFlags, SeekFrom, Statx, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, chmodat, fallocate, ftruncate, utimensat,
};
use rustix::io::{Errno, ReadWriteFlags};

use crate::abi::{FSYNC_DATA, OPEN_KEEP_CACHE, Reader, WRITE_CACHE, set};
use crate::folder::{Answer, Folder};
use crate::handles::Handle;
use crate::names::permissions;
use crate::nodes::{self, Stamp};
use crate::quota::{WRITE_MARGIN, taken};
use crate::reply::Reply;

/// What of the flags that a file is opened with is the host's business too. Appending is done write
/// by write; what else there is asks for nothing that a machine may have.
pub(crate) fn kept(asked: OFlags) -> OFlags {
    asked & (OFlags::RWMODE | OFlags::SYNC | OFlags::DSYNC)
}

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

impl Folder {
    pub(crate) fn open(&self, node: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let asked = OFlags::from_bits_retain(body.u32()?);
        self.open_node(node, asked, reply)
    }

    /// Opens a plain file, and says whether what the kernel has cached of it is still right.
    pub(crate) fn open_node(&self, node: u64, asked: OFlags, reply: &mut Reply) -> Answer {
        let writes = asked & OFlags::RWMODE != OFlags::RDONLY;
        if self.read_only && (writes || asked.contains(OFlags::TRUNC)) {
            return Err(Errno::ROFS);
        }
        let found = self.nodes.fd(node)?;
        match nodes::kind(&nodes::stat(&*found)?) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            // Opening a device or a pipe of the host would do something to it.
            _ => return Err(Errno::NXIO),
        }
        let file = File::from(self.open_found(&found, kept(asked))?);
        let truncated = asked.contains(OFlags::TRUNC);
        if truncated {
            self.resize(node, &file, 0)?;
        }
        let stamp = Stamp::of(&nodes::stat(&file)?);
        let fresh = self.nodes.cached(node) == Some(stamp) && !truncated;
        self.nodes.set_cached(node, stamp);
        let append = asked.contains(OFlags::APPEND);
        let grave = self.nodes.grave(node)?;
        let handle = self.handles.add(Handle::new(file, node, append, grave))?;
        reply.u64(handle).u32(if fresh { OPEN_KEEP_CACHE } else { 0 }).u32(0);
        Ok(())
    }

    pub(crate) fn release(&self, mut body: Reader<'_>) -> Answer {
        self.handles.remove(body.u64()?);
        Ok(())
    }

    pub(crate) fn read(&self, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let (handle, offset) = (body.u64()?, body.u64()?);
        let size = (body.u32()? as usize).min(WORKSPACE_TRANSFER_MAX);
        let handle = self.handles.file(handle)?;
        let buffer = reply.buffer();
        let start = buffer.len();
        buffer.resize(start + size, 0);
        let read = read_all(&handle.file, &mut buffer[start..], offset)?;
        reply.cut(read);
        Ok(())
    }

    pub(crate) fn write(&self, node: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let (handle, offset) = (body.u64()?, body.u64()?);
        let (size, flags) = (body.u32()? as usize, body.u32()?);
        body.skip(16)?;
        let bytes = body.rest();
        if bytes.len() != size || size > WORKSPACE_TRANSFER_MAX {
            return Err(Errno::INVAL);
        }
        let handle = self.handles.file(handle)?;
        if handle.node != node {
            return Err(Errno::BADF);
        }
        // To the system call the largest offset is another word for "here".
        i64::try_from(offset).map_err(|_| Errno::FBIG)?;
        let append = handle.append && flags & WRITE_CACHE == 0;
        let _alone = self.alone(node);
        let before = nodes::stat(&handle.file)?;
        let offset = if append { before.stx_size } else { offset };
        let most = most_added(&before, offset, size as u64);
        let (written, after) = self.quota.grow(most, || {
            let written = write_all(&handle.file, bytes, offset, append)?;
            let after = nodes::stat(&handle.file)?;
            Ok(((written, after), added(&before, &after)))
        })?;
        // What the kernel has cached was right before, and it knows what it wrote.
        if self.nodes.cached(node) == Some(Stamp::of(&before)) {
            self.nodes.set_cached(node, Stamp::of(&after));
        }
        reply.u32(u32::try_from(written).unwrap_or(u32::MAX)).u32(0);
        Ok(())
    }

    pub(crate) fn sync(&self, mut body: Reader<'_>) -> Answer {
        let (handle, flags) = (body.u64()?, body.u32()?);
        let handle = self.handles.get(handle)?;
        match flags & FSYNC_DATA {
            0 => rustix::fs::fsync(&handle.file),
            _ => rustix::fs::fdatasync(&handle.file),
        }
    }

    pub(crate) fn allocate(&self, node: u64, mut body: Reader<'_>) -> Answer {
        let (handle, offset, len) = (body.u64()?, body.u64()?, body.u64()?);
        let mode = FallocateFlags::from_bits_retain(body.u32()?);
        let handle = self.handles.file(handle)?;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Blocks behind a file's end would not be counted.
        let takes = mode.is_empty();
        if handle.node != node {
            return Err(Errno::BADF);
        }
        if !takes && mode != punch {
            return Err(Errno::OPNOTSUPP);
        }
        let _alone = self.alone(node);
        let most = if takes { len.saturating_add(WRITE_MARGIN) } else { 0 };
        self.measured(&handle.file, most, || fallocate(&handle.file, mode, offset, len))
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
    fn resize(&self, node: u64, file: &File, size: u64) -> Answer {
        let _alone = self.alone(node);
        self.measured(file, 0, || ftruncate(file, size))
    }

    pub(crate) fn seek(&self, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let (handle, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
        let handle = self.handles.file(handle)?;
        // What is left is the kernel's own affair.
        let to = match whence {
            3 => SeekFrom::Data(offset),
            4 => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        reply.u64(rustix::fs::seek(&handle.file, to)?);
        Ok(())
    }

    pub(crate) fn get_attributes(
        &self,
        node: u64,
        mut body: Reader<'_>,
        reply: &mut Reply,
    ) -> Answer {
        const BY_HANDLE: u32 = 1;
        let flags = body.u32()?;
        body.skip(4)?;
        let handle = body.u64()?;
        let stat = match self.handles.get(handle) {
            Ok(handle) if flags & BY_HANDLE != 0 && handle.node == node => {
                nodes::stat(&handle.file)?
            }
            _ => nodes::stat(&*self.nodes.fd(node)?)?,
        };
        reply.attr_out(&stat, self.owner());
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
        let (handle, size) = (body.u64()?, body.u64()?);
        body.skip(8)?;
        let (atime, mtime) = (body.u64()?, body.u64()?);
        body.skip(8)?;
        let (atime_nsec, mtime_nsec) = (body.u32()?, body.u32()?);
        body.skip(4)?;
        let mode = body.u32()?;
        let fd = self.nodes.fd(node)?;
        let kind = nodes::kind(&nodes::stat(&*fd)?);
        let name = Folder::link_name(&fd);
        if valid & set::MODE != 0 {
            if kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            chmodat(self.descriptors(), &name, permissions(mode), AtFlags::empty())?;
        }
        if valid & set::SIZE != 0 {
            if kind != FileType::RegularFile {
                return Err(Errno::INVAL);
            }
            match self.handles.file(handle) {
                Ok(handle) if valid & set::FH != 0 && handle.node == node => {
                    self.resize(node, &handle.file, size)?;
                }
                _ => self.resize(node, &self.open_found(&fd, OFlags::WRONLY)?.into(), size)?,
            }
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
        reply.attr_out(&nodes::stat(&*fd)?, self.owner());
        Ok(())
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
