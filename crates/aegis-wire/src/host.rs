//! snake_case shapes of `/v1` on the host socket (contracts/aegis.md 1).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::egress::ServiceName;
use crate::refusal::{Code, Refusal};
use crate::words::{CpuMillis, DiskBytes, Handle, ImageRef, Limit, Limits, MemoryMb, Time};
use aegis_rules::capability::CapabilityAsk;
use aegis_rules::egress::EgressAsk;
use aegis_rules::envelope::EnvelopeAsk;
use aegis_rules::given::{Models, Secrets};
use aegis_rules::instance::{Exit, Expose, IdlePolicy, Instance};

mod commits;
mod exec;
mod given;
mod ports;
mod reach;
mod tree;
mod workspace;

pub use commits::{CommitBody, CommitShape, FORKS_MAX, Fork, ForkBody};
pub use exec::{ATTACHED_STDERR, ATTACHED_STDOUT, AttachBody, AttachControl, Exec, ExecBody};
use exec::{check_command, check_cwd, check_env};
pub(crate) use given::services;
pub use given::{SecretBody, SecretList, SecretShape, SecretsBody};
pub(crate) use ports::check_reachable;
use ports::exposes;
pub use ports::{Endpoint, ExposeBody};
pub use reach::{
    AccessBody, AccessShape, DenialShape, EgressBody, EgressShape, RaiseBody, requests,
};
pub use tree::{
    AuditRow, CapabilityBody, CapabilityShape, ChildShape, EnvelopeBody, EnvelopeShape, LeaseShape,
    LimitsShape, SelfShape,
};
pub use workspace::{WorkspaceAsk, WorkspaceList, WorkspaceShape};

/// Body of `POST /v1/instances`, of a host and of a machine, as it comes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateBody {
    /// The primary process; required for a new one.
    #[serde(default)]
    pub command: Option<Vec<String>>,
    /// The host's name for it.
    #[serde(default)]
    pub handle: Option<String>,
    /// The image; else the configured one.
    #[serde(default)]
    pub image_ref: Option<String>,
    /// Its environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Its working directory.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Ports: `[8080]` or `[{"port":8080,"public_port"?:n,"protocol"?:"http|tcp"}]`.
    #[serde(default)]
    pub exposes: Vec<Value>,
    /// MiB.
    #[serde(default)]
    pub memory_mb: Option<f64>,
    /// Cores, fractions allowed.
    #[serde(default)]
    pub vcpus: Option<f64>,
    /// GB of 10^9 bytes, fractions allowed.
    #[serde(default)]
    pub disk_gb: Option<f64>,
    /// `default` or `leave-running`.
    #[serde(default)]
    pub idle_policy: Option<String>,
    /// Names of secrets that it gets; `["*"]` is all that there are.
    #[serde(default)]
    pub secrets: Vec<String>,
    /// Names of host services that it may use; none when absent, and its parent's for a child.
    #[serde(default)]
    pub host_services: Option<Vec<String>>,
    /// Models of the LLM door, as patterns; what the host's providers offer when absent.
    #[serde(default)]
    pub llm_models: Option<Vec<String>>,
    /// A directory of the host that it gets as `/workspace`: a name, or a path, and perhaps `:ro`.
    #[serde(default)]
    pub workspace: Option<String>,
    /// What it may do; nothing when absent, and its parent's for a child.
    #[serde(default)]
    pub capabilities: Option<CapabilityBody>,
    /// What it and all below it may hold and spend; as much as there is when absent.
    #[serde(default)]
    pub envelope: Option<EnvelopeBody>,
    /// What it and all below it may reach; all public addresses when absent, and no more than its
    /// parent for a child.
    #[serde(default)]
    pub egress: Option<EgressBody>,
    /// The commit that it starts from: id or name.
    #[serde(default)]
    pub commit: Option<String>,
    /// Boots from the commit's, or the other machine's, disk alone.
    #[serde(default)]
    pub disk_only: bool,
    /// Of a machine: itself (`self`) or a child of it, which is kept as it is now; the new one starts
    /// from that.
    #[serde(default)]
    pub from: Option<String>,
    /// Name of the kit that this comes from: what it may do lies within what the host lets kits have.
    #[serde(default)]
    pub kit: Option<String>,
    /// Its command waits for the host's client, and is that one's: see [`AttachBody::command`].
    #[serde(default)]
    pub attach: bool,
}

/// A request for an instance, parsed; what is absent gets the host's default.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "as in CreateBody")]
pub struct Create {
    pub command: Option<Vec<String>>,
    pub handle: Option<Handle>,
    pub image: Option<ImageRef>,
    pub env: BTreeMap<String, String>,
    pub cwd: Option<String>,
    pub exposes: Vec<Expose>,
    pub memory: Option<MemoryMb>,
    pub cpu: Option<CpuMillis>,
    pub disk: Option<DiskBytes>,
    pub idle_policy: IdlePolicy,
    pub secrets: Secrets,
    pub services: Option<Vec<ServiceName>>,
    pub models: Option<Models>,
    pub workspace: Option<WorkspaceAsk>,
    pub capabilities: CapabilityAsk,
    pub envelope: EnvelopeAsk,
    pub egress: EgressAsk,
    pub commit: Option<String>,
    pub disk_only: bool,
    pub from: Option<String>,
    pub kit: Option<String>,
    pub attach: bool,
}

impl CreateBody {
    /// Parses every field; the first bad one is refused by name.
    pub fn parse(self) -> Result<Create, Refusal> {
        if let Some(command) = &self.command {
            check_command(command, &self.env)?;
        }
        check_env(&self.env)?;
        let workspace = self.workspace.as_deref().map(WorkspaceAsk::parse).transpose()?;
        if self.kit.as_ref().is_some_and(|k| k.is_empty() || k.len() > 255) {
            return Err(Refusal::field("kit", "a name of 1 to 255 bytes"));
        }
        for (field, text) in [("commit", &self.commit), ("from", &self.from)] {
            if text.as_ref().is_some_and(|t| t.is_empty() || t.len() > 64) {
                return Err(Refusal::field(field, "an id or a name"));
            }
        }
        if self.disk_only && self.commit.is_none() && self.from.is_none() {
            return Err(Refusal::field("disk_only", "left out where nothing is started from"));
        }
        let ranged = |name: &str, value: Option<f64>, limit: Limit| match value {
            None => Ok(None),
            Some(value) => {
                let mut limits = Limits::default();
                limits.set(limit, value).map_err(|mut refusal| {
                    refusal.message =
                        refusal.message.replace(&format!("resourceLimits.{}", limit.field()), name);
                    refusal.field = Some(name.to_owned());
                    refusal
                })?;
                Ok(Some(limits))
            }
        };
        let word =
            |name: &'static str| move |e: crate::words::BadWord| Refusal::field(name, e.expected);
        Ok(Create {
            command: self.command,
            handle: self.handle.map(Handle::try_from).transpose().map_err(word("handle"))?,
            image: self.image_ref.map(ImageRef::try_from).transpose().map_err(word("image_ref"))?,
            env: self.env,
            cwd: check_cwd(self.cwd)?,
            exposes: exposes(&self.exposes)?,
            memory: ranged("memory_mb", self.memory_mb, Limit::Memory)?.map(|l| l.memory),
            cpu: ranged("vcpus", self.vcpus, Limit::Cpu)?.map(|l| l.cpu),
            disk: ranged("disk_gb", self.disk_gb, Limit::Disk)?.map(|l| l.disk),
            idle_policy: match self.idle_policy {
                None => IdlePolicy::Default,
                Some(word) => IdlePolicy::parse(&word)
                    .ok_or_else(|| Refusal::field("idle_policy", "default or leave-running"))?,
            },
            secrets: Secrets::parse(&self.secrets)?,
            services: self.host_services.map(|s| services(&s, "host_services")).transpose()?,
            models: self.llm_models.map(|m| Models::parse(m, "llm_models")).transpose()?,
            workspace,
            capabilities: self.capabilities.unwrap_or_default().parse()?,
            envelope: self.envelope.unwrap_or_default().parse()?,
            egress: self.egress.unwrap_or_default().parse("egress")?,
            commit: self.commit,
            disk_only: self.disk_only,
            from: self.from,
            kit: self.kit,
            attach: self.attach,
        })
    }
}

/// An instance in lists and by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct InstanceShape {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<String>,
    pub state: String,
    pub enabled: bool,
    pub command: Vec<String>,
    pub image_ref: String,
    pub parent_id: String,
    pub created_at: Time,
    pub updated_at: Time,
    pub last_active_at: Time,
    pub active_connections: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<Time>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<Endpoint>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_id: Option<String>,
    pub memory_mb: u32,
    pub vcpus: f64,
    pub disk_gb: f64,
    /// What it started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expose_ports: Vec<u16>,
    pub idle_policy: String,
    /// Names of the secrets that it gets at its start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secret_keys: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_services: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub llm_models: Option<Vec<String>>,
    /// The host's directory, and `:ro` where it can't be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitShape>,
    /// Why the last boot failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub usage: UsageShape,
    pub capabilities: CapabilityShape,
    /// Only of an instance by itself: a list would count every tree once per member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envelope: Option<EnvelopeShape>,
    #[serde(flatten)]
    pub lease: LeaseShape,
}

/// How the last machine ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names say it")]
pub struct ExitShape {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    pub message: String,
    pub at: Time,
}

impl ExitShape {
    /// The end of a record's last machine.
    pub fn of(exit: &Exit) -> ExitShape {
        ExitShape { code: exit.code, message: exit.message.clone(), at: exit.at }
    }
}

/// What was measured of an instance over all its boots.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the units are in the names")]
pub struct UsageShape {
    pub cpu_seconds: f64,
    pub memory_peak_mb: u64,
    pub disk_bytes: u64,
    pub uptime_seconds: f64,
    pub tokens: u64,
}

impl InstanceShape {
    /// The instance with what the running daemon knows of its use.
    pub fn new(
        instance: &Instance,
        host: &str,
        active_connections: u64,
        last_active_at: Time,
        now: Time,
    ) -> InstanceShape {
        let usage = instance.usage();
        let spec = &instance.spec;
        InstanceShape {
            id: instance.id.to_string(),
            handle: spec.handle.as_ref().map(ToString::to_string),
            state: instance.state.word().to_owned(),
            enabled: instance.enabled,
            command: spec.command.clone(),
            image_ref: spec.image.to_string(),
            parent_id: instance.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
            created_at: instance.created_at,
            updated_at: instance.updated_at,
            last_active_at,
            active_connections,
            stopped_at: instance.stopped_at.filter(|_| !instance.is_live()),
            endpoints: spec.exposes.iter().filter_map(|e| Endpoint::new(e, host)).collect(),
            guest_id: instance.guest.as_ref().map(ToString::to_string),
            memory_mb: spec.memory.0,
            vcpus: spec.cpu.cores(),
            disk_gb: (spec.disk.gb() * 1e4).round() / 1e4,
            commit: spec.origin.as_ref().map(|origin| origin.commit.to_string()),
            boot_id: instance.boot_id.clone(),
            expose_ports: spec.exposes.iter().map(|e| e.guest_port.get()).collect(),
            idle_policy: spec.idle_policy.word().to_owned(),
            secret_keys: spec.given.secrets.texts(),
            host_services: spec.given.services.iter().map(ToString::to_string).collect(),
            llm_models: spec.given.models.as_ref().map(|m| m.texts().to_vec()),
            workspace: spec.given.workspace.as_ref().map(workspace::shown),
            exit: instance.exit.as_ref().map(ExitShape::of),
            error: instance.last_error.clone(),
            usage: UsageShape {
                cpu_seconds: usage.cpu_ns as f64 / 1e9,
                memory_peak_mb: usage.memory_peak_mb(),
                disk_bytes: usage.disk_bytes,
                uptime_seconds: usage.uptime.seconds(),
                tokens: usage.tokens.0,
            },
            capabilities: CapabilityShape::of(&instance.capabilities),
            envelope: None,
            lease: LeaseShape::of(instance, now),
        }
    }
}

/// Answer to `POST /v1/instances`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct Created {
    pub id: String,
    pub state: String,
    pub command: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_ref: Option<String>,
}

/// Answer to verbs: `{"status": word}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusWord {
    /// What it is now.
    pub status: String,
}

/// Answer to `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct DaemonStatus {
    pub version: String,
    pub backend: String,
    pub isolation: String,
    pub provisioner: String,
    pub capabilities: BackendCapabilities,
    pub listen: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<String>,
    pub started_at: Time,
    pub counts: Counts,
    pub tasks: BTreeMap<String, String>,
}

/// What this backend can do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct BackendCapabilities {
    pub pause_resume: bool,
    pub persistent_pause: bool,
    pub network_backend: String,
    pub accel: String,
    pub cgroups: String,
    pub limits: Vec<String>,
}

/// How many there are.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names say it")]
pub struct Counts {
    pub invites_active: u64,
    pub guests_live: u64,
    pub instances: u64,
    pub machines: u64,
}

/// Parses a JSON body of type `T`, with a refusal that says what serde found.
pub fn body<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Refusal> {
    serde_json::from_value(value).map_err(|e| Refusal::new(Code::InvalidField, e.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_forms_of_exposes_are_taken() {
        let ask: CreateBody = body(json!({
            "command": ["true"],
            "exposes": [8080, {"port": 9090, "public_port": 40000, "protocol": "tcp"}],
        }))
        .unwrap();
        let ask = ask.parse().unwrap();
        assert_eq!(ask.exposes.len(), 2);
        assert_eq!(ask.exposes[1].public_port.unwrap().get(), 40000);
    }

    #[test]
    fn bad_fields_are_named() {
        let field = |value: Value| {
            let mut whole = json!({"command": ["true"]});
            for (k, v) in value.as_object().unwrap() {
                whole[k] = v.clone();
            }
            match body::<CreateBody>(whole).and_then(CreateBody::parse) {
                Ok(_) => panic!("{value} passed"),
                Err(refusal) => refusal.message,
            }
        };
        assert!(field(json!({"handle": "-x"})).contains("handle"));
        assert!(field(json!({"memory_mb": 0})).contains("memory_mb"));
        assert!(field(json!({"vcpus": -1})).contains("vcpus"));
        assert!(field(json!({"disk_gb": "x"})).contains("invalid type"));
        assert!(field(json!({"exposes": [0]})).contains("exposes[0]"));
        assert!(field(json!({"exposes": [1, 1]})).contains("exposes[1]"));
        assert!(field(json!({"parent_id": "x"})).contains("parent_id"));
        assert!(field(json!({"command": []})).contains("command"));
        assert!(field(json!({"env": {"A=B": "c"}})).contains("env.A=B"));
        assert!(field(json!({"idle_policy": "never"})).contains("idle_policy"));
        assert!(field(json!({"secrets": ["lower"]})).contains("secrets"));
        assert!(field(json!({"host_services": ["Up"]})).contains("host_services"));
        assert!(field(json!({"llm_models": [""]})).contains("llm_models"));
    }
}
