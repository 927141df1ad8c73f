//! Spare machines: clones that were started, and rehearsed what every machine does first, before
//! anybody asked for one. A launch that finds one of its kind only gives it an identity.
//!
//! ```text
//! wish ──▶ Prepare ──▶ warm ──▶ spare ──▶ run/SPARE renamed to run/INSTANCE ──▶ Launch
//!                                  └──▶ not needed: reaped
//! ```
//! No record bears a spare's id, and it ends with its connection: whatever happens to this daemon,
//! a spare is a machine without a record, which adoption destroys. A launch that finds none, or one
//! that fails in its hand, is a launch like any other. Spares are made while nobody waits for a
//! machine, for the shapes that were asked for last.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aegis_wire::bounds::WORKER_GENERATION;
use aegis_wire::words::{DiskBytes, InstanceId};
use aegis_wire::worker::{Event, Golden, Launch, MachineState, Request, Spare};
use futures_util::FutureExt as _;
use tokio::io::AsyncBufReadExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use super::steps;
use super::worker::{self, Connection, WorkerError};
use crate::ctx::{Ctx, Shared};
use crate::keys;

/// Shapes that have spares at a time; the one that was asked for longest ago loses its own.
const SHAPES_MAX: usize = 2;
/// A launch waits so long for a spare that is on its way: its own way would take as long.
const WARMING_DEADLINE: Duration = Duration::from_millis(300);
/// Machines that are born at a time, per CPU, and at least: one more would make all of them late, and
/// the first ones too late.
const BIRTHS_PER_CPU: usize = 2;
const BIRTHS_MIN: usize = 4;
/// The host keeps so many times a spare's memory free, for those who are somebody's.
const HEADROOM: u64 = 4;

/// The spares of this host. Cheap to clone.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    ctx: Shared,
    births: AtomicUsize,
    turns: Arc<Semaphore>,
    shelves: Mutex<Vec<Shelf>>,
}

/// The spares of one shape.
struct Shelf {
    golden: Golden,
    disk: DiskBytes,
    /// What lay at the golden's paths when its spares were made.
    stamp: Vec<Option<Stamp>>,
    slots: Vec<Slot>,
}

/// Tells a file from one that took its place.
type Stamp = (u64, u64, u64, i64, i64);

/// One spare, ready or on its way.
struct Slot {
    id: InstanceId,
    work: JoinHandle<Option<Connection>>,
}

/// A machine is being born, or waits for its turn; while one is, no spare is begun.
pub(super) struct Birth {
    pool: Pool,
    turn: Option<OwnedSemaphorePermit>,
}

impl Birth {
    /// Waits for its turn: who comes first is born first.
    pub(super) async fn turn(&mut self) {
        // The semaphore is never closed.
        self.turn = Arc::clone(&self.pool.inner.turns).acquire_owned().await.ok();
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        self.turn = None;
        if self.pool.inner.births.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.pool.fill();
        }
    }
}

impl Pool {
    /// An empty pool.
    pub(super) fn new(ctx: Shared) -> Pool {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let turns = Arc::new(Semaphore::new(BIRTHS_MIN.max(BIRTHS_PER_CPU * cpus)));
        let births = AtomicUsize::new(0);
        let inner = Inner { ctx, births, turns, shelves: Mutex::default() };
        Pool { inner: Arc::new(inner) }
    }

    /// How many spares wait for a launch.
    pub fn ready(&self) -> usize {
        self.shelves().iter().flat_map(|s| &s.slots).filter(|s| s.work.is_finished()).count()
    }

    /// Somebody is being born.
    pub(super) fn birth(&self) -> Birth {
        self.inner.births.fetch_add(1, Ordering::AcqRel);
        Birth { pool: self.clone(), turn: None }
    }

    /// Has spares made for a shape, once nobody is being born.
    pub(super) fn wish(&self, golden: Golden, disk: DiskBytes) {
        if self.inner.ctx.config.machines.spares == 0 {
            return;
        }
        let stamp =
            [&golden.qemu, &golden.kernel, &golden.harness, &golden.mcp, &golden.base].map(stamp);
        let given_up = {
            let mut shelves = self.shelves();
            let known = shelves.iter().position(|s| s.golden == golden && s.disk == disk);
            let known = known.map(|at| shelves.remove(at));
            // Spares of an image that was replaced are of no use.
            let (shelf, stale) = match known {
                Some(shelf) if shelf.stamp == stamp => (shelf, None),
                stale => (Shelf { golden, disk, stamp: stamp.into(), slots: Vec::new() }, stale),
            };
            shelves.insert(0, shelf);
            let kept = shelves.len().min(SHAPES_MAX);
            let mut given_up = shelves.split_off(kept);
            given_up.extend(stale);
            given_up
        };
        for slot in given_up.into_iter().flat_map(|s| s.slots) {
            tokio::spawn(discard(Arc::clone(&self.inner.ctx), slot));
        }
        self.fill();
    }

    /// Launches an instance on a spare, if there is one of its kind; what follows on the connection
    /// is its watch.
    pub(super) async fn launch(&self, launch: &Launch) -> Option<Connection> {
        let mut slot = {
            let mut shelves = self.shelves();
            let fits = |s: &&mut Shelf| s.golden == launch.golden && s.disk == launch.disk.bytes;
            let shelf = shelves.iter_mut().find(fits)?;
            let ready = shelf.slots.iter().position(|s| s.work.is_finished()).unwrap_or(0);
            (!shelf.slots.is_empty()).then(|| shelf.slots.swap_remove(ready))?
        };
        let ctx = &self.inner.ctx;
        match tokio::time::timeout(WARMING_DEADLINE, &mut slot.work).await {
            Ok(Ok(Some(connection))) => match claim(ctx, &slot.id, connection, launch).await {
                Ok(connection) => return Some(connection),
                Err(error) => tracing::warn!(spare = %slot.id, %error, "a spare failed"),
            },
            Ok(_) => {}
            Err(_) => slot.work.abort(),
        }
        let ctx = Arc::clone(ctx);
        tokio::spawn(async move { steps::reap_stray(&ctx, &slot.id, false).await });
        None
    }

    /// Gives up all spares; completes when they are gone.
    pub async fn close(&self) {
        let shelves = std::mem::take(&mut *self.shelves());
        let ends = shelves.into_iter().flat_map(|s| s.slots);
        let ctx = &self.inner.ctx;
        futures_util::future::join_all(ends.map(|slot| discard(Arc::clone(ctx), slot))).await;
    }

    /// Begins what is missing, unless somebody is being born.
    fn fill(&self) {
        if self.inner.births.load(Ordering::Acquire) > 0 {
            return;
        }
        let ctx = &self.inner.ctx;
        for shelf in self.shelves().iter_mut() {
            while shelf.slots.len() < ctx.config.machines.spares {
                if !has_room(shelf.golden.memory.bytes().saturating_mul(HEADROOM)) {
                    tracing::info!("no spare machine is made: the host is short of memory");
                    return;
                }
                let Ok(id) = keys::instance_id(ctx.now()) else { return };
                let spare = Spare {
                    generation: WORKER_GENERATION,
                    id: id.clone(),
                    golden: shelf.golden.clone(),
                    disk_bytes: shelf.disk,
                    cgroup: steps::cgroup(ctx, id.as_str()),
                    require_limits: ctx.config.machines.require_limits,
                };
                let work = tokio::spawn(make(Arc::clone(ctx), spare));
                shelf.slots.push(Slot { id, work });
            }
        }
    }

    fn shelves(&self) -> MutexGuard<'_, Vec<Shelf>> {
        self.inner.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes one spare. One that can't be made is tried again after the next birth.
async fn make(ctx: Shared, spare: Spare) -> Option<Connection> {
    let id = spare.id.clone();
    let work = async {
        worker::start(&ctx, &id).map_err(WorkerError::Gone)?;
        let mut connection = worker::say(&ctx, &id, &Request::Prepare(Box::new(spare))).await?;
        loop {
            match worker::read_line(&mut connection).await.map_err(WorkerError::Gone)? {
                Some(Event::State(MachineState::Spare)) => return Ok(connection),
                Some(Event::State(MachineState::Ended(ended))) => {
                    return Err(WorkerError::Program(ended.message));
                }
                Some(_) => {}
                None => return Err(WorkerError::Gone(std::io::ErrorKind::UnexpectedEof.into())),
            }
        }
    };
    match work.await {
        Ok(connection) => Some(connection),
        Err(error) => {
            tracing::warn!(spare = %id, %error, "a spare machine could not be made");
            None
        }
    }
}

/// Gives a spare its instance: from the rename on it is that instance's machine, found and reaped
/// by its id.
async fn claim(
    ctx: &Ctx,
    spare: &InstanceId,
    mut connection: Connection,
    launch: &Launch,
) -> Result<Connection, WorkerError> {
    // A spare says nothing after it was ready, but that it ended.
    if connection.fill_buf().now_or_never().is_some() {
        return Err(WorkerError::Gone(std::io::ErrorKind::BrokenPipe.into()));
    }
    std::fs::rename(ctx.run_dir(spare), ctx.run_dir(&launch.instance_id))
        .map_err(WorkerError::Gone)?;
    worker::say_more(&mut connection, launch).await?;
    Ok(connection)
}

async fn discard(ctx: Shared, slot: Slot) {
    slot.work.abort();
    // Its connection is closed only when nothing of it runs any more.
    let _ = slot.work.await;
    steps::reap_stray(&ctx, &slot.id, false).await;
}

fn stamp(path: &PathBuf) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
}

/// Whether the host has so much memory to spare.
pub fn has_room(bytes: u64) -> bool {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return false };
    available(&text).is_some_and(|free| free >= bytes)
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kb: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kb.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_replaced_file_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, next) = (dir.path().join("base"), dir.path().join("next"));
        assert_eq!(super::stamp(&path), None);
        std::fs::write(&path, b"one").unwrap();
        let first = super::stamp(&path);
        assert!(first.is_some() && super::stamp(&path) == first);
        std::fs::write(&next, b"two").unwrap();
        std::fs::rename(&next, &path).unwrap();
        assert_ne!(super::stamp(&path), first);
    }

    #[test]
    fn free_memory_is_read() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(super::available(text), Some(23_000_000 * 1024));
        assert_eq!(super::available("MemTotal: 1 kB\n"), None);
    }
}
