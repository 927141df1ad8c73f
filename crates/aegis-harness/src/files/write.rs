//! A file, on its way from the host: written beside its place, and put there when it is whole.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::PathBuf;

use aegis_wire::bounds::FILE_STALL;
use aegis_wire::channel::files::{Fault, FileAnswer, FilePath, Make, Meta, Mode};
use aegis_wire::channel::output::Kind;
use aegis_wire::pipe::mux::Stream;
use tokio::io::ReadHalf;

use super::place::{look, prepared};
use super::{agree, at_once, draft_in, fault};
use crate::exec::Host;
use crate::hands::Hands;
use crate::output::{self, Sink as _, last_frame};

/// Permissions of a file, where nothing else is said.
const FILE: u32 = 0o644;

/// A file that is not whole yet; dropped, it is gone.
struct Draft {
    file: File,
    draft: PathBuf,
    entry: PathBuf,
    mode: u32,
    owner: (Option<u32>, Option<u32>),
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Put into its place, it is not there any more.
        let _ = fs::remove_file(&self.draft);
    }
}

/// Takes it.
pub async fn run(
    clerks: &Hands,
    host: &mut Host,
    mut from: ReadHalf<Stream>,
    path: &FilePath,
    size: Option<u64>,
    make: Make,
) -> Result<(), Fault> {
    let asked = path.clone();
    let mut draft = at_once(clerks, move || Draft::begin(&asked, size, make)).await?;
    agree(host, None).await;
    loop {
        let mut bytes = Vec::new();
        let read = output::read_frame(&mut from, &mut bytes);
        match tokio::time::timeout(FILE_STALL, read).await {
            Ok(Ok(Some(Kind::Data))) => {
                draft = at_once(clerks, move || {
                    draft.file.write_all(&bytes).map_err(fault)?;
                    Ok(draft)
                })
                .await?;
            }
            Ok(Ok(Some(Kind::DataEnd))) => {
                let meta = at_once(clerks, move || draft.publish()).await?;
                let answer = FileAnswer::Done { meta: Some(meta) };
                host.send(&last_frame(Kind::Answer, &answer)).await;
                return Ok(());
            }
            // The host has left, or says what is none of this.
            _ => {
                let _ = clerks.run(move || drop(draft)).await;
                return Ok(());
            }
        }
    }
}

impl Draft {
    fn begin(path: &FilePath, size: Option<u64>, make: Make) -> Result<Draft, Fault> {
        if path.as_bytes().ends_with(b"/") {
            return Err(Fault::IsADirectory);
        }
        let (parent, entry) = prepared(path, &make)?;
        let there = fs::symlink_metadata(&entry).ok();
        if there.as_ref().is_some_and(|there| there.is_dir()) {
            return Err(Fault::IsADirectory);
        }
        if let Some(size) = size {
            has_room(&parent, size)?;
        }
        // What it replaces goes on in it, as if it had been overwritten.
        let there = there.filter(fs::Metadata::is_file);
        let mode = make.mode.map(Mode::bits);
        let mode = mode.or(there.as_ref().map(|t| t.mode() & 0o7777)).unwrap_or(FILE);
        let owner = (
            make.uid.or(there.as_ref().map(MetadataExt::uid)),
            make.gid.or(there.as_ref().map(MetadataExt::gid)),
        );
        let draft = draft_in(&parent)?;
        let file = File::options().write(true).create_new(true).mode(0o600).open(&draft);
        Ok(Draft { file: file.map_err(fault)?, draft, entry, mode, owner })
    }

    fn publish(self) -> Result<Meta, Fault> {
        let (uid, gid) = self.owner;
        if uid.is_some() || gid.is_some() {
            fchown(&self.file, uid, gid).map_err(fault)?;
        }
        self.file.set_permissions(fs::Permissions::from_mode(self.mode)).map_err(fault)?;
        fs::rename(&self.draft, &self.entry).map_err(fault)?;
        look(&self.entry).map_err(fault)
    }
}

/// Refuses what can't fit before any of it is written.
fn has_room(parent: &std::path::Path, size: u64) -> Result<(), Fault> {
    let at = rustix::fs::statvfs(parent).map_err(fault)?;
    // A file system that counts no blocks has no such bound.
    let free = at.f_bfree.saturating_mul(at.f_frsize);
    if at.f_blocks > 0 && size > free { Err(Fault::NoSpace) } else { Ok(()) }
}
