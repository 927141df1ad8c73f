//! What is done at once: looking, making, linking, removing, renaming; and listing.

use std::fs::{self, DirBuilder, Metadata, Permissions, ReadDir};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, lchown, symlink,
};
use std::path::Path;

use aegis_wire::bounds::FILE_ENTRIES_MAX;
use aegis_wire::channel::files::{
    Entry, Fault, FileAsk, FileKind, FileName, FilePath, Make, Meta, Mode,
};
use aegis_wire::channel::output::Kind;

use super::{agree, as_entry, as_path, at_once, draft_in, fault};
use crate::exec::Host;
use crate::hands::Hands;
use crate::output::{Sink as _, last_frame};

/// Permissions of a directory, where nothing else is said.
const DIRECTORY: u32 = 0o755;
/// Entries that are looked at before the host gets them.
const BATCH: usize = 64;

/// Does what needs no stream; what is there then.
pub fn change(ask: &FileAsk) -> Result<Option<Meta>, Fault> {
    match ask {
        FileAsk::Stat { path } => return look(as_path(path)).map(Some).map_err(fault),
        FileAsk::Mkdir { path, make } => make_directory(path, make)?,
        FileAsk::Symlink { path, target, make } => {
            let (parent, entry) = prepared(path, make)?;
            let draft = draft_in(&parent)?;
            symlink(std::ffi::OsStr::from_bytes(target.as_bytes()), &draft).map_err(fault)?;
            let owned = match (make.uid, make.gid) {
                (None, None) => Ok(()),
                (uid, gid) => lchown(&draft, uid, gid),
            };
            if let Err(error) = owned.and_then(|()| fs::rename(&draft, &entry)) {
                let _ = fs::remove_file(&draft);
                return Err(fault(error));
            }
        }
        FileAsk::Remove { path, recursive } => {
            let (_, entry) = as_entry(path)?;
            remove(&entry, *recursive).map_err(fault)?;
            return Ok(None);
        }
        FileAsk::Rename { path, to } => {
            let ((_, from), (_, to)) = (as_entry(path)?, as_entry(to)?);
            fs::rename(&from, &to).map_err(fault)?;
            return look(&to).map(Some).map_err(fault);
        }
        FileAsk::Read { .. }
        | FileAsk::List { .. }
        | FileAsk::Watch { .. }
        | FileAsk::Write { .. } => return Err(Fault::Failed),
    }
    let (_, entry) = as_entry(ask.path())?;
    look(&entry).map(Some).map_err(fault)
}

/// The directory and the path of what is to be made; makes the directory, where that is asked for.
pub fn prepared(
    path: &FilePath,
    make: &Make,
) -> Result<(std::path::PathBuf, std::path::PathBuf), Fault> {
    let (parent, entry) = as_entry(path)?;
    if make.create_dirs {
        DirBuilder::new().recursive(true).mode(DIRECTORY).create(&parent).map_err(|e| {
            // Something that is no directory is in the way.
            if e.kind() == io::ErrorKind::AlreadyExists { Fault::NotADirectory } else { fault(e) }
        })?;
    }
    Ok((parent, entry))
}

fn make_directory(path: &FilePath, make: &Make) -> Result<(), Fault> {
    let (_, entry) = prepared(path, make)?;
    let new = match DirBuilder::new().mode(DIRECTORY).create(&entry) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && make.create_dirs => {
            if !fs::symlink_metadata(&entry).map_err(fault)?.is_dir() {
                return Err(Fault::Exists);
            }
            false
        }
        Err(e) => return Err(fault(e)),
    };
    let finish = || -> io::Result<()> {
        if make.uid.is_some() || make.gid.is_some() {
            lchown(&entry, make.uid, make.gid)?;
        }
        match make.mode.map(Mode::bits).or(new.then_some(DIRECTORY)) {
            Some(mode) => fs::set_permissions(&entry, Permissions::from_mode(mode)),
            None => Ok(()),
        }
    };
    finish().map_err(|e| {
        if new {
            let _ = fs::remove_dir(&entry);
        }
        fault(e)
    })
}

fn remove(entry: &Path, recursive: bool) -> io::Result<()> {
    match (fs::symlink_metadata(entry)?.is_dir(), recursive) {
        (true, true) => fs::remove_dir_all(entry),
        (true, false) => fs::remove_dir(entry),
        (false, _) => fs::remove_file(entry),
    }
}

/// What is there; a link itself.
pub fn look(path: &Path) -> io::Result<Meta> {
    let meta = fs::symlink_metadata(path)?;
    let target = match meta.is_symlink() {
        true => fs::read_link(path)?.into_os_string().into_vec().try_into().ok(),
        false => None,
    };
    Ok(Meta { target, ..described(&meta) })
}

/// What the kernel says, in our words.
pub fn described(meta: &Metadata) -> Meta {
    let of = meta.file_type();
    let special = of.is_fifo() || of.is_socket() || of.is_block_device() || of.is_char_device();
    let kind = match (of.is_dir(), of.is_symlink(), special) {
        (true, ..) => FileKind::Dir,
        (_, true, _) => FileKind::Link,
        (.., true) => FileKind::Other,
        _ => FileKind::File,
    };
    Meta {
        kind,
        size: meta.size(),
        mode: Mode::try_from(meta.mode() & 0o7777).unwrap_or_default(),
        uid: meta.uid(),
        gid: meta.gid(),
        mtime_ms: meta.mtime().saturating_mul(1000).saturating_add(meta.mtime_nsec() / 1_000_000),
        target: None,
    }
}

/// Tells the entries of a directory; one more than a host takes, where there are more.
pub async fn list(clerks: &Hands, host: &mut Host, path: FilePath) -> Result<(), Fault> {
    let directory = as_path(&path).to_owned();
    let mut entries = at_once(clerks, move || fs::read_dir(&directory).map_err(fault)).await?;
    agree(host, None).await;
    let mut left = FILE_ENTRIES_MAX + 1;
    while left > 0 && host.listens() {
        let (frames, count, rest) =
            at_once(clerks, move || Ok(batch(entries, left.min(BATCH)))).await?;
        host.send(&frames).await;
        match rest {
            Some(rest) => entries = rest,
            None => break,
        }
        left -= count;
    }
    host.send(&last_frame(Kind::DataEnd, &())).await;
    Ok(())
}

/// Frames of the next entries, how many they are, and the rest where there is one.
fn batch(mut entries: ReadDir, most: usize) -> (Vec<u8>, usize, Option<ReadDir>) {
    let (mut frames, mut count) = (Vec::new(), 0);
    while count < most {
        let Some(Ok(entry)) = entries.next() else { return (frames, count, None) };
        // One that is gone by now is none.
        let Ok(meta) = look(&entry.path()) else { continue };
        let Ok(name) = FileName::try_from(entry.file_name().into_vec()) else { continue };
        frames.extend(last_frame(Kind::Data, &Entry { name, meta }));
        count += 1;
    }
    (frames, count, Some(entries))
}
