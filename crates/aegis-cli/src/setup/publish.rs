//! A directory appears whole or not at all: made under another name, synced, then swapped in.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::TempDir;

use crate::failure::{Failure, Result};

/// A directory on its way to `target`; gone when it is dropped before [`Draft::publish`].
pub struct Draft {
    dir: TempDir,
    target: PathBuf,
}

impl Draft {
    /// An empty draft beside `target`, hence on the same file system.
    pub fn beside(target: &Path) -> Result<Draft> {
        let parent = target.parent().unwrap_or(Path::new("/"));
        make_private(parent)?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let dir = tempfile::Builder::new()
            .prefix(&format!(".{name}-"))
            .tempdir_in(parent)
            .map_err(|e| Failure::file("write into", parent, e))?;
        Ok(Draft { dir, target: target.to_owned() })
    }

    /// Where to put things.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Syncs everything and swaps it in for what is at the target, if anything.
    pub fn publish(self) -> Result<()> {
        sync_tree(self.dir.path())?;
        let (from, to) = (self.dir.path(), &self.target);
        let failed = |e: rustix::io::Errno| Failure::file("replace", to, e.into());
        if to.exists() {
            // Exchanged in one step: nobody ever sees the target missing. The old one is then in
            // the draft's place, and goes with it.
            renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE).map_err(failed)?;
        } else {
            fs::rename(from, to).map_err(|e| Failure::file("replace", to, e))?;
            let _ = self.dir.keep();
        }
        sync(to.parent().unwrap_or(Path::new("/")))
    }
}

/// Makes a directory for its owner alone (0700), with its parents; leaves one that exists.
pub fn make_private(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| Failure::file("make", dir, e))
}

/// Files get 0644 (the worker's own user must read kernel and image), directories 0755.
fn sync_tree(path: &Path) -> Result<()> {
    let failed = |e| Failure::file("write", path, e);
    let meta = fs::symlink_metadata(path).map_err(failed)?;
    let mode = if meta.is_dir() { 0o755 } else { 0o644 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    if meta.is_dir() {
        for entry in fs::read_dir(path).map_err(failed)? {
            sync_tree(&entry.map_err(failed)?.path())?;
        }
    }
    sync(path)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| Failure::file("sync", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_draft_replaces_the_first_and_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("images/base");
        for text in ["one", "two"] {
            let draft = Draft::beside(&target).unwrap();
            fs::write(draft.path().join("file"), text).unwrap();
            draft.publish().unwrap();
            assert_eq!(fs::read_to_string(target.join("file")).unwrap(), text);
        }
        drop(Draft::beside(&target).unwrap());
        assert_eq!(fs::read_dir(home.path().join("images")).unwrap().count(), 1);
        let mode = fs::metadata(target.join("file")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
    }
}
