//! The process: confined, then requests in and answers out over one socket, until that ends.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use aegis_wire::bounds::WORKSPACE_MESSAGE_MAX;
use anyhow::Context as _;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::abi::IN_HEADER;
use crate::confine::{self, Confined};
use crate::folder::{Folder, Lent};
use crate::nodes::Bounds;
use crate::quota::Quota;
use crate::watch::{self, Watch};

/// Requests that are worked on at a time.
const THREADS: usize = 4;
/// Bytes of the machine's memory for each file that it can have known: it needs more itself.
const MEMORY_PER_NODE: u64 = 1024;
/// Files that any machine can have known.
const NODES_MAX: u64 = 2 << 20;
/// Descriptors besides those of files.
const OWN_FILES: usize = 64;

/// How a folder is lent: argument of the program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Terms {
    /// It may be looked at only.
    pub read_only: bool,
    /// Bytes that it may grow by, together with the disk.
    pub limit_bytes: u64,
    /// Bytes of the machine's memory.
    pub memory_bytes: u64,
    /// Descriptor of the machine's own disk.
    pub disk: i32,
    /// Descriptor of the file that keeps the count.
    pub book: i32,
}

/// Serves the machine at the socket on descriptor 0 the folder on descriptor 1, until the socket
/// ends.
///
/// # Errors
/// When this process can't be confined, or the other side breaks the protocol.
pub fn serve(terms: &Terms) -> anyhow::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let folder = io::stdout().as_fd().try_clone_to_owned()?;
    // It is of the mount namespace that is left: from there a way would lead on.
    rustix::stdio::dup2_stdout(File::options().write(true).open("/dev/null")?)?;
    let given = |fd: i32, write: bool| {
        let path = format!("/proc/self/fd/{fd}");
        File::options().read(true).write(write).open(path)
    };
    let disk = given(terms.disk, false).context("the disk")?;
    let book = given(terms.book, true).context("the book")?;
    let quota = Quota::new(terms.limit_bytes, Some(disk), Some(book));
    let watches = watch::host_limit();
    let confined = confine::confine(folder, terms.read_only)?;
    // After the change of user, which clears it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("parent")?;
    let folder = lend(confined, terms, quota, watches)?;
    work(socket, folder)
}

fn lend(confined: Confined, terms: &Terms, quota: Quota, watches: usize) -> anyhow::Result<Folder> {
    let files = confined.files.saturating_sub(OWN_FILES);
    let nodes = (terms.memory_bytes / MEMORY_PER_NODE).clamp(1024, NODES_MAX);
    let bounds = Bounds {
        nodes: usize::try_from(nodes).unwrap_or(usize::MAX),
        descriptors: files / 4,
        nameless: files / 4,
    };
    // By its number a descriptor is found from here, by every thread.
    rustix::process::fchdir(&confined.descriptors).context("descriptors")?;
    let watch = Watch::new(&confined.root, "", watches);
    if watch.is_none() {
        tracing::info!("the host's changes are not heard of: what is told is believed shortly");
    }
    Folder::new(Lent {
        root: confined.root,
        descriptors: confined.descriptors,
        read_only: terms.read_only,
        bounds,
        handles: files / 4,
        watch,
        quota,
    })
    .context("the folder")
}

/// Answers until the socket ends.
fn work(socket: UnixStream, folder: Folder) -> anyhow::Result<()> {
    let shared = Arc::new((folder, Mutex::new(socket.try_clone()?)));
    let news = Arc::clone(&shared);
    // It ends with the process.
    std::thread::Builder::new().name("news".to_owned()).spawn(move || {
        let (folder, output) = &*news;
        let send = |news: &[u8]| {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.write_all(news).is_ok()
        };
        if let Err(error) = folder.tell_changes(send) {
            // What the machine believes may be untrue from here on: it begins anew.
            tracing::error!(%error, "the host's changes are not heard of any more");
            std::process::exit(1);
        }
    })?;
    let input = Mutex::new(socket);
    std::thread::scope(|scope| {
        let (folder, output) = &*shared;
        let threads: Vec<_> =
            (0..THREADS).map(|_| scope.spawn(|| one(&input, output, folder))).collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a thread died"))??;
        }
        Ok(())
    })
}

fn one(
    input: &Mutex<UnixStream>,
    output: &Mutex<UnixStream>,
    folder: &Folder,
) -> anyhow::Result<()> {
    let mut request = Vec::new();
    loop {
        let read = {
            let mut input = input.lock().unwrap_or_else(PoisonError::into_inner);
            read_request(&mut *input, &mut request)
        };
        match read {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => {
                // The others wait for a request that will not come.
                let _ = input
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .shutdown(std::net::Shutdown::Both);
                return Err(error.into());
            }
        }
        let _looking = folder.looking(&request);
        if let Some(answer) = folder.answer(&request) {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.write_all(&answer)?;
        }
    }
}

/// Reads one request; false at the end.
fn read_request(from: &mut impl Read, request: &mut Vec<u8>) -> io::Result<bool> {
    let mut len = [0; 4];
    match from.read_exact(&mut len) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        other => other?,
    }
    let whole = u32::from_le_bytes(len) as usize;
    if !(IN_HEADER..=WORKSPACE_MESSAGE_MAX).contains(&whole) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{whole} bytes")));
    }
    request.clear();
    request.extend_from_slice(&len);
    request.resize(whole, 0);
    from.read_exact(&mut request[4..])?;
    Ok(true)
}

/// Opens a folder as it is lent: a directory that is reached over no link.
///
/// # Errors
/// When there is no such folder now.
pub fn open(path: &std::path::Path) -> io::Result<OwnedFd> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?)
}
