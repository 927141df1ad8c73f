//! Golden snapshots from a machine's side: their key, and how one is had.
//!
//! ```text
//! golden/KEY/lock          held while somebody looks for a keeper or starts one
//! golden/KEY/build         held by a keeper until it listens, also when its starter is dead
//! golden/KEY/keeper.sock   the keeper hands out (memory, state) here
//! golden/KEY/failed        why the last keeper could not start; those who waited read it
//! golden/KEY/mem, state, snapshot.json     so that the next keeper needs no boot
//! ```

use std::fs::File;
use std::io::{self, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use aegis_wire::bounds::{CHANNEL_GENERATION, GOLDEN_DEADLINE, WORKER_GENERATION};
use aegis_wire::worker::{Accel, Golden, GoldenReady};
use anyhow::Context as _;
use rustix::fs::FlockOperation;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use tokio::io::{AsyncWriteExt as _, BufReader, Interest};
use tokio::net::UnixStream;

use crate::child::Child;
use crate::qemu::{self, Engine, Shape};
use crate::snapshot::{self, Snapshot};
use crate::sys::{self, Confine};
use crate::{keeper, lines};

/// A keeper answers at once.
const KEEPER_DEADLINE: Duration = Duration::from_secs(5);
/// A keeper that starts may boot twice, and store nothing before it speaks.
const START_DEADLINE: Duration = Duration::from_secs(2 * GOLDEN_DEADLINE.as_secs() + 10);
/// Longest line that a keeper says, bytes.
pub const KEEPER_LINE_MAX: usize = 16 * 1024;
/// Enough of /proc/cpuinfo for the first processor, bytes.
const CPUINFO_MAX: u64 = 4096;

/// What a keeper is started with: on its standard input.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// What it keeps.
    pub source: Source,
    /// Numbers of its memory and its state, where they are at hand and in no file yet.
    pub given: Option<(i32, i32)>,
}

/// What a starting keeper says on its standard output, once.
#[derive(Debug, Serialize, Deserialize)]
pub enum KeeperSaid {
    /// It listens.
    Ready,
    /// It could not, and why.
    Failed(String),
}

/// Which snapshot, and where.
#[derive(Clone, Debug)]
pub struct Place {
    /// Names the snapshot: a hash of all inputs.
    pub key: String,
    /// Its directory.
    pub directory: PathBuf,
    /// What its machines have in common.
    pub shape: Shape,
    /// Names what saved memory of such machines depends on besides itself: a part of the inputs.
    pub fits: String,
}

/// What a keeper keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Source {
    /// A golden snapshot, which it can make.
    Golden(Golden),
    /// The memory of a commit, which it can only load.
    Commit {
        /// What its machines are made of.
        golden: Golden,
        /// The commit's directory.
        dir: PathBuf,
    },
}

impl Source {
    /// Which snapshot, and where.
    pub fn place(&self) -> anyhow::Result<Place> {
        match self {
            Source::Golden(golden) => place(golden),
            Source::Commit { golden, dir } => {
                Ok(Place { directory: dir.clone(), ..place(golden)? })
            }
        }
    }
}

/// Finds out which snapshot these inputs make.
pub fn place(golden: &Golden) -> anyhow::Result<Place> {
    let engine = engine(golden.accel)?;
    let shape = Shape { engine, vcpus: golden.vcpus, memory: golden.memory };
    let fits = fits(golden, shape)?;
    let key = key(golden, &fits)?;
    Ok(Place { directory: golden.dir.join(&key), key, shape, fits })
}

/// Hardware where it may be and works, else software.
pub fn engine(accel: Accel) -> anyhow::Result<Engine> {
    match accel {
        Accel::Tcg => Ok(Engine::Tcg),
        Accel::Auto => Ok(if qemu::kvm().is_ok() { Engine::Kvm } else { Engine::Tcg }),
        Accel::Kvm => match qemu::kvm() {
            Ok(()) => Ok(Engine::Kvm),
            Err(why) => anyhow::bail!("KVM is demanded but not usable: {why}"),
        },
    }
}

/// A snapshot in use.
pub struct Lease {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// To be held while anything runs that was made of it: the keeper counts.
    pub held: UnixStream,
}

/// Has the snapshot: from its keeper, or from one that is started now, which loads or builds it.
pub async fn obtain(source: &Source, place: &Place) -> anyhow::Result<(Lease, GoldenReady)> {
    let began = Instant::now();
    let ready = |cached| GoldenReady {
        key: place.key.clone(),
        cached,
        elapsed_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    };
    if let Some(lease) = ask_keeper(&place.directory).await? {
        return Ok((lease, ready(true)));
    }
    let came = SystemTime::now();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&place.directory)
        .with_context(|| format!("can't make {}", place.directory.display()))?;
    let lock = tokio::time::timeout(START_DEADLINE, lock(place.directory.clone(), "lock"))
        .await
        .context("another worker still makes the golden snapshot")??;
    // Whoever had the lock before may have done the work.
    if let Some(lease) = ask_keeper(&place.directory).await? {
        return Ok((lease, ready(true)));
    }
    let failed = place.directory.join("failed");
    if let Ok(meta) = std::fs::metadata(&failed)
        && meta.modified()? >= came
    {
        anyhow::bail!("{}", std::fs::read_to_string(&failed)?);
    }
    let stored = place.directory.join("snapshot.json").exists();
    if let Err(error) = start_keeper(source, place, None).await {
        let _ = std::fs::write(&failed, format!("{error:#}"));
        return Err(error);
    }
    drop(lock);
    let lease = ask_keeper(&place.directory)
        .await?
        .context("the keeper of the golden snapshot ended as soon as it was ready")?;
    Ok((lease, ready(stored)))
}

/// Asks the keeper; `None` when there is none.
pub async fn ask_keeper(directory: &Path) -> anyhow::Result<Option<Lease>> {
    let Ok(at) = File::open(directory) else { return Ok(None) };
    // By the directory's descriptor: a socket's own path may have no more than 107 bytes.
    let path = Path::new(&sys::fd_path(&at)).join(keeper::SOCKET);
    let Ok(mut stream) = UnixStream::connect(path).await else { return Ok(None) };
    let asked = tokio::time::timeout(KEEPER_DEADLINE, async {
        stream.write_all(b"{\"op\":\"get\"}\n").await?;
        receive(&stream).await
    });
    match asked.await.context("the keeper of the golden snapshot does not answer")? {
        Ok(snapshot) => Ok(Some(Lease { snapshot, held: stream })),
        // It was about to end when we connected.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
            ) =>
        {
            Ok(None)
        }
        Err(e) => Err(e).context("the keeper of the golden snapshot gave nothing"),
    }
}

async fn receive(stream: &UnixStream) -> io::Result<Snapshot> {
    stream
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut line = [0; 64];
            let mut parts = [io::IoSliceMut::new(&mut line)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let message = rustix::net::recvmsg(stream, &mut parts, &mut control, flags)?;
            if message.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut fds: Vec<OwnedFd> = Vec::new();
            for part in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = part {
                    fds.extend(rights);
                }
            }
            match (fds.pop(), fds.pop()) {
                (Some(state), Some(memory)) => Ok(Snapshot { memory, state }),
                _ => Err(io::Error::other("no descriptors came")),
            }
        })
        .await
}

/// Takes a lock of a snapshot's directory, however long its holder needs.
pub async fn lock(directory: PathBuf, name: &'static str) -> anyhow::Result<File> {
    tokio::task::spawn_blocking(move || {
        let path = directory.join(name);
        loop {
            let file = File::options().create(true).append(true).open(&path)?;
            rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
            let ours = file.metadata()?;
            // The directory may have been removed and made anew while we waited.
            match std::fs::metadata(&path) {
                Ok(meta) if meta.ino() == ours.ino() && meta.dev() == ours.dev() => {
                    return Ok(file);
                }
                _ => std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?,
            }
        }
    })
    .await?
}

/// Starts the keeper of what was just saved; it stores it while it serves it already. Must be called
/// on the main thread.
pub async fn hand_over(source: &Source, snapshot: &Snapshot) -> anyhow::Result<()> {
    start_keeper(source, &source.place()?, Some(snapshot)).await
}

async fn start_keeper(
    source: &Source,
    place: &Place,
    given: Option<&Snapshot>,
) -> anyhow::Result<()> {
    let log = File::options().create(true).append(true).open(place.directory.join("keeper.log"))?;
    let (spec, mut tell) = io::pipe()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("keeper").stdin(spec).stdout(Stdio::piped()).stderr(log);
    let mut keep = Vec::new();
    for fd in given.into_iter().flat_map(|snapshot| [&snapshot.memory, &snapshot.state]) {
        keep.push(fd.try_clone()?);
    }
    let order = Order {
        source: source.clone(),
        given: match &keep[..] {
            [memory, state] => Some((memory.as_raw_fd(), state.as_raw_fd())),
            _ => None,
        },
    };
    sys::confine(&mut command, Confine { keep, new_session: true, ..Confine::default() });
    let mut child = Child::spawn_as_is(command).context("can't start the keeper")?;
    // Far less than a pipe holds; the keeper reads up to the end.
    io::Write::write_all(&mut tell, &lines::line(&order)?)?;
    drop(tell);
    let mut said = BufReader::new(child.stdout()?);
    let line = tokio::time::timeout(START_DEADLINE, lines::read(&mut said, KEEPER_LINE_MAX))
        .await
        .context("the keeper of the golden snapshot said nothing")??
        .with_context(|| {
            format!("the keeper died; see {}", place.directory.join("keeper.log").display())
        })?;
    match serde_json::from_slice(&line)? {
        KeeperSaid::Ready => {
            child.leave();
            Ok(())
        }
        KeeperSaid::Failed(why) => anyhow::bail!("{why}"),
    }
}

/// Hash of everything that the snapshot depends on.
fn key(golden: &Golden, fits: &str) -> anyhow::Result<String> {
    let mut hash = Inputs::default();
    hash.add("fits", fits.as_bytes());
    hash.files([&golden.harness, &golden.mcp])?;
    hash.files(&snapshot::modules(golden)?)?;
    Ok(hash.finish())
}

/// Hash of what any saved memory of such machines depends on: what took over the rest when it was
/// saved is in it.
fn fits(golden: &Golden, shape: Shape) -> anyhow::Result<String> {
    let mut hash = Inputs::default();
    hash.add("generations", format!("1 {WORKER_GENERATION} {CHANNEL_GENERATION}").as_bytes());
    hash.add("arguments", qemu::template(shape).join("\n").as_bytes());
    hash.files([&golden.qemu, &golden.kernel, &golden.base])?;
    hash.add("processor", &processor());
    // Another host may have another rate of the time stamp counter.
    hash.add("host", &std::fs::read("/etc/machine-id").unwrap_or_default());
    Ok(hash.finish())
}

#[derive(Default)]
struct Inputs(sha2::Sha256);

impl Inputs {
    fn add(&mut self, label: &str, bytes: &[u8]) {
        for part in [label.as_bytes(), bytes] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
    }

    /// Files count by name, size, time and inode: a hash of a base image's bytes would cost more than
    /// the machine.
    fn files<'a>(&mut self, paths: impl IntoIterator<Item = &'a PathBuf>) -> anyhow::Result<()> {
        for path in paths {
            let meta = std::fs::metadata(path)
                .with_context(|| format!("{} is needed for machines", path.display()))?;
            let (mtime, inode) = ((meta.mtime(), meta.mtime_nsec()), (meta.dev(), meta.ino()));
            let facts = format!("{} {mtime:?} {inode:?}", meta.len());
            self.add(&path.to_string_lossy(), facts.as_bytes());
        }
        Ok(())
    }

    fn finish(self) -> String {
        snapshot::hex(&self.0.finalize()[..16])
    }
}

/// What is constant in the description of the first processor.
fn processor() -> Vec<u8> {
    let mut text = String::new();
    if let Ok(file) = File::open("/proc/cpuinfo") {
        let _ = file.take(CPUINFO_MAX).read_to_string(&mut text);
    }
    let keep = ["vendor_id", "cpu family", "model", "stepping", "microcode", "flags"];
    let first = text.lines().take_while(|line| !line.is_empty());
    let lines = first.filter(|line| keep.iter().any(|word| line.starts_with(word)));
    lines.collect::<Vec<_>>().join("\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use aegis_wire::words::MemoryMb;

    use super::*;

    #[test]
    fn any_changed_input_makes_another_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        let modules = dir.path().join("modules");
        std::fs::create_dir(&modules).unwrap();
        let golden = Golden {
            dir: dir.path().join("golden"),
            qemu: file("qemu"),
            kernel: file("kernel"),
            modules: Some(modules.clone()),
            harness: file("harness"),
            mcp: file("mcp"),
            base: file("base"),
            vcpus: 1,
            memory: MemoryMb(256),
            accel: Accel::Tcg,
        };
        let mut keys = vec![place(&golden).unwrap().key];
        assert_eq!(keys[0], place(&golden).unwrap().key, "the same inputs, the same key");
        keys.push(place(&Golden { vcpus: 2, ..golden.clone() }).unwrap().key);
        keys.push(place(&Golden { memory: MemoryMb(512), ..golden.clone() }).unwrap().key);
        for name in ["qemu", "kernel", "harness", "mcp", "base"] {
            std::fs::write(dir.path().join(name), format!("{name} changed")).unwrap();
            keys.push(place(&golden).unwrap().key);
        }
        std::fs::write(modules.join("a.ko"), "x").unwrap();
        keys.push(place(&golden).unwrap().key);
        let all = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), all);
        std::fs::remove_file(dir.path().join("base")).unwrap();
        assert!(place(&golden).is_err());
    }
}
