//! `aegis invite …`: codes that lend somebody a machine.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Ask, items, maybe, text, when};
use crate::failure::Result;
use crate::human::{parse_gb, parse_memory_mb, parse_seconds};
use crate::output::{fields, table};
use aegis_wire::path::escape;

/// What can be asked of invites.
#[derive(Subcommand, Debug)]
pub enum InviteCommand {
    /// Make one; prints its code
    Create(Box<CreateArgs>),
    /// List them, newest first
    #[command(visible_alias = "ls")]
    List {
        /// Only those in this state
        #[arg(long, value_name = "STATUS", value_parser = ["active", "redeemed", "revoked", "expired"])]
        status: Option<String>,
    },
    /// Make one worthless that was not redeemed yet
    Revoke {
        /// Its id
        id: String,
    },
}

/// What `aegis invite create` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
What is not said gets the host's defaults: 2 CPUs, 4096 MB, 20 GB disk, 10 GB egress, 72 hours, \
50 million tokens.

Examples:
  aegis invite create --label \"for ty\"
  aegis invite create --label demo --cpus 1 --memory 512M --disk 2G --hours 1 --expires-in 10m
  aegis invite create --can-spawn --max-children 3 --memory 2G
  aegis invite create --agent-port 8080 --json | jq -r .code")]
pub struct CreateArgs {
    /// Who invites [default: the user's name]
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
    /// What it is for
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// How long the code can be redeemed (10m, 24h, 7d) [default: 24h]
    #[arg(long, value_name = "TIME", value_parser = parse_seconds)]
    expires_in: Option<f64>,
    /// CPUs, fractions allowed
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<f64>,
    /// Memory (512M, 4G)
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_mb)]
    memory: Option<u32>,
    /// Disk (500M, 20G)
    #[arg(long, value_name = "SIZE", value_parser = parse_gb)]
    disk: Option<f64>,
    /// What may be sent to the internet (10G)
    #[arg(long, value_name = "SIZE", value_parser = parse_gb)]
    egress: Option<f64>,
    /// How long the machine lives, from the redeem on, in hours
    #[arg(long, value_name = "NUMBER")]
    hours: Option<f64>,
    /// LLM tokens, input and output together
    #[arg(long, value_name = "NUMBER")]
    tokens: Option<u64>,
    /// Whether it may reach the internet
    #[arg(long, value_name = "yes|no", value_parser = yes_or_no)]
    internet: Option<bool>,
    /// Only this of the internet: a name, *.name, a network, with :PORT or without (may be repeated)
    #[arg(long, value_name = "WHAT")]
    allow: Vec<String>,
    /// Whether it may start machines of its own
    #[arg(long, value_name = "yes|no", value_parser = yes_or_no)]
    sub_agents: Option<bool>,
    /// The same as --sub-agents yes
    #[arg(long, conflicts_with = "sub_agents")]
    can_spawn: bool,
    /// How deep its machines may spawn machines [default: 1 when it may]
    #[arg(long, value_name = "NUMBER")]
    spawn_depth: Option<u32>,
    /// Machines that one of its machines may have spawned at a time [default: 5]
    #[arg(long, value_name = "NUMBER")]
    max_children: Option<u32>,
    /// Part of CPU, memory and disk that its first machine gets, the rest is for those that it
    /// spawns [default: 0.5 when it may spawn, else 1]
    #[arg(long, value_name = "0.1..1")]
    root_share: Option<f64>,
    /// Whether it may reach services of the host
    #[arg(long, value_name = "yes|no", value_parser = yes_or_no)]
    host_services: Option<bool>,
    /// One of them, inside http://NAME.host.aegis/ (may be repeated); --host-services yes with it
    #[arg(long, value_name = "NAME")]
    host_service: Vec<String>,
    /// Whether it may ask LLMs at http://llm.aegis/
    #[arg(long, value_name = "yes|no", value_parser = yes_or_no)]
    llm: Option<bool>,
    /// Models that it may ask for there (gpt-*; may be repeated) [default: all that the host offers]
    #[arg(long, value_name = "GLOB")]
    llm_model: Vec<String>,
    /// Image or commit that the machine starts from
    #[arg(long, value_name = "IMAGE")]
    golden: Option<String>,
    /// Port inside at which the guest's agent answers
    #[arg(long, value_name = "PORT")]
    agent_port: Option<u16>,
    /// What happens at a limit
    #[arg(long, value_name = "WHAT", value_parser = ["throttle", "freeze", "kill"])]
    on_limit: Option<String>,
}

/// A word for a flag.
pub fn yes_or_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" | "true" => Ok(true),
        "no" | "false" => Ok(false),
        _ => Err("must be yes or no".into()),
    }
}

impl CreateArgs {
    fn body(self) -> Value {
        let by = self.by.or_else(|| std::env::var("USER").ok().filter(|user| !user.is_empty()));
        let mut body = json!({ "createdBy": by.unwrap_or_else(|| "host".into()) });
        let set = |to: &mut Value, name: &str, value: Option<Value>| {
            if let Some(value) = value {
                to[name] = value;
            }
        };
        set(&mut body, "label", self.label.map(Value::from));
        set(&mut body, "expiresInHours", self.expires_in.map(|s| json!(s / 3600.0)));
        set(&mut body, "golden", self.golden.map(Value::from));
        set(&mut body, "agentPort", self.agent_port.map(Value::from));
        set(&mut body, "onLimit", self.on_limit.map(Value::from));
        set(&mut body, "spawnDepth", self.spawn_depth.map(Value::from));
        set(&mut body, "maxChildren", self.max_children.map(Value::from));
        set(&mut body, "rootShare", self.root_share.map(Value::from));
        let some = |list: Vec<String>| (!list.is_empty()).then(|| json!(list));
        set(&mut body, "egressAllow", some(self.allow));
        let host_services = (!self.host_service.is_empty()).then_some(true);
        set(&mut body, "hostServices", some(self.host_service));
        let none = (self.llm == Some(false)).then(|| json!([]));
        set(&mut body, "llmModels", none.or(some(self.llm_model)));
        let mut limits = json!({});
        set(&mut limits, "maxCpuCores", self.cpus.map(Value::from));
        set(&mut limits, "maxMemoryMB", self.memory.map(Value::from));
        set(&mut limits, "maxDiskGB", self.disk.map(Value::from));
        set(&mut limits, "maxNetworkEgressGB", self.egress.map(Value::from));
        set(&mut limits, "maxDurationHours", self.hours.map(Value::from));
        set(&mut limits, "maxTokenBudget", self.tokens.map(Value::from));
        let sub_agents = self.can_spawn.then_some(true).or(self.sub_agents);
        let mut permissions = json!({});
        set(&mut permissions, "canAccessInternet", self.internet.map(Value::from));
        set(&mut permissions, "canSpawnSubAgents", sub_agents.map(Value::from));
        let host_services = self.host_services.or(host_services);
        set(&mut permissions, "canAccessHostServices", host_services.map(Value::from));
        for (name, part) in [("resourceLimits", limits), ("permissions", permissions)] {
            if part.as_object().is_some_and(|part| !part.is_empty()) {
                body[name] = part;
            }
        }
        body
    }
}

/// Asks.
pub async fn run(ask: &Ask, command: InviteCommand) -> Result<()> {
    match command {
        InviteCommand::Create(args) => {
            let invite = ask.client.post("/couch/invites", Some(args.body())).await?;
            ask.format.answer(&invite, || invite_fields(&invite))
        }
        InviteCommand::List { status } => list(ask, status).await,
        InviteCommand::Revoke { id } => {
            let invite = ask.client.delete(&format!("/couch/invites/{}", escape(&id))).await?;
            ask.format.answer(&invite, || invite_fields(&invite))
        }
    }
}

fn invite_fields(invite: &Value) -> String {
    fields(&[
        ("Id", text(invite, "id")),
        ("Code", maybe(invite, "code")),
        ("Label", maybe(invite, "label")),
        ("Status", text(invite, "status")),
        ("Limits", limits(invite)),
        ("May", permissions(invite)),
        ("Code expires", when(invite, "expiresAt")),
    ])
}

/// The six limits in one line.
pub fn limits(value: &Value) -> String {
    let limits = value.get("resourceLimits").unwrap_or(&Value::Null);
    format!(
        "{} CPUs, {} MB memory, {} GB disk, {} GB egress, {} h, {} tokens",
        text(limits, "maxCpuCores"),
        text(limits, "maxMemoryMB"),
        text(limits, "maxDiskGB"),
        text(limits, "maxNetworkEgressGB"),
        text(limits, "maxDurationHours"),
        text(limits, "maxTokenBudget"),
    )
}

/// What is permitted, in one line.
pub fn permissions(value: &Value) -> String {
    let may: Vec<&str> = [
        ("canAccessInternet", "internet (not served yet)"),
        ("canSpawnSubAgents", "sub-agents"),
        ("canAccessHostServices", "host services"),
    ]
    .into_iter()
    .filter(|(name, _)| {
        value.pointer(&format!("/permissions/{name}")).and_then(Value::as_bool) == Some(true)
    })
    .map(|(_, word)| word)
    .collect();
    if may.is_empty() { "nothing beyond its machine".into() } else { may.join(", ") }
}

async fn list(ask: &Ask, status: Option<String>) -> Result<()> {
    let query = status.map(|s| format!("?status={}", escape(&s))).unwrap_or_default();
    let answer = ask.client.get(&format!("/couch/invites{query}")).await?;
    ask.format.answer(&answer, || {
        let rows = items(&answer, "invites").iter().map(|invite| {
            vec![
                text(invite, "id"),
                text(invite, "status"),
                maybe(invite, "label"),
                text(invite, "createdBy"),
                when(invite, "createdAt"),
                when(invite, "expiresAt"),
                maybe(invite, "redeemedBy"),
            ]
        });
        let head = ["id", "status", "label", "by", "created", "expires", "redeemed by"];
        table(&head, rows.collect()) + &more(&answer)
    })
}

/// Says that there is more than a page.
pub fn more(answer: &Value) -> String {
    match answer.get("nextCursor").and_then(Value::as_str) {
        Some(_) => "… and more: narrow it down with --status\n".into(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn body(args: &[&str]) -> Value {
        let args = ["aegis", "invite", "create", "--by", "noah"].iter().chain(args);
        let Command::Invite(InviteCommand::Create(args)) = Cli::parse_from(args).command else {
            panic!("invite create");
        };
        args.body()
    }

    #[test]
    fn only_what_was_said_is_sent() {
        assert_eq!(body(&[]), json!({ "createdBy": "noah" }));
        assert_eq!(
            body(&["--memory", "1G", "--disk", "500M", "--expires-in", "30m", "--internet", "no"]),
            json!({ "createdBy": "noah", "expiresInHours": 0.5,
                "resourceLimits": { "maxMemoryMB": 1024, "maxDiskGB": 0.5 },
                "permissions": { "canAccessInternet": false } })
        );
    }

    #[test]
    fn an_invite_may_spawn() {
        assert_eq!(
            body(&[
                "--can-spawn",
                "--spawn-depth",
                "2",
                "--max-children",
                "3",
                "--root-share",
                "0.4"
            ]),
            json!({ "createdBy": "noah", "spawnDepth": 2, "maxChildren": 3, "rootShare": 0.4,
                "permissions": { "canSpawnSubAgents": true } })
        );
    }

    #[test]
    fn services_and_models_are_sent() {
        assert_eq!(
            body(&["--host-service", "ollama", "--llm-model", "gpt-*", "--llm-model", "o3"]),
            json!({ "createdBy": "noah", "hostServices": ["ollama"], "llmModels": ["gpt-*", "o3"],
                "permissions": { "canAccessHostServices": true } })
        );
        assert_eq!(body(&["--llm", "no"]), json!({ "createdBy": "noah", "llmModels": [] }));
    }

    #[test]
    fn an_invite_reads_in_one_glance() {
        let invite = json!({ "id": "01", "code": "inv_x", "status": "active",
            "resourceLimits": { "maxCpuCores": 2 }, "permissions": { "canSpawnSubAgents": true } });
        let words = invite_fields(&invite);
        assert!(
            words.contains("inv_x") && words.contains("2 CPUs") && words.contains("sub-agents")
        );
    }
}
