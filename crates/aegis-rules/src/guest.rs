//! Guests: who redeemed an invite, from `provisioning` to the end (contracts/couch.md 4 and 5).
//!
//! ```text
//! provisioning ──▶ running ◀──▶ frozen
//!       └─────────────┴──────────┴──▶ stopped | expired | revoked;   expired ──kill──▶ revoked
//! ```

use crate::change::Change;
use crate::exceed;
use crate::instance::{Instance, InstanceState, Wanted};
use crate::invite::SecretHash;
use crate::kill::Receipt;
use crate::refusal::{Code, Refusal};
use crate::request::AccessRequest;
use crate::words::{
    GuestId, InstanceId, InviteId, Label, Limits, OnLimit, Permissions, PublicKey, Time, Usage,
};

/// Where a guest is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestStatus {
    /// Its machine is on the way.
    Provisioning,
    /// Its machine answers.
    Running,
    /// Its machine's clock stands still, by the host or a limit.
    Frozen,
    /// Its machine ended by itself, or the host stopped it.
    Stopped,
    /// Its time is over.
    Expired,
    /// Killed.
    Revoked,
}

impl GuestStatus {
    /// All of them.
    pub const ALL: [GuestStatus; 6] = [
        GuestStatus::Provisioning,
        GuestStatus::Running,
        GuestStatus::Frozen,
        GuestStatus::Stopped,
        GuestStatus::Expired,
        GuestStatus::Revoked,
    ];

    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            GuestStatus::Provisioning => "provisioning",
            GuestStatus::Running => "running",
            GuestStatus::Frozen => "frozen",
            GuestStatus::Stopped => "stopped",
            GuestStatus::Expired => "expired",
            GuestStatus::Revoked => "revoked",
        }
    }

    /// From the word on the wire.
    pub fn parse(word: &str) -> Option<GuestStatus> {
        Self::ALL.into_iter().find(|s| s.word() == word)
    }

    /// Whether the guest's token works in this status.
    pub fn is_live(self) -> bool {
        match self {
            GuestStatus::Provisioning | GuestStatus::Running | GuestStatus::Frozen => true,
            GuestStatus::Stopped | GuestStatus::Expired | GuestStatus::Revoked => false,
        }
    }

    /// Whether one status may follow the other. Final ones never change, but `expired → revoked`.
    pub fn may_become(self, next: GuestStatus) -> bool {
        use GuestStatus::{Expired, Frozen, Provisioning, Revoked, Running, Stopped};
        match (self, next) {
            (Provisioning, Running | Stopped | Expired | Revoked) => true,
            (Running, Frozen | Stopped | Expired | Revoked) => true,
            (Frozen, Running | Stopped | Expired | Revoked) => true,
            (Expired, Revoked) => true,
            (Provisioning, Provisioning | Frozen)
            | (Running, Provisioning | Running)
            | (Frozen, Provisioning | Frozen)
            | (Stopped | Revoked, _)
            | (Expired, Provisioning | Running | Frozen | Stopped | Expired) => false,
        }
    }
}

/// Who makes a guest's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Provisioner {
    /// This host.
    Local,
    /// A person, who then activates the guest.
    Manual,
    /// The vers cloud ([`crate::remote`]).
    Vers,
}

/// A redeemed invite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its id, not secret.
    pub id: GuestId,
    /// The invite that it redeemed.
    pub invite: InviteId,
    /// Its name.
    pub name: Label,
    /// For SSH access.
    pub public_key: Option<PublicKey>,
    /// Hash of its token.
    pub token_hash: SecretHash,
    /// Hash of the redeem's `Idempotency-Key`.
    pub idempotency: Option<SecretHash>,
    /// As recorded; [`Guest::status_at`] is what holds.
    pub status: GuestStatus,
    /// Who makes its machine.
    pub provisioner: Provisioner,
    /// The six limits.
    pub limits: Limits,
    /// The three permissions.
    pub permissions: Permissions,
    /// Its machine here.
    pub instance: Option<InstanceId>,
    /// Its machine's name for clients, once it runs.
    pub vm_id: Option<String>,
    /// Where its agent answers, once it runs.
    pub agent_endpoint: Option<String>,
    /// Why the last try to provision failed.
    pub provision_error: Option<String>,
    /// What was reported by `PUT usage`, where this host can't measure; and the highest of what its
    /// machines held together, which no single record remembers.
    pub reported: Usage,
    /// Whether a passed limit was noted.
    pub limits_exceeded: bool,
    /// What is done when a limit is passed, where the invite said it.
    pub on_limit: Option<OnLimit>,
    /// Whether it is frozen because of a limit.
    pub frozen_by_limit: bool,
    /// What its machines asked for, oldest first.
    pub requests: Vec<AccessRequest>,
    /// When it redeemed.
    pub created_at: Time,
    /// When its time is over.
    pub expires_at: Time,
    /// When it ended.
    pub stopped_at: Option<Time>,
    /// The proof of its end, once there is one.
    pub receipt: Option<Receipt>,
}

impl Guest {
    /// The status that holds now: a guest is expired the moment its time is over, whoever looks.
    pub fn status_at(&self, now: Time) -> GuestStatus {
        if self.status.is_live() && now >= self.expires_at {
            GuestStatus::Expired
        } else {
            self.status
        }
    }

    /// Usage over the whole tree: measured here, and reported where it can't be. What machines that
    /// are there hold is summed; it is never lower than it was.
    pub fn usage(&self, machines: &[Instance]) -> Usage {
        let mut all = Usage::default();
        let (mut memory, mut disk) = (0_u64, 0_u64);
        for machine in machines {
            all = all.and(machine.usage()).and(machine.usage_below);
            if machine.is_live() {
                // What a machine's own process takes besides is not the guest's.
                let peak = machine.usage_boot.memory_peak_bytes.min(machine.spec.memory.bytes());
                memory = memory.saturating_add(peak);
            }
            if machine.state != InstanceState::Gone {
                disk = disk.saturating_add(machine.usage().disk_bytes);
            }
        }
        all.memory_peak_bytes = all.memory_peak_bytes.max(memory);
        all.disk_bytes = all.disk_bytes.max(disk);
        all.at_least(self.reported)
    }
}

/// What a guest and its machines are after changes; for judging what follows from them.
pub(crate) fn after(
    guest: &Guest,
    machines: &[Instance],
    changes: &[Change],
) -> (Guest, Vec<Instance>) {
    let (mut guest, mut machines) = (guest.clone(), machines.to_vec());
    for change in changes {
        guest.apply(change);
        machines
            .iter_mut()
            .filter(|m| change.subject().id() == m.id.as_str())
            .for_each(|m| m.apply(change));
    }
    (guest, machines)
}

/// The refusal of what a guest in this state can not do.
pub(crate) fn wrong_state(what: &str, status: GuestStatus) -> Refusal {
    Refusal::new(Code::GuestState, format!("cannot {what} guest with status '{}'", status.word()))
}

/// Marks a guest of a manual provisioner as running.
pub fn activate(
    guest: &Guest,
    vm_id: String,
    agent_endpoint: String,
    now: Time,
) -> Result<Vec<Change>, Refusal> {
    match guest.status_at(now) {
        GuestStatus::Provisioning => Ok(vec![Change::GuestActivated {
            id: guest.id.clone(),
            vm_id,
            agent_endpoint: Some(agent_endpoint),
            at: now,
        }]),
        other => Err(wrong_state("activate", other)),
    }
}

/// Takes numbers that this host can't measure (contracts/couch.md 5). For a local guest only
/// `tokensUsed` may be raised; nothing ever goes down.
pub fn report_usage(
    guest: &Guest,
    asked: ReportedUsage,
    now: Time,
) -> Result<Vec<Change>, Refusal> {
    if !guest.status_at(now).is_live() {
        return Err(wrong_state("report usage of", guest.status_at(now)));
    }
    let mut usage = guest.reported;
    let fields: [(&str, Option<u64>, &mut u64); 6] = [
        ("cpuSeconds", asked.cpu_ns, &mut usage.cpu_ns),
        ("memoryPeakMB", asked.memory_peak_bytes, &mut usage.memory_peak_bytes),
        ("diskUsedGB", asked.disk_bytes, &mut usage.disk_bytes),
        ("networkEgressGB", asked.egress_bytes, &mut usage.egress.0),
        ("tokensUsed", asked.tokens, &mut usage.tokens.0),
        ("uptimeSeconds", asked.uptime_ms, &mut usage.uptime.0),
    ];
    for (name, value, recorded) in fields {
        let Some(value) = value else { continue };
        if guest.provisioner == Provisioner::Local && name != "tokensUsed" {
            return Err(Refusal::field(
                name,
                "left out: this host measures it itself, only tokensUsed can be raised",
            ));
        }
        if value < *recorded {
            return Err(Refusal::field(name, "not less than what was recorded before"));
        }
        *recorded = value;
    }
    Ok(vec![Change::UsageReported { id: guest.id.clone(), usage }])
}

/// What `PUT usage` gives, in the units of [`Usage`]; absent fields stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportedUsage {
    /// Nanoseconds.
    pub cpu_ns: Option<u64>,
    /// Bytes.
    pub memory_peak_bytes: Option<u64>,
    /// Bytes.
    pub disk_bytes: Option<u64>,
    /// Bytes.
    pub egress_bytes: Option<u64>,
    /// Tokens.
    pub tokens: Option<u64>,
    /// Milliseconds.
    pub uptime_ms: Option<u64>,
}

/// Stops the clock of a running guest's machine. It is `frozen` at once; the machine follows.
pub fn freeze(guest: &Guest, machines: &[Instance], now: Time) -> Result<Vec<Change>, Refusal> {
    match guest.status_at(now) {
        GuestStatus::Running => {
            let mut changes =
                vec![Change::GuestMoved { id: guest.id.clone(), to: GuestStatus::Frozen, at: now }];
            changes.extend(want(machines, Wanted::Frozen, now));
            Ok(changes)
        }
        other => Err(wrong_state("freeze", other)),
    }
}

/// Lets a frozen guest's machine go on.
pub fn thaw(guest: &Guest, machines: &[Instance], now: Time) -> Result<Vec<Change>, Refusal> {
    match guest.status_at(now) {
        GuestStatus::Frozen => {
            let mut changes = vec![Change::GuestMoved {
                id: guest.id.clone(),
                to: GuestStatus::Running,
                at: now,
            }];
            changes.extend(want(machines, Wanted::Running, now));
            Ok(changes)
        }
        other => Err(wrong_state("thaw", other)),
    }
}

/// Records that a guest's time is over, and wants its machines gone.
pub fn expire(guest: &Guest, machines: &[Instance], now: Time) -> Vec<Change> {
    let mut changes = Vec::new();
    if now < guest.expires_at {
        return changes;
    }
    if guest.status.is_live() {
        changes.push(Change::GuestMoved {
            id: guest.id.clone(),
            to: GuestStatus::Expired,
            at: now,
        });
    }
    // A stopped guest's disk was kept until now.
    changes.extend(want(machines, Wanted::Gone, now));
    changes
}

/// What follows for a guest when its machine says that it runs.
pub fn machine_runs(
    guest: &Guest,
    machine: &Instance,
    endpoint: Option<String>,
    now: Time,
) -> Vec<Change> {
    match guest.status_at(now) {
        GuestStatus::Provisioning => vec![Change::GuestActivated {
            id: guest.id.clone(),
            vm_id: machine.vm_id(),
            agent_endpoint: endpoint,
            at: now,
        }],
        _ => Vec::new(),
    }
}

/// What follows for a guest when its machine has ended and is not to come back.
pub fn machine_stopped(guest: &Guest, now: Time) -> Vec<Change> {
    if guest.status_at(now).is_live() {
        vec![Change::GuestMoved { id: guest.id.clone(), to: GuestStatus::Stopped, at: now }]
    } else {
        Vec::new()
    }
}

/// Keeps the highest of what the tree held together, and notes passed limits, once.
pub fn note_usage(guest: &Guest, tree: &[Instance], now: Time) -> Vec<Change> {
    let usage = guest.usage(tree);
    let mut changes = Vec::new();
    let peaks = Usage {
        memory_peak_bytes: usage.memory_peak_bytes,
        disk_bytes: usage.disk_bytes,
        ..guest.reported
    };
    // One machine's own peaks are kept with it.
    if tree.len() > 1 && peaks != guest.reported {
        changes.push(Change::UsageReported { id: guest.id.clone(), usage: peaks });
    }
    changes.extend(exceeded(guest, tree, &usage, now));
    changes
}

/// What follows from passed limits, once.
pub fn exceeded(guest: &Guest, tree: &[Instance], usage: &Usage, now: Time) -> Vec<Change> {
    if guest.limits_exceeded {
        return Vec::new();
    }
    let found = usage.violations(&guest.limits, now.since(guest.created_at));
    exceed::passed(guest, tree, &found, now)
}

/// Wants all machines of a guest in one condition, except those that are past it.
pub(crate) fn want(
    machines: &[Instance],
    wanted: Wanted,
    now: Time,
) -> impl Iterator<Item = Change> + '_ {
    machines
        .iter()
        .filter(move |m| {
            m.state != InstanceState::Gone && m.wanted != wanted && m.wanted != Wanted::Gone
        })
        .filter(move |m| wanted == Wanted::Gone || m.wanted != Wanted::Stopped)
        .map(move |m| Change::InstanceWanted { id: m.id.clone(), wanted, at: now })
}
