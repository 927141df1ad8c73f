//! The folder as its machine's kernel asks for it: one request, one answer, from any thread.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use aegis_wire::bounds::{WORKSPACE_PAGES_MAX, WORKSPACE_READ_AHEAD, WORKSPACE_TRANSFER_MAX};
use aegis_wire::channel::workspace::OWNER_OPCODE;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::abi::{Head, Reader, init, op};
use crate::handles::Handles;
use crate::nodes::{self, Bounds, Nodes};
use crate::opened::Opened;
use crate::quota::Quota;
use crate::reply::{Owner, Reply};
use crate::watch::Watch;

/// Locks that keep two writes to one file apart, so that what each adds can be measured.
const STRIPES: usize = 64;
/// Requests that the kernel does in the background at a time.
const BACKGROUND: u16 = 16;

/// What is lent.
pub struct Lent {
    /// The folder.
    pub root: OwnedFd,
    /// `/proc/self/fd` of this process: the way from a descriptor that can't be read to one that can.
    pub descriptors: OwnedFd,
    /// It may be looked at only.
    pub read_only: bool,
    /// What is held at most of it.
    pub bounds: Bounds,
    /// Open files, and open directories, at most.
    pub handles: usize,
    /// Where the host's changes can be heard of.
    pub watch: Option<Watch>,
    /// How much it may grow.
    pub quota: Quota,
}

/// A folder that is lent.
pub struct Folder {
    pub(crate) nodes: Nodes,
    pub(crate) handles: Handles,
    pub(crate) opened: Opened,
    pub(crate) quota: Arc<Quota>,
    pub(crate) read_only: bool,
    pub(crate) watch: Option<Watch>,
    // Read by requests whose answers are to be believed, written by news.
    pub(crate) looks: RwLock<()>,
    descriptors: OwnedFd,
    owner: Mutex<Owner>,
    stripes: [Mutex<()>; STRIPES],
    names: Mutex<()>,
    // Read by those who write to files, written by those who change modes.
    modes: RwLock<()>,
}

/// What is answered to a request that is answered.
pub(crate) type Answer = Result<(), Errno>;

impl Folder {
    /// Lends it.
    ///
    /// # Errors
    /// When it can't be looked at.
    pub fn new(lent: Lent) -> Result<Folder, Errno> {
        let quota = Arc::new(lent.quota);
        Ok(Folder {
            nodes: Nodes::new(lent.root, lent.bounds, Arc::clone(&quota))?,
            handles: Handles::new(lent.handles),
            opened: Opened::new(lent.handles),
            quota,
            read_only: lent.read_only,
            watch: lent.watch,
            looks: RwLock::default(),
            descriptors: lent.descriptors,
            owner: Mutex::default(),
            stripes: [const { Mutex::new(()) }; STRIPES],
            names: Mutex::default(),
            modes: RwLock::default(),
        })
    }

    /// Answers one request; some have no answer.
    pub fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        let (head, body) = Head::read(request)?;
        match head.opcode {
            op::FORGET => {
                let _ = self.forget(head.node, body);
                None
            }
            op::BATCH_FORGET => {
                let _ = self.forget_all(body);
                None
            }
            // What is interrupted is over soon.
            op::INTERRUPT => None,
            OWNER_OPCODE => {
                let _ = self.set_owner(body);
                None
            }
            _ => {
                let mut reply = Reply::to(head.unique, 256);
                Some(match self.serve(head, body, &mut reply) {
                    Ok(()) => reply.done(),
                    Err(errno) => Reply::failed(head.unique, errno),
                })
            }
        }
    }

    fn serve(&self, head: Head, body: Reader<'_>, reply: &mut Reply) -> Answer {
        let node = head.node;
        if self.read_only && changes(head.opcode) {
            return Err(Errno::ROFS);
        }
        match head.opcode {
            op::INIT => init(body, reply),
            op::DESTROY => Ok(()),
            op::LOOKUP => self.lookup(node, body, reply),
            op::GETATTR => self.get_attributes(node, reply),
            op::SETATTR => self.set_attributes(node, body, reply),
            op::READLINK => self.read_link(node, reply),
            op::SYMLINK => self.symlink(node, body, reply),
            op::MKNOD => self.make_node(node, body, reply),
            op::MKDIR => self.make_directory(node, body, reply),
            op::UNLINK => self.remove(node, body, false),
            op::RMDIR => self.remove(node, body, true),
            op::RENAME => self.rename(node, body, false),
            op::RENAME2 => self.rename(node, body, true),
            op::LINK => self.link(node, body, reply),
            op::CREATE => self.create(node, body, reply),
            op::READ => self.read(node, body, reply),
            op::WRITE => self.write(node, body, reply),
            op::FSYNC => self.sync(node, body),
            op::FSYNCDIR => self.sync_directory(body),
            op::RELEASEDIR => self.release(body),
            op::FALLOCATE => self.allocate(node, body),
            op::LSEEK => self.seek(node, body, reply),
            op::OPENDIR => self.open_directory(node, reply),
            op::READDIR => self.list(node, body, reply, false),
            op::READDIRPLUS => self.list(node, body, reply, true),
            op::STATFS => self.statfs(node, reply),
            // The kernel does without: that files are opened and closed it keeps to itself from the
            // first answer on, locks are its own, attributes beside these there are none.
            _ => Err(Errno::NOSYS),
        }
    }

    fn set_owner(&self, mut body: Reader<'_>) -> Answer {
        let owner = Owner { uid: body.u32()?, gid: body.u32()? };
        if let Some(watch) = &self.watch {
            watch.set_heard(body.u32().is_ok_and(|takes_news| takes_news == 1));
        }
        *self.owner.lock().unwrap_or_else(PoisonError::into_inner) = owner;
        Ok(())
    }

    /// Whose all files are, inside.
    pub(crate) fn owner(&self) -> Owner {
        *self.owner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps others from changing the contents of that file.
    pub(crate) fn alone(&self, node: u64) -> MutexGuard<'_, ()> {
        let stripe = &self.stripes[node as usize % STRIPES];
        stripe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps modes as they are while a file is written to. (Opening it to be written may change them
    /// for a moment: that comes before.)
    pub(crate) fn modes_stay(&self) -> RwLockReadGuard<'_, ()> {
        self.modes.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps others from changing modes, and from writing, which takes rights from a mode too.
    pub(crate) fn change_modes(&self) -> RwLockWriteGuard<'_, ()> {
        self.modes.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps others from taking names away, and from giving one file two.
    pub(crate) fn names_stand_still(&self) -> MutexGuard<'_, ()> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Name of a descriptor in [`Lent::descriptors`].
    pub(crate) fn link_name(fd: &OwnedFd) -> String {
        fd.as_raw_fd().to_string()
    }

    /// All descriptors of this process.
    pub(crate) fn descriptors(&self) -> &OwnedFd {
        &self.descriptors
    }

    /// Opens a file that was found, for reading or writing.
    pub(crate) fn open_found(&self, fd: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        rustix::fs::openat(&self.descriptors, Folder::link_name(fd), flags, Mode::empty())
    }

    fn forget(&self, node: u64, mut body: Reader<'_>) -> Answer {
        self.forget_times(node, body.u64()?);
        Ok(())
    }

    fn forget_all(&self, mut body: Reader<'_>) -> Answer {
        let count = body.u32()?;
        body.skip(4)?;
        for _ in 0..count {
            let (node, times) = (body.u64()?, body.u64()?);
            self.forget_times(node, times);
        }
        Ok(())
    }

    /// The kernel forgets a file as often as it says.
    pub(crate) fn forget_times(&self, node: u64, times: u64) {
        if let Some((parent, name)) = self.nodes.forget(node, times) {
            self.opened.close(node);
            if let Some(watch) = &self.watch {
                watch.forget(node, parent, &name);
            }
        }
    }

    /// The machine's own view: its limit, and what is left of that and of the host's disk.
    fn statfs(&self, node: u64, reply: &mut Reply) -> Answer {
        const BLOCK: u64 = 4096;
        let host = rustix::fs::fstatvfs(&*self.nodes.fd(node)?)?;
        let (limit, left) = self.quota.room();
        let free = left.min(host.f_bavail.saturating_mul(host.f_frsize)) / BLOCK;
        let names = left / crate::quota::NAME_BYTES;
        reply.u64(limit / BLOCK).u64(free).u64(free);
        reply.u64(limit / crate::quota::NAME_BYTES).u64(names.min(host.f_favail));
        reply.u32(BLOCK as u32).u32(crate::abi::NAME_MAX as u32).u32(BLOCK as u32).u32(0);
        reply.zeros(24);
        Ok(())
    }

    /// Opens what a directory's handle reads.
    pub(crate) fn open_listed(&self, node: u64) -> Result<OwnedFd, Errno> {
        let fd = self.nodes.fd(node)?;
        if nodes::kind(&nodes::stat(&*fd)?) != rustix::fs::FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        self.open_found(&fd, OFlags::RDONLY | OFlags::DIRECTORY)
    }
}

/// Whether a request changes the folder whatever it says; opening is looked at by itself.
fn changes(opcode: u32) -> bool {
    matches!(
        opcode,
        op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::CREATE
            | op::WRITE
            | op::FALLOCATE
    )
}

fn init(mut body: Reader<'_>, reply: &mut Reply) -> Answer {
    let (major, minor) = (body.u32()?, body.u32()?);
    body.skip(4)?;
    let offered = body.u32()?;
    if major < init::MAJOR || (major == init::MAJOR && minor < init::MINOR) {
        return Err(Errno::PROTO);
    }
    let flags = init::ASYNC_READ
        | init::BIG_WRITES
        | init::AUTO_INVAL_DATA
        | init::DO_READDIRPLUS
        | init::READDIRPLUS_AUTO
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::MAX_PAGES
        | init::CACHE_SYMLINKS;
    reply.u32(init::MAJOR).u32(init::MINOR);
    // A newer kernel asks again in our words after it read the first number alone.
    reply.u32(WORKSPACE_READ_AHEAD).u32(flags & offered);
    reply.u16(BACKGROUND).u16(BACKGROUND * 3 / 4);
    reply.u32(WORKSPACE_TRANSFER_MAX as u32).u32(1);
    reply.u16(WORKSPACE_PAGES_MAX).u16(0).zeros(32);
    Ok(())
}
