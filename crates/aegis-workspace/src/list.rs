//! Directories: opened and listed.

use std::mem::MaybeUninit;
use std::sync::PoisonError;

use aegis_wire::bounds::WORKSPACE_TRANSFER_MAX;
use rustix::fs::{FileType, RawDir, SeekFrom, Statx};
use rustix::io::Errno;

use crate::abi::Reader;
use crate::folder::{Answer, Folder};
use crate::handles::Handle;
use crate::nodes;
use crate::reply::Reply;

/// Bytes that are read of a directory at once.
const CHUNK: usize = 32 * 1024;
/// `fuse_dirent` without its name.
const ENTRY: usize = 24;
/// `fuse_entry_out`.
const TOLD: usize = 128;

impl Folder {
    pub(crate) fn open_directory(&self, node: u64, reply: &mut Reply) -> Answer {
        let file = self.open_listed(node)?;
        let handle = self.handles.add(Handle::new(file, node))?;
        reply.u64(handle).u64(0);
        Ok(())
    }

    pub(crate) fn release(&self, mut body: Reader<'_>) -> Answer {
        self.handles.remove(body.u64()?);
        Ok(())
    }

    pub(crate) fn sync_directory(&self, mut body: Reader<'_>) -> Answer {
        rustix::fs::fsync(&self.handles.get(body.u64()?)?.file)
    }

    /// Lists from where the kernel says, as much as it has room for; `plus` tells of each file too.
    pub(crate) fn list(
        &self,
        node: u64,
        mut body: Reader<'_>,
        reply: &mut Reply,
        plus: bool,
    ) -> Answer {
        let (handle, offset) = (body.u64()?, body.u64()?);
        let room = (body.u32()? as usize).min(WORKSPACE_TRANSFER_MAX);
        let handle = self.handles.get(handle)?;
        if handle.node != node {
            return Err(Errno::BADF);
        }
        if plus {
            self.watch_over(node, &handle.file);
        }
        let _turn = handle.turn.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::fs::seek(&handle.file, SeekFrom::Start(offset))?;
        let mut chunk = [MaybeUninit::uninit(); CHUNK];
        let mut entries = RawDir::new(&handle.file, &mut chunk);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            let len = name.to_bytes().len();
            let padded = (ENTRY + len).next_multiple_of(8);
            let whole = if plus { TOLD + padded } else { padded };
            if reply.len() + whole > room {
                break;
            }
            if plus {
                let told = match name.to_bytes() {
                    b"." | b".." => None,
                    _ => self.listed(node, &handle, name),
                };
                match told {
                    Some((id, stat)) => self.tell_entry(node, name, id, &stat, reply),
                    // The kernel asks when it wants to know.
                    None => drop(reply.zeros(TOLD)),
                };
            }
            reply.u64(entry.ino()).u64(entry.next_entry_cookie());
            reply.u32(len as u32).u32(kind_word(entry.file_type()));
            reply.bytes(name.to_bytes()).zeros(padded - ENTRY - len);
        }
        Ok(())
    }

    fn listed(&self, parent: u64, handle: &Handle, name: &std::ffi::CStr) -> Option<(u64, Statx)> {
        let stat = nodes::stat_at(&handle.file, name).ok()?;
        let id = self.nodes.told(parent, name, &stat, None).ok()?;
        Some((id, stat))
    }
}

/// `d_type`.
fn kind_word(kind: FileType) -> u32 {
    match kind {
        FileType::Fifo => 1,
        FileType::CharacterDevice => 2,
        FileType::Directory => 4,
        FileType::BlockDevice => 6,
        FileType::RegularFile => 8,
        FileType::Symlink => 10,
        FileType::Socket => 12,
        FileType::Unknown => 0,
    }
}
