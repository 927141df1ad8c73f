//! Instances: the record that lives on, and what its machine's next step is.
//!
//! ```text
//! starting ──▶ running ◀──▶ paused | frozen        (wanted says what should be,
//!     └───────────┴────────────┴──▶ stopped ──▶ gone   a worker says what is)
//! ```
//! `wanted` is written before anything is done, so it is the journal of intents: after a crash
//! [`plan()`] finds the same next step again. Every step is safe to repeat.

mod ask;
mod family;
mod observe;
mod plan;

pub use ask::{Asked, Verb, ask, expire};
pub use family::{ancestors, children, find, subtree};
pub use observe::{Fact, RETRIES_OF_A_HOST, observe};
pub use plan::{Plan, Seen, Step, plan};

use std::collections::BTreeMap;

use crate::capability::Capabilities;
use crate::egress::Egress;
use crate::given::Given;
use crate::kill::MachineEnd;
use crate::remote::Remote;
use crate::words::{
    CommitId, CpuMillis, DiskBytes, DurationMs, EgressBytes, GuestId, Handle, ImageRef, InstanceId,
    Limits, LlmTokens, MemoryMb, Port, Time, Tree, Usage,
};

/// What an instance is made of; kept over restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The host's name for it.
    pub handle: Option<Handle>,
    /// The image it starts from.
    pub image: ImageRef,
    /// The primary process: program and arguments.
    pub command: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// Its working directory.
    pub cwd: Option<String>,
    /// CPU quota.
    pub cpu: CpuMillis,
    /// Machine memory.
    pub memory: MemoryMb,
    /// Writable disk.
    pub disk: DiskBytes,
    /// Ports that the outside may reach.
    pub exposes: Vec<Expose>,
    /// A port that must accept before `running` is said.
    pub await_port: Option<Port>,
    /// Whether it may be paused when nobody uses it.
    pub idle_policy: IdlePolicy,
    /// Line for root's `authorized_keys`.
    pub authorized_key: Option<String>,
    /// What it is given besides its machine.
    pub given: Given,
    /// The commit that it starts from.
    pub origin: Option<Origin>,
    /// The primary process waits for a client of the host's, and is that one's.
    pub attach: bool,
}

/// What a machine starts from besides its image; its disk lies over the commit's, for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The commit.
    pub commit: CommitId,
    /// At its first start it goes on from the commit's memory.
    pub memory: bool,
}

#[cfg(test)]
impl Spec {
    /// One that tests may change.
    pub(crate) fn example() -> Spec {
        Spec {
            handle: None,
            image: "base".parse().expect("a reference"),
            command: vec![],
            env: BTreeMap::new(),
            cwd: None,
            cpu: CpuMillis(1000),
            memory: MemoryMb(256),
            disk: DiskBytes(1),
            exposes: vec![],
            await_port: None,
            idle_policy: IdlePolicy::Default,
            authorized_key: None,
            given: Given::default(),
            origin: None,
            attach: false,
        }
    }
}

/// A port inside that the outside may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expose {
    /// The port on the machine's loopback.
    pub guest_port: Port,
    /// The port on the host; chosen at the first start when absent, and kept.
    pub public_port: Option<Port>,
    /// What is spoken there, for the URL that people see.
    pub protocol: Protocol,
}

/// What is spoken on an exposed port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP.
    Http,
    /// Anything over TCP.
    Tcp,
}

impl Protocol {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            Protocol::Http => "http",
            Protocol::Tcp => "tcp",
        }
    }

    /// From the word on the wire.
    pub fn parse(word: &str) -> Option<Protocol> {
        [Protocol::Http, Protocol::Tcp].into_iter().find(|p| p.word() == word)
    }
}

/// Whether an instance may be paused when nobody uses it (contracts/aegis.md 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdlePolicy {
    /// It may.
    #[default]
    Default,
    /// It may not.
    LeaveRunning,
}

impl IdlePolicy {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            IdlePolicy::Default => "default",
            IdlePolicy::LeaveRunning => "leave-running",
        }
    }

    /// From the word on the wire.
    pub fn parse(word: &str) -> Option<IdlePolicy> {
        [IdlePolicy::Default, IdlePolicy::LeaveRunning].into_iter().find(|p| p.word() == word)
    }
}

/// What should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// A machine that runs.
    Running,
    /// A machine whose clock stands still, until someone uses it.
    Paused,
    /// A machine whose clock stands still, until the host lets it go on.
    Frozen,
    /// No machine; record and disk are kept.
    Stopped,
    /// Nothing left, proven.
    Gone,
}

impl Wanted {
    /// All of them.
    pub const ALL: [Wanted; 5] =
        [Wanted::Running, Wanted::Paused, Wanted::Frozen, Wanted::Stopped, Wanted::Gone];

    /// The word in the ledger.
    pub fn word(self) -> &'static str {
        match self {
            Wanted::Running => "running",
            Wanted::Paused => "paused",
            Wanted::Frozen => "frozen",
            Wanted::Stopped => "stopped",
            Wanted::Gone => "gone",
        }
    }

    /// From the word in the ledger.
    pub fn parse(word: &str) -> Option<Wanted> {
        Self::ALL.into_iter().find(|w| w.word() == word)
    }
}

/// What is, as far as it was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InstanceState {
    /// A machine is on the way.
    Starting,
    /// It runs.
    Running,
    /// Its clock stands still, until someone uses it.
    Paused,
    /// Its clock stands still, until the host lets it go on.
    Frozen,
    /// No machine; the disk is kept.
    Stopped,
    /// Proven gone.
    Gone,
}

impl InstanceState {
    /// All of them.
    pub const ALL: [InstanceState; 6] = [
        InstanceState::Starting,
        InstanceState::Running,
        InstanceState::Paused,
        InstanceState::Frozen,
        InstanceState::Stopped,
        InstanceState::Gone,
    ];

    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            InstanceState::Starting => "starting",
            InstanceState::Running => "running",
            InstanceState::Paused => "paused",
            InstanceState::Frozen => "frozen",
            InstanceState::Stopped => "stopped",
            InstanceState::Gone => "gone",
        }
    }

    /// From the word on the wire.
    pub fn parse(word: &str) -> Option<InstanceState> {
        Self::ALL.into_iter().find(|s| s.word() == word)
    }

    /// Whether a machine was said to be there and complete.
    pub fn is_up(self) -> bool {
        match self {
            InstanceState::Running | InstanceState::Paused | InstanceState::Frozen => true,
            InstanceState::Starting | InstanceState::Stopped | InstanceState::Gone => false,
        }
    }
}

/// How the last machine of an instance ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code of the primary process, if it exited.
    pub code: Option<i32>,
    /// One sentence.
    pub message: String,
    /// When.
    pub at: Time,
}

/// A machine's wish not to be paused for idleness (contracts/aegis.md 2). It never puts off an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// For people.
    pub reason: Option<String>,
    /// Until when.
    pub expires_at: Time,
}

/// The record of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Its id, not guessable.
    pub id: InstanceId,
    /// Whose audit chain it belongs to.
    pub tree: Tree,
    /// The guest that it was provisioned for.
    pub guest: Option<GuestId>,
    /// The instance that spawned it.
    pub parent: Option<InstanceId>,
    /// What it is made of.
    pub spec: Spec,
    /// Its machine elsewhere, where it is not this host's.
    pub remote: Option<Remote>,
    /// Its labels, where it is lent by the vers API; absent where it is not.
    pub lent: Option<BTreeMap<String, String>>,
    /// What it may do besides computing.
    pub capabilities: Capabilities,
    /// The most that it and all of its descendants together may hold and spend.
    pub envelope: Limits,
    /// What it and all of its descendants may reach.
    pub egress: Egress,
    /// When the envelope's time is over; absent where the host set no end.
    pub ends_at: Option<Time>,
    /// Names the capability token that its machine was given last.
    pub jti: Option<String>,
    /// What holds off its idle pause.
    pub lease: Option<Lease>,
    /// What should be.
    pub wanted: Wanted,
    /// What is.
    pub state: InstanceState,
    /// False after `disable`: nothing but `start` wakes it.
    pub enabled: bool,
    /// Boots begun in a row without one that ran.
    pub attempts: u32,
    /// Not before this is the next one tried.
    pub retry_at: Option<Time>,
    /// Why the last one failed.
    pub last_error: Option<String>,
    /// What processes inside see as boot id.
    pub boot_id: Option<String>,
    /// Usage of boots that ended.
    pub usage_past: Usage,
    /// Usage of this boot so far.
    pub usage_boot: Usage,
    /// Bytes that its machine may have sent in this boot, those that it did send included.
    pub egress_allowed: EgressBytes,
    /// Counts what its machine was told of that: a later word wins over an earlier one.
    pub egress_version: u64,
    /// LLM tokens that calls which run have reserved; they count as spent until they are settled.
    pub tokens_reserved: u64,
    /// Usage of descendants whose records are no longer kept.
    pub usage_below: Usage,
    /// How its last machine ended.
    pub exit: Option<Exit>,
    /// When its clock was last stopped, for the receipt.
    pub frozen_at: Option<Time>,
    /// The proof that it is gone.
    pub end: Option<MachineEnd>,
    /// When it was made.
    pub created_at: Time,
    /// When anything of this last changed.
    pub updated_at: Time,
    /// When it last began or stopped to run.
    pub stopped_at: Option<Time>,
}

impl Instance {
    /// A new instance that wants to run, may do nothing more, and has an envelope that holds its own
    /// machine and nothing else.
    pub fn new(
        id: InstanceId,
        tree: Tree,
        guest: Option<GuestId>,
        parent: Option<InstanceId>,
        spec: Spec,
        now: Time,
    ) -> Instance {
        let envelope = Limits {
            cpu: spec.cpu,
            memory: spec.memory,
            disk: spec.disk,
            egress: EgressBytes(0),
            duration: DurationMs(0),
            tokens: LlmTokens(0),
        };
        Instance {
            id,
            tree,
            guest,
            parent,
            spec,
            remote: None,
            lent: None,
            capabilities: Capabilities::default(),
            envelope,
            egress: Egress::default(),
            ends_at: None,
            jti: None,
            lease: None,
            wanted: Wanted::Running,
            state: InstanceState::Starting,
            enabled: true,
            attempts: 0,
            retry_at: None,
            last_error: None,
            boot_id: None,
            usage_past: Usage::default(),
            usage_boot: Usage::default(),
            egress_allowed: EgressBytes(0),
            egress_version: 0,
            tokens_reserved: 0,
            usage_below: Usage::default(),
            exit: None,
            frozen_at: None,
            end: None,
            created_at: now,
            updated_at: now,
            stopped_at: None,
        }
    }

    /// The same instance with what it may do, and with an envelope and its end.
    pub fn with_rights(
        self,
        capabilities: Capabilities,
        envelope: Limits,
        ends_at: Option<Time>,
    ) -> Instance {
        Instance { capabilities, envelope, ends_at, ..self }
    }

    /// The same instance, lent by the vers API under these labels.
    pub fn lent_as(self, labels: Option<BTreeMap<String, String>>) -> Instance {
        Instance { lent: labels, ..self }
    }

    /// The same instance with what it may reach.
    pub fn with_egress(self, egress: Egress) -> Instance {
        Instance { egress, ..self }
    }

    /// Usage over all boots.
    pub fn usage(&self) -> Usage {
        self.usage_past.and(self.usage_boot)
    }

    /// The lease that holds off its idle pause now.
    pub fn lease_at(&self, now: Time) -> Option<&Lease> {
        self.lease.as_ref().filter(|lease| now < lease.expires_at)
    }

    /// Whether the time of its envelope is over: the clock decides, not the last sweep.
    pub fn is_over(&self, now: Time) -> bool {
        self.ends_at.is_some_and(|end| now >= end)
    }

    /// Whether a machine is, or may be, there.
    pub fn is_live(&self) -> bool {
        !matches!(self.state, InstanceState::Stopped | InstanceState::Gone)
    }

    /// Whether it has ended, or is to end: then nothing may live below it.
    pub fn is_ending(&self) -> bool {
        matches!(self.wanted, Wanted::Stopped | Wanted::Gone)
    }

    /// What clients call its machine: the id, or what the cloud in which it is calls it.
    pub fn vm_id(&self) -> String {
        match self.remote.as_ref().and_then(|remote| remote.vm.as_ref()) {
            Some(vm) => vm.to_string(),
            None => self.id.to_string(),
        }
    }

    /// Name for people: the handle, else the id.
    pub fn name(&self) -> &str {
        self.spec.handle.as_ref().map_or(self.id.as_str(), |h| h.as_str())
    }
}
