//! Shapes of trees of machines: capabilities, envelopes, what a machine sees of itself and of its
//! children (contracts/aegis.md 3 and 4, seeds/003).

use serde::{Deserialize, Serialize};

use super::{Endpoint, ExitShape};
use crate::refusal::Refusal;
use crate::words::{Limit, Limits, MemoryMb, Time};
use aegis_rules::capability::{Capabilities, CapabilityAsk};
use aegis_rules::envelope::EnvelopeAsk;
use aegis_rules::instance::Instance;

/// Bytes of all lists of a capability together: they stand in a token.
const CAPABILITY_BYTES_MAX: usize = 6 * 1024;

/// What an instance may do, as it stands in tokens and answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct CapabilityShape {
    pub spawn: bool,
    pub spawn_depth: u32,
    pub max_children: u32,
    pub allowed_images: Vec<String>,
    pub max_memory_mb: u32,
    pub max_vcpus: u32,
    pub allowed_secrets: Vec<String>,
    pub allowed_workspaces: Vec<String>,
    pub max_expose_ports: u32,
}

/// `capabilities` of a request, as it comes. What a host leaves out is nothing; what a machine
/// leaves out for its child is its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct CapabilityBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spawn: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spawn_depth: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_children: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_images: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory_mb: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_secrets: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_workspaces: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_expose_ports: Option<u32>,
}

impl CapabilityShape {
    /// The capabilities of a record.
    pub fn of(of: &Capabilities) -> CapabilityShape {
        let of = of.clone();
        CapabilityShape {
            spawn: of.spawn,
            spawn_depth: of.spawn_depth,
            max_children: of.max_children,
            allowed_images: of.allowed_images,
            max_memory_mb: of.max_memory.0,
            max_vcpus: of.max_vcpus,
            allowed_secrets: of.allowed_secrets,
            allowed_workspaces: of.allowed_workspaces,
            max_expose_ports: of.max_expose_ports,
        }
    }

    /// As the rules judge them.
    pub fn into_words(self) -> Capabilities {
        Capabilities {
            spawn: self.spawn,
            spawn_depth: self.spawn_depth,
            max_children: self.max_children,
            allowed_images: self.allowed_images,
            max_memory: MemoryMb(self.max_memory_mb),
            max_vcpus: self.max_vcpus,
            allowed_secrets: self.allowed_secrets,
            allowed_workspaces: self.allowed_workspaces,
            max_expose_ports: self.max_expose_ports,
        }
    }
}

impl CapabilityBody {
    /// What is asked for; lists that would not fit in a token are refused.
    pub fn parse(self) -> Result<CapabilityAsk, Refusal> {
        let lists = [&self.allowed_images, &self.allowed_secrets, &self.allowed_workspaces];
        let bytes: usize = lists.into_iter().flatten().flatten().map(|n| n.len() + 3).sum();
        if bytes > CAPABILITY_BYTES_MAX {
            return Err(Refusal::field(
                "capabilities",
                format!("lists of at most {CAPABILITY_BYTES_MAX} bytes together"),
            ));
        }
        Ok(CapabilityAsk {
            spawn: self.spawn,
            spawn_depth: self.spawn_depth,
            max_children: self.max_children,
            allowed_images: self.allowed_images,
            max_memory: self.max_memory_mb.map(MemoryMb),
            max_vcpus: self.max_vcpus,
            allowed_secrets: self.allowed_secrets,
            allowed_workspaces: self.allowed_workspaces,
            max_expose_ports: self.max_expose_ports,
        })
    }
}

/// The six limits, as they stand in answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the units are in the names, those of an invite's limits")]
pub struct LimitsShape {
    pub vcpus: f64,
    pub memory_mb: u64,
    pub disk_gb: f64,
    pub egress_gb: f64,
    pub duration_hours: f64,
    pub tokens: u64,
}

impl LimitsShape {
    /// The limits of a record.
    pub fn of(limits: &Limits) -> LimitsShape {
        LimitsShape {
            vcpus: limits.get(Limit::Cpu),
            memory_mb: u64::from(limits.memory.0),
            disk_gb: limits.get(Limit::Disk),
            egress_gb: limits.get(Limit::Egress),
            duration_hours: limits.get(Limit::Duration),
            tokens: limits.tokens.0,
        }
    }
}

/// `envelope` of a request, as it comes: what the instance and all below it may hold and spend.
/// What is left out is as much as may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "as in LimitsShape")]
pub struct EnvelopeBody {
    pub vcpus: Option<f64>,
    pub memory_mb: Option<f64>,
    pub disk_gb: Option<f64>,
    pub egress_gb: Option<f64>,
    pub duration_hours: Option<f64>,
    pub tokens: Option<f64>,
}

impl EnvelopeBody {
    /// The limits that were asked for.
    pub fn parse(self) -> Result<EnvelopeAsk, Refusal> {
        let mut asked = Limits::default();
        let fields = [
            ("vcpus", Limit::Cpu, self.vcpus),
            ("memory_mb", Limit::Memory, self.memory_mb),
            ("disk_gb", Limit::Disk, self.disk_gb),
            ("egress_gb", Limit::Egress, self.egress_gb),
            ("duration_hours", Limit::Duration, self.duration_hours),
            ("tokens", Limit::Tokens, self.tokens),
        ];
        for (name, limit, value) in fields {
            let Some(value) = value else { continue };
            asked.set(limit, value).map_err(|mut refusal| {
                let field = format!("envelope.{name}");
                let of_an_invite = format!("resourceLimits.{}", limit.field());
                refusal.message = refusal.message.replace(&of_an_invite, &field);
                refusal.field = Some(field);
                refusal
            })?;
        }
        Ok(EnvelopeAsk {
            cpu: self.vcpus.map(|_| asked.cpu),
            memory: self.memory_mb.map(|_| asked.memory),
            disk: self.disk_gb.map(|_| asked.disk),
            egress: self.egress_gb.map(|_| asked.egress),
            duration: self.duration_hours.map(|_| asked.duration),
            tokens: self.tokens.map(|_| asked.tokens),
        })
    }
}

/// What a subtree may hold and spend, does, and still may.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct EnvelopeShape {
    pub limit: LimitsShape,
    pub spent: LimitsShape,
    pub left: LimitsShape,
}

/// A keepalive lease.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct LeaseShape {
    pub lease_held: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_expires_at: Option<Time>,
}

impl LeaseShape {
    /// What holds off an instance's idle pause now.
    pub fn of(instance: &Instance, now: Time) -> LeaseShape {
        let lease = instance.lease_at(now);
        LeaseShape {
            lease_held: lease.is_some(),
            lease_reason: lease.and_then(|l| l.reason.clone()),
            lease_expires_at: lease.map(|l| l.expires_at),
        }
    }
}

/// An instance as its parent sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct ChildShape {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<String>,
    pub state: String,
    pub parent_id: String,
    pub image_ref: String,
    pub command: Vec<String>,
    pub endpoints: Vec<Endpoint>,
    pub memory_mb: u32,
    pub vcpus: f64,
    pub disk_gb: f64,
    pub created_at: Time,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<Time>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitShape>,
    /// Why the last boot failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl ChildShape {
    /// A child, whose ports answer on the address `host`.
    pub fn new(child: &Instance, host: &str) -> ChildShape {
        let spec = &child.spec;
        ChildShape {
            id: child.id.to_string(),
            handle: spec.handle.as_ref().map(ToString::to_string),
            state: child.state.word().to_owned(),
            parent_id: child.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
            image_ref: spec.image.to_string(),
            command: spec.command.clone(),
            endpoints: spec.exposes.iter().filter_map(|e| Endpoint::new(e, host)).collect(),
            memory_mb: spec.memory.0,
            vcpus: spec.cpu.cores(),
            disk_gb: (spec.disk.gb() * 1e4).round() / 1e4,
            created_at: child.created_at,
            stopped_at: child.stopped_at.filter(|_| !child.is_live()),
            exit: child.exit.as_ref().map(ExitShape::of),
            error: child.last_error.clone(),
        }
    }
}

/// Answer to `GET /v1/self`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct SelfShape {
    pub id: String,
    pub handle: String,
    pub state: String,
    pub image: String,
    pub parent_id: String,
    pub endpoints: Vec<Endpoint>,
    pub capabilities: CapabilityShape,
    pub envelope: EnvelopeShape,
    #[serde(flatten)]
    pub lease: LeaseShape,
}

/// One row of the audit trail: the columns that are hashed, and the hash
/// (`aegis_rules::audit::link`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRow {
    /// Position over all trees.
    pub seq: u64,
    /// Whose chain: an invite's id, or that of a host's own root instance.
    pub tree: String,
    /// Position in that chain, from 1.
    pub position: u64,
    /// When, milliseconds since 1970.
    pub at_ms: i64,
    /// When, for people.
    pub at: Time,
    /// Who did it.
    pub actor: String,
    /// What happened.
    pub kind: String,
    /// To what.
    pub subject: String,
    /// The data, in the text form that was hashed.
    pub data: String,
    /// SHA-256 over the previous hash of this tree and this row, hexadecimal.
    pub hash: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_left_out_is_not_asked_for() {
        let ask: EnvelopeBody = serde_json::from_value(json!({"memory_mb": 1024})).unwrap();
        let ask = ask.parse().unwrap();
        assert_eq!(ask, EnvelopeAsk { memory: Some(MemoryMb(1024)), ..EnvelopeAsk::default() });
        let ask: CapabilityBody = serde_json::from_value(json!({"spawn": true})).unwrap();
        let ask = ask.parse().unwrap();
        assert_eq!(ask, CapabilityAsk { spawn: Some(true), ..CapabilityAsk::default() });
        // A token's claims leave nothing out.
        assert!(serde_json::from_value::<CapabilityShape>(json!({"spawn": true})).is_err());
    }

    #[test]
    fn bad_fields_are_named() {
        let bad: EnvelopeBody = serde_json::from_value(json!({"disk_gb": -1})).unwrap();
        let refusal = bad.parse().unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("envelope.disk_gb"));
        assert!(refusal.message.starts_with("envelope.disk_gb"), "{}", refusal.message);
        let long = vec!["x".repeat(250); 30];
        let bad: CapabilityBody = serde_json::from_value(json!({"allowed_images": long})).unwrap();
        assert_eq!(bad.parse().unwrap_err().field.as_deref(), Some("capabilities"));
        assert!(serde_json::from_value::<CapabilityBody>(json!({"max_gpus": 1})).is_err());
        assert!(serde_json::from_value::<EnvelopeBody>(json!({"memory": 1})).is_err());
    }

    #[test]
    fn capabilities_come_back_as_they_were() {
        let words = Capabilities {
            spawn: true,
            spawn_depth: 2,
            max_children: 5,
            allowed_images: vec!["node:*".to_owned()],
            max_memory: MemoryMb(2048),
            max_vcpus: 2,
            allowed_secrets: vec!["KEY".to_owned()],
            allowed_workspaces: vec!["/srv/*".to_owned()],
            max_expose_ports: 3,
        };
        let text = serde_json::to_string(&CapabilityShape::of(&words)).unwrap();
        let back: CapabilityShape = serde_json::from_str(&text).unwrap();
        assert_eq!(back.into_words(), words);
    }
}
