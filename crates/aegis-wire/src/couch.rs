//! camelCase shapes of `/couch` (contracts/couch.md), and how requests become the rules' words.
//!
//! Requests are read field by field, so that every refusal names its field and what would pass.

mod ask;
mod event;

pub use ask::{activate, create_invite, redeem, usage};
pub use event::{Event, EventKind};

use serde::{Serialize, Serializer};

use crate::words::{Limit, Limits, Permissions, Share, Time, Usage};
use aegis_rules::egress::AllowList;
use aegis_rules::exceed;
use aegis_rules::guest::Guest;
use aegis_rules::invite::Invite;
use aegis_rules::kill::Receipt;

/// A number that is written without a point when it is whole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amount(pub f64);

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        const EXACT: f64 = 9_007_199_254_740_992.0;
        if self.0.fract() == 0.0 && self.0.abs() <= EXACT {
            s.serialize_i64(self.0 as i64)
        } else {
            s.serialize_f64(self.0)
        }
    }
}

/// `resourceLimits`
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct ResourceLimits {
    pub max_cpu_cores: Amount,
    #[serde(rename = "maxMemoryMB")]
    pub max_memory_mb: Amount,
    #[serde(rename = "maxDiskGB")]
    pub max_disk_gb: Amount,
    #[serde(rename = "maxNetworkEgressGB")]
    pub max_network_egress_gb: Amount,
    pub max_duration_hours: Amount,
    pub max_token_budget: Amount,
}

impl From<&Limits> for ResourceLimits {
    fn from(limits: &Limits) -> ResourceLimits {
        let amount = |limit| Amount(limits.get(limit));
        ResourceLimits {
            max_cpu_cores: amount(Limit::Cpu),
            max_memory_mb: amount(Limit::Memory),
            max_disk_gb: amount(Limit::Disk),
            max_network_egress_gb: amount(Limit::Egress),
            max_duration_hours: amount(Limit::Duration),
            max_token_budget: amount(Limit::Tokens),
        }
    }
}

/// `permissions`
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct PermissionsShape {
    pub can_access_internet: bool,
    pub can_spawn_sub_agents: bool,
    pub can_access_host_services: bool,
}

impl From<&Permissions> for PermissionsShape {
    fn from(p: &Permissions) -> PermissionsShape {
        PermissionsShape {
            can_access_internet: p.internet,
            can_spawn_sub_agents: p.spawn,
            can_access_host_services: p.host_services,
        }
    }
}

/// `resourceUsage`
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct ResourceUsage {
    pub cpu_seconds: Amount,
    #[serde(rename = "memoryPeakMB")]
    pub memory_peak_mb: Amount,
    #[serde(rename = "diskUsedGB")]
    pub disk_used_gb: Amount,
    #[serde(rename = "networkEgressGB")]
    pub network_egress_gb: Amount,
    pub tokens_used: Amount,
    pub uptime_seconds: Amount,
}

impl From<&Usage> for ResourceUsage {
    fn from(usage: &Usage) -> ResourceUsage {
        ResourceUsage {
            cpu_seconds: Amount(usage.cpu_ns as f64 / 1e9),
            memory_peak_mb: Amount(usage.memory_peak_mb() as f64),
            disk_used_gb: Amount(usage.disk_bytes as f64 / 1e9),
            network_egress_gb: Amount(usage.egress.gb()),
            tokens_used: Amount(usage.tokens.0 as f64),
            uptime_seconds: Amount(usage.uptime.seconds()),
        }
    }
}

/// An invite (section 2). `code` is a secret of the host and whom it gives it to.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct InviteShape {
    pub id: String,
    pub code: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    pub status: &'static str,
    pub resource_limits: ResourceLimits,
    pub permissions: PermissionsShape,
    pub created_by: String,
    pub created_at: Time,
    pub expires_at: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redeemed_at: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redeemed_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub golden: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_allow: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub host_services: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub llm_models: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spawn_depth: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_children: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root_share: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_limit: Option<&'static str>,
}

impl InviteShape {
    /// The invite as it stands now, with its code.
    pub fn new(invite: &Invite, code: String, now: Time) -> InviteShape {
        InviteShape {
            id: invite.id.to_string(),
            code,
            label: invite.label.as_ref().map(ToString::to_string),
            status: invite.status_at(now).word(),
            resource_limits: (&invite.limits).into(),
            permissions: (&invite.permissions).into(),
            created_by: invite.created_by.to_string(),
            created_at: invite.created_at,
            expires_at: invite.expires_at,
            redeemed_at: invite.redeemed_at,
            redeemed_by: invite.redeemed_by.as_ref().map(ToString::to_string),
            guest_id: invite.guest_id.as_ref().map(ToString::to_string),
            golden: invite.offer.golden.as_ref().map(ToString::to_string),
            agent_port: invite.offer.agent_port.map(|p| p.get()),
            egress_allow: invite.offer.egress_allow.as_ref().map(AllowList::texts),
            host_services: invite.offer.host_services.clone(),
            llm_models: invite.offer.llm_models.as_ref().map(|m| m.texts().to_vec()),
            spawn_depth: invite.offer.spawn_depth,
            max_children: invite.offer.max_children,
            root_share: invite.offer.root_share.map(Share::part),
            on_limit: invite.offer.on_limit.map(|o| o.word()),
        }
    }
}

/// The answer to a redeem (section 3).
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct RedeemedShape {
    pub guest_id: String,
    pub status: &'static str,
    pub auth_token: String,
    pub resource_limits: ResourceLimits,
    pub permissions: PermissionsShape,
    pub expires_at: Time,
    pub agent_endpoint: Option<String>,
}

impl RedeemedShape {
    /// The guest with its token.
    pub fn new(guest: &Guest, auth_token: String, now: Time) -> RedeemedShape {
        RedeemedShape {
            guest_id: guest.id.to_string(),
            status: guest.status_at(now).word(),
            auth_token,
            resource_limits: (&guest.limits).into(),
            permissions: (&guest.permissions).into(),
            expires_at: guest.expires_at,
            agent_endpoint: guest.agent_endpoint.clone(),
        }
    }
}

/// What a guest sees of itself (section 4).
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct OwnStatus {
    pub guest_id: String,
    pub name: String,
    pub status: &'static str,
    pub vm_id: Option<String>,
    pub agent_endpoint: Option<String>,
    pub resource_limits: ResourceLimits,
    pub permissions: PermissionsShape,
    pub resource_usage: ResourceUsage,
    pub expires_at: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provision_error: Option<String>,
}

impl OwnStatus {
    /// The guest as it stands now.
    pub fn new(guest: &Guest, usage: &Usage, now: Time) -> OwnStatus {
        OwnStatus {
            guest_id: guest.id.to_string(),
            name: guest.name.to_string(),
            status: guest.status_at(now).word(),
            vm_id: guest.vm_id.clone(),
            agent_endpoint: guest.agent_endpoint.clone(),
            resource_limits: (&guest.limits).into(),
            permissions: (&guest.permissions).into(),
            resource_usage: usage.into(),
            expires_at: guest.expires_at,
            provision_error: guest.provision_error.clone(),
        }
    }
}

/// A guest as the host sees it in lists (section 1): neither token nor its hash.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct GuestShape {
    pub id: String,
    pub invite_id: String,
    pub name: String,
    pub status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_endpoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    pub resource_limits: ResourceLimits,
    pub permissions: PermissionsShape,
    pub resource_usage: ResourceUsage,
    pub created_at: Time,
    pub expires_at: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provision_error: Option<String>,
}

impl GuestShape {
    /// The guest as it stands now.
    pub fn new(guest: &Guest, usage: &Usage, now: Time) -> GuestShape {
        GuestShape {
            id: guest.id.to_string(),
            invite_id: guest.invite.to_string(),
            name: guest.name.to_string(),
            status: guest.status_at(now).word(),
            vm_id: guest.vm_id.clone(),
            agent_endpoint: guest.agent_endpoint.clone(),
            public_key: guest.public_key.as_ref().map(|k| k.as_str().to_owned()),
            resource_limits: (&guest.limits).into(),
            permissions: (&guest.permissions).into(),
            resource_usage: usage.into(),
            created_at: guest.created_at,
            expires_at: guest.expires_at,
            stopped_at: guest.stopped_at,
            provision_error: guest.provision_error.clone(),
        }
    }
}

/// Usage and limits of one guest (section 5).
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct GuestStatusShape {
    pub id: String,
    pub name: String,
    pub status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_endpoint: Option<String>,
    pub resource_usage: ResourceUsage,
    pub resource_limits: ResourceLimits,
    pub limits_exceeded: bool,
    pub violations: Vec<String>,
    pub created_at: Time,
    pub expires_at: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provision_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<ReceiptShape>,
}

impl GuestStatusShape {
    /// The guest as it stands now.
    pub fn new(guest: &Guest, usage: &Usage, now: Time) -> GuestStatusShape {
        let until = guest.stopped_at.unwrap_or(now);
        let violations = exceed::violations(guest, usage, until);
        GuestStatusShape {
            id: guest.id.to_string(),
            name: guest.name.to_string(),
            status: guest.status_at(now).word(),
            vm_id: guest.vm_id.clone(),
            agent_endpoint: guest.agent_endpoint.clone(),
            resource_usage: usage.into(),
            resource_limits: (&guest.limits).into(),
            limits_exceeded: guest.limits_exceeded || !violations.is_empty(),
            violations: violations.iter().map(ToString::to_string).collect(),
            created_at: guest.created_at,
            expires_at: guest.expires_at,
            stopped_at: guest.stopped_at,
            provision_error: guest.provision_error.clone(),
            receipt: guest.receipt.as_ref().map(Into::into),
        }
    }
}

/// Answer to `PUT usage`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct UsageShape {
    pub id: String,
    pub resource_usage: ResourceUsage,
    pub limits_exceeded: bool,
    pub violations: Vec<String>,
}

impl UsageShape {
    /// Usage of a guest as it stands now.
    pub fn new(guest: &Guest, usage: &Usage, now: Time) -> UsageShape {
        let violations = exceed::violations(guest, usage, now);
        UsageShape {
            id: guest.id.to_string(),
            resource_usage: usage.into(),
            limits_exceeded: guest.limits_exceeded || !violations.is_empty(),
            violations: violations.iter().map(ToString::to_string).collect(),
        }
    }
}

/// The receipt of a kill (section 7).
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct ReceiptShape {
    pub machines: Vec<MachineEndShape>,
    pub elapsed_ms: u64,
    pub hash: String,
}

/// One machine in a receipt.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct MachineEndShape {
    pub id: String,
    pub frozen_at: Option<Time>,
    pub destroyed_at: Time,
    pub verified: Vec<String>,
}

impl From<&Receipt> for ReceiptShape {
    fn from(receipt: &Receipt) -> ReceiptShape {
        ReceiptShape {
            machines: receipt
                .machines
                .iter()
                .map(|m| MachineEndShape {
                    id: m.id.to_string(),
                    frozen_at: m.frozen_at,
                    destroyed_at: m.destroyed_at,
                    verified: m.verified.clone(),
                })
                .collect(),
            elapsed_ms: receipt.elapsed.0,
            hash: receipt.hash.clone(),
        }
    }
}

/// Answer to the kill switch (section 1); without a receipt the destruction still goes on.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct KilledShape {
    pub id: String,
    pub status: &'static str,
    pub stopped_at: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<ReceiptShape>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destroying: Option<bool>,
}
