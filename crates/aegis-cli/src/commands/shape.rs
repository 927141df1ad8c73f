//! What a new machine is made of: from flags, from a kit, or both. The same for `run` and
//! `instance start`.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::kit::Kit;
use super::reach::Reach;
use super::{Ask, kit, parse_env};
use crate::failure::{Failure, Result};
use crate::human::{parse_gb, parse_memory_mb};

/// What `--can-spawn` alone means: the same words as in its help.
const SPAWN_DEPTH: u32 = 1;
const MAX_CHILDREN: u32 = 5;
const MAX_MEMORY_MB: u32 = 1024;
const MAX_VCPUS: u32 = 1;

/// What a new machine is made of.
#[derive(Args, Debug, Default)]
pub struct Shape {
    /// Take everything that no flag says from a kit: a manifest, or a NAME for HOME/kits/NAME.toml
    #[arg(long, value_name = "KIT")]
    kit: Option<PathBuf>,
    /// Image, pulled if it is not there [default: the host's]
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// Start from what was kept of a machine: id or name of a commit
    #[arg(long, value_name = "COMMIT")]
    commit: Option<String>,
    /// Boot from the commit's disk alone
    #[arg(long, requires = "commit")]
    disk_only: bool,
    /// Name of your own for it, unique on this host
    #[arg(long, value_name = "HANDLE")]
    name: Option<String>,
    /// Memory (512M, 2G)
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_mb)]
    memory: Option<u32>,
    /// CPUs, fractions allowed
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<f64>,
    /// Disk (500M, 20G)
    #[arg(long, value_name = "SIZE", value_parser = parse_gb)]
    disk: Option<f64>,
    /// Add to its environment (may be repeated)
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// Reach a port inside through a port of this host (may be repeated)
    #[arg(long, value_name = "PORT")]
    expose: Vec<u16>,
    /// Give it a secret of this host as a variable (may be repeated; * for all)
    #[arg(long, value_name = "NAME")]
    secret: Vec<String>,
    /// Give it a folder of this host as /workspace, live both ways: a NAME, which is made if it is not
    /// there, or a PATH; `:ro` behind it forbids changes
    #[arg(long, value_name = "NAME|PATH[:ro]")]
    workspace: Option<String>,
    /// Let it use a service of this host, inside http://NAME.host.aegis/ (may be repeated)
    #[arg(long, value_name = "NAME")]
    host_service: Vec<String>,
    /// Models that it may ask for at http://llm.aegis/ (gpt-*; may be repeated) [default: all that
    /// this host offers]
    #[arg(long, value_name = "GLOB")]
    llm_model: Vec<String>,
    #[command(flatten)]
    reach: Reach,
    #[command(flatten)]
    rights: Rights,
    #[command(flatten)]
    limits: TreeLimits,
}

/// What it may do beside its own work (contracts/aegis.md 3).
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Machines that spawn machines")]
struct Rights {
    /// It may spawn machines: one level deep, 5 at a time, of any image, each with at most 1024 MB
    /// and 1 CPU, unless more is said
    #[arg(long)]
    can_spawn: bool,
    /// How deep it may be spawned below it (1: its children spawn none)
    #[arg(long, value_name = "NUMBER")]
    spawn_depth: Option<u32>,
    /// Its children at a time
    #[arg(long, value_name = "NUMBER")]
    max_children: Option<u32>,
    /// Images that its children may use: node:*, ghcr.io/acme/** (may be repeated)
    #[arg(long, value_name = "GLOB")]
    allow_image: Vec<String>,
    /// Memory of each child (512M, 2G)
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_mb)]
    max_memory: Option<u32>,
    /// CPUs of each child
    #[arg(long, value_name = "NUMBER")]
    max_vcpus: Option<u32>,
    /// Secrets that its children may get (may be repeated)
    #[arg(long, value_name = "NAME")]
    allow_secret: Vec<String>,
    /// Host directories that its children may use (may be repeated)
    #[arg(long, value_name = "GLOB")]
    allow_workspace: Vec<String>,
    /// Ports that it and each child may expose
    #[arg(long, value_name = "NUMBER")]
    max_expose_ports: Option<u32>,
}

/// What it and all that it spawns may hold and spend together.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "What it and all that it spawns may hold and spend together")]
struct TreeLimits {
    /// CPUs
    #[arg(long, value_name = "NUMBER")]
    limit_cpus: Option<f64>,
    /// Memory (512M, 2G)
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_mb)]
    limit_memory: Option<u32>,
    /// Disk (500M, 20G)
    #[arg(long, value_name = "SIZE", value_parser = parse_gb)]
    limit_disk: Option<f64>,
    /// What may be sent to the internet (10G)
    #[arg(long, value_name = "SIZE", value_parser = parse_gb)]
    limit_egress: Option<f64>,
    /// Hours from now
    #[arg(long, value_name = "NUMBER")]
    limit_hours: Option<f64>,
    /// LLM tokens, input and output together
    #[arg(long, value_name = "NUMBER")]
    limit_tokens: Option<u64>,
}

impl Shape {
    /// Body of `POST /v1/instances`. Reads the kit, and asks whether the host has its secrets.
    pub async fn body(self, ask: &Ask, command: &[String]) -> Result<Value> {
        let kit = self.kit.as_deref().map(|named| kit::read(&kit::path(ask, named))).transpose()?;
        if let Some(kit) = &kit {
            kit::check_secrets(ask, kit).await?;
        }
        self.merge(kit, command)
    }

    /// The kit's words, then the flags' over them.
    fn merge(self, kit: Option<Kit>, command: &[String]) -> Result<Value> {
        let mut body = kit.as_ref().map_or_else(|| json!({}), Kit::body);
        if !command.is_empty() {
            body["command"] = json!(command);
        }
        set(&mut body, "image_ref", self.image);
        set(&mut body, "commit", self.commit);
        set(&mut body, "disk_only", self.disk_only.then_some(true));
        // An image may name a command; whether it does, the daemon knows. A commit has its own.
        if ["command", "image_ref", "commit"].iter().all(|f| body.get(f).is_none()) {
            return Err(Failure::Usage(
                "the kit names no command: put one after `--`, or into the kit".into(),
            ));
        }
        set(&mut body, "handle", self.name);
        set(&mut body, "memory_mb", self.memory);
        set(&mut body, "vcpus", self.cpus);
        set(&mut body, "disk_gb", self.disk);
        for (name, value) in self.env {
            body["env"][name] = value.into();
        }
        if !self.expose.is_empty() {
            body["exposes"] = json!(self.expose);
        }
        part(&mut body, "egress", |to| self.reach.set(to));
        let some = |list: Vec<String>| (!list.is_empty()).then_some(list);
        set(&mut body, "secrets", some(self.secret));
        set(&mut body, "workspace", self.workspace.map(absolute));
        set(&mut body, "host_services", some(self.host_service));
        set(&mut body, "llm_models", some(self.llm_model));
        part(&mut body, "capabilities", |to| self.rights.set(to));
        part(&mut body, "envelope", |to| self.limits.set(to));
        Ok(body)
    }
}

/// A path as the daemon takes it, which has another working directory.
fn absolute(place: String) -> String {
    if !place.contains('/') && place != "." && place != ".." {
        return place;
    }
    match std::path::absolute(&place) {
        Ok(path) => path.to_string_lossy().into_owned(),
        Err(_) => place,
    }
}

impl Rights {
    fn set(self, to: &mut Value) {
        if self.can_spawn {
            // What a kit says of spawning stays.
            let said = to.get("spawn").and_then(Value::as_bool) == Some(true);
            to["spawn"] = true.into();
            if !said {
                let defaults = json!({ "spawn_depth": SPAWN_DEPTH, "max_children": MAX_CHILDREN,
                    "allowed_images": ["*"], "max_memory_mb": MAX_MEMORY_MB, "max_vcpus": MAX_VCPUS });
                for (name, value) in defaults.as_object().into_iter().flatten() {
                    to[name] = value.clone();
                }
            }
        }
        set(to, "spawn_depth", self.spawn_depth);
        set(to, "max_children", self.max_children);
        set(to, "max_memory_mb", self.max_memory);
        set(to, "max_vcpus", self.max_vcpus);
        set(to, "max_expose_ports", self.max_expose_ports);
        let some = |list: Vec<String>| (!list.is_empty()).then_some(list);
        set(to, "allowed_images", some(self.allow_image));
        set(to, "allowed_secrets", some(self.allow_secret));
        set(to, "allowed_workspaces", some(self.allow_workspace));
    }
}

impl TreeLimits {
    fn set(self, to: &mut Value) {
        set(to, "vcpus", self.limit_cpus);
        set(to, "memory_mb", self.limit_memory);
        set(to, "disk_gb", self.limit_disk);
        set(to, "egress_gb", self.limit_egress);
        set(to, "duration_hours", self.limit_hours);
        set(to, "tokens", self.limit_tokens);
    }
}

fn set(to: &mut Value, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        to[name] = value.into();
    }
}

/// Changes an object inside, and leaves out an empty one.
fn part(body: &mut Value, name: &str, change: impl FnOnce(&mut Value)) {
    let mut inside = body.get(name).cloned().unwrap_or_else(|| json!({}));
    change(&mut inside);
    if inside.as_object().is_some_and(|inside| !inside.is_empty()) {
        body[name] = inside;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        shape: Shape,
    }

    fn body(kit: Option<&str>, flags: &[&str], command: &[&str]) -> Result<Value> {
        let flags = Flags::parse_from(["x"].iter().chain(flags));
        let command: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
        flags.shape.merge(kit.map(|text| kit::parse(text).unwrap()), &command)
    }

    #[test]
    fn only_what_was_asked_for_is_sent() {
        assert_eq!(body(None, &[], &["true"]).unwrap(), json!({ "command": ["true"] }));
        let flags = [
            "--name",
            "web",
            "--memory",
            "512M",
            "--cpus",
            "0.5",
            "--disk",
            "2G",
            "--env",
            "A=b",
            "--expose",
            "8080",
            "--image",
            "base",
            "--secret",
            "KEY",
            "--host-service",
            "ollama",
            "--llm-model",
            "gpt-*",
            "--workspace",
            "notes:ro",
        ];
        assert_eq!(
            body(None, &flags, &["true"]).unwrap(),
            json!({ "command": ["true"], "handle": "web", "memory_mb": 512, "vcpus": 0.5,
                "disk_gb": 2.0, "env": {"A": "b"}, "exposes": [8080], "image_ref": "base",
                "secrets": ["KEY"], "host_services": ["ollama"], "llm_models": ["gpt-*"],
                "workspace": "notes:ro" })
        );
    }

    #[test]
    fn rights_and_limits_are_sent() {
        let flags = ["--can-spawn", "--max-children", "2", "--allow-image", "node:*"];
        let sent = body(None, &[&flags[..], &["--limit-memory", "2G"]].concat(), &["x"]).unwrap();
        assert_eq!(
            sent["capabilities"],
            json!({ "spawn": true, "spawn_depth": 1, "max_children": 2, "max_memory_mb": 1024,
                "max_vcpus": 1, "allowed_images": ["node:*"] })
        );
        assert_eq!(sent["envelope"], json!({ "memory_mb": 2048 }));
    }

    #[test]
    fn flags_go_over_a_kit() {
        let kit = "name = 'bot'\ncommand = ['bot']\nmemory_mb = 256\n[env]\nA = 'kit'\nB = 'kit'\n\
                   [capabilities]\nspawn = true\nspawn_depth = 2\nmax_children = 4";
        let flags = ["--memory", "512M", "--env", "A=flag", "--can-spawn", "--max-children", "1"];
        assert_eq!(
            body(Some(kit), &flags, &[]).unwrap(),
            json!({ "kit": "bot", "command": ["bot"], "memory_mb": 512, "env": {"A": "flag", "B": "kit"},
                "capabilities": {"spawn": true, "spawn_depth": 2, "max_children": 1} })
        );
        assert_eq!(
            body(Some("name = 'x'"), &[], &["y"]).unwrap(),
            json!({ "kit": "x", "command": ["y"] })
        );
        assert_eq!(body(Some("name = 'x'"), &[], &[]).unwrap_err().exit_code(), 2);
        assert_eq!(body(None, &["--image", "y"], &[]).unwrap(), json!({ "image_ref": "y" }));
    }
}
