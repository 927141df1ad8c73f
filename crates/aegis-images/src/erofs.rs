//! Writes erofs: what a machine's root lies on, read-only and uncompressed.
//!
//! Own code, since `mkfs.erofs` takes a directory where the distribution's is older than 1.7: then
//! paths and owners out of hostile layers would have to become real on this host. Here contents go to
//! the file as they come, one block after another, and the tree, which is only ever in memory, last.
//! The format: `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h` of Linux.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};

use crate::tree::{Id, Kind, Meta, Node, ROOT, Tree};

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// Contents up to this many bytes lie beside their inode.
const INLINE_MAX: usize = 2048;
/// Contents of that kind that are kept in memory, bytes together; further ones get blocks.
const INLINE_TOTAL_MAX: usize = 64 << 20;
/// Bytes that are written at a time.
const PIECE: usize = 256 * 1024;
/// Bytes of an inode of the extended form.
const INODE: usize = 64;
/// Inode numbers count in this many bytes.
const SLOT: usize = 32;
/// Where the first inode lies in the inodes' area: number 0 means "none" to some programs.
const FIRST: usize = 4 * SLOT;
/// Bytes before the names, for each name of a directory.
const DIRENT: usize = 12;

/// Where a file's contents are.
#[derive(Debug)]
pub enum Content {
    /// In memory, until the tree is written.
    Inline(Vec<u8>),
    /// From this block on.
    Blocks(u32),
}

/// An image on its way.
#[derive(Debug)]
pub struct Writer {
    file: File,
    /// Where the next contents begin: a whole block.
    at: u64,
    max: u64,
    inline: usize,
    piece: Vec<u8>,
}

impl Writer {
    /// Into an empty file, which gets at most `max` bytes.
    pub fn new(file: File, max: u64) -> Writer {
        // The first block is the superblock's.
        Writer { file, at: BLOCK, max, inline: 0, piece: vec![0; PIECE] }
    }

    /// Takes a file's contents: exactly `size` bytes.
    pub fn store(&mut self, from: &mut impl Read, size: u64) -> io::Result<Content> {
        if size <= INLINE_MAX as u64 && self.inline < INLINE_TOTAL_MAX {
            let mut bytes = Vec::with_capacity(size as usize);
            from.take(size).read_to_end(&mut bytes)?;
            if bytes.len() as u64 != size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.inline += bytes.len();
            return Ok(Content::Inline(bytes));
        }
        let first = self.reserve(size)?;
        let (mut at, mut left) = (u64::from(first) * BLOCK, size);
        while left > 0 {
            let want = left.min(PIECE as u64) as usize;
            let piece = &mut self.piece[..want];
            from.read_exact(piece)?;
            // What is all zero stays a hole: a bomb of zeros takes no disk.
            if piece.iter().any(|byte| *byte != 0) {
                self.file.seek(SeekFrom::Start(at))?;
                self.file.write_all(piece)?;
            }
            at += want as u64;
            left -= want as u64;
        }
        Ok(Content::Blocks(first))
    }

    /// Room for so many bytes; gives its first block.
    fn reserve(&mut self, size: u64) -> io::Result<u32> {
        let first = self.at / BLOCK;
        let end = size.checked_next_multiple_of(BLOCK).and_then(|n| self.at.checked_add(n));
        match (end, u32::try_from(first)) {
            (Some(end), Ok(first)) if end <= self.max => {
                self.at = end;
                Ok(first)
            }
            _ => {
                let message = format!("the image would have more than {} bytes", self.max);
                Err(io::Error::new(io::ErrorKind::FileTooLarge, message))
            }
        }
    }

    /// Writes the tree, and gives the size of the whole.
    pub fn finish(mut self, tree: &Tree) -> io::Result<u64> {
        self.free_dead(tree);
        let mut inodes = order(tree);
        let places: HashMap<Id, usize> =
            inodes.iter().enumerate().map(|(n, i)| (i.id, n)).collect();
        // Sizes first: where a directory lies, and so its number, depends on sizes alone.
        let mut next = FIRST;
        for inode in &mut inodes {
            let node = tree.node(inode.id);
            inode.xattrs = xattrs(&node.meta);
            let inline = match &node.kind {
                Kind::Directory(_) => {
                    inode.size = directory_size(&inode.names) as u64;
                    usize::try_from(inode.size).ok()
                }
                Kind::Link(target) => {
                    inode.size = target.len() as u64;
                    Some(target.len())
                }
                Kind::File { content: Content::Inline(bytes), .. } => {
                    inode.size = bytes.len() as u64;
                    Some(bytes.len())
                }
                Kind::File { content: Content::Blocks(first), size } => {
                    (inode.size, inode.block) = (*size, *first);
                    None
                }
                Kind::Fifo => None,
            };
            let mut whole = INODE + inode.xattrs.len();
            match inline {
                Some(length) if length <= INLINE_MAX => {
                    inode.inline = true;
                    whole += length;
                }
                Some(length) => inode.block = self.reserve(length as u64)?,
                None => {}
            }
            // Neither an inode nor what lies beside it may cross a block's end.
            if next % BLOCK as usize + whole > BLOCK as usize {
                next = next.next_multiple_of(BLOCK as usize);
            }
            inode.place = next;
            next = (next + whole).next_multiple_of(SLOT);
        }
        let numbers: Vec<u64> = inodes.iter().map(|inode| (inode.place / SLOT) as u64).collect();
        let number = |id: Id| numbers[places[&id]];
        let area = self.reserve(next as u64)?;
        let mut out = vec![0; (next as u64).next_multiple_of(BLOCK) as usize];
        for (n, inode) in inodes.iter().enumerate() {
            let node = tree.node(inode.id);
            let head = inode.head(node, n as u32 + 1);
            let mut at = inode.place;
            for part in [&head[..], &inode.xattrs] {
                out[at..at + part.len()].copy_from_slice(part);
                at += part.len();
            }
            let made;
            let bytes: &[u8] = match &node.kind {
                Kind::Directory(_) => {
                    made = directory(tree, &inode.names, number);
                    &made
                }
                Kind::Link(target) => target,
                Kind::File { content: Content::Inline(bytes), .. } => bytes,
                Kind::File { .. } | Kind::Fifo => continue,
            };
            if inode.inline {
                out[at..at + bytes.len()].copy_from_slice(bytes);
            } else {
                self.file.seek(SeekFrom::Start(u64::from(inode.block) * BLOCK))?;
                self.file.write_all(bytes)?;
            }
        }
        self.file.seek(SeekFrom::Start(u64::from(area) * BLOCK))?;
        self.file.write_all(&out)?;
        let blocks = u32::try_from(self.at / BLOCK).map_err(io::Error::other)?;
        self.file.seek(SeekFrom::Start(1024))?;
        self.file.write_all(&superblock(number(ROOT), inodes.len() as u64, blocks, area))?;
        self.file.set_len(self.at)?;
        self.file.sync_all()?;
        Ok(self.at)
    }

    /// Gives back the blocks of files that a later layer replaced.
    fn free_dead(&self, tree: &Tree) {
        use rustix::fs::{FallocateFlags, fallocate};
        for node in tree.dead() {
            if let Kind::File { content: Content::Blocks(first), size } = &node.kind {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let length = size.next_multiple_of(BLOCK);
                // A file system that can't only wastes them.
                let _ = fallocate(&self.file, mode, u64::from(*first) * BLOCK, length);
            }
        }
    }
}

/// An inode with its place.
struct Inode<'a> {
    id: Id,
    /// Of a directory: all names in order, with `.` and `..`.
    names: Vec<(&'a [u8], Id)>,
    links: u32,
    xattrs: Vec<u8>,
    size: u64,
    inline: bool,
    block: u32,
    place: usize,
}

/// Everything that can be reached, the root first: its number has 16 bits only.
fn order(tree: &Tree) -> Vec<Inode<'_>> {
    let inode = |id| Inode {
        id,
        names: Vec::new(),
        links: 1,
        xattrs: Vec::new(),
        size: 0,
        inline: false,
        block: 0,
        place: 0,
    };
    let mut all = vec![inode(ROOT)];
    let mut parents = HashMap::from([(ROOT, ROOT)]);
    let mut seen: HashMap<Id, usize> = HashMap::from([(ROOT, 0)]);
    let mut n = 0;
    while n < all.len() {
        let id = all[n].id;
        if let Kind::Directory(entries) = &tree.node(id).kind {
            let parent = parents[&id];
            let mut names: Vec<(&[u8], Id)> = vec![(b".", id), (b"..", parent)];
            names.extend(entries.iter().map(|(name, entry)| (name.as_slice(), entry.id)));
            names.sort_unstable_by_key(|(name, _)| *name);
            let mut below = 0;
            for entry in entries.values() {
                let is_directory = matches!(tree.node(entry.id).kind, Kind::Directory(_));
                below += u32::from(is_directory);
                match seen.get(&entry.id) {
                    Some(at) => all[*at].links += 1,
                    None => {
                        seen.insert(entry.id, all.len());
                        all.push(inode(entry.id));
                        if is_directory {
                            parents.insert(entry.id, id);
                        }
                    }
                }
            }
            all[n].names = names;
            all[n].links = 2 + below;
        }
        n += 1;
    }
    all
}

impl Inode<'_> {
    fn head(&self, node: &Node, number: u32) -> [u8; INODE] {
        const EXTENDED: u16 = 1;
        const LAYOUT_INLINE: u16 = 2 << 1;
        let kind = match node.kind {
            Kind::Directory(_) => 0o040_000,
            Kind::File { .. } => 0o100_000,
            Kind::Link(_) => 0o120_000,
            Kind::Fifo => 0o010_000,
        };
        let layout = if self.inline { LAYOUT_INLINE } else { 0 };
        let xattr_count = match self.xattrs.len() {
            0 => 0,
            length => (length - XATTR_HEAD) / 4 + 1,
        };
        let mut head = [0; INODE];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(EXTENDED | layout).to_le_bytes());
        put(2, &(xattr_count as u16).to_le_bytes());
        put(4, &(kind | (node.meta.mode & 0o7777)).to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.block.to_le_bytes());
        put(20, &number.to_le_bytes());
        put(24, &node.meta.uid.to_le_bytes());
        put(28, &node.meta.gid.to_le_bytes());
        put(32, &node.meta.mtime.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        head
    }
}

const XATTR_HEAD: usize = 12;

/// Attributes beside an inode.
fn xattrs(meta: &Meta) -> Vec<u8> {
    if meta.xattrs.is_empty() {
        return Vec::new();
    }
    let mut out = vec![0; XATTR_HEAD];
    for attribute in &meta.xattrs {
        out.push(attribute.name.len() as u8);
        out.push(attribute.space as u8);
        out.extend((attribute.value.len() as u16).to_le_bytes());
        out.extend(&attribute.name);
        out.extend(&attribute.value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// How many of these names the next block of a directory takes, and how many bytes they are.
fn fill(names: &[(&[u8], Id)]) -> (usize, usize) {
    let mut bytes = 0;
    for (n, (name, _)) in names.iter().enumerate() {
        let more = DIRENT + name.len();
        if bytes + more > BLOCK as usize {
            return (n, bytes);
        }
        bytes += more;
    }
    (names.len(), bytes)
}

fn directory_size(names: &[(&[u8], Id)]) -> usize {
    let (mut rest, mut size) = (names, 0);
    loop {
        let (taken, bytes) = fill(rest);
        rest = &rest[taken..];
        if rest.is_empty() {
            return size + bytes;
        }
        size += BLOCK as usize;
    }
}

fn directory(tree: &Tree, names: &[(&[u8], Id)], number: impl Fn(Id) -> u64) -> Vec<u8> {
    let (mut rest, mut out) = (names, Vec::new());
    while !rest.is_empty() {
        out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
        let (taken, _) = fill(rest);
        let mut offset = taken * DIRENT;
        for (name, id) in &rest[..taken] {
            let kind: u8 = match tree.node(*id).kind {
                Kind::File { .. } => 1,
                Kind::Directory(_) => 2,
                Kind::Fifo => 5,
                Kind::Link(_) => 7,
            };
            out.extend(number(*id).to_le_bytes());
            out.extend((offset as u16).to_le_bytes());
            out.extend([kind, 0]);
            offset += name.len();
        }
        for (name, _) in &rest[..taken] {
            out.extend(*name);
        }
        rest = &rest[taken..];
    }
    out
}

fn superblock(root: u64, inodes: u64, blocks: u32, area: u32) -> [u8; 128] {
    const MAGIC: u32 = 0xe0f5_e1e2;
    const MTIME: u32 = 2;
    let mut out = [0; 128];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &MTIME.to_le_bytes());
    put(12, &[BLOCK.trailing_zeros() as u8]);
    put(14, &(root as u16).to_le_bytes());
    put(16, &inodes.to_le_bytes());
    put(36, &blocks.to_le_bytes());
    put(40, &area.to_le_bytes());
    out
}
