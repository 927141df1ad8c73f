//! The machine's files, for the host: one stream for each question (`aegis_wire::channel::files`).
//!
//! ```text
//! channel ─▶ serve ─▶ place: stat, list, make, link, remove, rename
//!                 ├─▶ read ─▶ to the host
//!                 ├─▶ write ◀─ from the host
//!                 └─▶ watch ─▶ to the host
//! ```
//! All of it is done as root, by threads of their own: a file system of the user's may take any
//! time. A host that leaves ends it, and what was half written is gone.

mod place;
mod read;
mod watch;
mod write;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aegis_wire::channel::files::{Fault, FileAnswer, FileAsk, FilePath, Meta};
use aegis_wire::channel::output::Kind;
use aegis_wire::pipe::mux::Stream;
use rustix::io::Errno;
use tokio::io::{AsyncReadExt as _, ReadHalf};

use crate::exec::Host;
use crate::hands::Hands;
use crate::machine::Machine;
use crate::output::{Sink as _, last_frame};

/// Names of files that are not whole yet begin with this.
const DRAFT: &str = ".aegis-draft-";

/// Answers one question.
pub async fn serve(machine: Arc<Machine>, stream: Stream, ask: FileAsk) {
    let (from_host, to_host) = tokio::io::split(stream);
    let mut host = Host::new(to_host);
    if !machine.has_files() {
        return refuse(&mut host, Fault::NotReady).await;
    }
    let clerks = &machine.clerks;
    let done = match ask {
        FileAsk::Read { path, from, length } => tokio::select! {
            done = read::run(clerks, &mut host, path, from, length) => done,
            () = left(from_host) => return,
        },
        FileAsk::List { path } => tokio::select! {
            done = place::list(clerks, &mut host, path) => done,
            () = left(from_host) => return,
        },
        FileAsk::Watch { path, recursive } => tokio::select! {
            done = watch::run(clerks, &mut host, path, recursive) => done,
            () = left(from_host) => return,
        },
        FileAsk::Write { path, size, make } => {
            write::run(clerks, &mut host, from_host, &path, size, make).await
        }
        ask => match at_once(clerks, move || place::change(&ask)).await {
            Ok(meta) => {
                host.end(&last_frame(Kind::Answer, &FileAnswer::Done { meta })).await;
                return;
            }
            Err(fault) => Err(fault),
        },
    };
    match done {
        Ok(()) => host.end(&[]).await,
        Err(fault) => refuse(&mut host, fault).await,
    }
}

async fn refuse(host: &mut Host, fault: Fault) {
    host.end(&last_frame(Kind::Answer, &FileAnswer::Refused { fault })).await;
}

/// Completes when the host has left. One that takes nothing any more would be waited for in vain.
async fn left(mut from_host: ReadHalf<Stream>) {
    let mut ignored = [0; 64];
    while matches!(from_host.read(&mut ignored).await, Ok(n) if n > 0) {}
}

/// The answer behind which more comes.
async fn agree(host: &mut Host, meta: Option<Meta>) {
    host.send(&last_frame(Kind::Answer, &FileAnswer::Done { meta })).await;
}

/// Has something done by a clerk.
async fn at_once<T: Send + 'static>(
    clerks: &Hands,
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    clerks.run(work).await.unwrap_or(Err(Fault::Busy))
}

fn as_path(path: &FilePath) -> &Path {
    Path::new(OsStr::from_bytes(path.as_bytes()))
}

/// The directory of an entry that is to be made or taken away, and its path without a slash at its
/// end; the root, `.` and `..` are none.
fn as_entry(path: &FilePath) -> Result<(PathBuf, PathBuf), Fault> {
    let name = path.name().ok_or_else(|| {
        if as_path(path).file_name().is_some() { Fault::BadName } else { Fault::Denied }
    })?;
    let parent = as_path(path).parent().ok_or(Fault::Denied)?.to_owned();
    let entry = parent.join(OsStr::from_bytes(name.as_bytes()));
    Ok((parent, entry))
}

/// A path beside `parent`'s entries that nobody has.
fn draft_in(parent: &Path) -> Result<PathBuf, Fault> {
    let mut noise = [0; 8];
    rustix::rand::getrandom(&mut noise, rustix::rand::GetRandomFlags::empty())
        .map_err(|_| Fault::Failed)?;
    Ok(parent.join(format!("{DRAFT}{:016x}", u64::from_ne_bytes(noise))))
}

fn fault(error: impl Into<io::Error>) -> Fault {
    let error = error.into();
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT) => Fault::NotFound,
        Some(Errno::NOTDIR) => Fault::NotADirectory,
        Some(Errno::ISDIR) => Fault::IsADirectory,
        Some(Errno::EXIST) => Fault::Exists,
        Some(Errno::NOTEMPTY) => Fault::NotEmpty,
        Some(Errno::PERM | Errno::ACCESS) => Fault::Denied,
        Some(Errno::ROFS) => Fault::ReadOnly,
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => Fault::NoSpace,
        Some(Errno::NAMETOOLONG | Errno::LOOP | Errno::INVAL | Errno::ILSEQ) => Fault::BadName,
        Some(Errno::XDEV) => Fault::OtherFileSystem,
        Some(Errno::BUSY | Errno::TXTBSY) => Fault::Busy,
        _ => Fault::Failed,
    }
}

#[cfg(test)]
mod tests;
