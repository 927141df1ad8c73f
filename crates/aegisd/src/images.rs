//! The images of this host: names, and what lies behind them.
//!
//! ```text
//! HOME/images/NAME/base.erofs        made here, by `aegis setup`
//! HOME/images/sha256-…/              fetched: base.erofs, and record.json
//! HOME/images/index.json             names in full → digests
//! HOME/images/blobs/                 the fetcher's own (aegis_wire::images::blob_dir)
//! ```
//! What is fetched is made by a confined program out of strangers' bytes: what it leaves is looked at
//! here, and taken over, before any machine lies on it.

mod fetch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};

use aegis_wire::bounds::IMAGE_NAMES_MAX;
use aegis_wire::images::{Made, RunConfig, blob_dir};
use aegis_wire::words::{ImageRef, Reference, Time, is_digest};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

pub use fetch::{Failed, Teller, fetch, pull};

/// The file that machines lie on.
const BASE: &str = "base.erofs";
/// What is known of a fetched image.
const RECORD: &str = "record.json";
/// Names and digests.
const INDEX: &str = "index.json";
/// The fetcher's directory.
const BLOBS: &str = "blobs";
/// Largest record or index.
const TEXT_MAX: u64 = 4 << 20;
/// Bytes at 1024 in every image.
const EROFS_MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];

/// The image that setup makes: this name alone is never a registry's, so that no stranger's image is
/// fetched where setup was not run.
const OURS: &str = "base";

/// Whether a name is only ever that of an image made here.
pub fn is_ours(name: &ImageRef) -> bool {
    name.as_str() == OURS
}

/// An image that is there.
#[derive(Clone, Debug)]
pub struct Image {
    /// What machines lie on.
    pub base: PathBuf,
    /// Of its manifest; one that was made here has none.
    pub digest: Option<String>,
    /// How it is run, where nobody says otherwise.
    pub run: RunConfig,
    /// Bytes of the file.
    pub bytes: u64,
    /// Since when it is there.
    pub created_at: Time,
}

impl Image {
    /// Where its processes begin, where nobody says otherwise: a fetched one need have no `/root`.
    pub fn cwd(&self) -> Option<String> {
        let fetched = self.digest.is_some();
        self.run.cwd.clone().or_else(|| fetched.then(|| "/".to_owned()))
    }
}

/// What is known of a fetched image.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    created_at: Time,
    #[serde(flatten)]
    made: Made,
}

/// Names in full, and what they stand for.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Index {
    names: BTreeMap<String, String>,
}

/// All images below a home.
#[derive(Clone, Debug)]
pub struct Images {
    dir: PathBuf,
}

impl Images {
    /// Those of this home.
    pub fn of(home: &Path) -> Images {
        Images { dir: home.join("images") }
    }

    /// What a name stands for, if it is there. One that was made here goes before others' of the
    /// same name.
    pub fn find(&self, name: &ImageRef) -> Option<Image> {
        self.local(name.as_str()).or_else(|| self.fetched(&self.digest_of(name)?))
    }

    /// The digest that a name of a fetched image stands for; its own too.
    pub fn digest_of(&self, name: &ImageRef) -> Option<String> {
        if is_digest(name.as_str()) {
            return self.place(name.as_str())?.is_dir().then(|| name.to_string());
        }
        let reference = Reference::of(name).ok().filter(|_| !is_ours(name))?;
        let known = self.index().names.remove(&reference.to_string());
        // A digest may be that of the image itself, whatever it was pulled by.
        known.or(reference.digest.filter(|digest| self.fetched(digest).is_some()))
    }

    /// One that was made here.
    pub fn local(&self, name: &str) -> Option<Image> {
        // Not what somebody else can write to, nor what was fetched.
        let other = name == BLOBS || name.starts_with("sha256-");
        if name.contains('/') || name.starts_with('.') || other {
            return None;
        }
        let base = self.dir.join(name).join(BASE);
        let meta = fs::metadata(&base).ok()?;
        let at = meta.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
        Some(Image {
            base,
            digest: None,
            run: RunConfig::default(),
            bytes: meta.len(),
            created_at: Time(i64::try_from(at.as_millis()).unwrap_or(i64::MAX)),
        })
    }

    /// One that was fetched, by its digest.
    pub fn fetched(&self, digest: &str) -> Option<Image> {
        let record = self.record(digest)?;
        let base = self.place(digest)?.join(BASE);
        Some(Image {
            bytes: fs::metadata(&base).ok()?.len(),
            base,
            digest: Some(digest.to_owned()),
            run: record.made.config,
            created_at: record.created_at,
        })
    }

    /// Names of those that were made here.
    pub fn local_names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| self.local(name).is_some()).collect();
        names.sort();
        names
    }

    /// All names of fetched images, and images that have none any more.
    pub fn names(&self) -> Vec<(Option<String>, String)> {
        let index = self.index().names;
        let named: BTreeSet<&String> = index.values().collect();
        let bare = self.digests().into_iter().filter(|digest| !named.contains(digest));
        let mut all: Vec<_> = bare.map(|digest| (None, digest)).collect();
        all.extend(index.iter().map(|(name, digest)| (Some(name.clone()), digest.clone())));
        all
    }

    fn digests(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        let digests = names.filter_map(|n| Some(format!("sha256:{}", n.strip_prefix("sha256-")?)));
        digests.filter(|digest| is_digest(digest)).collect()
    }

    fn place(&self, digest: &str) -> Option<PathBuf> {
        is_digest(digest).then(|| self.dir.join(digest.replace(':', "-")))
    }

    fn record(&self, digest: &str) -> Option<Record> {
        let bytes = read(&self.place(digest)?.join(RECORD)).ok()?;
        let record: Record = serde_json::from_slice(&bytes).ok()?;
        record.made.config.is_bounded().then_some(record)
    }

    fn index(&self) -> Index {
        let bytes = read(&self.dir.join(INDEX)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    fn write_index(&self, index: &Index) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(index).map_err(io::Error::other)?;
        let (new, path) = (self.dir.join(".index.new"), self.dir.join(INDEX));
        write_synced(&new, &text)?;
        fs::rename(&new, path)?;
        File::open(&self.dir)?.sync_all()
    }

    /// Takes over what the fetcher made, under these names too.
    ///
    /// # Errors
    /// The disk's, or what was made is not what it should be.
    pub fn keep(&self, made: Made, names: &[String], now: Time) -> io::Result<Image> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let place = self.place(&made.digest).ok_or_else(|| bad("its digest is none"))?;
        if !made.config.is_bounded() || made.blobs.iter().any(|blob| !is_digest(blob)) {
            return Err(bad("its configuration is not allowed"));
        }
        let digest = made.digest.clone();
        if self.fetched(&digest).is_none() {
            let draft = self.dir.join(".draft");
            remove(&draft)?;
            fs::DirBuilder::new().mode(0o700).create(&draft)?;
            take_over(&self.dir.join(BLOBS).join(blob_dir::WORK), made.bytes, &draft)?;
            let record = Record { created_at: now, made };
            let text = serde_json::to_vec_pretty(&record).map_err(io::Error::other)?;
            write_synced(&draft.join(RECORD), &text)?;
            File::open(&draft)?.sync_all()?;
            // One whose record was not understood is in the way.
            remove(&place)?;
            fs::rename(&draft, &place)?;
            File::open(&self.dir)?.sync_all()?;
        }
        let mut index = self.index();
        for name in names {
            index.names.insert(name.clone(), digest.clone());
        }
        if index.names.len() > IMAGE_NAMES_MAX {
            return Err(io::Error::other("this host knows too many names of images; see prune"));
        }
        self.write_index(&index)?;
        self.fetched(&digest).ok_or_else(|| bad("it is not there"))
    }

    /// Forgets a name, and the image with its last one. Says whether the image is gone.
    pub fn forget(&self, name: &str, digest: &str) -> io::Result<bool> {
        let mut index = self.index();
        if name == digest {
            index.names.retain(|_, of| of != digest);
        } else {
            index.names.remove(name);
        }
        self.write_index(&index)?;
        if index.names.values().any(|of| of == digest) {
            return Ok(false);
        }
        if let Some(place) = self.place(digest) {
            remove(&place)?;
        }
        Ok(true)
    }

    /// Forgets one that was made here.
    pub fn forget_local(&self, name: &str) -> io::Result<()> {
        // Out of sight in one move: nobody finds half of it.
        let trash = self.dir.join(".trash");
        remove(&trash)?;
        fs::rename(self.dir.join(name), &trash)?;
        remove(&trash)
    }

    /// Removes blobs that no image is made of, and what was fetched in part. Gives their bytes.
    pub fn prune_blobs(&self) -> io::Result<u64> {
        let records = self.digests().into_iter().filter_map(|digest| self.record(&digest));
        let used: BTreeSet<String> =
            records.flat_map(|r| r.made.blobs).map(|blob| blob.replace(':', "-")).collect();
        let mut freed = 0;
        for entry in fs::read_dir(self.dir.join(BLOBS)).into_iter().flatten() {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| used.contains(name)) {
                continue;
            }
            let meta = entry.metadata()?;
            freed += if meta.is_file() { meta.len() } else { 0 };
            remove(&entry.path())?;
        }
        Ok(freed)
    }

    /// The fetcher's directory.
    fn blobs(&self) -> io::Result<PathBuf> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        Ok(self.dir.join(BLOBS))
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(TEXT_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(path, bytes)?;
    File::open(path)?.sync_all()
}

/// A file or directory that need not be there.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Moves an image out of a directory that its maker can write to. It has ended, with all that it
/// started; no link or other name of the file is followed or left.
fn take_over(work: &Path, bytes: u64, draft: &Path) -> io::Result<()> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let work = rustix::fs::open(work, flags | OFlags::DIRECTORY, Mode::empty())?;
    let file: OwnedFd =
        rustix::fs::openat(&work, blob_dir::IMAGE, flags | OFlags::NONBLOCK, Mode::empty())?;
    let file = File::from(file);
    let meta = file.metadata()?;
    use std::os::unix::fs::MetadataExt as _;
    let mut magic = [0; 4];
    if !meta.is_file() || meta.nlink() != 1 || meta.len() != bytes {
        return Err(bad("the image is not the file that it should be"));
    }
    file.read_exact_at(&mut magic, 1024)?;
    if magic != EROFS_MAGIC {
        return Err(bad("the image is no file system"));
    }
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    rustix::fs::fchown(&file, Some(uid), Some(gid))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
    let to = draft.join(BASE);
    rustix::fs::renameat(&work, blob_dir::IMAGE, rustix::fs::CWD, &to)?;
    // What was moved is what was looked at.
    let moved = fs::symlink_metadata(&to)?;
    if (moved.dev(), moved.ino()) != (meta.dev(), meta.ino()) {
        return Err(bad("the image was exchanged"));
    }
    file.sync_all()
}

#[cfg(test)]
mod tests;
