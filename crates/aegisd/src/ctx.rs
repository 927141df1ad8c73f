//! What every verb of the daemon needs: settings, keys, clock, ledger, and what runs.

mod given;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use aegis_rules::instance::Instance;
use aegis_wire::words::{ImageRef, InstanceId, MemoryMb, Time, Tree, Usage};

use crate::clock::Clock;
use crate::cloud::Cloud;
use crate::commits::Commits;
use crate::config::Config;
use crate::keys::Keys;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::watch::Watch;

/// Shared by all tasks; made once by `main`.
pub struct Ctx {
    /// Settings.
    pub config: Config,
    /// Secrets.
    pub keys: Keys,
    /// The time.
    pub clock: Clock,
    /// The memory.
    pub ledger: Ledger,
    /// The account in another cloud, if there is one.
    pub cloud: Option<Cloud>,
    /// Follows directories.
    pub watch: Watch,
    /// What is kept of machines.
    pub commits: Commits,
    /// Which sizes of machines trees have asked for.
    pub sizes: Sizes,
    /// Usage of running machines that is newer than the ledger's.
    pub meters: Meters,
    /// What was done since the start.
    pub metrics: Metrics,
}

/// Every task's handle on the context.
pub type Shared = Arc<Ctx>;

impl Ctx {
    /// The time now.
    pub fn now(&self) -> Time {
        self.clock.now()
    }

    /// A machine's run directory.
    pub fn run_dir(&self, id: &InstanceId) -> PathBuf {
        self.config.home.join("run").join(id.as_str())
    }

    /// What is kept of an instance while it has a record: its disk and its logs.
    pub fn instance_dir(&self, id: &InstanceId) -> PathBuf {
        self.config.home.join("instances").join(id.as_str())
    }

    /// An instance's own disk: there from its first start until it is gone.
    pub fn disk(&self, id: &InstanceId) -> PathBuf {
        self.instance_dir(id).join("disk.img")
    }
}

/// A size of machine, as far as a snapshot goes.
pub type Size = (ImageRef, u32, MemoryMb);

/// Which sizes of machines trees have asked for since this daemon started.
#[derive(Default)]
pub struct Sizes {
    trees: Mutex<HashMap<Tree, HashSet<Size>>>,
}

/// Trees whose sizes are remembered; when there are more, all begin anew.
const TREES_MAX: usize = 4096;

impl Sizes {
    /// Whether a tree may have a machine of this size, with at most so many different ones.
    pub fn admit(&self, tree: &Tree, size: Size, most: usize) -> bool {
        let mut trees = self.trees.lock().unwrap_or_else(PoisonError::into_inner);
        if trees.len() >= TREES_MAX && !trees.contains_key(tree) {
            trees.clear();
        }
        let sizes = trees.entry(tree.clone()).or_default();
        sizes.contains(&size) || (sizes.len() < most && sizes.insert(size))
    }
}

/// The latest sample of each running machine's boot, and what it was seen doing.
#[derive(Default)]
pub struct Meters {
    live: Mutex<HashMap<InstanceId, Usage>>,
    used: Mutex<HashMap<InstanceId, Used>>,
}

/// When somebody last did something with a machine, and how many are at it.
#[derive(Clone, Copy)]
struct Used {
    at: Time,
    users: u64,
}

/// Somebody uses a machine until this is dropped.
pub struct InUse {
    ctx: Shared,
    id: InstanceId,
}

impl InUse {
    /// From now on.
    pub fn begin(ctx: &Shared, id: &InstanceId) -> InUse {
        ctx.meters.count(id, ctx.now(), 1);
        InUse { ctx: Arc::clone(ctx), id: id.clone() }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.ctx.meters.count(&self.id, self.ctx.now(), -1);
    }
}

impl Meters {
    /// Notes a sample; counts never go down.
    pub fn note(&self, id: &InstanceId, usage: Usage) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = live.entry(id.clone()).or_default();
        *slot = slot.at_least(usage);
    }

    /// The latest sample of this boot.
    pub fn get(&self, id: &InstanceId) -> Usage {
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .copied()
            .unwrap_or_default()
    }

    /// Lays what is newer than the ledger over records of it.
    pub fn overlay(&self, instances: &mut [Instance]) {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        for instance in instances {
            if let Some(newer) = live.get(&instance.id) {
                instance.usage_boot = instance.usage_boot.at_least(*newer);
            }
        }
    }

    /// The boot is over, and recorded.
    pub fn forget(&self, id: &InstanceId) {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        let mut used = self.used();
        if used.get(id).is_some_and(|u| u.users == 0) {
            used.remove(id);
        }
    }

    /// Notes that somebody did something with a machine.
    pub fn touch(&self, id: &InstanceId, now: Time) {
        self.count(id, now, 0);
    }

    fn count(&self, id: &InstanceId, now: Time, more: i64) {
        let mut used = self.used();
        let slot = used.entry(id.clone()).or_insert(Used { at: now, users: 0 });
        slot.at = slot.at.max(now);
        slot.users = slot.users.saturating_add_signed(more);
    }

    /// When somebody last did something with a machine.
    pub fn used_at(&self, id: &InstanceId) -> Option<Time> {
        self.used().get(id).map(|u| u.at)
    }

    /// How many are at it now.
    pub fn users(&self, id: &InstanceId) -> u64 {
        self.used().get(id).map_or(0, |u| u.users)
    }

    fn used(&self) -> std::sync::MutexGuard<'_, HashMap<InstanceId, Used>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_some_sizes_again_and_again() {
        let sizes = Sizes::default();
        let tree = |id: &str| Tree::Instance(id.parse().unwrap());
        let a = tree("inst-01ARZ3NDEKTSV4RRFFQ69G5FAV");
        let b = tree("inst-01ARZ3NDEKTSV4RRFFQ69G5FAW");
        let size = |mb| ("base".parse().unwrap(), 1, MemoryMb(mb));
        assert!((0..3).all(|n| sizes.admit(&a, size(128 + n), 3)));
        assert!(!sizes.admit(&a, size(200), 3) && sizes.admit(&b, size(200), 3));
        assert!((0..3).all(|n| sizes.admit(&a, size(128 + n), 3)), "known ones stay");
    }
}
