//! Blobs by their digests, in the one directory that a job may write to: layers that several images
//! have are fetched once. A blob appears under its name when it is whole and was verified; what is
//! fetched in part stays beside it, and is continued.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use aegis_wire::images::blob_dir;

use crate::digest::Digest;

/// The directory.
#[derive(Clone, Debug)]
pub struct Blobs {
    dir: PathBuf,
}

/// A blob on its way.
#[derive(Debug)]
pub struct Draft {
    file: File,
    path: PathBuf,
    hash: Sha256,
    /// Bytes that are there.
    pub bytes: u64,
}

impl Blobs {
    /// Of this directory.
    pub fn new(dir: impl Into<PathBuf>) -> Blobs {
        Blobs { dir: dir.into() }
    }

    /// Where a blob is or will be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.file_name())
    }

    /// Where a job makes its image.
    pub fn work(&self) -> PathBuf {
        self.dir.join(blob_dir::WORK)
    }

    /// Whether there is one of that size.
    pub fn has(&self, digest: &Digest, bytes: u64) -> bool {
        fs::metadata(self.path(digest)).is_ok_and(|m| m.is_file() && m.len() == bytes)
    }

    /// Reads a small one, and looks whether it is what its name says.
    pub fn read(&self, digest: &Digest, max: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.path(digest))?.take(max + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > max || Digest::of_bytes(&bytes) != *digest {
            self.remove(digest);
            let message = format!("{digest} is not what its name says");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(bytes)
    }

    /// Names of all that is there.
    pub fn names(&self) -> io::Result<BTreeSet<OsString>> {
        fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name())).collect()
    }

    /// Removes all blobs but these.
    pub fn retain(&self, names: &BTreeSet<OsString>) -> io::Result<()> {
        for name in self.names()?.difference(names) {
            let path = self.dir.join(name);
            if path.is_file() {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Forgets one that turned out to be broken.
    pub fn remove(&self, digest: &Digest) {
        let _ = fs::remove_file(self.path(digest));
    }

    /// Goes on where an earlier fetch of it ended.
    pub fn resume(&self, digest: &Digest) -> io::Result<Draft> {
        let path = self.dir.join(format!("{}.part", digest.file_name()));
        let mut draft = Draft::open(path, false)?;
        let mut piece = vec![0; 1 << 20];
        loop {
            let n = draft.file.read(&mut piece)?;
            if n == 0 {
                return Ok(draft);
            }
            draft.hash.update(&piece[..n]);
            draft.bytes += n as u64;
        }
    }

    /// One whose digest nobody knows yet.
    pub fn begin(&self, name: &str) -> io::Result<Draft> {
        Draft::open(self.dir.join(format!("{name}.part")), true)
    }

    /// Gives a whole draft its name.
    pub fn keep(&self, draft: Draft) -> io::Result<(Digest, u64)> {
        draft.file.sync_all()?;
        let digest = Digest::of(draft.hash);
        fs::rename(&draft.path, self.path(&digest))?;
        Ok((digest, draft.bytes))
    }
}

impl Draft {
    fn open(path: PathBuf, empty: bool) -> io::Result<Draft> {
        let mut options = OpenOptions::new();
        let file = options.create(true).read(true).write(true).truncate(empty).mode(0o600);
        Ok(Draft { file: file.open(&path)?, path, hash: Sha256::new(), bytes: 0 })
    }

    /// More of it.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Begins anew.
    pub fn clear(&mut self) -> io::Result<()> {
        use std::io::Seek as _;
        self.file.set_len(0)?;
        self.file.rewind()?;
        (self.hash, self.bytes) = (Sha256::new(), 0);
        Ok(())
    }

    /// What is there, by its digest.
    pub fn digest(&self) -> Digest {
        Digest::of(self.hash.clone())
    }

    /// Gives it up.
    pub fn discard(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// An empty directory.
pub fn emptied(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    fs::create_dir(dir)
}
