//! `aegis-worker keeper`: holds one golden snapshot in memory and hands it to workers.
//!
//! It outlives whoever started it. It ends when its directory or its socket is removed, when it is
//! told to quit, when nobody wanted its snapshot for long (the next one loads what is stored), or
//! when nobody has it and the host keeps many: a machine that may spawn chooses the sizes of its
//! children, and each size is another snapshot.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aegis_wire::bounds::WORKER_LINE_MAX;
use anyhow::Context as _;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, BufReader, Interest};
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore};

use crate::golden::{self, KeeperSaid, Order, Place, Source};
use crate::snapshot::{self, Snapshot};
use crate::{lines, sys};

/// The keeper's socket in its snapshot's directory.
pub const SOCKET: &str = "keeper.sock";
/// Askers at a time; more wait in the socket's backlog.
const ASKERS_MAX: usize = 64;
/// Leases that are counted: each holds a descriptor of this process.
const LEASES_MAX: usize = 800;
/// How much golden memory may grow before it is made new, bytes.
const GROWTH_MAX: u64 = 16 << 20;
/// Snapshots that a host keeps though nobody has them.
const KEPT_MAX: usize = 16;
/// One more than that is kept so long.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// An asker says what it wants at once.
const ASK_DEADLINE: Duration = Duration::from_secs(5);
/// A snapshot that nobody has is held in memory for so long.
const UNUSED_MAX: Duration = Duration::from_secs(3600);
/// The lowest priority there is.
const LAST: i32 = 19;
/// Longest line that an asker says, bytes.
const ASK_MAX: usize = 256;

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Ask {
    /// Memory and state.
    Get,
    /// The end.
    Quit,
}

/// Runs the keeper whose [`Order`] comes on standard input.
pub async fn run() -> anyhow::Result<()> {
    let started = start().await;
    let said = match &started {
        Ok(_) => KeeperSaid::Ready,
        Err(error) => KeeperSaid::Failed(format!("{error:#}")),
    };
    // Whoever started us may be gone; the snapshot is here all the same.
    let _ = io::stdout().write_all(&lines::line(&said)?).and_then(|()| io::stdout().flush());
    let Some(Ready { place, snapshot, listener, stored, again }) = started? else {
        return Ok(());
    };
    let snapshot = Arc::new(snapshot);
    let safe = Arc::new(AtomicBool::new(stored));
    if !stored {
        let (directory, snapshot) = (place.directory.clone(), Arc::clone(&snapshot));
        let safe = Arc::clone(&safe);
        std::thread::spawn(move || {
            // Whoever waits for a machine of it goes first; to Linux this is this thread alone.
            let _ = rustix::process::setpriority_process(None, LAST);
            // What can't be made again and is only given is a fork's: it ends with its machines.
            let done = snapshot::store(&directory, &snapshot, again);
            if let Err(error) = &done {
                tracing::warn!(error = format!("{error:#}"), "the snapshot can't be stored");
            }
            safe.store(done.is_ok() || again, Ordering::Relaxed);
        });
    }
    serve(&place.directory, listener, snapshot, again, &safe).await
}

/// What a keeper starts with.
struct Ready {
    place: Place,
    snapshot: Snapshot,
    listener: UnixListener,
    /// It is in files.
    stored: bool,
    /// It can be made again.
    again: bool,
}

/// Loads or builds the snapshot and listens; `None` when another keeper does so already.
async fn start() -> anyhow::Result<Option<Ready>> {
    let mut spec = Vec::new();
    io::stdin().take(WORKER_LINE_MAX as u64).read_to_end(&mut spec)?;
    let Order { source, given } = serde_json::from_slice(&spec).context("no order on stdin")?;
    let given = given.map(|(memory, state)| Snapshot {
        memory: sys::born_with(memory),
        state: sys::born_with(state),
    });
    let place = source.place()?;
    // The starter's lock ends with the starter; two builds side by side would only be slow.
    let _building = golden::lock(place.directory.clone(), "build").await?;
    if golden::ask_keeper(&place.directory).await?.is_some() {
        return Ok(None);
    }
    let load = || {
        snapshot::load(&place.directory, place.shape).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "the stored snapshot can't be loaded");
            None
        })
    };
    let (snapshot, stored) = match (given, &source) {
        // What its pages were counted to is no longer that of those who will share them.
        (Some(snapshot), _) => (snapshot.refresh()?, false),
        (None, source) => match (load(), source) {
            (Some(snapshot), _) => (snapshot, true),
            (None, Source::Golden(golden)) => {
                (snapshot::build(golden, place.shape, &place.key).await?, false)
            }
            (None, Source::Commit { dir, .. }) => {
                anyhow::bail!("the memory of the commit in {} is not whole", dir.display())
            }
        },
    };
    let now = source.place()?;
    anyhow::ensure!(now.key == place.key, "its files changed while it was made; try again");
    let listener = bind(&place.directory)?;
    let again = matches!(source, Source::Golden(_));
    Ok(Some(Ready { place, snapshot, listener, stored, again }))
}

fn bind(directory: &Path) -> anyhow::Result<UnixListener> {
    let at = File::open(directory)?;
    // By the directory's descriptor: a socket's own path may have no more than 107 bytes.
    let path = Path::new(&sys::fd_path(&at)).join(SOCKET);
    // We were started under the directory's lock, so what lies there is a dead keeper's.
    let _ = std::fs::remove_file(&path);
    let listener = std::os::unix::net::UnixListener::bind(&path)
        .with_context(|| format!("can't listen in {}", directory.display()))?;
    listener.set_nonblocking(true)?;
    Ok(UnixListener::from_std(listener)?)
}

async fn serve(
    directory: &Path,
    listener: UnixListener,
    snapshot: Arc<Snapshot>,
    again: bool,
    safe: &AtomicBool,
) -> anyhow::Result<()> {
    let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let what = WatchFlags::DELETE | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
    inotify::add_watch(&watch, directory, what | WatchFlags::ONLYDIR)?;
    let watch = sys::readable(watch)?;
    let quit = Arc::new(Notify::new());
    let askers = Arc::new(Semaphore::new(ASKERS_MAX));
    let leases = Leases::new(snapshot)?;
    let mut ticks = tokio::time::interval(IDLE_MAX);
    loop {
        if !directory.join(SOCKET).exists() {
            return Ok(());
        }
        tokio::select! {
            (permit, accepted) = accept(&listener, &askers) => {
                let (permit, (stream, _)) = (permit?, accepted?);
                let (quit, leases) = (Arc::clone(&quit), Arc::clone(&leases));
                tokio::spawn(async move {
                    match tokio::time::timeout(ASK_DEADLINE, ask(stream)).await {
                        Ok(Ok((Ask::Quit, _))) => quit.notify_one(),
                        Ok(Ok((Ask::Get, stream))) => leases.serve(stream, permit).await,
                        _ => {}
                    }
                });
            }
            ready = watch.readable() => {
                // What happened does not matter: the loop looks.
                let mut space = [MaybeUninit::uninit(); 4096];
                let mut events = inotify::Reader::new(watch.get_ref(), &mut space);
                while events.next().is_ok() {}
                ready?.clear_ready();
            }
            _ = ticks.tick() => {
                // What is a commit's is most often needed once; what is nowhere else may be needed yet.
                let safe = safe.load(Ordering::Relaxed);
                let most = if again || !safe { UNUSED_MAX } else { IDLE_MAX };
                if leases.idle_for() > most {
                    quit.notify_one();
                }
                if safe && leases.idle_for() >= IDLE_MAX && too_many(directory) {
                    // While we listen no other keeper begins here. The manifest first: without it
                    // there is no snapshot.
                    for name in snapshot::FILES.into_iter().filter(|_| again) {
                        let _ = std::fs::remove_file(directory.join(name));
                    }
                    let _ = std::fs::remove_file(directory.join(SOCKET));
                    return Ok(());
                }
            }
            () = quit.notified() => {
                let _ = std::fs::remove_file(directory.join(SOCKET));
                return Ok(());
            }
        }
    }
}

/// Whether there are more snapshots beside this one than are kept for nobody.
fn too_many(directory: &Path) -> bool {
    let beside = directory.parent().and_then(|all| std::fs::read_dir(all).ok());
    let kept = |entry: &std::fs::DirEntry| entry.path().join(SOCKET).exists();
    beside.is_some_and(|all| all.flatten().filter(kept).count() > KEPT_MAX)
}

type Permit = tokio::sync::OwnedSemaphorePermit;

async fn accept(
    listener: &UnixListener,
    askers: &Arc<Semaphore>,
) -> (Result<Permit, tokio::sync::AcquireError>, io::Result<(UnixStream, SocketAddr)>) {
    let permit = Arc::clone(askers).acquire_owned().await;
    (permit, listener.accept().await)
}

/// Who has the snapshot. When nobody has it any more, pages of zeros that its clones made in it are
/// given back to the host.
struct Leases {
    inner: Mutex<Inner>,
    /// Bytes that the snapshot took when it was new.
    fresh: u64,
}

struct Inner {
    snapshot: Arc<Snapshot>,
    held: usize,
    /// Somebody has it who is not counted.
    uncounted: bool,
    /// When the last one gave it back.
    idle_since: Instant,
}

impl Leases {
    fn new(snapshot: Arc<Snapshot>) -> io::Result<Arc<Leases>> {
        let fresh = snapshot.allocated()?;
        let inner =
            Mutex::new(Inner { snapshot, held: 0, uncounted: false, idle_since: Instant::now() });
        Ok(Arc::new(Leases { inner, fresh }))
    }

    async fn serve(&self, stream: UnixStream, permit: Permit) {
        let snapshot = {
            let mut inner = self.lock();
            inner.held += 1;
            Arc::clone(&inner.snapshot)
        };
        let given = tokio::time::timeout(ASK_DEADLINE, give(&stream, &snapshot)).await;
        drop(permit);
        let counted = self.lock().held <= LEASES_MAX;
        if counted && matches!(given, Ok(Ok(()))) {
            // The asker says nothing more; its end is the end of the lease.
            let mut word = [0; 1];
            let mut stream = stream;
            let _ = stream.read(&mut word).await;
        }
        let mut inner = self.lock();
        inner.held -= 1;
        inner.uncounted |= !counted;
        inner.idle_since = Instant::now();
        if inner.held == 0 && !inner.uncounted {
            self.tidy(&mut inner);
        }
    }

    /// For how long nobody has had it.
    fn idle_for(&self) -> Duration {
        let inner = self.lock();
        let idle = inner.held == 0 && !inner.uncounted;
        if idle { inner.idle_since.elapsed() } else { Duration::ZERO }
    }

    fn tidy(&self, inner: &mut Inner) {
        let grown = inner.snapshot.allocated().is_ok_and(|now| now > self.fresh + GROWTH_MAX);
        if !grown {
            return;
        }
        match inner.snapshot.refresh() {
            Ok(snapshot) => inner.snapshot = Arc::new(snapshot),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "golden memory stays large");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn ask(stream: UnixStream) -> anyhow::Result<(Ask, UnixStream)> {
    let mut stream = BufReader::new(stream);
    let line = lines::read(&mut stream, ASK_MAX).await?.context("nothing was asked")?;
    Ok((serde_json::from_slice(&line)?, stream.into_inner()))
}

async fn give(stream: &UnixStream, snapshot: &Snapshot) -> io::Result<()> {
    // Opened anew, so that each asker reads from the beginning.
    let state = File::open(sys::fd_path(&snapshot.state))?;
    stream
        .async_io(Interest::WRITABLE, || {
            let fds = [snapshot.memory.as_fd(), state.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::Error::other("no room for descriptors"));
            }
            let line = [io::IoSlice::new(b"{\"ok\":true}\n")];
            rustix::net::sendmsg(stream, &line, &mut control, SendFlags::NOSIGNAL)
                .map(drop)
                .map_err(io::Error::from)
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepers_beyond_those_that_are_kept_are_too_many() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..=KEPT_MAX {
            let own = dir.path().join(n.to_string());
            std::fs::create_dir(&own).unwrap();
            File::create(own.join(SOCKET)).unwrap();
            assert_eq!(too_many(&own), n >= KEPT_MAX, "{n}");
        }
    }
}
