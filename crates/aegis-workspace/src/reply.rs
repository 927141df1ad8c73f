//! Answers, as the kernel reads them.

use rustix::fs::Statx;
use rustix::io::Errno;

use crate::abi::OUT_HEADER;

/// How long the kernel may believe what it was told, seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Believed {
    /// Of what a name means.
    pub name: u64,
    /// Of what a file is.
    pub attributes: u64,
}
/// Bits of a mode that mean nothing but permissions: a file gives nobody other rights than their own.
pub const PERMISSIONS: u32 = 0o1777;

/// Whose all files are, inside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// An answer that grows.
pub struct Reply(Vec<u8>);

impl Reply {
    /// To the request of that number, with room for so many bytes.
    pub fn to(unique: u64, room: usize) -> Reply {
        let mut bytes = Vec::with_capacity(OUT_HEADER + room);
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&unique.to_le_bytes());
        Reply(bytes)
    }

    /// News of that kind, which answer nothing.
    pub fn news(code: u32) -> Reply {
        let mut news = Reply::to(0, 64);
        news.0[4..8].copy_from_slice(&code.to_le_bytes());
        news
    }

    /// Bytes of its body so far.
    pub fn len(&self) -> usize {
        self.0.len() - OUT_HEADER
    }

    /// A number.
    pub fn u16(&mut self, value: u16) -> &mut Reply {
        self.bytes(&value.to_le_bytes())
    }

    /// A number.
    pub fn u32(&mut self, value: u32) -> &mut Reply {
        self.bytes(&value.to_le_bytes())
    }

    /// A number.
    pub fn u64(&mut self, value: u64) -> &mut Reply {
        self.bytes(&value.to_le_bytes())
    }

    /// Bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Reply {
        self.0.extend_from_slice(bytes);
        self
    }

    /// So many zeros.
    pub fn zeros(&mut self, count: usize) -> &mut Reply {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// The buffer itself, for who reads right into it.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }

    /// Forgets all behind so many bytes of the body.
    pub fn cut(&mut self, len: usize) {
        self.0.truncate(OUT_HEADER + len);
    }

    /// `fuse_attr`.
    pub fn attr(&mut self, stat: &Statx, owner: Owner) -> &mut Reply {
        let times = [stat.stx_atime, stat.stx_mtime, stat.stx_ctime];
        self.u64(stat.stx_ino).u64(stat.stx_size).u64(stat.stx_blocks);
        for time in times {
            self.u64(time.tv_sec as u64);
        }
        for time in times {
            self.u32(time.tv_nsec);
        }
        let mode = u32::from(stat.stx_mode);
        let mode = mode & !0o7777 | mode & PERMISSIONS;
        self.u32(mode).u32(stat.stx_nlink).u32(owner.uid).u32(owner.gid);
        // No device of the host has a number inside.
        self.u32(0).u32(stat.stx_blksize).u32(0)
    }

    /// `fuse_attr_out`.
    pub fn attr_out(&mut self, stat: &Statx, owner: Owner, believed: u64) -> &mut Reply {
        self.u64(believed).u64(0).attr(stat, owner)
    }

    /// `fuse_entry_out`.
    pub fn entry(
        &mut self,
        node: u64,
        stat: &Statx,
        owner: Owner,
        believed: Believed,
    ) -> &mut Reply {
        let Believed { name, attributes } = believed;
        self.u64(node).u64(0).u64(name).u64(attributes).u64(0).attr(stat, owner)
    }

    /// `fuse_entry_out` of a name that nothing has.
    pub fn nothing(&mut self, believed: u64) -> &mut Reply {
        self.zeros(16).u64(believed).zeros(104)
    }

    /// The whole answer.
    pub fn done(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&len.to_le_bytes());
        self.0
    }

    /// The whole answer that says why not.
    pub fn failed(unique: u64, errno: Errno) -> Vec<u8> {
        let mut reply = Reply::to(unique, 0);
        reply.0[4..8].copy_from_slice(&(-errno.raw_os_error()).to_le_bytes());
        reply.done()
    }
}
