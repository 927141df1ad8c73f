//! The kill switch: what is written first, what must be proven gone, the receipt
//! (contracts/couch.md 7).

use sha2::{Digest as _, Sha256};

use crate::audit::hex;
use crate::change::Change;
use crate::guest::{self, Guest, GuestStatus, want};
use crate::instance::{Instance, InstanceState, Wanted};
use crate::refusal::{Code, Refusal};
use crate::words::{DurationMs, GuestId, InstanceId, Time};

/// What must be looked for, and not be there, before a machine counts as gone.
pub const MUST_VERIFY: [&str; 4] = ["process", "cgroup", "network", "disk"];

/// The same of a machine in somebody else's cloud: its provider says, to a key that it accepts, that
/// there is no such machine.
pub const MUST_VERIFY_ELSEWHERE: [&str; 1] = ["provider"];

fn must_verify(machine: &Instance) -> &'static [&'static str] {
    if machine.remote.is_some() { &MUST_VERIFY_ELSEWHERE } else { &MUST_VERIFY }
}

/// One machine's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineEnd {
    /// Which.
    pub id: InstanceId,
    /// When its clock was stopped; absent when there was nothing to stop.
    pub frozen_at: Option<Time>,
    /// When it was proven gone.
    pub destroyed_at: Time,
    /// What was looked for and is not there.
    pub verified: Vec<String>,
}

/// Proof that all machines of a guest are gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Every machine of the tree.
    pub machines: Vec<MachineEnd>,
    /// From the kill to the last proof.
    pub elapsed: DurationMs,
    /// SHA-256 over guest and machines, hexadecimal; it also stands in the audit trail.
    pub hash: String,
}

/// Begins a kill: revoked, and every machine of the tree wanted gone, in one set of changes.
/// Works from every state that is not already ended by a stop or a kill.
pub fn open(guest: &Guest, machines: &[Instance], now: Time) -> Result<Vec<Change>, Refusal> {
    match guest.status_at(now) {
        status @ (GuestStatus::Stopped | GuestStatus::Revoked) => {
            Err(Refusal::new(Code::GuestState, format!("guest already {}", status.word())))
        }
        GuestStatus::Provisioning
        | GuestStatus::Running
        | GuestStatus::Frozen
        | GuestStatus::Expired => {
            let mut changes = Vec::new();
            if guest.status.is_live() && now >= guest.expires_at {
                // The clock was first; the trail says both.
                changes.push(Change::GuestMoved {
                    id: guest.id.clone(),
                    to: GuestStatus::Expired,
                    at: now,
                });
            }
            changes.push(Change::GuestMoved {
                id: guest.id.clone(),
                to: GuestStatus::Revoked,
                at: now,
            });
            changes.extend(want(machines, Wanted::Gone, now));
            Ok(changes)
        }
    }
}

/// Begins a kill, and closes it at once where no machine is there to be proven gone.
pub fn open_whole(guest: &Guest, machines: &[Instance], now: Time) -> Result<Vec<Change>, Refusal> {
    let mut changes = open(guest, machines, now)?;
    let (after, rest) = guest::after(guest, machines, &changes);
    changes.extend(close(&after, &rest).unwrap_or_default());
    Ok(changes)
}

/// Closes a kill when every machine of the tree is proven gone; `None` while one is not.
pub fn close(guest: &Guest, machines: &[Instance]) -> Option<Vec<Change>> {
    if guest.receipt.is_some() || guest.status != GuestStatus::Revoked {
        return None;
    }
    let killed_at = guest.stopped_at?;
    let ends: Vec<MachineEnd> = machines
        .iter()
        .map(|m| {
            (m.state == InstanceState::Gone).then(|| m.end.clone()).flatten().filter(|end| {
                must_verify(m).iter().all(|must| end.verified.iter().any(|v| v == must))
            })
        })
        .collect::<Option<_>>()?;
    let last = ends.iter().map(|end| end.destroyed_at).max().unwrap_or(killed_at);
    let hash = hash(&guest.id, killed_at, &ends);
    let receipt = Receipt { machines: ends, elapsed: last.since(killed_at), hash };
    Some(vec![Change::KillVerified { id: guest.id.clone(), receipt: Box::new(receipt) }])
}

fn hash(guest: &GuestId, killed_at: Time, ends: &[MachineEnd]) -> String {
    let mut hasher = Sha256::new();
    let mut put = |field: &str| {
        hasher.update((field.len() as u64).to_be_bytes());
        hasher.update(field.as_bytes());
    };
    put(guest.as_str());
    put(&killed_at.to_string());
    for end in ends {
        put(end.id.as_str());
        put(&end.frozen_at.map(|t| t.to_string()).unwrap_or_default());
        put(&end.destroyed_at.to_string());
        put(&end.verified.join(","));
    }
    hex(&hasher.finalize())
}
