//! Arguments of the tools. Their doc comments are what an agent reads, so they speak to it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// No arguments.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// Names a child.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Child {
    /// Id (inst-…) or handle of the child.
    #[serde(alias = "instance_id", alias = "handle")]
    pub id: String,
}

/// Body of `POST /v1/instances`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spawn {
    /// Program and arguments of the child's main process; the child stops when it ends. For a
    /// machine to work in with instance_exec: ["sleep", "infinity"]. Left out with from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Instead of an image: "self", or a child's id, which runs. The new child goes on where that one
    /// is now, with all its processes and files, as a machine of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// A name of your own for it, unique on the host: letters, digits, '.', '_', '-'.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<String>,
    /// Image to boot, for example "python:3.12"; the host's default when left out. Must match
    /// capabilities.allowed_images of self_info.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_ref: Option<String>,
    /// Directory to share with the child: below your own /workspace, or a host path that
    /// capabilities.allowed_workspaces allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<String>,
    /// Ports inside the child to make reachable from outside: [8080], or
    /// [{"port": 8080, "protocol": "http"}]. At most capabilities.max_expose_ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exposes: Vec<Port>,
    /// Memory in MB, at most capabilities.max_memory_mb.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// CPUs, fractions allowed, at most capabilities.max_vcpus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<f64>,
    /// Disk in GB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_gb: Option<f64>,
    /// Environment variables of its main process.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory of its main process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Names of host secrets to inject; each must be in capabilities.allowed_secrets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// "default": paused when idle; "leave-running": never paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_policy: Option<String>,
    /// Let the child do less than you may; what is left out is inherited. It can never do more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
    /// Let the child and all below it hold and spend less than your own envelope.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envelope: Option<Envelope>,
}

/// A port to expose.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Port {
    /// The port inside.
    Number(u16),
    /// The port inside, with more words.
    Full {
        /// The port inside.
        port: u16,
        /// The port outside; any free one when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        public_port: Option<u16>,
        /// "http" or "tcp".
        #[serde(default, skip_serializing_if = "Option::is_none")]
        protocol: Option<String>,
    },
}

/// What a child may do.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    /// It may spawn children of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spawn: Option<bool>,
    /// How deep below it may be spawned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spawn_depth: Option<u32>,
    /// Children at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_children: Option<u32>,
    /// Images its children may use, with * and **.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_images: Option<Vec<String>>,
    /// Memory of each of its children, MB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mb: Option<u32>,
    /// CPUs of each of its children.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// Secrets its children may get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_secrets: Option<Vec<String>>,
    /// Host paths its children may use, with * and **.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_workspaces: Option<Vec<String>>,
    /// Exposed ports of it and of each of its children.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_expose_ports: Option<u32>,
}

/// What a child and all below it may hold and spend.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<f64>,
    /// Memory, MB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<f64>,
    /// Disk, GB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_gb: Option<f64>,
    /// What may be sent to the internet, GB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_gb: Option<f64>,
    /// Hours from now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_hours: Option<f64>,
    /// LLM tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<f64>,
}

/// Body of `POST /v1/instances/{id}/exec`, with the id of its path.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Id (inst-…) or handle of the child.
    #[serde(alias = "instance_id", alias = "handle", skip_serializing)]
    pub id: String,
    /// Program and arguments; no shell reads them.
    pub command: Vec<String>,
    /// Environment variables in addition to those of the child's main process.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Kill it after so many seconds; 600 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_secs: Option<u64>,
}

/// Query of `GET /v1/instances/{id}/logs`, with the id of its path.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Logs {
    /// Id (inst-…) or handle of the child.
    #[serde(alias = "instance_id", alias = "handle")]
    pub id: String,
    /// How many of the last lines; 200 when left out.
    #[serde(default)]
    pub tail: Option<u64>,
    /// Only lines after this time, as in 2026-01-31T12:00:00Z.
    #[serde(default)]
    pub since: Option<String>,
    /// Only the output of one exec.
    #[serde(default)]
    pub exec_id: Option<String>,
}

/// Body of `POST /v1/self/keepalive`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Acquire {
    /// How long, milliseconds; 300000 (5 minutes) when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    /// What for, in a few words for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Body of `POST /v1/self/expose`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Expose {
    /// The port on which a program of this instance listens.
    #[serde(alias = "port")]
    pub guest_port: u16,
    /// "http" or "tcp"; http when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
}

/// Path of `DELETE /v1/self/expose/{port}`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Unexpose {
    /// The port that was exposed.
    #[serde(alias = "port")]
    pub guest_port: u16,
}
