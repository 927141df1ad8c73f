//! What the double remembers: machines, commits, tags. All in memory, all gone with it.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aegis_wire::vers::{CommitInfo, Vm, VmMetadata, VmState};
use aegis_wire::words::{Time, Uuid};

use crate::exec::Ran;
use crate::faults::Faults;

/// One machine.
pub(crate) struct Machine {
    pub(crate) vm: Uuid,
    pub(crate) owner: String,
    pub(crate) created_at: String,
    /// As it was set last; see [`Machine::state`].
    pub(crate) set: VmState,
    pub(crate) born: Instant,
    pub(crate) boot: Duration,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) parent: Option<Uuid>,
    pub(crate) disk_mib: u32,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    pub(crate) execs: Vec<Ran>,
}

/// A tag of the organisation.
pub(crate) struct Tag {
    pub(crate) id: Uuid,
    pub(crate) commit: Uuid,
    pub(crate) description: Option<String>,
    pub(crate) created_at: String,
    pub(crate) updated_at: String,
}

/// Everything.
pub(crate) struct World {
    pub(crate) owner: String,
    pub(crate) boot: Duration,
    pub(crate) machines: Vec<Machine>,
    pub(crate) commits: Vec<CommitInfo>,
    pub(crate) tags: BTreeMap<String, Tag>,
    pub(crate) faults: Faults,
    /// Creates that were asked for, whatever came of them.
    pub(crate) creates: u64,
    /// Machines that were made.
    pub(crate) made: u64,
    /// Machines that were deleted.
    pub(crate) deleted: u64,
}

impl World {
    pub(crate) fn new(owner: &Uuid, golden: Uuid, boot: Duration, faults: Faults) -> World {
        let mut world = World {
            owner: owner.to_string(),
            boot,
            machines: vec![],
            commits: vec![],
            tags: BTreeMap::new(),
            faults,
            creates: 0,
            made: 0,
            deleted: 0,
        };
        world.add_commit(golden, "golden".to_owned(), None, None, None);
        world
    }

    pub(crate) fn add_commit(
        &mut self,
        commit_id: Uuid,
        name: String,
        description: Option<String>,
        parent_vm_id: Option<Uuid>,
        grandparent_commit_id: Option<Uuid>,
    ) {
        self.commits.push(CommitInfo {
            commit_id,
            owner_id: self.owner.clone(),
            name,
            description,
            is_public: false,
            created_at: now(),
            parent_vm_id,
            grandparent_commit_id,
        });
    }

    /// Makes a machine; `parent` is the commit that it comes from.
    pub(crate) fn make(
        &mut self,
        owner: String,
        parent: Option<Uuid>,
        labels: BTreeMap<String, String>,
    ) -> io::Result<Uuid> {
        let vm = uuid()?;
        self.made += 1;
        self.machines.push(Machine {
            vm: vm.clone(),
            owner,
            created_at: now(),
            set: VmState::Running,
            born: Instant::now(),
            boot: self.boot,
            labels,
            parent,
            disk_mib: 1024,
            files: BTreeMap::new(),
            execs: vec![],
        });
        Ok(vm)
    }

    /// One of the asker's own.
    pub(crate) fn own(&mut self, vm: &Uuid) -> Option<&mut Machine> {
        let owner = self.owner.clone();
        self.machines.iter_mut().find(|m| m.vm == *vm && m.owner == owner)
    }

    /// How a machine is now.
    pub(crate) fn state(&self, machine: &Machine) -> VmState {
        let age = machine.born.elapsed();
        let dies = Duration::from_millis(self.faults.dead_after_ms);
        match machine.set {
            VmState::Running if age < machine.boot => VmState::Booting,
            VmState::Running if !dies.is_zero() && age >= machine.boot + dies => VmState::Dead,
            set => set,
        }
    }

    pub(crate) fn vm(&self, machine: &Machine) -> Vm {
        Vm {
            vm_id: machine.vm.clone(),
            owner_id: machine.owner.clone(),
            created_at: machine.created_at.clone(),
            state: self.state(machine),
            labels: machine.labels.clone(),
        }
    }

    pub(crate) fn metadata(&self, machine: &Machine) -> VmMetadata {
        let of = |commit: &Uuid| self.commits.iter().find(|c| c.commit_id == *commit);
        VmMetadata {
            vm_id: machine.vm.clone(),
            owner_id: machine.owner.clone(),
            created_at: machine.created_at.clone(),
            deleted_at: None,
            state: self.state(machine),
            ip: "fd00::1".to_owned(),
            parent_commit_id: machine.parent.clone(),
            grandparent_vm_id: machine.parent.as_ref().and_then(|c| of(c)?.parent_vm_id.clone()),
        }
    }

    /// As many of others as the faults ask for.
    pub(crate) fn bring_foreign(&mut self) -> io::Result<()> {
        let there = self.machines.iter().filter(|m| m.owner != self.owner).count();
        for _ in there..self.faults.foreign as usize {
            let golden = self.commits.first().map(|c| c.commit_id.clone());
            let labels = BTreeMap::from([("team".to_owned(), "another".to_owned())]);
            self.make(uuid()?.to_string(), golden, labels)?;
        }
        Ok(())
    }
}

/// The time now, as the cloud writes it.
pub(crate) fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(i64::try_from(since.as_millis()).unwrap_or(i64::MAX)).to_string()
}

pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

pub(crate) fn uuid() -> io::Result<Uuid> {
    let mut b = random::<16>()?;
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    Ok(Uuid::from_bytes(b))
}
