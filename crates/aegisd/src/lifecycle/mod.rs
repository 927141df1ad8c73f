//! From what is wanted to what is: one driver task per instance, woken by level, not by message.
//!
//! ```text
//! ledger (wanted) ─┐
//!                  ├─▶ rules::instance::plan ─▶ one step ─▶ fact ─▶ ledger ─▶ again
//! worker (seen)  ──┘
//! ```
//! A knock carries nothing and may be lost or doubled: the driver looks for itself. A kill is just
//! another wish, but it cancels the step that runs.

mod adopt;
mod calls;
mod driver;
mod environment;
mod idle;
mod image;
mod link;
mod note;
mod pool;
mod reach;
mod remote;
mod steps;
mod sweep;
mod worker;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use aegis_rules::instance::Spec;
use aegis_wire::words::InstanceId;
use tokio::sync::{Notify, mpsc};
use tracing::Instrument as _;
use tracing::field::Empty;

use crate::ctx::{Ctx, Shared};
use crate::images::Images;
use crate::router::Router;
use pool::Pool;

/// A record that can't be read is read again after this.
const AFTER_FAILURE: std::time::Duration = std::time::Duration::from_secs(1);

pub use calls::{open_bulk, serve_calls};
pub use environment::injected;
pub use image::image;
pub use pool::has_room;
pub use remote::sweep as sweep_cloud;
pub use steps::{commit, warm};
pub use sweep::sweep;
pub use worker::{Connection, WorkerError, attach, exec, files, probe, read_line, read_raw};

/// Wakes drivers; cheap to clone.
#[derive(Clone)]
pub struct Lifecycle {
    inner: Arc<Inner>,
}

/// Who is told of each machine that came up, or was found.
pub struct Told {
    /// It may call.
    pub broker: mpsc::Sender<InstanceId>,
    /// It may knock; and when it no longer does.
    pub hatch: mpsc::Sender<Presence>,
}

/// That a machine is there, or no longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It came up, or was found.
    Came(InstanceId),
    /// It has ended.
    Left(InstanceId),
}

struct Inner {
    ctx: Shared,
    router: Router,
    pool: Pool,
    told: Told,
    drivers: Mutex<HashMap<InstanceId, Arc<Notify>>>,
}

impl Lifecycle {
    /// A lifecycle without any driver yet.
    pub fn new(ctx: Shared, router: Router, told: Told) -> Lifecycle {
        let pool = Pool::new(Arc::clone(&ctx));
        let drivers = Mutex::default();
        Lifecycle { inner: Arc::new(Inner { ctx, router, pool, told, drivers }) }
    }

    /// What everybody needs.
    pub fn ctx(&self) -> &Ctx {
        &self.inner.ctx
    }

    /// Knocks at instances that a write touched beside those that it was asked about, for ever.
    pub async fn follow(self) {
        let mut commits = self.inner.ctx.ledger.commits();
        // What was touched by a write that is not synced yet is not to be seen before the next one.
        let mut again = BTreeSet::new();
        loop {
            let fresh = self.inner.ctx.ledger.take_touched();
            for id in fresh.union(&again) {
                self.knock(id);
            }
            again = fresh;
            if commits.changed().await.is_err() {
                return;
            }
        }
    }

    /// Has the instance looked at, soon.
    pub fn knock(&self, id: &InstanceId) {
        let mut drivers = self.lock();
        if let Some(driver) = drivers.get(id) {
            driver.notify_one();
            return;
        }
        let knock = Arc::new(Notify::new());
        drivers.insert(id.clone(), Arc::clone(&knock));
        drop(drivers);
        let span = tracing::error_span!(parent: None, "driver", instance = %id, guest = Empty);
        tokio::spawn(drive(self.clone(), id.clone(), knock).instrument(span));
    }

    /// After a start: every instance that is not at rest gets its driver, what has no record is
    /// destroyed. Returns when all living machines have told their state and usage.
    pub async fn adopt(&self) -> anyhow::Result<()> {
        adopt::adopt(self).await
    }

    /// How many drivers run.
    pub fn drivers(&self) -> usize {
        self.lock().len()
    }

    /// The spare machines.
    pub fn pool(&self) -> &Pool {
        &self.inner.pool
    }

    /// Somebody will most likely want such a machine: its snapshot and a spare are made.
    pub fn expect(&self, spec: &Spec) {
        // What is missing is told to whoever launches one.
        let ctx = &self.inner.ctx;
        if let Some(image) = Images::of(&ctx.config.home).find(&spec.image) {
            self.inner.pool.wish(steps::golden(ctx, spec, &image), spec.disk);
        }
    }

    /// Ends a driver's entry unless someone knocked since it looked last.
    fn retire(&self, id: &InstanceId, knock: &Notify) -> bool {
        let mut drivers = self.lock();
        // A stored permit means a knock that was not looked at; holding the lock, no new one comes.
        let mut pending = std::pin::pin!(knock.notified());
        if pending.as_mut().enable() {
            return false;
        }
        drivers.remove(id);
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<InstanceId, Arc<Notify>>> {
        self.inner.drivers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Drives an instance, by what it is: one of this host, or one in another cloud.
async fn drive(lifecycle: Lifecycle, id: InstanceId, knock: Arc<Notify>) {
    loop {
        match lifecycle.ctx().ledger.read(|f| f.instance(&id)) {
            Ok(Some(instance)) if instance.remote.is_some() => {
                return remote::run(lifecycle, id, knock).await;
            }
            Ok(_) => return driver::run(lifecycle, id, knock).await,
            Err(error) => {
                tracing::error!(error = format!("{:#}", anyhow::Error::from(error)), "not read");
                let _ = tokio::time::timeout(AFTER_FAILURE, knock.notified()).await;
            }
        }
    }
}
