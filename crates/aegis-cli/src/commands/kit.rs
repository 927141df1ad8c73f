//! Kits: a manifest of what an instance is made of, which secrets it needs, and what it may do
//! (contracts/aegis.md 8).

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use aegis_wire::host::CapabilityBody;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Ask, items};
use crate::failure::{Failure, Result};
use crate::output::plain;

/// Largest manifest that is read, bytes: a command may hold a whole script.
const MANIFEST_MAX: u64 = 256 * 1024;

/// A manifest. What it leaves out gets the host's defaults; what it says of capabilities is all
/// that its instances may do.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Kit {
    /// What it is called.
    #[serde(rename(serialize = "kit"))]
    pub name: String,
    /// What it is for, for people.
    #[serde(default, skip_serializing)]
    #[allow(dead_code, reason = "for the readers of the file")]
    pub description: Option<String>,
    /// The primary process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    command: Option<Vec<String>>,
    /// Image or commit.
    #[serde(default, rename(serialize = "image_ref"), skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    env: BTreeMap<String, String>,
    /// Directory in which the primary process starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cwd: Option<String>,
    /// Ports inside that are reached through ports of the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    exposes: Vec<Port>,
    /// Names of secrets that the host must have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Names of host services that it may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host_services: Option<Vec<String>>,
    /// Models of the LLM door.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    llm_models: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory_mb: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vcpus: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    disk_gb: Option<f64>,
    /// `default` or `leave-running`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    idle_policy: Option<String>,
    /// What its instances may do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    capabilities: Option<CapabilityBody>,
    /// What an instance and all that it spawns may hold and spend together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    envelope: Option<Envelope>,
}

/// A port, alone or with what is spoken there.
#[derive(Debug, Deserialize, Serialize)]
#[serde(untagged, expecting = "a port such as 8080, or { port = 8080, protocol = \"http\" }")]
enum Port {
    Number(u16),
    Full(FullPort),
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct FullPort {
    port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public_port: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vcpus: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory_mb: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    disk_gb: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    egress_gb: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    duration_hours: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokens: Option<u64>,
}

impl Kit {
    /// Body of `POST /v1/instances`, as far as the kit says.
    pub fn body(&self) -> Value {
        serde_json::to_value(self).unwrap_or_else(|_| json!({}))
    }
}

/// Where a kit is: a name alone is one of the home's own.
pub fn path(ask: &Ask, named: &Path) -> PathBuf {
    let is_name = named.components().count() == 1 && named.extension().is_none_or(|e| e != "toml");
    if is_name {
        return ask.home.root().join("kits").join(named).with_extension("toml");
    }
    named.to_owned()
}

/// Reads a manifest.
pub fn read(path: &Path) -> Result<Kit> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|e| Failure::file("open", path, e))?;
    file.take(MANIFEST_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|e| Failure::file("read", path, e))?;
    if text.len() as u64 > MANIFEST_MAX {
        return Err(Failure::here(format!(
            "the kit {} is larger than {MANIFEST_MAX} bytes",
            path.display()
        )));
    }
    // Its own words show the line and name what is allowed there.
    parse(&text).map_err(|e| {
        Failure::here(format!(
            "the kit {} is not right:\n{}",
            path.display(),
            e.to_string().trim_end()
        ))
    })
}

/// Parses a manifest.
pub fn parse(text: &str) -> Result<Kit, toml::de::Error> {
    toml::from_str(text)
}

/// Says which secrets of a kit this host lacks, before a machine is made that lacks them.
pub async fn check_secrets(ask: &Ask, kit: &Kit) -> Result<()> {
    if kit.secrets.is_empty() {
        return Ok(());
    }
    let fix = "see what it has with `aegis secret list`, or take them out of the kit";
    let kept = match ask.client.get("/v1/secrets").await {
        Ok(kept) => kept,
        Err(Failure::Refused(refused)) if matches!(refused.status, 404 | 405) => {
            return Err(Failure::here(format!(
                "the kit {} needs the secrets {}, and this daemon keeps no secrets",
                kit.name,
                kit.secrets.join(", ")
            ))
            .fix("take them out of the kit"));
        }
        Err(failure) => return Err(failure),
    };
    let names: Vec<String> = items(&kept, "secrets")
        .iter()
        .map(|secret| plain(secret.get("name").unwrap_or(secret)))
        .collect();
    let lacking: Vec<&str> =
        kit.secrets.iter().filter(|name| !names.contains(name)).map(String::as_str).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let lacking = lacking.join(", ");
    Err(Failure::here(format!(
        "the kit {} needs secrets that this host lacks: {lacking}",
        kit.name
    ))
    .fix(fix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_becomes_a_request() {
        let kit = parse(
            "name = 'bot'\ndescription = 'builds'\nimage = 'base'\ncommand = ['python3', 'x']\n\
             exposes = [8080, { port = 53, protocol = 'tcp' }]\nsecrets = ['KEY']\n\
             [env]\nA = 'b'\n[capabilities]\nspawn = true\nmax_children = 2\n\
             [envelope]\nmemory_mb = 1024\n",
        )
        .unwrap();
        assert_eq!(
            kit.body(),
            json!({ "kit": "bot", "image_ref": "base", "command": ["python3", "x"], "env": { "A": "b" },
                "exposes": [8080, { "port": 53, "protocol": "tcp" }], "secrets": ["KEY"],
                "capabilities": { "spawn": true, "max_children": 2 },
                "envelope": { "memory_mb": 1024.0 } })
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kit.toml");
        for (text, word) in [
            ("name = 'x'\n[capabilities]\nspwan = true\n", "spwan"),
            ("name = 'x'\nimages = 'base'\n", "images"),
            ("command = ['x']\n", "name"),
            ("name = 'x'\nexposes = ['web']\n", "8080"),
            ("name = 'x'\nmemory_mb = -1\n", "memory_mb"),
        ] {
            std::fs::write(&path, text).unwrap();
            let words = read(&path).unwrap_err().words();
            assert!(words.contains(word) && words.contains("kit.toml"), "{words}");
        }
        assert!(read(&dir.path().join("none")).unwrap_err().words().contains("none"));
    }
}
