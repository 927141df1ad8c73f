//! The host's end of a copy. What comes out of a machine is written below one directory and nowhere
//! else: each step is taken from an open directory, and no link is ever followed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use aegis_wire::channel::files::{FileKind, FileName, LinkTarget, Mode};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use rustix::fs::{AtFlags, CWD, OFlags, RawMode};
use rustix::io::Errno;

use super::{Found, Node, Source};
use crate::commands::pieces;
use crate::failure::{Failure, Result};

/// What of a machine's permissions means anything here: its set-user-id programs stay its own.
const KEPT: u32 = 0o777;

/// A directory that is written into.
pub struct Directory {
    fd: OwnedFd,
    /// For people.
    path: PathBuf,
}

impl Directory {
    /// One that the user named: links in that name are the user's own.
    pub fn named(path: &Path) -> Result<Directory> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Directory::open(CWD, path, OFlags::empty())
            .map(|fd| Directory { fd, path: path.to_owned() })
            .map_err(|e| Failure::file("open the directory", path, e.into()))
    }

    fn open(at: impl std::os::fd::AsFd, path: &Path, more: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(at, path, flags | more, rustix::fs::Mode::empty())
    }

    fn failed(&self, verb: &str, name: &FileName, e: Errno) -> Failure {
        Failure::file(verb, &self.path.join(name_of(name)), e.into())
    }

    /// A directory in it: made, or there already. A link to one is none.
    pub fn enter(&self, name: &FileName) -> Result<Directory> {
        let own = name_of(name);
        match rustix::fs::mkdirat(&self.fd, own, rustix::fs::Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(self.failed("make the directory", name, e)),
        }
        let fd = Directory::open(&self.fd, Path::new(own), OFlags::NOFOLLOW)
            .map_err(|e| self.failed("enter", name, e))?;
        Ok(Directory { fd, path: self.path.join(own) })
    }

    /// Its permissions, once all is in it.
    pub fn finish(&self, mode: Mode) -> Result<()> {
        rustix::fs::fchmod(&self.fd, kept(mode))
            .map_err(|e| Failure::file("set the permissions of", &self.path, e.into()))
    }

    /// A link in it, as text: where it points is nobody's business here. It takes the place of what
    /// is no directory.
    pub fn link(&self, name: &FileName, target: &LinkTarget) -> Result<()> {
        let failed = |e| self.failed("make the link", name, e);
        let draft = draft()?;
        rustix::fs::symlinkat(target.as_bytes(), &self.fd, draft.as_str()).map_err(failed)?;
        rustix::fs::renameat(&self.fd, draft.as_str(), &self.fd, name_of(name)).map_err(|e| {
            let _ = rustix::fs::unlinkat(&self.fd, draft.as_str(), AtFlags::empty());
            failed(e)
        })
    }

    /// A file in it, whole or not at all; how many bytes it has.
    pub async fn write(
        &self,
        name: &FileName,
        mode: Mode,
        mut pieces: impl Stream<Item = Result<Bytes>> + Unpin,
        mut wrote: impl FnMut(u64),
    ) -> Result<u64> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let draft = draft()?;
        let private = rustix::fs::Mode::from_raw_mode(0o600);
        let fd = rustix::fs::openat(&self.fd, draft.as_str(), flags | OFlags::CLOEXEC, private)
            .map_err(|e| self.failed("make", name, e))?;
        let draft = Draft { directory: &self.fd, name: draft };
        let mut file = File::from(fd);
        let mut bytes = 0;
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            file.write_all(&piece)
                .map_err(|e| Failure::file("write", &self.path.join(name_of(name)), e))?;
            bytes += piece.len() as u64;
            wrote(piece.len() as u64);
        }
        rustix::fs::fchmod(&file, kept(mode))
            .and_then(|()| {
                rustix::fs::renameat(&self.fd, draft.name.as_str(), &self.fd, name_of(name))
            })
            .map_err(|e| self.failed("write", name, e))?;
        Ok(bytes)
    }
}

/// A file that is not whole yet. In its place, it is not there under this name any more.
struct Draft<'a> {
    directory: &'a OwnedFd,
    name: String,
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::unlinkat(self.directory, self.name.as_str(), AtFlags::empty());
    }
}

fn draft() -> Result<String> {
    let mut noise = [0; 8];
    getrandom::fill(&mut noise).map_err(|e| Failure::because("no randomness", e))?;
    Ok(format!(".aegis-cp-{:016x}", u64::from_ne_bytes(noise)))
}

fn kept(mode: Mode) -> rustix::fs::Mode {
    rustix::fs::Mode::from_raw_mode((mode.bits() & KEPT) as RawMode)
}

fn name_of(name: &FileName) -> &OsStr {
    OsStr::from_bytes(name.as_bytes())
}

/// What is at a path here; a link itself.
pub fn look(path: &Path) -> Result<Found> {
    let failed = |e| Failure::file("read", path, e);
    let meta = fs::symlink_metadata(path).map_err(failed)?;
    let kind = match (meta.is_file(), meta.is_dir(), meta.is_symlink()) {
        (true, ..) => FileKind::File,
        (_, true, _) => FileKind::Dir,
        (.., true) => FileKind::Link,
        _ => FileKind::Other,
    };
    let target = match kind {
        FileKind::Link => {
            let target = fs::read_link(path).map_err(failed)?.into_os_string().into_vec();
            Some(target.try_into().map_err(|e| Failure::because("a link that points nowhere", e))?)
        }
        _ => None,
    };
    let mode = Mode::try_from(meta.mode() & 0o7777).unwrap_or_default();
    Ok(Found { kind, mode, size: meta.len(), target })
}

/// The entries of a directory here, by name.
pub fn list(path: &Path) -> Result<Vec<Node>> {
    let failed = |e| Failure::file("list", path, e);
    let mut nodes = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = FileName::try_from(entry.file_name().into_vec())
            .map_err(|e| Failure::because("a name that is none", e))?;
        let found = look(&entry.path())?;
        nodes.push(Node { name, found, source: Source::Here(entry.path()) });
    }
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(nodes)
}

/// The bytes of a file here, as many as it has now; and how many those are.
pub fn read(path: &Path) -> Result<(u64, impl Stream<Item = io::Result<Bytes>> + Send + 'static)> {
    let failed = |e| Failure::file("read", path, e);
    // A pipe in its place is not waited for, a link not followed.
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let file = File::options().read(true).custom_flags(flags.bits() as i32).open(path);
    let file = file.map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(Failure::here(format!("{} is no file any more", path.display())));
    }
    let size = meta.len();
    Ok((size, pieces::by(move |to| pieces::pump(file.take(size), &to))))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn name(text: &str) -> FileName {
        text.as_bytes().to_vec().try_into().unwrap()
    }

    fn write(directory: &Directory, at: &str, mode: u32, text: &'static str) -> Result<u64> {
        let pieces = futures_util::stream::iter([Ok(Bytes::from_static(text.as_bytes()))]);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mode = Mode::try_from(mode).unwrap();
        runtime.block_on(directory.write(&name(at), mode, pieces, |_| {}))
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let (home, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("kept"), "kept").unwrap();
        symlink(outside.path(), home.path().join("dir")).unwrap();
        symlink(outside.path().join("kept"), home.path().join("file")).unwrap();
        let directory = Directory::named(home.path()).unwrap();
        assert!(directory.enter(&name("dir")).is_err(), "a link is no directory");
        write(&directory, "file", 0o4755, "new").unwrap();
        assert_eq!(fs::read(outside.path().join("kept")).unwrap(), b"kept");
        let written = fs::symlink_metadata(home.path().join("file")).unwrap();
        assert!(written.is_file());
        assert_eq!(written.permissions().mode() & 0o7777, 0o755, "no set-user-id");
        let target = LinkTarget::try_from(b"/etc/passwd".to_vec()).unwrap();
        directory.link(&name("file"), &target).unwrap();
        write(&directory, "file", 0o600, "again").unwrap();
        assert_eq!(fs::read(home.path().join("file")).unwrap(), b"again");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_breaks_off_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let directory = Directory::named(home.path()).unwrap();
        let pieces = futures_util::stream::iter([
            Ok(Bytes::from_static(b"half")),
            Err(Failure::here("broke off")),
        ]);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mode = Mode::try_from(0o644).unwrap();
        let done = runtime.block_on(directory.write(&name("x"), mode, pieces, |_| {}));
        assert!(done.is_err());
        // A directory is not replaced by a file.
        fs::create_dir(home.path().join("d")).unwrap();
        assert!(write(&directory, "d", 0o644, "x").is_err());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }
}
