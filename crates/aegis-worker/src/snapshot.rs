//! A golden snapshot: how it is made (a machine is booted once and saved), stored and loaded.
//!
//! Memory lies in a memfd that is sealed against every change: a clone whose guest could punch
//! holes into it would corrupt all its siblings. The saved device state lies in one too.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aegis_wire::bounds::{GOLDEN_DEADLINE, RPC_DEADLINE};
use aegis_wire::channel::{Health, method};
use aegis_wire::pipe::session::Pipe;
use aegis_wire::worker::Golden;
use anyhow::Context as _;
use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::Digest as _;

use crate::qemu::{self, Birth, Cage, Engine, Parts, Shape};
use crate::qmp::Qmp;
use crate::{cpio, relay, sys};

/// Size of the disk that a golden machine has in place of a real one, bytes.
pub const PLACEHOLDER_DISK: u64 = 1 << 20;
/// Largest device state that is loaded from a file, bytes.
const STATE_MAX: u64 = 64 << 20;
/// How long the time stamp counter is compared with the clock.
const TSC_MEASURE: Duration = Duration::from_millis(100);
/// Granularity of holes.
const PAGE: usize = 4096;

/// A snapshot, sealed.
///
/// A seal does not keep holes: a clone that touches a page for which golden memory has none makes
/// the kernel put a page of zeros there, even where the clone writes a copy of its own. So golden
/// memory grows with what its clones touch, at most to the machine's size; [`Snapshot::refresh`]
/// makes it small again.
pub struct Snapshot {
    /// The machine's memory.
    pub memory: OwnedFd,
    /// The state of its devices.
    pub state: OwnedFd,
}

impl Snapshot {
    /// Bytes that its memory takes on the host.
    pub fn allocated(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(File::from(self.memory.try_clone()?).metadata()?.blocks() * 512)
    }

    /// The same snapshot, without the pages of zeros.
    pub fn refresh(&self) -> anyhow::Result<Snapshot> {
        let old = File::open(sys::fd_path(&self.memory))?;
        let new = File::from(memory_file("golden", old.metadata()?.len())?);
        copy_sparse(&old, &new)?;
        let memory = OwnedFd::from(new);
        seal(&memory)?;
        Ok(Snapshot { memory, state: self.state.try_clone()? })
    }
}

/// Says that the files beside it are whole.
#[derive(Serialize, Deserialize)]
struct Manifest {
    memory_bytes: u64,
    state_bytes: u64,
    state_sha256: String,
}

const MANIFEST: &str = "snapshot.json";
const MEMORY: &str = "mem";
const STATE: &str = "state";
/// What a stored snapshot consists of; it is none without the first.
pub const FILES: [&str; 3] = [MANIFEST, MEMORY, STATE];

/// Boots a machine of this shape, lets its harness come up and quiesce, and saves it. A boot that
/// does not get there is tried once more.
pub async fn build(golden: &Golden, shape: Shape, name: &str) -> anyhow::Result<Snapshot> {
    let tsc_khz = match shape.engine {
        Engine::Tcg => Some(tsc_khz()),
        Engine::Kvm => None,
    };
    let initrd = cpio::initramfs(&golden.harness, &golden.mcp, &modules(golden)?)?;
    let mut last = None;
    for attempt in 1..=2 {
        let boot = boot_and_save(golden, shape, tsc_khz, &initrd, name);
        let outcome = tokio::time::timeout(GOLDEN_DEADLINE, boot).await.unwrap_or_else(|_| {
            Err(anyhow::anyhow!("it did not get there within {}s", GOLDEN_DEADLINE.as_secs()))
        });
        match outcome {
            Ok(snapshot) => return Ok(snapshot),
            Err(error) => {
                tracing::warn!(attempt, error = format!("{error:#}"), "the golden machine failed");
                last = Some(error);
            }
        }
    }
    Err(last
        .unwrap_or_else(|| anyhow::anyhow!("it was never tried"))
        .context("the golden machine can't be made"))
}

/// Kernel modules of a golden machine, in the order of their names.
pub fn modules(golden: &Golden) -> anyhow::Result<Vec<PathBuf>> {
    let Some(directory) = &golden.modules else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    let entries = std::fs::read_dir(directory)
        .with_context(|| format!("can't read the modules in {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "ko") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// A disk in memory, for a machine that never gets a real one.
pub fn placeholder_disk() -> anyhow::Result<OwnedFd> {
    memory_file("disk", PLACEHOLDER_DISK)
}

/// Opens a file for a machine's QEMU, which opens it once more as a user of its own.
pub fn open_shared(path: &Path) -> anyhow::Result<OwnedFd> {
    let file = File::open(path).with_context(|| format!("can't open {}", path.display()))?;
    let mode = file.metadata()?.permissions().mode();
    anyhow::ensure!(
        !rustix::process::geteuid().is_root() || mode & 0o004 != 0,
        "{0} can't be read by the machines' own users: chmod 0644 {0}",
        path.display(),
    );
    Ok(file.into())
}

async fn boot_and_save(
    golden: &Golden,
    shape: Shape,
    tsc_khz: Option<u64>,
    initrd: &[u8],
    name: &str,
) -> anyhow::Result<Snapshot> {
    let memory = memory_file("golden", shape.memory.bytes())?;
    let initrd_file = File::from(memory_file("initrd", initrd.len() as u64)?);
    initrd_file.write_all_at(initrd, 0)?;
    let parts = Parts {
        memory: memory.try_clone()?,
        base: open_shared(&golden.base)?,
        disk: placeholder_disk()?,
        under: None,
        kernel: open_shared(&golden.kernel)?,
        initrd: Some(initrd_file.into()),
        state: None,
    };
    let cage = Cage { uid: qemu::own_uid(name), ..Cage::default() };
    let mut vmm = qemu::start(&golden.qemu, shape, Birth::Golden { tsc_khz }, parts, cage)?;
    let qmp = Qmp::start(vmm.qmp);
    let mut pipe = Pipe::new(vmm.wires.ctl);
    let death = vmm.child.death();
    let work = async {
        qmp.execute("qmp_capabilities", Value::Null).await?;
        relay::one_session(&mut pipe, GOLDEN_DEADLINE, async |peer| {
            let _: Health = peer.call(method::HEALTH, &Value::Null, RPC_DEADLINE).await?;
            // Warms caches: on a slow host longer than an ordinary call.
            let _: Value = peer.call(method::QUIESCE, &Value::Null, GOLDEN_DEADLINE).await?;
            Ok(())
        })
        .await?;
        let state = memory_file("state", 0)?;
        migrate(&qmp, state.as_fd(), true).await?;
        Ok(state)
    };
    let saved = tokio::select! {
        saved = work => saved,
        () = death.happened() => Err(anyhow::anyhow!("QEMU ended")),
    };
    let state = saved.map_err(|error| with_last_words(error, &vmm.child.last_words()))?;
    // A mapping that can write forbids the seal: the process must be gone first.
    vmm.child.kill();
    vmm.child.wait().await?;
    sealed(memory, state)
}

/// Adds what QEMU said last to an error.
pub fn with_last_words(error: anyhow::Error, words: &str) -> anyhow::Error {
    if words.is_empty() { error } else { error.context(format!("QEMU said: {words}")) }
}

/// Saves the machine to a file or a pipe; without the memory where that is `shared` with us
/// already. A machine that runs goes on meanwhile and is stopped at the end; it does again what it
/// did when it was saved, run or stand still, where it is taken over.
pub async fn migrate(qmp: &Qmp, to: BorrowedFd<'_>, shared: bool) -> anyhow::Result<()> {
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 1u64 << 40})).await?;
    begin_migration(qmp, to, shared, false).await?;
    qmp.migration("completed").await
}

/// Begins to save the machine; with `pauses` it waits where it has stopped, to be told to continue.
pub async fn begin_migration(
    qmp: &Qmp,
    to: BorrowedFd<'_>,
    shared: bool,
    pauses: bool,
) -> anyhow::Result<()> {
    let capabilities = json!({"capabilities": [
        {"capability": "x-ignore-shared", "state": shared},
        {"capability": "events", "state": true},
        {"capability": "pause-before-switchover", "state": pauses},
    ]});
    qmp.execute("migrate-set-capabilities", capabilities).await?;
    qmp.send("getfd", json!({"fdname": "state"}), Some(to)).await?.answer().await?;
    // What was said of an earlier one does not count.
    qmp.forget_migration();
    qmp.execute("migrate", json!({"uri": "fd:state"})).await?;
    Ok(())
}

/// Memory of its own, empty.
pub fn memory_file(name: &str, bytes: u64) -> anyhow::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create(name, flags).context("can't make a memfd")?);
    file.set_len(bytes)?;
    // QEMU opens it anew, for writing, as a user of its own; the seal protects it, not the mode.
    file.set_permissions(std::fs::Permissions::from_mode(0o666))?;
    Ok(file.into())
}

/// Forbids every change, for ever and for everybody.
fn seal(fd: &OwnedFd) -> anyhow::Result<()> {
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(fd, seals).context("can't seal the golden memory")
}

/// A snapshot of memory that nobody writes any more.
pub fn sealed(memory: OwnedFd, state: OwnedFd) -> anyhow::Result<Snapshot> {
    seal(&memory)?;
    seal(&state)?;
    Ok(Snapshot { memory, state })
}

/// The rate of this host's time stamp counter, which software emulation shows to machines.
fn tsc_khz() -> u64 {
    let clock = || {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    };
    let (clock_then, count_then) = (clock(), sys::time_stamp_counter());
    std::thread::sleep(TSC_MEASURE);
    let (clock_now, count_now) = (clock(), sys::time_stamp_counter());
    let (ns, ticks) = (clock_now - clock_then, count_now - count_then);
    (u128::from(ticks) * 1_000_000 / u128::from(ns.max(1))) as u64
}

/// Writes a snapshot to files, so that the next keeper needs no boot. The manifest comes last; with
/// `durable` it is all on the disk then.
pub fn store(directory: &Path, snapshot: &Snapshot, durable: bool) -> anyhow::Result<()> {
    let memory = File::from(snapshot.memory.try_clone()?);
    let state = read_whole(&snapshot.state)?;
    let put = |name: &str, fill: &mut dyn FnMut(&File) -> io::Result<()>| -> anyhow::Result<()> {
        let temporary = directory.join(format!("{name}.new"));
        let file = File::create(&temporary)?;
        fill(&file)?;
        if durable {
            file.sync_all()?;
        }
        std::fs::rename(&temporary, directory.join(name))?;
        Ok(())
    };
    let memory_bytes = memory.metadata()?.len();
    put(MEMORY, &mut |file| copy_sparse(&memory, file))?;
    put(STATE, &mut |file| file.write_all_at(&state, 0))?;
    let manifest = Manifest {
        memory_bytes,
        state_bytes: state.len() as u64,
        state_sha256: hex(&sha2::Sha256::digest(&state)),
    };
    let text = serde_json::to_vec(&manifest)?;
    put(MANIFEST, &mut |file| file.write_all_at(&text, 0))?;
    if durable {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

/// Loads a snapshot from its files; `None` when there is no whole one.
pub fn load(directory: &Path, shape: Shape) -> anyhow::Result<Option<Snapshot>> {
    let text = match std::fs::read(directory.join(MANIFEST)) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else { return Ok(None) };
    let (memory, state) =
        match (File::open(directory.join(MEMORY)), File::open(directory.join(STATE))) {
            (Ok(memory), Ok(state)) => (memory, state),
            _ => return Ok(None),
        };
    let mut bytes = Vec::new();
    state.take(STATE_MAX).read_to_end(&mut bytes)?;
    let whole = memory.metadata()?.len() == shape.memory.bytes()
        && manifest.memory_bytes == shape.memory.bytes()
        && manifest.state_bytes == bytes.len() as u64
        && manifest.state_sha256 == hex(&sha2::Sha256::digest(&bytes));
    if !whole {
        return Ok(None);
    }
    let into = File::from(memory_file("golden", manifest.memory_bytes)?);
    copy_sparse(&memory, &into)?;
    let state = File::from(memory_file("state", 0)?);
    state.write_all_at(&bytes, 0)?;
    sealed(into.into(), state.into()).map(Some)
}

/// Copies what is not zero, and leaves holes for what is.
fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut from = from;
    let mut chunk = vec![0; 256 * PAGE];
    let mut at = 0;
    while at < length {
        at = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
            Ok(at) => at,
            // Nothing but a hole up to the end.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(at))?.min(length);
        from.seek(SeekFrom::Start(at))?;
        while at < end {
            let want = chunk.len().min((end - at) as usize);
            from.read_exact(&mut chunk[..want])?;
            write_pages(to, &chunk[..want], at)?;
            at += want as u64;
        }
    }
    Ok(())
}

/// Writes runs of pages that are not all zero.
fn write_pages(to: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let mut run = 0..0;
    let flush = |run: &std::ops::Range<usize>| match run.is_empty() {
        true => Ok(()),
        false => to.write_all_at(&bytes[run.clone()], at + run.start as u64),
    };
    for start in (0..bytes.len()).step_by(PAGE) {
        let end = bytes.len().min(start + PAGE);
        if bytes[start..end].iter().all(|b| *b == 0) {
            flush(&run)?;
            run = end..end;
        } else {
            run.end = end;
        }
    }
    flush(&run)
}

fn read_whole(fd: &OwnedFd) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(sys::fd_path(fd))?.take(STATE_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use aegis_wire::words::MemoryMb;

    use super::*;

    #[test]
    fn snapshots_survive_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape { engine: Engine::Tcg, vcpus: 1, memory: MemoryMb(8) };
        assert!(load(dir.path(), shape).unwrap().is_none());
        let memory = File::from(memory_file("m", shape.memory.bytes()).unwrap());
        memory.write_all_at(b"first", 0).unwrap();
        memory.write_all_at(&[0; 3 * PAGE], 1 << 20).unwrap();
        memory.write_all_at(b"last", (8 << 20) - 4).unwrap();
        let state = File::from(memory_file("s", 0).unwrap());
        state.write_all_at(b"state of devices", 0).unwrap();
        let made = sealed(memory.into(), state.into()).unwrap();
        assert!(File::from(made.memory.try_clone().unwrap()).write_all_at(b"x", 0).is_err());
        store(dir.path(), &made, true).unwrap();
        let blocks = std::fs::metadata(dir.path().join(MEMORY)).unwrap().blocks();
        assert!(blocks * 512 <= 64 * 1024, "zero pages are holes");
        let loaded = load(dir.path(), shape).unwrap().unwrap();
        assert!(made.refresh().unwrap().allocated().unwrap() < made.allocated().unwrap());
        let whole = |s: &Snapshot| std::fs::read(sys::fd_path(&s.memory)).unwrap();
        assert_eq!(whole(&loaded), whole(&made));
        assert_eq!(read_whole(&loaded.state).unwrap(), b"state of devices");
        std::fs::write(dir.path().join(STATE), b"state of evil").unwrap();
        assert!(load(dir.path(), shape).unwrap().is_none(), "a changed state is none");
    }

    #[test]
    fn the_counter_has_a_rate() {
        assert!((100_000..20_000_000).contains(&tsc_khz()));
    }
}
