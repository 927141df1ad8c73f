//! Commits: a running machine's disk and memory as others can start from them, taken while it stands
//! still for an instant.
//!
//! ```text
//! source   disk is mirrored while it runs · stop · memory goes on its way · goes on · stop · the mirror
//!          is let go, what of the memory has changed follows · goes on
//! copy     takes the memory in, runs where nobody sees it, with no link to anything, until its
//!          harness has everything stand still; what it is then, is what is kept
//! ```
//! The copy is a QEMU of its own, whose memory lies in a file that is shared with us. So what is kept
//! has the form of a golden snapshot, and any number of machines can be cloned of it at once.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use aegis_wire::bounds::{COMMIT_DEADLINE, IDENTIFY_DEADLINE, RPC_DEADLINE};
use aegis_wire::channel::method;
use aegis_wire::pipe::session::Pipe;
use aegis_wire::worker::{Committed, From, Kept, commit};
use anyhow::Context as _;
use rustix::pipe::PipeFlags;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::cgroup::Group;
use crate::golden::{self, Place, Source};
use crate::machine::restore;
use crate::qemu::{self, Birth, MEMORY};
use crate::qmp::Qmp;
use crate::relay::{self, Relay};
use crate::snapshot::{self, Snapshot};
use crate::suspend::{self, Bed};
use crate::{disk, lines, stream, sys};

/// What lies between QEMU and the file that its memory goes to, bytes.
const PIPE_BYTES: usize = 1 << 20;
/// Names of the job, and of the disk that it writes.
const JOB: &str = "commit";
const TARGET: &str = "copy";
/// Number of the set of descriptors that QEMU opens the new disk by.
const FD_SET: u64 = 1;
/// Largest [`Kept`], bytes.
const KEPT_MAX: u64 = 4096;
/// What a failed commit leaves in the source is removed within this.
const UNDO_DEADLINE: Duration = Duration::from_secs(5);
/// How long a source that does not go on is left alone before it is told again.
const UNDO_AGAIN: Duration = Duration::from_millis(100);

/// A machine that runs, to take a commit of.
pub struct Origin<'a> {
    /// Its monitor.
    pub qmp: &'a Qmp,
    /// What it is made of.
    pub bed: &'a Bed,
    /// Its channel.
    pub relay: &'a Relay,
}

/// What was taken of it.
pub struct Taken {
    disk: File,
    /// As QEMU saves it.
    memory: Option<OwnedFd>,
    stopped: Duration,
}

/// Takes disk and memory, the disk into an empty directory. Who gives it up before it is done calls
/// [`undo`].
pub async fn take(source: &Origin<'_>, dir: &Path, memory: bool) -> anyhow::Result<Taken> {
    let disk = new_disk(&dir.join(commit::DISK), source.bed)?;
    let work = async {
        let mirror = Mirror::begin(source.qmp, &disk).await?;
        sync(source).await?;
        if memory {
            give(source, mirror).await.map(|(stopped, sent)| (stopped, Some(sent)))
        } else {
            disk_alone(source, mirror).await.map(|stopped| (stopped, None))
        }
    };
    let done = tokio::time::timeout(COMMIT_DEADLINE, work).await.unwrap_or_else(|_| {
        Err(anyhow::anyhow!("it was not there within {}s", COMMIT_DEADLINE.as_secs()))
    });
    let (stopped, memory) = done?;
    Ok(Taken { disk, memory, stopped })
}

/// Makes a commit of what was taken; the source has nothing to do with it any more. A copy runs in the
/// source's cgroup: what it takes is the source's, and ends with it.
pub async fn keep(
    bed: &Bed,
    group: &Group,
    taken: Taken,
    dir: &Path,
    durable: bool,
) -> anyhow::Result<Committed> {
    let Taken { disk, memory, stopped } = taken;
    let fits = memory.is_some().then(|| bed.fits().to_owned());
    let mut kept_bytes = 0;
    if let Some(sent) = memory {
        let usual = qemu::memory_limit(bed.shape().memory);
        let more = usual + bed.shape().memory.bytes() + qemu::beside_memory();
        if let Err(error) = group.limit_memory(more) {
            tracing::warn!(%error, "the copy shares its machine's memory limit");
        }
        let kept = copy(bed, group, sent, &disk).await;
        // What is charged now is charged; later it is the old limit again.
        let _ = group.limit_memory(usual);
        kept_bytes = store(bed, kept?, dir, durable).await?;
    }
    settle(&disk, durable)?;
    note(dir, &Kept { fits, disk_bytes: bed.disk_bytes() }, durable)?;
    Ok(Committed {
        bytes: allocated(dir)? + kept_bytes,
        stopped_us: u64::try_from(stopped.as_micros()).unwrap_or(u64::MAX),
    })
}

/// Whether a machine of this place, with a disk of this size, can start from a commit: `memory` says
/// whether it goes on from its memory now, which it does once.
pub fn fits(from: &From, memory: bool, place: &Place, disk_bytes: u64) -> anyhow::Result<()> {
    use std::io::Read as _;
    let path = from.dir.join(commit::KEPT);
    let file = File::open(&path).with_context(|| format!("there is no {}", path.display()))?;
    let mut text = Vec::new();
    file.take(KEPT_MAX).read_to_end(&mut text)?;
    let kept: Kept = serde_json::from_slice(&text).context("the commit is damaged")?;
    anyhow::ensure!(
        kept.disk_bytes == disk_bytes,
        "the commit's disk has {} bytes, this machine's {disk_bytes}",
        kept.disk_bytes,
    );
    let memory = !memory || kept.fits.as_deref() == Some(&place.fits);
    anyhow::ensure!(
        memory,
        "the commit's memory was saved by another QEMU, kernel, base image, size or processor than \
         machines have now; its disk alone still serves: start it without its memory"
    );
    Ok(())
}

/// Has what was written inside reach the disk, which then serves without the memory too.
async fn sync(source: &Origin<'_>) -> anyhow::Result<()> {
    let session = source.relay.session().await?;
    let _: Value = session.peer.call(method::SYNC, &Value::Null, RPC_DEADLINE).await?;
    Ok(())
}

/// Stops for the moment in which the mirror is let go.
async fn disk_alone(source: &Origin<'_>, mirror: Mirror<'_>) -> anyhow::Result<Duration> {
    let stopped = Instant::now();
    source.qmp.execute("stop", Value::Null).await?;
    mirror.end().await?;
    go_on(source.qmp).await?;
    Ok(stopped.elapsed())
}

/// Has a snapshot in the commit's directory when this returns, or, where it need not outlive the host,
/// have a keeper who does it meanwhile; returns how many bytes that will take.
async fn store(bed: &Bed, snapshot: Snapshot, dir: &Path, durable: bool) -> anyhow::Result<u64> {
    let began = Instant::now();
    let bytes = if durable {
        let dir = dir.to_owned();
        tokio::task::spawn_blocking(move || snapshot::store(&dir, &snapshot, true)).await??;
        // Counted with all that is there.
        0
    } else {
        let source = Source::Commit { golden: bed.golden().clone(), dir: dir.to_owned() };
        golden::hand_over(&source, &snapshot).await?;
        snapshot.allocated()?
    };
    tracing::debug!(took = ?began.elapsed(), durable, "the copy is stored");
    Ok(bytes)
}

/// Lets a machine that nobody sees go on from what was sent, until everything in it stands still.
async fn copy(bed: &Bed, group: &Group, sent: OwnedFd, disk: &File) -> anyhow::Result<Snapshot> {
    let memory = snapshot::memory_file("commit", bed.shape().memory.bytes())?;
    let cgroups = group.doors().context("can't open its cgroups")?;
    let mut copy = bed.copy(memory.try_clone()?, sent, disk.try_clone()?.into(), cgroups)?;
    let death = copy.child.death();
    let qmp = Qmp::start(copy.qmp);
    let mut pipe = Pipe::new(copy.wires.ctl);
    let began = Instant::now();
    let work = async {
        restore(&qmp, copy.state_fd, Birth::Wake, COMMIT_DEADLINE).await?;
        tracing::debug!(took = ?began.elapsed(), "the copy has the memory");
        hold(&qmp, &mut pipe).await
    };
    let saved = tokio::select! {
        saved = work => saved,
        () = death.happened() => Err(anyhow::anyhow!("the copy's QEMU ended")),
    };
    copy.child.kill();
    copy.child.wait().await?;
    let words = copy.child.last_words();
    let state = saved.map_err(|error| snapshot::with_last_words(error, &words))?;
    let snapshot = snapshot::sealed(memory, state)?;
    tracing::debug!(took = ?began.elapsed(), "the copy was saved");
    Ok(snapshot)
}

/// Saves the source's memory; returns for how long it stood still, and what was saved.
///
/// Software emulation misses a write to a page whose dirty mark is taken away in that very moment: a
/// copy would now and then end in a panic. So marks are only taken away while it stands still: as the
/// migration begins, and as it ends. No time being allowed for the end, QEMU does not do it between.
async fn give(source: &Origin<'_>, mirror: Mirror<'_>) -> anyhow::Result<(Duration, OwnedFd)> {
    let qmp = source.qmp;
    // QEMU itself may write no file larger than the machine's disk.
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES)?;
    let sent = snapshot::memory_file("sent", 0)?;
    let into = File::from(sent.try_clone()?);
    let most = 2 * source.bed.shape().memory.bytes() + suspend::BESIDE_MEMORY_MAX;
    let copying =
        tokio::task::spawn_blocking(move || stream::copy(File::from(read), into, MEMORY, most));
    let parameters = json!({"max-bandwidth": 1u64 << 40, "downtime-limit": 0});
    qmp.execute("migrate-set-parameters", parameters).await?;
    let first = Instant::now();
    qmp.execute("stop", Value::Null).await?;
    // Between the second stop and the last of the memory is where the disk belongs.
    snapshot::begin_migration(qmp, write.as_fd(), false, true).await?;
    drop(write);
    qmp.migration("active").await?;
    go_on(qmp).await?;
    let first = first.elapsed();
    qmp.migration("pre-switchover").await?;
    let second = qmp.seen().borrow().stopped_at.unwrap_or_else(Instant::now);
    mirror.end().await?;
    qmp.execute("migrate-continue", json!({"state": "pre-switchover"})).await?;
    qmp.migration("completed").await?;
    go_on(qmp).await?;
    let second = second.elapsed();
    tracing::info!(?first, ?second, "it stood still");
    copying.await.context("the copy was lost")??;
    // Opened anew, to be read from its beginning.
    Ok((first + second, File::open(sys::fd_path(&sent))?.into()))
}

/// Has everything in the copy stand still, and saves the state of its devices. What in it does not
/// answer soon has not long to run unseen.
async fn hold(qmp: &Qmp, pipe: &mut Pipe<UnixStream>) -> anyhow::Result<OwnedFd> {
    relay::one_session(pipe, IDENTIFY_DEADLINE, async |peer| {
        let _: Value = peer.call(method::HOLD, &Value::Null, RPC_DEADLINE).await?;
        Ok(())
    })
    .await?;
    tracing::debug!("the copy stands still");
    let state = snapshot::memory_file("state", 0)?;
    snapshot::migrate(qmp, state.as_fd(), true).await?;
    Ok(state)
}

async fn go_on(qmp: &Qmp) -> anyhow::Result<()> {
    // A migration is told to be complete a moment before it is; no event tells the rest.
    while qmp.execute("query-status", Value::Null).await?["status"] == "finish-migrate" {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    qmp.execute("cont", Value::Null).await?;
    Ok(())
}

/// Lets a source go on whose commit was given up, and then removes what that may have left in it; each
/// command may find nothing.
pub async fn undo(qmp: &Qmp) {
    let _ = qmp.execute("migrate_cancel", Value::Null).await;
    // Whatever else fails: it must not stand still for ever. Only its end is another way out.
    while let Err(error) = go_on(qmp).await {
        if qmp.seen().borrow().closed {
            return;
        }
        tracing::error!(error = format!("{error:#}"), "the machine does not go on yet");
        tokio::time::sleep(UNDO_AGAIN).await;
    }
    let _ = qmp.execute("block-job-cancel", json!({"device": JOB, "force": true})).await;
    let _ = tokio::time::timeout(UNDO_DEADLINE, qmp.job_gone()).await;
    let _ = qmp.execute("blockdev-del", json!({"node-name": TARGET})).await;
    let _ = qmp.execute("remove-fd", json!({"fdset-id": FD_SET})).await;
}

/// A second disk that becomes like the source's while the source runs.
struct Mirror<'a>(&'a Qmp);

impl<'a> Mirror<'a> {
    /// Completes when it is like it, but for what is written now.
    async fn begin(qmp: &'a Qmp, target: &File) -> anyhow::Result<Mirror<'a>> {
        let add = qmp.send("add-fd", json!({"fdset-id": FD_SET}), Some(target.as_fd())).await?;
        add.answer().await?;
        let node = json!({
            "driver": "raw", "node-name": TARGET, "discard": "unmap", "detect-zeroes": "unmap",
            "file": {"driver": "file", "filename": format!("/dev/fdset/{FD_SET}")},
        });
        qmp.execute("blockdev-add", node).await?;
        let job = json!({
            "job-id": JOB, "device": qemu::DISK_NODE, "target": TARGET, "sync": "full",
            // Who writes faster than the copy waits for it: else it might never be ready.
            "copy-mode": "write-blocking",
        });
        qmp.execute("blockdev-mirror", job).await?;
        qmp.job_ready().await?;
        Ok(Mirror(qmp))
    }

    /// Lets it go with what was written up to now; the source must stand still.
    async fn end(self) -> anyhow::Result<()> {
        self.0.execute("block-job-cancel", json!({"device": JOB})).await?;
        self.0.job_gone().await?;
        self.0.execute("blockdev-del", json!({"node-name": TARGET})).await?;
        self.0.execute("remove-fd", json!({"fdset-id": FD_SET})).await?;
        Ok(())
    }
}

/// An empty file for the disk, which the machine's own QEMU may write.
fn new_disk(path: &Path, bed: &Bed) -> anyhow::Result<File> {
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("can't make {}", path.display()))?;
    file.set_len(bed.disk_bytes())?;
    disk::own(&file, bed.uid())?;
    Ok(file)
}

/// From now on nobody writes it, and every machine's user may read it.
fn settle(target: &File, durable: bool) -> anyhow::Result<()> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(target, Some(0), Some(0))?;
    }
    target.set_permissions(std::fs::Permissions::from_mode(0o444))?;
    if durable {
        target.sync_all().context("the commit's disk can't be written")?;
    }
    Ok(())
}

fn note(dir: &Path, kept: &Kept, durable: bool) -> anyhow::Result<()> {
    let mut file = File::create(dir.join(commit::KEPT))?;
    file.write_all(&lines::line(kept)?)?;
    if durable {
        file.sync_all()?;
        File::open(dir)?.sync_all().context("the commit's directory can't be written")?;
    }
    Ok(())
}

fn allocated(dir: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes)
}
