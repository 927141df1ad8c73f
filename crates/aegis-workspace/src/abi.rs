//! The kernel's own protocol (`linux/fuse.h`, 7.31 and what later ones understand of it): numbers,
//! and requests as they come. Whoever sends them is hostile; every length is looked at here.

use std::ffi::CStr;

use rustix::io::Errno;

/// What the kernel asks for.
pub mod op {
    #![allow(missing_docs, reason = "the names are the kernel's")]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
}

/// What both sides agree on at first.
pub mod init {
    #![allow(missing_docs, reason = "the names are the kernel's")]
    pub const MAJOR: u32 = 7;
    pub const MINOR: u32 = 31;
    pub const ASYNC_READ: u32 = 1;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
}

/// Bits of SETATTR's `valid`.
pub mod set {
    #![allow(missing_docs, reason = "the names are the kernel's")]
    pub const MODE: u32 = 1;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// The answer to CREATE: what the kernel has cached of the file is still right.
pub const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// WRITE comes from the page cache: however the file was opened, the offset counts.
pub const WRITE_CACHE: u32 = 1;
/// FSYNC asks for the data only.
pub const FSYNC_DATA: u32 = 1;
/// The folder itself.
pub const ROOT_ID: u64 = 1;
/// Bytes of a request's head.
pub const IN_HEADER: usize = 40;
/// Bytes of an answer's head.
pub const OUT_HEADER: usize = 16;
/// Longest name, bytes, as on all of Linux's file systems.
pub const NAME_MAX: usize = 255;

/// Takes what a request is made of, from the front.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Of these bytes.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (first, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*first)
    }

    /// The next number.
    pub fn u32(&mut self) -> Result<u32, Errno> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    /// The next number.
    pub fn u64(&mut self) -> Result<u64, Errno> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// Passes over bytes.
    pub fn skip(&mut self, bytes: usize) -> Result<(), Errno> {
        self.0 = self.0.get(bytes..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// The next text, with its zero.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.to_bytes_with_nul().len()..];
        Ok(text)
    }

    /// The next text, which is a name in a directory: one component that leads nowhere else.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        let bytes = name.to_bytes();
        if bytes.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        Ok(name)
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// A request's head.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// One of [`op`], or anything.
    pub opcode: u32,
    /// Names the answer.
    pub unique: u64,
    /// What it is about.
    pub node: u64,
}

impl Head {
    /// Of a whole request; nothing when it is none.
    pub fn read(request: &[u8]) -> Option<(Head, Reader<'_>)> {
        let mut reader = Reader::new(request);
        let len = reader.u32().ok()?;
        let opcode = reader.u32().ok()?;
        let unique = reader.u64().ok()?;
        let node = reader.u64().ok()?;
        reader.skip(IN_HEADER - 24).ok()?;
        (len as usize == request.len()).then_some((Head { opcode, unique, node }, reader))
    }
}
