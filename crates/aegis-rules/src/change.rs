//! All that can ever be written.
//!
//! A [`Change`] is the new state of a row, the audit note and the event at once, so nothing changes
//! without leaving a trace. The ledger stores what [`Change::note`] says and what the `apply`
//! functions make of the records; nothing else writes.

mod apply;

use std::collections::BTreeMap;

use crate::audit::{Note, Subject};
use crate::egress::{Denied, Egress};
use crate::given::Secrets;
use crate::guest::{Guest, GuestStatus};
use crate::instance::{Exit, Expose, Instance, InstanceState, Wanted};
use crate::invite::Invite;
use crate::kill::{MachineEnd, Receipt};
use crate::refusal::{Code, Refusal};
use crate::request::AccessRequest;
use crate::words::{
    CommitId, EgressBytes, GuestId, InstanceId, InviteId, Label, Limits, LlmTokens, Port, Time,
    Usage, Uuid,
};

/// One thing that is written, together with the others of its set or not at all.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "fields are ids, times and new values of what the variant names")]
pub enum Change {
    /// An invite exists.
    InviteCreated(Box<Invite>),
    /// It was spent.
    InviteRedeemed { id: InviteId, guest: GuestId, by: Label, at: Time },
    /// It was withdrawn.
    InviteRevoked { id: InviteId, at: Time },
    /// Its time is over.
    InviteExpired { id: InviteId, at: Time },

    /// A guest exists.
    GuestCreated(Box<Guest>),
    /// Its machine answers.
    GuestActivated { id: GuestId, vm_id: String, agent_endpoint: Option<String>, at: Time },
    /// It is frozen, thawed, stopped, expired or revoked now.
    GuestMoved { id: GuestId, to: GuestStatus, at: Time },
    /// Why the last try to provision it failed.
    ProvisionFailed { id: GuestId, reason: String, at: Time },
    /// Numbers that this host can't measure.
    UsageReported { id: GuestId, usage: Usage },
    /// It passed limits; `froze` when it was frozen for that.
    LimitsExceeded { id: GuestId, violations: Vec<String>, froze: bool, at: Time },
    /// It is within its limits again.
    LimitsEased { id: GuestId, at: Time },
    /// It has other limits.
    GuestLimits { id: GuestId, limits: Box<Limits>, expires_at: Time, at: Time },
    /// One of its machines asks the host for more.
    RequestRaised { id: GuestId, request: Box<AccessRequest> },
    /// The host decided it.
    RequestDecided { id: GuestId, number: u32, granted: bool, at: Time },
    /// A kill could not be proven yet.
    KillUnverified { id: GuestId, remaining: Vec<String>, at: Time },
    /// A kill is proven.
    KillVerified { id: GuestId, receipt: Box<Receipt> },

    /// An instance exists and wants to run.
    InstanceCreated(Box<Instance>),
    /// What should be, changed.
    InstanceWanted { id: InstanceId, wanted: Wanted, at: Time },
    /// A stopped one is to run again.
    InstanceStarts { id: InstanceId, at: Time },
    /// Nothing but start wakes it.
    InstanceDisabled { id: InstanceId, at: Time },
    /// A port of the host leads to it.
    InstancePort { id: InstanceId, guest_port: Port, public_port: Port },
    /// Its machine answers.
    InstanceRuns { id: InstanceId, boot_id: String, at: Time },
    /// Its machine's clock stands still: paused or frozen.
    InstanceFroze { id: InstanceId, to: InstanceState, at: Time },
    /// What it used in this boot.
    InstanceUsed { id: InstanceId, usage: Usage },
    /// How many bytes it may send in this boot.
    EgressAllowed { id: InstanceId, ceiling: EgressBytes },
    /// What it was allowed and did not send is called back.
    EgressCalledBack { id: InstanceId },
    /// What it, and all below it, may reach.
    EgressSet { id: InstanceId, egress: Box<Egress>, at: Time },
    /// Its gateway refused it something, so many times.
    EgressDenied { id: InstanceId, denied: Denied, count: u64, at: Time },
    /// What it, and all below it, may hold and spend, and until when.
    InstanceEnvelope { id: InstanceId, envelope: Box<Limits>, ends_at: Option<Time>, at: Time },
    /// A boot failed.
    BootFailed { id: InstanceId, attempts: u32, retry_at: Time, message: String, at: Time },
    /// Its machine has ended.
    InstanceEnded { id: InstanceId, exit: Exit },
    /// All but the disk is gone; `stopped` when that is what was wanted.
    InstanceCleared { id: InstanceId, usage: Usage, stopped: bool, at: Time },
    /// Something of it resists destruction.
    DestroyFailed { id: InstanceId, message: String },
    /// It is proven gone.
    InstanceDestroyed { end: MachineEnd, usage: Usage },
    /// It takes over the usage of a descendant whose record goes.
    InstanceAbsorbed { id: InstanceId, usage: Usage },
    /// Its record is no longer needed.
    InstanceForgotten { id: InstanceId, at: Time },

    /// A machine of it is about to be asked for, in another cloud.
    VmIntended { id: InstanceId, at: Time },
    /// That is its machine there; `unclear_at` is when one was asked for that may be another.
    VmClaimed { id: InstanceId, vm: Uuid, unclear_at: Option<Time>, at: Time },
    /// It has no machine there; `unclear_at` is when one was asked for of which nothing became known.
    VmAbsent { id: InstanceId, unclear_at: Option<Time>, at: Time },

    /// It is lent under other labels.
    InstanceLabelled { id: InstanceId, labels: BTreeMap<String, String>, at: Time },

    /// Its machine has another capability token, of this name.
    InstanceToken { id: InstanceId, jti: String, at: Time },
    /// What it is at this time is kept.
    InstanceCommitted { id: InstanceId, commit: CommitId, memory: bool, at: Time },
    /// It asked not to be paused for idleness.
    LeaseHeld { id: InstanceId, reason: Option<String>, expires_at: Time, at: Time },
    /// It no longer does.
    LeaseReleased { id: InstanceId, at: Time },
    /// It gets these secrets at its next start.
    InstanceSecrets { id: InstanceId, secrets: Secrets, at: Time },
    /// The most that an LLM call of it may cost, before it begins.
    TokensReserved { id: InstanceId, call: String, amount: LlmTokens, at: Time },
    /// What the call did cost; `of` says what it was, where that is known.
    TokensSettled {
        id: InstanceId,
        call: String,
        of: Option<Box<LlmCall>>,
        reserved: LlmTokens,
        spent: LlmTokens,
        at: Time,
    },
    /// One more port of it may be reached.
    InstanceExposed { id: InstanceId, expose: Expose, at: Time },
    /// One less.
    InstanceUnexposed { id: InstanceId, guest_port: Port, at: Time },
    /// It asked for something that it may not have.
    GuestDenied {
        id: InstanceId,
        method: String,
        code: Code,
        rule: Option<&'static str>,
        requested: Option<String>,
        allowed: Option<String>,
        target: Option<String>,
        at: Time,
    },
    /// Its parent has a command run in it.
    ChildExec { id: InstanceId, parent: InstanceId, command: Vec<String>, at: Time },
    /// Its parent changes its files: `what` is one word and the path.
    ChildFiles { id: InstanceId, parent: InstanceId, what: String, at: Time },
}

/// What an LLM call was, without a word of what was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LlmCall {
    /// The provider's name in the host's settings.
    pub provider: String,
    /// The model, as it was asked for.
    pub model: String,
    /// How it ended, in a word.
    pub end: &'static str,
}

/// Longest text from a machine in a note, characters.
const TEXT_MAX: usize = 256;

fn cut(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

impl Change {
    /// The trace of a refusal to a machine that asked.
    pub fn denied(
        id: InstanceId,
        method: &str,
        refusal: &Refusal,
        target: Option<&str>,
        at: Time,
    ) -> Change {
        Change::GuestDenied {
            id,
            method: cut(method),
            code: refusal.code,
            rule: refusal.rule,
            requested: refusal.requested.as_deref().map(cut),
            allowed: refusal.allowed.as_deref().map(cut),
            target: target.map(cut),
            at,
        }
    }

    /// What the audit trail says of it; `None` for counters and notes to oneself.
    pub fn note(&self) -> Option<Note> {
        let invite = |kind, id: &InviteId, data| note(kind, Subject::Invite(id.clone()), data);
        let guest = |kind, id: &GuestId, data| note(kind, Subject::Guest(id.clone()), data);
        let instance =
            |kind, id: &InstanceId, data| note(kind, Subject::Instance(id.clone()), data);
        match self {
            Change::InviteCreated(i) => invite(
                "couch.invite.created",
                &i.id,
                vec![
                    ("createdBy", i.created_by.to_string()),
                    ("expiresAt", i.expires_at.to_string()),
                ],
            ),
            Change::InviteRedeemed { id, guest, by, .. } => invite(
                "couch.invite.redeemed",
                id,
                vec![("guestId", guest.to_string()), ("redeemedBy", by.to_string())],
            ),
            Change::InviteRevoked { id, .. } => invite("couch.invite.revoked", id, vec![]),
            Change::InviteExpired { id, .. } => invite("couch.invite.expired", id, vec![]),

            Change::GuestCreated(_) | Change::UsageReported { .. } => None,
            Change::GuestActivated { id, vm_id, .. } => {
                guest("couch.guest.activated", id, vec![("vmId", vm_id.clone())])
            }
            Change::GuestMoved { id, to, .. } => {
                let kind = match to {
                    GuestStatus::Provisioning => return None,
                    GuestStatus::Running => "couch.guest.thawed",
                    GuestStatus::Frozen => "couch.guest.frozen",
                    GuestStatus::Stopped => "couch.guest.stopped",
                    GuestStatus::Expired => "couch.guest.expired",
                    GuestStatus::Revoked => "couch.guest.killed",
                };
                guest(kind, id, vec![])
            }
            Change::ProvisionFailed { id, reason, .. } => {
                guest("couch.provision.failed", id, vec![("reason", reason.clone())])
            }
            Change::LimitsEased { id, .. } => guest("couch.guest.limits_eased", id, vec![]),
            Change::GuestLimits { id, limits, expires_at, .. } => guest(
                "couch.guest.limits",
                id,
                vec![
                    ("egressBytes", limits.egress.0.to_string()),
                    ("tokens", limits.tokens.0.to_string()),
                    ("expiresAt", expires_at.to_string()),
                ],
            ),
            Change::RequestRaised { id, request } => guest(
                "couch.guest.requested",
                id,
                vec![
                    ("number", request.number.to_string()),
                    ("instance", request.from.to_string()),
                    ("egress", cut(&request.wish.egress.to_string())),
                    ("reason", cut(request.reason.as_deref().unwrap_or_default())),
                ],
            ),
            Change::RequestDecided { id, number, granted, .. } => guest(
                if *granted { "couch.guest.granted" } else { "couch.guest.refused" },
                id,
                vec![("number", number.to_string())],
            ),
            Change::LimitsExceeded { id, violations, .. } => guest(
                "couch.guest.limits_exceeded",
                id,
                vec![("violations", violations.join(", "))],
            ),
            Change::KillUnverified { id, remaining, .. } => {
                guest("couch.kill.unverified", id, vec![("remaining", remaining.join("; "))])
            }
            Change::KillVerified { id, receipt } => guest(
                "couch.kill.verified",
                id,
                vec![
                    ("machines", receipt.machines.len().to_string()),
                    ("elapsedMs", receipt.elapsed.0.to_string()),
                    ("receiptHash", receipt.hash.clone()),
                ],
            ),

            Change::InstanceCreated(i) => instance(
                if i.parent.is_some() { "instance.spawned" } else { "instance.created" },
                &i.id,
                created(i),
            ),
            Change::VmClaimed { id, vm, .. } => {
                instance("instance.vm.claimed", id, vec![("vmId", vm.to_string())])
            }
            Change::VmAbsent { id, unclear_at: Some(at), .. } => {
                instance("instance.vm.unclear", id, vec![("askedAt", at.to_string())])
            }
            Change::InstanceStarts { id, .. } => instance("instance.starting", id, vec![]),
            Change::InstanceRuns { id, boot_id, .. } => {
                instance("instance.started", id, vec![("bootId", boot_id.clone())])
            }
            Change::InstanceFroze { id, to, .. } => {
                instance("instance.paused", id, vec![("state", to.word().to_owned())])
            }
            Change::InstanceEnded { id, exit } => {
                instance("instance.stopped", id, vec![("message", exit.message.clone())])
            }
            Change::InstanceDestroyed { end, .. } => {
                instance("instance.destroyed", &end.id, vec![("verified", end.verified.join(","))])
            }
            Change::InstanceDisabled { id, .. } => instance("instance.disabled", id, vec![]),
            Change::InstanceWanted { id, wanted, .. } => {
                instance("instance.wanted", id, vec![("wanted", wanted.word().to_owned())])
            }
            Change::LeaseHeld { id, reason, expires_at, .. } => instance(
                "instance.lease.held",
                id,
                vec![
                    ("expiresAt", expires_at.to_string()),
                    ("reason", cut(reason.as_deref().unwrap_or_default())),
                ],
            ),
            Change::LeaseReleased { id, .. } => instance("instance.lease.released", id, vec![]),
            Change::InstanceExposed { id, expose, .. } => instance(
                "instance.exposed",
                id,
                vec![
                    ("guestPort", expose.guest_port.to_string()),
                    ("protocol", expose.protocol.word().to_owned()),
                ],
            ),
            Change::InstanceUnexposed { id, guest_port, .. } => {
                instance("instance.unexposed", id, vec![("guestPort", guest_port.to_string())])
            }
            Change::GuestDenied { id, method, code, rule, requested, allowed, target, .. } => {
                let mut data = vec![("method", cut(method)), ("code", code.word().to_owned())];
                data.extend(rule.map(|rule| ("rule", rule.to_owned())));
                let texts = [("requested", requested), ("allowed", allowed), ("target", target)];
                data.extend(texts.into_iter().filter_map(|(k, v)| Some((k, cut(v.as_deref()?)))));
                instance("instance.denied", id, data)
            }
            Change::EgressSet { id, egress, .. } => {
                let allow =
                    egress.allow.as_ref().map_or("all public".to_owned(), |l| l.to_string());
                let internet = egress.internet.to_string();
                instance(
                    "instance.egress",
                    id,
                    vec![("internet", internet), ("allow", cut(&allow))],
                )
            }
            Change::EgressDenied { id, denied, count, .. } => instance(
                "instance.denied",
                id,
                vec![
                    ("method", "egress".to_owned()),
                    ("code", Code::CapabilityDenied.word().to_owned()),
                    ("rule", denied.rule.to_owned()),
                    ("requested", cut(&denied.requested)),
                    ("allowed", cut(&denied.allowed)),
                    ("count", count.to_string()),
                ],
            ),
            Change::ChildExec { id, parent, command, .. } => instance(
                "instance.exec",
                id,
                vec![("parent", parent.to_string()), ("command", cut(&command.join(" ")))],
            ),
            Change::InstanceCommitted { id, commit, memory, .. } => instance(
                "instance.committed",
                id,
                vec![("commit", commit.to_string()), ("memory", memory.to_string())],
            ),
            Change::ChildFiles { id, parent, what, .. } => instance(
                "instance.files",
                id,
                vec![("parent", parent.to_string()), ("change", cut(what))],
            ),
            Change::InstanceSecrets { id, secrets, .. } => {
                instance("instance.secrets", id, vec![("secrets", secrets.texts().join(","))])
            }
            Change::TokensSettled { id, call, of, reserved, spent, .. } => {
                let mut data = vec![
                    ("call", call.clone()),
                    ("tokens", spent.0.to_string()),
                    ("reserved", reserved.0.to_string()),
                ];
                if let Some(of) = of {
                    data.push(("provider", cut(&of.provider)));
                    data.push(("model", cut(&of.model)));
                    data.push(("end", of.end.to_owned()));
                }
                instance("llm.call", id, data)
            }
            Change::InstanceToken { .. }
            | Change::VmIntended { .. }
            | Change::VmAbsent { unclear_at: None, .. }
            | Change::InstanceLabelled { .. }
            | Change::TokensReserved { .. }
            | Change::InstanceAbsorbed { .. }
            | Change::InstancePort { .. }
            | Change::InstanceUsed { .. }
            | Change::EgressAllowed { .. }
            | Change::EgressCalledBack { .. }
            | Change::InstanceEnvelope { .. }
            | Change::BootFailed { .. }
            | Change::InstanceCleared { .. }
            | Change::DestroyFailed { .. }
            | Change::InstanceForgotten { .. } => None,
        }
    }

    /// Which record it changes.
    pub fn subject(&self) -> Subject {
        match self {
            Change::InviteCreated(i) => Subject::Invite(i.id.clone()),
            Change::InviteRedeemed { id, .. }
            | Change::InviteRevoked { id, .. }
            | Change::InviteExpired { id, .. } => Subject::Invite(id.clone()),
            Change::GuestCreated(g) => Subject::Guest(g.id.clone()),
            Change::GuestActivated { id, .. }
            | Change::GuestMoved { id, .. }
            | Change::ProvisionFailed { id, .. }
            | Change::UsageReported { id, .. }
            | Change::LimitsExceeded { id, .. }
            | Change::LimitsEased { id, .. }
            | Change::GuestLimits { id, .. }
            | Change::RequestRaised { id, .. }
            | Change::RequestDecided { id, .. }
            | Change::KillUnverified { id, .. }
            | Change::KillVerified { id, .. } => Subject::Guest(id.clone()),
            Change::InstanceCreated(i) => Subject::Instance(i.id.clone()),
            Change::InstanceDestroyed { end, .. } => Subject::Instance(end.id.clone()),
            Change::InstanceWanted { id, .. }
            | Change::InstanceStarts { id, .. }
            | Change::InstanceDisabled { id, .. }
            | Change::InstancePort { id, .. }
            | Change::InstanceRuns { id, .. }
            | Change::InstanceFroze { id, .. }
            | Change::InstanceUsed { id, .. }
            | Change::EgressAllowed { id, .. }
            | Change::EgressCalledBack { id }
            | Change::EgressSet { id, .. }
            | Change::EgressDenied { id, .. }
            | Change::InstanceEnvelope { id, .. }
            | Change::BootFailed { id, .. }
            | Change::InstanceEnded { id, .. }
            | Change::InstanceCleared { id, .. }
            | Change::DestroyFailed { id, .. }
            | Change::InstanceAbsorbed { id, .. }
            | Change::InstanceForgotten { id, .. }
            | Change::InstanceToken { id, .. }
            | Change::VmIntended { id, .. }
            | Change::VmClaimed { id, .. }
            | Change::VmAbsent { id, .. }
            | Change::InstanceLabelled { id, .. }
            | Change::InstanceSecrets { id, .. }
            | Change::InstanceCommitted { id, .. }
            | Change::TokensReserved { id, .. }
            | Change::TokensSettled { id, .. }
            | Change::LeaseHeld { id, .. }
            | Change::LeaseReleased { id, .. }
            | Change::InstanceExposed { id, .. }
            | Change::InstanceUnexposed { id, .. }
            | Change::GuestDenied { id, .. }
            | Change::ChildExec { id, .. }
            | Change::ChildFiles { id, .. } => Subject::Instance(id.clone()),
        }
    }
}

/// What is noted of a new instance: what it is made of, and what it may do.
fn created(i: &Instance) -> Vec<(&'static str, String)> {
    let mut data = vec![
        ("image", i.spec.image.to_string()),
        ("cpuMillis", i.spec.cpu.0.to_string()),
        ("memoryMb", i.spec.memory.0.to_string()),
        ("diskBytes", i.spec.disk.0.to_string()),
    ];
    data.extend(i.parent.as_ref().map(|parent| ("parent", parent.to_string())));
    if i.capabilities.spawn {
        data.push(("spawnDepth", i.capabilities.spawn_depth.to_string()));
        data.push(("maxChildren", i.capabilities.max_children.to_string()));
    }
    data
}

#[allow(clippy::unnecessary_wraps, reason = "the arms of note() read as one table")]
fn note(kind: &'static str, subject: Subject, data: Vec<(&'static str, String)>) -> Option<Note> {
    Some(Note { kind, subject, data })
}
