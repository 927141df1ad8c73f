//! What a change makes of a record.

use super::Change;
use crate::guest::{Guest, GuestStatus};
use crate::instance::{Instance, InstanceState, Lease, Wanted};
use crate::invite::{Invite, InviteStatus};
use crate::remote::Remote;
use crate::request::{KEPT_MAX, Verdict};
use crate::words::{EgressBytes, LlmTokens, Time, Usage};

impl Invite {
    /// The record after a change to it; other changes leave it as it is.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::InviteRedeemed { guest, by, at, .. } => {
                self.status = InviteStatus::Redeemed;
                self.guest_id = Some(guest.clone());
                self.redeemed_by = Some(by.clone());
                self.redeemed_at = Some(*at);
            }
            Change::InviteRevoked { .. } => self.status = InviteStatus::Revoked,
            Change::InviteExpired { .. } => self.status = InviteStatus::Expired,
            _ => {}
        }
    }
}

impl Guest {
    /// The record after a change to it; other changes leave it as it is.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::GuestActivated { vm_id, agent_endpoint, .. } => {
                self.status = GuestStatus::Running;
                self.vm_id = Some(vm_id.clone());
                self.agent_endpoint = agent_endpoint.clone();
                self.provision_error = None;
            }
            Change::GuestMoved { to, at, .. } => {
                debug_assert!(self.status.may_become(*to), "{:?} to {to:?}", self.status);
                self.status = *to;
                if *to != GuestStatus::Frozen {
                    self.frozen_by_limit = false;
                }
                if !to.is_live() {
                    self.stopped_at = Some(*at);
                    self.agent_endpoint = None;
                }
            }
            Change::ProvisionFailed { reason, .. } => self.provision_error = Some(reason.clone()),
            Change::UsageReported { usage, .. } => self.reported = *usage,
            Change::LimitsExceeded { froze, .. } => {
                self.limits_exceeded = true;
                self.frozen_by_limit |= froze;
            }
            Change::LimitsEased { .. } => self.limits_exceeded = false,
            Change::GuestLimits { limits, expires_at, .. } => {
                self.limits = **limits;
                self.expires_at = *expires_at;
            }
            Change::RequestRaised { request, .. } => {
                if self.requests.len() >= KEPT_MAX {
                    let old = self.requests.iter().position(|r| r.verdict != Verdict::Open);
                    self.requests.remove(old.unwrap_or(0));
                }
                self.requests.push((**request).clone());
            }
            Change::RequestDecided { number, granted, .. } => {
                let verdict = if *granted { Verdict::Granted } else { Verdict::Denied };
                let decided = self.requests.iter_mut().filter(|r| r.number == *number);
                decided.for_each(|r| r.verdict = verdict);
            }
            Change::KillVerified { receipt, .. } => self.receipt = Some((**receipt).clone()),
            _ => {}
        }
    }
}

impl Instance {
    /// The record after a change to it; other changes leave it as it is.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::InstanceWanted { wanted, at, .. } => {
                // Gone is final: no later wish takes it back.
                if self.wanted != Wanted::Gone {
                    self.wanted = *wanted;
                    if *wanted == Wanted::Gone {
                        // What was wrong before is nothing that resists its end.
                        self.last_error = None;
                    }
                }
                self.retry_at = None;
                self.updated_at = *at;
            }
            Change::InstanceStarts { at, .. } => {
                self.wanted = Wanted::Running;
                self.state = InstanceState::Starting;
                self.enabled = true;
                self.attempts = 0;
                self.retry_at = None;
                self.last_error = None;
                self.exit = None;
                self.boot_id = None;
                self.forget_boot();
                self.updated_at = *at;
            }
            Change::InstanceDisabled { at, .. } => {
                self.enabled = false;
                self.updated_at = *at;
            }
            Change::InstancePort { guest_port, public_port, .. } => {
                for expose in &mut self.spec.exposes {
                    if expose.guest_port == *guest_port {
                        expose.public_port = Some(*public_port);
                    }
                }
            }
            Change::InstanceRuns { boot_id, at, .. } => {
                self.state = InstanceState::Running;
                self.boot_id = Some(boot_id.clone());
                // Its clock goes on: how long ago it stood still is no part of a later end.
                self.frozen_at = None;
                self.attempts = 0;
                self.retry_at = None;
                self.last_error = None;
                self.updated_at = *at;
            }
            Change::InstanceFroze { to, at, .. } => {
                self.state = *to;
                self.frozen_at = Some(*at);
                self.updated_at = *at;
            }
            Change::InstanceUsed { usage, .. } => self.usage_boot = *usage,
            Change::EgressAllowed { ceiling, .. } => {
                self.egress_allowed = *ceiling;
                self.egress_version += 1;
            }
            Change::EgressCalledBack { .. } => self.egress_version += 1,
            Change::EgressSet { egress, at, .. } => {
                self.egress = (**egress).clone();
                self.updated_at = *at;
            }
            Change::InstanceEnvelope { envelope, ends_at, at, .. } => {
                self.envelope = **envelope;
                self.ends_at = *ends_at;
                self.updated_at = *at;
            }
            Change::BootFailed { attempts, retry_at, message, at, .. } => {
                self.attempts = *attempts;
                self.retry_at = Some(*retry_at);
                self.last_error = Some(message.clone());
                self.updated_at = *at;
            }
            Change::InstanceEnded { exit, .. } => {
                self.exit = Some(exit.clone());
                self.updated_at = exit.at;
            }
            Change::InstanceCleared { usage, stopped, at, .. } => {
                self.fold(*usage, *at);
                self.frozen_at = None;
                if *stopped {
                    self.state = InstanceState::Stopped;
                    self.stopped_at = Some(*at);
                } else {
                    self.state = InstanceState::Starting;
                }
            }
            Change::DestroyFailed { message, .. } => self.last_error = Some(message.clone()),
            Change::InstanceDestroyed { end, usage } => {
                self.fold(*usage, end.destroyed_at);
                self.state = InstanceState::Gone;
                self.stopped_at = self.stopped_at.or(Some(end.destroyed_at));
                self.end = Some(end.clone());
                self.last_error = None;
            }
            Change::InstanceAbsorbed { usage, .. } => {
                self.usage_below = self.usage_below.and(*usage);
            }
            Change::VmIntended { at, .. } => self.in_cloud(|r| r.intended_at = Some(*at)),
            Change::VmClaimed { vm, unclear_at, .. } => self.in_cloud(|r| {
                r.vm = Some(vm.clone());
                r.intended_at = None;
                unclear_at.iter().for_each(|at| r.note_unclear(*at));
            }),
            Change::VmAbsent { unclear_at, .. } => self.in_cloud(|r| {
                r.vm = None;
                r.intended_at = None;
                unclear_at.iter().for_each(|at| r.note_unclear(*at));
            }),
            Change::InstanceLabelled { labels, at, .. } => {
                self.lent = Some(labels.clone());
                self.updated_at = *at;
            }
            Change::InstanceToken { jti, .. } => self.jti = Some(jti.clone()),
            Change::LeaseHeld { reason, expires_at, .. } => {
                self.lease = Some(Lease { reason: reason.clone(), expires_at: *expires_at });
            }
            Change::LeaseReleased { .. } => self.lease = None,
            Change::InstanceSecrets { secrets, at, .. } => {
                self.spec.given.secrets = secrets.clone();
                self.updated_at = *at;
            }
            Change::TokensReserved { amount, .. } => {
                self.tokens_reserved = self.tokens_reserved.saturating_add(amount.0);
            }
            Change::TokensSettled { reserved, spent, .. } => {
                self.tokens_reserved = self.tokens_reserved.saturating_sub(reserved.0);
                // Also after the boot in which it began: this one's sum is folded at its end.
                let tokens = &mut self.usage_boot.tokens;
                *tokens = LlmTokens(tokens.0.saturating_add(spent.0.min(reserved.0)));
            }
            Change::InstanceExposed { expose, at, .. } => {
                self.spec.exposes.retain(|e| e.guest_port != expose.guest_port);
                self.spec.exposes.push(*expose);
                self.updated_at = *at;
            }
            Change::InstanceUnexposed { guest_port, at, .. } => {
                self.spec.exposes.retain(|e| e.guest_port != *guest_port);
                self.updated_at = *at;
            }
            _ => {}
        }
    }

    fn in_cloud(&mut self, change: impl FnOnce(&mut Remote)) {
        if let Some(remote) = &mut self.remote {
            change(remote);
        }
    }

    /// What a machine was given dies with it.
    fn forget_boot(&mut self) {
        self.jti = None;
        self.lease = None;
    }

    /// A boot is over: its usage counts among the past ones.
    fn fold(&mut self, usage: Usage, at: Time) {
        self.usage_past = self.usage_past.and(self.usage_boot.at_least(usage));
        self.usage_boot = Usage::default();
        self.egress_allowed = EgressBytes(0);
        self.boot_id = None;
        self.forget_boot();
        self.updated_at = at;
    }
}
