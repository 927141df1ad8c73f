//! The JSON inside of rows. Fields are only ever added, with a default.

use std::collections::BTreeMap;

use aegis_rules::capability::Capabilities;
use aegis_rules::egress::AllowList;
use aegis_rules::guest::{Guest, Provisioner};
use aegis_rules::instance::{Exit, Expose, IdlePolicy, Instance, Lease, Origin, Protocol, Spec};
use aegis_rules::invite::{Invite, Offer};
use aegis_rules::kill::{MachineEnd, Receipt};
use aegis_wire::words::{
    BadWord, CommitId, CpuMillis, DiskBytes, DurationMs, EgressBytes, Handle, ImageRef, InstanceId,
    Limits, LlmTokens, MemoryMb, OnLimit, Permissions, Port, PublicKey, Share, Time, Usage,
};
use serde::{Deserialize, Serialize};

use super::given::{GivenRow, models};
use super::reach::{EgressRow, RequestRow};
use super::remote::RemoteRow;

#[derive(Serialize, Deserialize)]
pub(super) struct LimitsRow {
    cpu_millis: CpuMillis,
    memory_mb: MemoryMb,
    disk_bytes: DiskBytes,
    egress_bytes: EgressBytes,
    duration_ms: DurationMs,
    tokens: LlmTokens,
}

impl From<Limits> for LimitsRow {
    fn from(l: Limits) -> LimitsRow {
        LimitsRow {
            cpu_millis: l.cpu,
            memory_mb: l.memory,
            disk_bytes: l.disk,
            egress_bytes: l.egress,
            duration_ms: l.duration,
            tokens: l.tokens,
        }
    }
}

impl From<LimitsRow> for Limits {
    fn from(r: LimitsRow) -> Limits {
        Limits {
            cpu: r.cpu_millis,
            memory: r.memory_mb,
            disk: r.disk_bytes,
            egress: r.egress_bytes,
            duration: r.duration_ms,
            tokens: r.tokens,
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct PermissionsRow {
    internet: bool,
    spawn: bool,
    host_services: bool,
}

impl From<Permissions> for PermissionsRow {
    fn from(p: Permissions) -> PermissionsRow {
        PermissionsRow { internet: p.internet, spawn: p.spawn, host_services: p.host_services }
    }
}

impl From<PermissionsRow> for Permissions {
    fn from(r: PermissionsRow) -> Permissions {
        Permissions { internet: r.internet, spawn: r.spawn, host_services: r.host_services }
    }
}

#[derive(Default, Serialize, Deserialize)]
pub(super) struct UsageRow {
    cpu_ns: u64,
    memory_peak_bytes: u64,
    disk_bytes: u64,
    egress_bytes: u64,
    tokens: u64,
    uptime_ms: u64,
}

impl From<Usage> for UsageRow {
    fn from(u: Usage) -> UsageRow {
        UsageRow {
            cpu_ns: u.cpu_ns,
            memory_peak_bytes: u.memory_peak_bytes,
            disk_bytes: u.disk_bytes,
            egress_bytes: u.egress.0,
            tokens: u.tokens.0,
            uptime_ms: u.uptime.0,
        }
    }
}

impl From<UsageRow> for Usage {
    fn from(r: UsageRow) -> Usage {
        Usage {
            cpu_ns: r.cpu_ns,
            memory_peak_bytes: r.memory_peak_bytes,
            disk_bytes: r.disk_bytes,
            egress: EgressBytes(r.egress_bytes),
            tokens: LlmTokens(r.tokens),
            uptime: DurationMs(r.uptime_ms),
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct OfferRow {
    limits: LimitsRow,
    permissions: PermissionsRow,
    golden: Option<ImageRef>,
    agent_port: Option<Port>,
    egress_allow: Option<AllowList>,
    host_services: Vec<String>,
    #[serde(default)]
    llm_models: Option<Vec<String>>,
    spawn_depth: Option<u32>,
    max_children: Option<u32>,
    #[serde(default)]
    root_share: Option<Share>,
    on_limit: Option<String>,
}

impl OfferRow {
    pub(super) fn of(i: &Invite) -> OfferRow {
        OfferRow {
            limits: i.limits.into(),
            permissions: i.permissions.into(),
            golden: i.offer.golden.clone(),
            agent_port: i.offer.agent_port,
            egress_allow: i.offer.egress_allow.clone(),
            host_services: i.offer.host_services.clone(),
            llm_models: i.offer.llm_models.as_ref().map(|m| m.texts().to_vec()),
            spawn_depth: i.offer.spawn_depth,
            max_children: i.offer.max_children,
            root_share: i.offer.root_share,
            on_limit: i.offer.on_limit.map(|o| o.word().to_owned()),
        }
    }

    pub(super) fn into_words(self) -> (Limits, Permissions, Offer) {
        let offer = Offer {
            golden: self.golden,
            agent_port: self.agent_port,
            egress_allow: self.egress_allow,
            host_services: self.host_services,
            llm_models: models(self.llm_models),
            spawn_depth: self.spawn_depth,
            max_children: self.max_children,
            root_share: self.root_share,
            on_limit: self.on_limit.as_deref().and_then(OnLimit::parse),
        };
        (self.limits.into(), self.permissions.into(), offer)
    }
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ProvisionerRow {
    Local,
    Manual,
    Vers,
}

impl From<ProvisionerRow> for Provisioner {
    fn from(r: ProvisionerRow) -> Provisioner {
        match r {
            ProvisionerRow::Local => Provisioner::Local,
            ProvisionerRow::Manual => Provisioner::Manual,
            ProvisionerRow::Vers => Provisioner::Vers,
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct EndRow {
    id: InstanceId,
    frozen_at: Option<i64>,
    destroyed_at: i64,
    verified: Vec<String>,
}

impl From<&MachineEnd> for EndRow {
    fn from(e: &MachineEnd) -> EndRow {
        EndRow {
            id: e.id.clone(),
            frozen_at: e.frozen_at.map(|t| t.0),
            destroyed_at: e.destroyed_at.0,
            verified: e.verified.clone(),
        }
    }
}

impl From<EndRow> for MachineEnd {
    fn from(r: EndRow) -> MachineEnd {
        MachineEnd {
            id: r.id,
            frozen_at: r.frozen_at.map(Time),
            destroyed_at: Time(r.destroyed_at),
            verified: r.verified,
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct ReceiptRow {
    machines: Vec<EndRow>,
    elapsed_ms: u64,
    hash: String,
}

impl From<ReceiptRow> for Receipt {
    fn from(r: ReceiptRow) -> Receipt {
        Receipt {
            machines: r.machines.into_iter().map(Into::into).collect(),
            elapsed: DurationMs(r.elapsed_ms),
            hash: r.hash,
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct GuestDetail {
    pub(super) public_key: Option<PublicKey>,
    pub(super) idempotency: Option<[u8; 32]>,
    pub(super) provisioner: ProvisionerRow,
    pub(super) limits: LimitsRow,
    pub(super) permissions: PermissionsRow,
    pub(super) vm_id: Option<String>,
    pub(super) agent_endpoint: Option<String>,
    pub(super) provision_error: Option<String>,
    pub(super) reported: UsageRow,
    pub(super) limits_exceeded: bool,
    #[serde(default)]
    pub(super) on_limit: Option<String>,
    #[serde(default)]
    pub(super) frozen_by_limit: bool,
    #[serde(default)]
    pub(super) requests: Vec<RequestRow>,
    pub(super) receipt: Option<ReceiptRow>,
}

impl GuestDetail {
    pub(super) fn of(g: &Guest) -> GuestDetail {
        GuestDetail {
            public_key: g.public_key.clone(),
            idempotency: g.idempotency.map(|h| h.0),
            provisioner: match g.provisioner {
                Provisioner::Local => ProvisionerRow::Local,
                Provisioner::Manual => ProvisionerRow::Manual,
                Provisioner::Vers => ProvisionerRow::Vers,
            },
            limits: g.limits.into(),
            permissions: g.permissions.into(),
            vm_id: g.vm_id.clone(),
            agent_endpoint: g.agent_endpoint.clone(),
            provision_error: g.provision_error.clone(),
            reported: g.reported.into(),
            limits_exceeded: g.limits_exceeded,
            on_limit: g.on_limit.map(|o| o.word().to_owned()),
            frozen_by_limit: g.frozen_by_limit,
            requests: g.requests.iter().map(Into::into).collect(),
            receipt: g.receipt.as_ref().map(|r| ReceiptRow {
                machines: r.machines.iter().map(Into::into).collect(),
                elapsed_ms: r.elapsed.0,
                hash: r.hash.clone(),
            }),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct ExposeRow {
    guest_port: Port,
    public_port: Option<Port>,
    protocol: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct SpecRow {
    handle: Option<Handle>,
    image: ImageRef,
    command: Vec<String>,
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    cpu_millis: CpuMillis,
    memory_mb: MemoryMb,
    disk_bytes: DiskBytes,
    exposes: Vec<ExposeRow>,
    await_port: Option<Port>,
    idle_policy: String,
    authorized_key: Option<String>,
    #[serde(default)]
    given: GivenRow,
    #[serde(default)]
    origin: Option<OriginRow>,
    #[serde(default)]
    attach: bool,
}

#[derive(Serialize, Deserialize)]
struct OriginRow {
    commit: CommitId,
    memory: bool,
}

impl SpecRow {
    pub(super) fn of(s: &Spec) -> SpecRow {
        SpecRow {
            handle: s.handle.clone(),
            image: s.image.clone(),
            command: s.command.clone(),
            env: s.env.clone(),
            cwd: s.cwd.clone(),
            cpu_millis: s.cpu,
            memory_mb: s.memory,
            disk_bytes: s.disk,
            exposes: s
                .exposes
                .iter()
                .map(|e| ExposeRow {
                    guest_port: e.guest_port,
                    public_port: e.public_port,
                    protocol: e.protocol.word().to_owned(),
                })
                .collect(),
            await_port: s.await_port,
            idle_policy: s.idle_policy.word().to_owned(),
            authorized_key: s.authorized_key.clone(),
            given: (&s.given).into(),
            origin: s
                .origin
                .as_ref()
                .map(|o| OriginRow { commit: o.commit.clone(), memory: o.memory }),
            attach: s.attach,
        }
    }

    pub(super) fn into_words(self) -> Result<Spec, BadWord> {
        Ok(Spec {
            handle: self.handle,
            image: self.image,
            command: self.command,
            env: self.env,
            cwd: self.cwd,
            cpu: self.cpu_millis,
            memory: self.memory_mb,
            disk: self.disk_bytes,
            exposes: self
                .exposes
                .into_iter()
                .map(|e| {
                    let protocol = Protocol::parse(&e.protocol)
                        .ok_or(BadWord::new("protocol", "http or tcp"))?;
                    let ExposeRow { guest_port, public_port, .. } = e;
                    Ok(Expose { guest_port, public_port, protocol })
                })
                .collect::<Result<_, BadWord>>()?,
            await_port: self.await_port,
            idle_policy: IdlePolicy::parse(&self.idle_policy)
                .ok_or(BadWord::new("idle policy", "default or leave-running"))?,
            authorized_key: self.authorized_key,
            given: self.given.into_words()?,
            origin: self.origin.map(|o| Origin { commit: o.commit, memory: o.memory }),
            attach: self.attach,
        })
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct ExitRow {
    code: Option<i32>,
    message: String,
    at: i64,
}

impl From<ExitRow> for Exit {
    fn from(r: ExitRow) -> Exit {
        Exit { code: r.code, message: r.message, at: Time(r.at) }
    }
}

/// What is missing is not allowed.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct CapabilitiesRow {
    spawn: bool,
    spawn_depth: u32,
    max_children: u32,
    allowed_images: Vec<String>,
    max_memory_mb: MemoryMb,
    max_vcpus: u32,
    allowed_secrets: Vec<String>,
    allowed_workspaces: Vec<String>,
    max_expose_ports: u32,
}

impl From<&Capabilities> for CapabilitiesRow {
    fn from(c: &Capabilities) -> CapabilitiesRow {
        CapabilitiesRow {
            spawn: c.spawn,
            spawn_depth: c.spawn_depth,
            max_children: c.max_children,
            allowed_images: c.allowed_images.clone(),
            max_memory_mb: c.max_memory,
            max_vcpus: c.max_vcpus,
            allowed_secrets: c.allowed_secrets.clone(),
            allowed_workspaces: c.allowed_workspaces.clone(),
            max_expose_ports: c.max_expose_ports,
        }
    }
}

impl From<CapabilitiesRow> for Capabilities {
    fn from(r: CapabilitiesRow) -> Capabilities {
        Capabilities {
            spawn: r.spawn,
            spawn_depth: r.spawn_depth,
            max_children: r.max_children,
            allowed_images: r.allowed_images,
            max_memory: r.max_memory_mb,
            max_vcpus: r.max_vcpus,
            allowed_secrets: r.allowed_secrets,
            allowed_workspaces: r.allowed_workspaces,
            max_expose_ports: r.max_expose_ports,
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct LeaseRow {
    reason: Option<String>,
    expires_at: i64,
}

impl From<LeaseRow> for Lease {
    fn from(r: LeaseRow) -> Lease {
        Lease { reason: r.reason, expires_at: Time(r.expires_at) }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct InstanceDetail {
    pub(super) enabled: bool,
    pub(super) attempts: u32,
    pub(super) retry_at: Option<i64>,
    pub(super) last_error: Option<String>,
    pub(super) boot_id: Option<String>,
    pub(super) usage_past: UsageRow,
    pub(super) usage_boot: UsageRow,
    pub(super) exit: Option<ExitRow>,
    pub(super) frozen_at: Option<i64>,
    pub(super) end: Option<EndRow>,
    pub(super) stopped_at: Option<i64>,
    #[serde(default)]
    pub(super) capabilities: CapabilitiesRow,
    /// Rows of schema 1 had none; the migration gave them one.
    pub(super) envelope: LimitsRow,
    #[serde(default)]
    pub(super) jti: Option<String>,
    #[serde(default)]
    pub(super) lease: Option<LeaseRow>,
    #[serde(default)]
    pub(super) usage_below: UsageRow,
    #[serde(default)]
    pub(super) egress: EgressRow,
    #[serde(default)]
    pub(super) egress_allowed: u64,
    #[serde(default)]
    pub(super) egress_version: u64,
    #[serde(default)]
    pub(super) tokens_reserved: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) remote: Option<RemoteRow>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) lent: Option<BTreeMap<String, String>>,
}

impl InstanceDetail {
    pub(super) fn of(i: &Instance) -> InstanceDetail {
        InstanceDetail {
            enabled: i.enabled,
            attempts: i.attempts,
            retry_at: i.retry_at.map(|t| t.0),
            last_error: i.last_error.clone(),
            boot_id: i.boot_id.clone(),
            usage_past: i.usage_past.into(),
            usage_boot: i.usage_boot.into(),
            exit: i.exit.as_ref().map(|e| ExitRow {
                code: e.code,
                message: e.message.clone(),
                at: e.at.0,
            }),
            frozen_at: i.frozen_at.map(|t| t.0),
            end: i.end.as_ref().map(Into::into),
            stopped_at: i.stopped_at.map(|t| t.0),
            capabilities: (&i.capabilities).into(),
            envelope: i.envelope.into(),
            jti: i.jti.clone(),
            lease: i
                .lease
                .as_ref()
                .map(|l| LeaseRow { reason: l.reason.clone(), expires_at: l.expires_at.0 }),
            usage_below: i.usage_below.into(),
            egress: (&i.egress).into(),
            egress_allowed: i.egress_allowed.0,
            egress_version: i.egress_version,
            tokens_reserved: i.tokens_reserved,
            remote: i.remote.as_ref().map(Into::into),
            lent: i.lent.clone(),
        }
    }
}
