//! Names: found, made, changed, removed. Each is one component, looked up in a descriptor of its
//! directory, so that no link, no `..` and no race leads out of the folder.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, Statx, linkat, mkdirat, mknodat, readlinkat_raw,
    renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::abi::{OPEN_KEEP_CACHE, Reader};
use crate::folder::{Answer, Folder};
use crate::nodes::{self, Key, Stamp};
use crate::quota::NAME_BYTES;
use crate::reply::{PERMISSIONS, Reply};

/// Longest target of a link, bytes.
const TARGET_MAX: usize = 4095;
/// What making a name adds.
const ONE_NAME: i64 = NAME_BYTES as i64;

/// RENAME2: fail where the new name is taken.
const NOREPLACE: u32 = 1;
/// RENAME2: both names are there, and change places.
const EXCHANGE: u32 = 2;

impl Folder {
    pub(crate) fn lookup(&self, parent: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let name = body.name()?;
        let directory = self.nodes.fd(parent)?;
        self.watch_over(parent, &directory);
        match nodes::find(&*directory, name) {
            Ok((fd, stat)) => self.found(parent, name, fd, &stat, reply),
            // That nothing is there is believed for a while too.
            Err(Errno::NOENT) => {
                self.tell_nothing(parent, name, reply);
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }

    fn found(
        &self,
        parent: u64,
        name: &CStr,
        fd: OwnedFd,
        stat: &Statx,
        reply: &mut Reply,
    ) -> Answer {
        let node = self.nodes.told(parent, name, stat, Some(fd))?;
        self.tell_entry(parent, name, node, stat, reply);
        Ok(())
    }

    /// Tells of a name that was made just now.
    fn made(&self, parent: u64, directory: &OwnedFd, name: &CStr, reply: &mut Reply) -> Answer {
        self.watch_over(parent, directory);
        self.changes_name(parent, name);
        let (fd, stat) = nodes::find(directory, name)?;
        self.found(parent, name, fd, &stat, reply)?;
        self.own(&stat);
        Ok(())
    }

    pub(crate) fn read_link(&self, node: u64, reply: &mut Reply) -> Answer {
        let fd = self.nodes.fd(node)?;
        let mut target = [0; TARGET_MAX + 1];
        let len = readlinkat_raw(&*fd, c"", &mut target[..])?;
        reply.bytes(&target[..len]);
        Ok(())
    }

    pub(crate) fn symlink(&self, parent: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let (name, target) = (body.name()?, body.text()?);
        if target.to_bytes().len() > TARGET_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let directory = self.nodes.fd(parent)?;
        self.quota.grow(NAME_BYTES, || {
            symlinkat(target, &*directory, name)?;
            Ok(((), ONE_NAME))
        })?;
        self.made(parent, &directory, name, reply)
    }

    pub(crate) fn make_node(&self, parent: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let mode = body.u32()?;
        body.skip(12)?;
        let name = body.name()?;
        let kind = match FileType::from_raw_mode(mode) {
            FileType::Unknown => FileType::RegularFile,
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            _ => return Err(Errno::PERM),
        };
        let directory = self.nodes.fd(parent)?;
        self.quota.grow(NAME_BYTES, || {
            mknodat(&*directory, name, kind, permissions(mode), 0)?;
            Ok(((), ONE_NAME))
        })?;
        self.made(parent, &directory, name, reply)
    }

    pub(crate) fn make_directory(
        &self,
        parent: u64,
        mut body: Reader<'_>,
        reply: &mut Reply,
    ) -> Answer {
        let mode = body.u32()?;
        body.skip(4)?;
        let name = body.name()?;
        let directory = self.nodes.fd(parent)?;
        self.quota.grow(NAME_BYTES, || {
            mkdirat(&*directory, name, permissions(mode))?;
            Ok(((), ONE_NAME))
        })?;
        self.made(parent, &directory, name, reply)
    }

    /// Makes a file and opens it; or finds the one that stands there by now.
    pub(crate) fn create(&self, parent: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let (flags, mode) = (body.u32()?, body.u32()?);
        body.skip(8)?;
        let name = body.name()?;
        let asked = OFlags::from_bits_retain(flags);
        let directory = self.nodes.fd(parent)?;
        self.watch_over(parent, &directory);
        let access = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let made = self.quota.grow(NAME_BYTES, || {
            let access = access | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file =
                rustix::fs::openat2(&*directory, name, access, permissions(mode), nodes::inside())?;
            Ok((file, ONE_NAME))
        });
        match made {
            Ok(file) => {
                let stat = nodes::stat(&file)?;
                let node = self.nodes.told(parent, name, &stat, None)?;
                self.nodes.set_own(node, Stamp::of(&stat));
                self.changes_name(parent, name);
                self.tell_entry(parent, name, node, &stat, reply);
                reply.u64(0).u32(OPEN_KEEP_CACHE).u32(0);
                Ok(())
            }
            Err(Errno::EXIST) if !asked.contains(OFlags::EXCL) => {
                let (fd, stat) = nodes::find(&*directory, name)?;
                if nodes::kind(&stat) != FileType::RegularFile {
                    return Err(Errno::EXIST);
                }
                let node = self.nodes.told(parent, name, &stat, Some(fd))?;
                // The kernel holds it to be new, and empty.
                let emptied = match asked.contains(OFlags::TRUNC) {
                    true => self.resize(node, 0),
                    false => Ok(()),
                };
                emptied.inspect_err(|_| self.forget_times(node, 1))?;
                let stat = nodes::stat(&*self.nodes.fd(node)?)?;
                self.tell_entry(parent, name, node, &stat, reply);
                reply.u64(0).u64(0);
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn remove(&self, parent: u64, mut body: Reader<'_>, directory: bool) -> Answer {
        let name = body.name()?;
        let above = self.nodes.fd(parent)?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let _alone = self.names_stand_still();
        self.replacing(parent, &above, name, || unlinkat(&*above, name, flags))
    }

    /// Does what takes a name away. If it is the last one of its file, those who have the file keep
    /// it, and what it takes is free when the last of them is done. Names must stand still meanwhile:
    /// else another file's name might go.
    fn replacing(
        &self,
        parent: u64,
        above: &OwnedFd,
        name: &CStr,
        work: impl FnOnce() -> Result<(), Errno>,
    ) -> Answer {
        let (fd, stat) = nodes::find(above, name)?;
        self.changes_name(parent, name);
        let last = stat.stx_nlink == 1 || nodes::kind(&stat) == FileType::Directory;
        if !last {
            let node = self.nodes.known(Key::of(&stat));
            if let Some(node) = node {
                self.nodes.untold(node);
            }
            work()?;
            // Its other name may not be known here.
            if let Some(node) = node {
                self.nodes.lose(node, parent, name, Some(fd));
            }
            self.quota.give_back(NAME_BYTES);
            return Ok(());
        }
        // Known for a moment at least, so that there is one account of who has it.
        let node = self.nodes.told(parent, name, &stat, Some(fd))?;
        let done = self.nodes.last_name_goes(node).and_then(|()| {
            work().inspect_err(|_| self.nodes.name_stays(node))?;
            self.quota.give_back(NAME_BYTES);
            Ok(())
        });
        self.forget_times(node, 1);
        done
    }

    pub(crate) fn rename(&self, parent: u64, mut body: Reader<'_>, two: bool) -> Answer {
        let to_parent = body.u64()?;
        let flags = if two { body.u32()? } else { 0 };
        if two {
            body.skip(4)?;
        }
        let (name, to_name) = (body.name()?, body.name()?);
        let flags = match flags {
            0 => RenameFlags::empty(),
            NOREPLACE => RenameFlags::NOREPLACE,
            EXCHANGE => RenameFlags::EXCHANGE,
            _ => return Err(Errno::INVAL),
        };
        let (from, to) = (self.nodes.fd(parent)?, self.nodes.fd(to_parent)?);
        let _alone = self.names_stand_still();
        let key = Key::of(&nodes::stat_at(&*from, name)?);
        let there = match nodes::stat_at(&*to, to_name) {
            Ok(stat) => Some(Key::of(&stat)),
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(errno),
        };
        let work = || renameat_with(&*from, name, &*to, to_name, flags);
        // Two names of one file both stay.
        if flags.is_empty() && there.is_some_and(|there| there != key) {
            self.replacing(to_parent, &to, to_name, work)?;
        } else {
            work()?;
        }
        self.changes_name(parent, name);
        self.changes_name(to_parent, to_name);
        self.moved(key, to_parent, &to, to_name);
        if flags == RenameFlags::EXCHANGE
            && let Some(there) = there
        {
            self.moved(there, parent, &from, name);
        }
        Ok(())
    }

    /// The machine made it what it is.
    fn own(&self, stat: &Statx) {
        if let Some(node) = self.nodes.known(Key::of(stat)) {
            self.nodes.set_own(node, Stamp::of(stat));
        }
    }

    fn moved(&self, key: Key, parent: u64, directory: &OwnedFd, name: &CStr) {
        let Some(node) = self.nodes.known(key) else { return };
        self.nodes.renamed(node, parent, name);
        if let Ok(stat) = nodes::stat_at(directory, name) {
            self.own(&stat);
        }
        if let Some(watch) = &self.watch {
            watch.believe(parent, name, node);
            self.tidy(watch);
        }
    }

    /// Gives a file of the folder another name in it.
    pub(crate) fn link(&self, parent: u64, mut body: Reader<'_>, reply: &mut Reply) -> Answer {
        let old = body.u64()?;
        let name = body.name()?;
        let (file, directory) = (self.nodes.fd(old)?, self.nodes.fd(parent)?);
        if nodes::kind(&nodes::stat(&*file)?) == FileType::Directory {
            return Err(Errno::PERM);
        }
        let source = Folder::link_name(&file);
        let _alone = self.names_stand_still();
        self.quota.grow(NAME_BYTES, || {
            linkat(self.descriptors(), &source, &*directory, name, AtFlags::SYMLINK_FOLLOW)?;
            Ok(((), ONE_NAME))
        })?;
        self.made(parent, &directory, name, reply)
    }
}

/// Of a mode: what gives rights to nobody but by permission.
pub(crate) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & PERMISSIONS)
}
