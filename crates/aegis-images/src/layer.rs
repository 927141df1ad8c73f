//! One layer: a tar, compressed or not, laid over the tree that is there. Everything in it is what a
//! stranger wrote.

use std::collections::BTreeMap;
use std::io::{self, Read};

use sha2::{Digest as _, Sha256};
use tar::{Archive, EntryType};

use crate::digest::Digest;
use crate::erofs::Writer;
use crate::tree::{Attribute, Bad, Kind, Meta, Space, Tree};

/// Bytes of all extended attributes of a file.
const XATTRS_MAX: usize = 1024;
/// What zstd may keep of what it has unpacked: 128 MiB, as its own tools.
const ZSTD_WINDOW_LOG: u32 = 27;
/// Before the name of something that is hidden.
const WHITEOUT: &[u8] = b".wh.";
/// In a directory of which earlier layers' contents are hidden.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that begin so are another program's notes.
const NOTES: &[u8] = b".wh..wh.";

/// Why a layer was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It can't be read, is no tar, is compressed badly, or is too large.
    #[error("the layer {0} is broken: {1}")]
    Broken(Digest, #[source] io::Error),
    /// What is in it is not allowed.
    #[error("the layer {0} is refused: {1}")]
    Refused(Digest, #[source] Bad),
    /// It is not the one that the image's configuration names.
    #[error("the layer {0} unpacks to {1}, but the image's configuration says {2}")]
    Other(Digest, Digest, Digest),
}

/// Counts down, so that no bomb goes off, and hashes.
struct Counted<'a, R> {
    from: R,
    left: &'a mut u64,
    hash: Sha256,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(to)?;
        match self.left.checked_sub(n as u64) {
            Some(left) => *self.left = left,
            None => {
                let message = "the image unpacks to more bytes than this host takes";
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
            }
        }
        self.hash.update(&to[..n]);
        Ok(n)
    }
}

/// Unpacks by what the bytes are, not by what somebody calls them.
fn unpacked<'a>(mut from: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = Vec::with_capacity(4);
    from.by_ref().take(4).read_to_end(&mut start)?;
    let kind = start.clone();
    let whole = io::Cursor::new(start).chain(from);
    Ok(match kind[..] {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(whole)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut zstd = zstd::stream::read::Decoder::new(whole)?;
            zstd.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(zstd)
        }
        _ => Box::new(whole),
    })
}

/// Lays a layer over the tree, and its files' contents into the image. `left` is how many bytes it
/// may unpack to, and is lowered; `diff` is the digest of those bytes, where it is known.
pub fn apply(
    name: &Digest,
    from: impl Read,
    diff: Option<&Digest>,
    left: &mut u64,
    tree: &mut Tree,
    image: &mut Writer,
) -> Result<Digest, Error> {
    let broken = |e: io::Error| Error::Broken(name.clone(), e);
    let mut bytes = Counted { from: unpacked(from).map_err(broken)?, left, hash: Sha256::new() };
    tree.begin_layer();
    let mut archive = Archive::new(&mut bytes);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        match take(&mut entry, tree, image) {
            Ok(()) => {}
            Err(Problem::Io(e)) => return Err(broken(e)),
            Err(Problem::Bad(e)) => return Err(Error::Refused(name.clone(), e)),
        }
    }
    // What follows a tar's end counts too.
    io::copy(&mut bytes, &mut io::sink()).map_err(broken)?;
    let made = Digest::of(bytes.hash);
    match diff {
        Some(diff) if *diff != made => Err(Error::Other(name.clone(), made, diff.clone())),
        _ => Ok(made),
    }
}

enum Problem {
    Io(io::Error),
    Bad(Bad),
}

impl From<io::Error> for Problem {
    fn from(e: io::Error) -> Problem {
        Problem::Io(e)
    }
}

impl From<Bad> for Problem {
    fn from(e: Bad) -> Problem {
        Problem::Bad(e)
    }
}

fn take<R: Read>(
    entry: &mut tar::Entry<'_, R>,
    tree: &mut Tree,
    image: &mut Writer,
) -> Result<(), Problem> {
    let path = entry.path_bytes().into_owned();
    let trimmed = path.strip_suffix(b"/").unwrap_or(&path);
    let cut = trimmed.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    let (above, name) = trimmed.split_at(cut);
    if name == OPAQUE {
        return Ok(tree.opaque(above)?);
    }
    if name.starts_with(NOTES) {
        return Ok(());
    }
    if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        return Ok(tree.whiteout(&[above, hidden].concat())?);
    }
    let target = || entry.link_name_bytes().map(|t| t.into_owned()).unwrap_or_default();
    let kind = match entry.header().entry_type() {
        // The oldest tars mark a directory by its name alone.
        EntryType::Regular if path.ends_with(b"/") => Kind::Directory(BTreeMap::new()),
        EntryType::Directory => Kind::Directory(BTreeMap::new()),
        EntryType::Symlink => Kind::Link(target()),
        EntryType::Link => return Ok(tree.link(&path, &target())?),
        EntryType::Fifo => Kind::Fifo,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let size = entry.size();
            let content = image.store(entry, size)?;
            Kind::File { content, size }
        }
        // Machines bring their own devices; a layer's are no use to anybody else.
        _ => return Ok(()),
    };
    if let Kind::Link(target) = &kind
        && (target.is_empty() || target.len() > 4095 || target.contains(&0))
    {
        let name = String::from_utf8_lossy(target).chars().take(200).collect();
        return Err(Bad::Name(name).into());
    }
    let meta = meta(entry, matches!(kind, Kind::Link(_)))?;
    Ok(tree.put(&path, meta, kind)?)
}

fn meta<R: Read>(entry: &mut tar::Entry<'_, R>, is_link: bool) -> io::Result<Meta> {
    let header = entry.header();
    let narrow =
        |n: u64| u32::try_from(n).map_err(|_| io::Error::other("an owner's number is too large"));
    let mode = if is_link { 0o777 } else { (header.mode()? & 0o7777) as u16 };
    let mut meta = Meta {
        mode,
        uid: narrow(header.uid()?)?,
        gid: narrow(header.gid()?)?,
        mtime: i64::try_from(header.mtime()?).unwrap_or(0),
        xattrs: Vec::new(),
    };
    let mut bytes = 0;
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.") else { continue };
        // Others would mean something to the overlay or to a security module that is not there.
        let (space, name) = match name {
            b"security.capability" => (Space::Security, &b"capability"[..]),
            _ => match name.strip_prefix(b"user.") {
                Some(name) if !name.starts_with(b"overlay.") => (Space::User, name),
                _ => continue,
            },
        };
        bytes += name.len() + extension.value_bytes().len() + 8;
        if name.is_empty() || name.len() > 255 || bytes > XATTRS_MAX {
            return Err(io::Error::other("a file's attributes are too long"));
        }
        let value = extension.value_bytes().to_vec();
        meta.xattrs.push(Attribute { space, name: name.to_vec(), value });
    }
    Ok(meta)
}
