//! `aegis instance …`: machines of this host.

use std::collections::{HashMap, HashSet};

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use super::shape::Shape;
use super::{Ask, image, items, maybe, text, when};
use crate::failure::Result;
use crate::human;
use crate::output::{fields, plain, table};
use aegis_wire::path::escape;

/// What can be asked of instances.
#[derive(Subcommand, Debug)]
pub enum InstanceCommand {
    /// Make a new machine, or start one that is stopped
    Start(Box<StartArgs>),
    /// List them
    #[command(visible_alias = "ls")]
    List {
        /// Only those in this state
        #[arg(long, value_name = "STATE", value_parser = ["starting", "running", "paused", "frozen", "stopped"])]
        state: Option<String>,
        /// Only the children of this one (id or handle)
        #[arg(long, value_name = "ID")]
        parent: Option<String>,
    },
    /// Show all about one
    Info(Name),
    /// End it; its record and disk stay
    Stop(Name),
    /// Stop it, and forbid that anything wakes it
    Disable(Name),
    /// Delete it with its disk
    #[command(visible_alias = "rm")]
    Delete(Names),
    /// Hold its clock
    Pause(Name),
    /// Let it go on
    Resume(Name),
    /// Stop it and start it again
    Restart(Name),
    /// Reach a port inside through a port of this host
    #[command(after_help = "Example:\n  aegis instance expose web 8080")]
    Expose {
        /// Id or handle
        name: String,
        /// The port inside
        port: u16,
        /// The port of this host [default: any free one]
        #[arg(long, value_name = "PORT")]
        public: Option<u16>,
        /// What is spoken there
        #[arg(long, value_name = "WHAT", value_parser = ["http", "tcp"])]
        protocol: Option<String>,
    },
    /// End what expose began
    Unexpose {
        /// Id or handle
        name: String,
        /// The port inside
        port: u16,
    },
    /// Say which secrets it gets, from its next start on
    #[command(
        after_help = "Examples:\n  aegis instance secrets web GITHUB_TOKEN\n  aegis instance secrets web --none"
    )]
    Secrets {
        /// Id or handle
        name: String,
        /// Their names; * alone for all that there are then
        #[arg(value_name = "SECRET", required_unless_present = "none")]
        secrets: Vec<String>,
        /// None at all
        #[arg(long, conflicts_with = "secrets")]
        none: bool,
    },
    /// Delete those that have been stopped for long
    #[command(after_help = "Example:\n  aegis instance prune --older-than 7d")]
    Prune {
        /// Stopped for at least this long (12h, 7d)
        #[arg(long, value_name = "TIME", default_value = "7d", value_parser = checked_time)]
        older_than: String,
    },
}

/// What `aegis instance start` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  aegis instance start --name web --memory 512M -- python3 -m http.server 8080
  aegis instance start --expose 8080 -- python3 -m http.server 8080
  aegis instance start --can-spawn --max-children 3 --limit-memory 2G --name bot -- python3 bot.py
  aegis instance start --kit examples/build-bot/kit.toml
  aegis instance start --commit golden --name web2      goes on where the commit was taken
  aegis instance start web          again, from its stored settings")]
pub struct StartArgs {
    /// Id or handle of a stopped one
    #[arg(required_unless_present_any = ["command", "kit", "image", "commit"], conflicts_with_all = ["command", "kit", "image", "commit"])]
    existing: Option<String>,
    #[command(flatten)]
    shape: Shape,
    /// The primary process of a new one, after `--` [default: the image's own]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// One machine.
#[derive(Args, Debug)]
pub struct Name {
    /// Id or handle
    name: String,
}

/// Some machines.
#[derive(Args, Debug)]
pub struct Names {
    /// Ids or handles
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

fn checked_time(text: &str) -> Result<String, String> {
    human::parse_seconds(text).map(|_| text.trim().to_owned())
}

/// Asks.
pub async fn run(ask: &Ask, command: InstanceCommand) -> Result<()> {
    match command {
        InstanceCommand::Start(args) => start(ask, *args).await,
        InstanceCommand::List { state, parent } => list(ask, state, parent).await,
        InstanceCommand::Info(name) => info(ask, &name.name).await,
        InstanceCommand::Stop(name) => verb(ask, &name.name, "stop").await,
        InstanceCommand::Disable(name) => verb(ask, &name.name, "disable").await,
        InstanceCommand::Pause(name) => verb(ask, &name.name, "pause").await,
        InstanceCommand::Resume(name) => verb(ask, &name.name, "resume").await,
        InstanceCommand::Restart(name) => restart(ask, &name.name).await,
        InstanceCommand::Delete(names) => delete(ask, &names.names).await,
        InstanceCommand::Expose { name, port, public, protocol } => {
            expose(ask, &name, port, public, protocol).await
        }
        InstanceCommand::Unexpose { name, port } => {
            let answer = ask.client.delete(&format!("{}/expose/{port}", path(&name))).await?;
            ask.format.answer(&answer, || format!("{}\n", text(&answer, "status")))
        }
        InstanceCommand::Secrets { name, secrets, none: _ } => {
            let path = format!("{}/secrets", path(&name));
            let body = json!({ "secrets": secrets });
            let answer = ask.client.ask(Method::PUT, &path, Some(body), &[]).await?;
            ask.format.answer(&answer, || format!("{}\n", text(&answer, "secrets")))
        }
        InstanceCommand::Prune { older_than } => prune(ask, &older_than).await,
    }
}

fn path(name: &str) -> String {
    format!("/v1/instances/{}", escape(name))
}

async fn start(ask: &Ask, args: StartArgs) -> Result<()> {
    let started = match args.existing {
        Some(name) => {
            ask.client.post(&format!("{}/start", path(&name)), None).await?;
            ask.client.get(&path(&name)).await?
        }
        None => {
            let body = args.shape.body(ask, &args.command).await?;
            image::provide(ask, &body).await?;
            ask.client.post("/v1/instances", Some(body)).await?
        }
    };
    // These two lines are read by scripts.
    ask.format.answer(&started, || {
        let mut words = format!("Instance started: {}\n", text(&started, "id"));
        let handle = maybe(&started, "handle");
        if !handle.is_empty() {
            words += &format!("Handle: {handle}\n");
        }
        words
    })
}

async fn list(ask: &Ask, state: Option<String>, parent: Option<String>) -> Result<()> {
    let mut query = Vec::new();
    query.extend(state.map(|state| format!("state={}", escape(&state))));
    query.extend(parent.map(|parent| format!("parent_id={}", escape(&parent))));
    let mut path = "/v1/instances".to_owned();
    if !query.is_empty() {
        path += &format!("?{}", query.join("&"));
    }
    let answer = ask.client.get(&path).await?;
    ask.format.answer(&answer, || {
        let rows = in_tree_order(items(&answer, "instances"));
        let children = rows.iter().any(|(_, instance)| !maybe(instance, "parent_id").is_empty());
        let mut head = vec!["id", "handle", "state", "image", "command", "created", "endpoints"];
        if children {
            head.insert(1, "parent");
        }
        let rows = rows.iter().map(|(depth, instance)| {
            let endpoints = items(instance, "endpoints").iter().map(|e| text(e, "url"));
            let branch = if *depth == 0 { "" } else { "└ " };
            let mut row = vec![
                text(instance, "id"),
                format!(
                    "{}{branch}{}",
                    "  ".repeat(depth.saturating_sub(1)),
                    text(instance, "handle")
                ),
                text(instance, "state"),
                text(instance, "image_ref"),
                brief_command(instance, COMMAND_IN_LIST),
                when(instance, "created_at"),
                endpoints.collect::<Vec<_>>().join(" "),
            ];
            if children {
                let parent = maybe(instance, "parent_id");
                row.insert(1, if parent.is_empty() { "-".into() } else { parent });
            }
            row
        });
        table(&head, rows.collect())
    })
}

/// Each instance after its parent, with its depth; one whose parent is not in the list stands where
/// it stood.
fn in_tree_order(instances: &[Value]) -> Vec<(usize, &Value)> {
    let ids: HashSet<String> = instances.iter().map(|i| text(i, "id")).collect();
    let parent = |i: &Value| Some(maybe(i, "parent_id")).filter(|p| ids.contains(p));
    let mut below: HashMap<String, Vec<&Value>> = HashMap::new();
    let mut open = Vec::new();
    for instance in instances {
        match parent(instance) {
            Some(parent) => below.entry(parent).or_default().push(instance),
            None => open.push((0, instance)),
        }
    }
    open.reverse();
    let mut ordered = Vec::with_capacity(instances.len());
    while let Some((depth, instance)) = open.pop() {
        ordered.push((depth, instance));
        let children = below.remove(&text(instance, "id")).unwrap_or_default();
        open.extend(children.into_iter().rev().map(|child| (depth + 1, child)));
    }
    ordered
}

async fn expose(
    ask: &Ask,
    name: &str,
    port: u16,
    public: Option<u16>,
    protocol: Option<String>,
) -> Result<()> {
    let mut body = json!({ "guest_port": port });
    if let Some(public) = public {
        body["public_port"] = public.into();
    }
    if let Some(protocol) = protocol {
        body["protocol"] = protocol.into();
    }
    let endpoint = ask.client.post(&format!("{}/expose", path(name)), Some(body)).await?;
    ask.format.answer(&endpoint, || format!("{}\n", text(&endpoint, "url")))
}

/// What one may do beside its own work, in one line; nothing when nothing.
fn rights(instance: &Value) -> String {
    let may = instance.get("capabilities").unwrap_or(&Value::Null);
    if may.get("spawn").and_then(Value::as_bool) != Some(true) {
        return String::new();
    }
    format!(
        "spawn {} machines at a time, {} deep, of images {}, each at most {} MB and {} CPUs",
        text(may, "max_children"),
        text(may, "spawn_depth"),
        text(may, "allowed_images"),
        text(may, "max_memory_mb"),
        text(may, "max_vcpus")
    )
}

/// Six limits in one line.
fn six(limits: Option<&Value>) -> String {
    let Some(limits) = limits else { return String::new() };
    let text = |limits: &Value, name: &str| {
        let value = limits.get(name).and_then(Value::as_f64).unwrap_or_default();
        // Hours that are left have many digits.
        ((value * 100.0).round() / 100.0).to_string()
    };
    format!(
        "{} CPUs, {} MB memory, {} GB disk, {} GB egress, {} h, {} tokens",
        text(limits, "vcpus"),
        text(limits, "memory_mb"),
        text(limits, "disk_gb"),
        text(limits, "egress_gb"),
        text(limits, "duration_hours"),
        text(limits, "tokens")
    )
}

/// What keeps it from being paused, in words.
fn lease(instance: &Value) -> String {
    if instance.get("lease_held").and_then(Value::as_bool) != Some(true) {
        return String::new();
    }
    format!("{} ({})", when(instance, "lease_expires_at"), text(instance, "lease_reason"))
}

/// So much of a command is shown in a list, and of one machine; scripts read it with `--json`.
const COMMAND_IN_LIST: usize = 60;
const COMMAND_ALONE: usize = 400;

/// A command in one line of at most so many characters: it may hold a whole script.
fn brief_command(instance: &Value, most: usize) -> String {
    let whole = command(instance);
    let mut line: String = whole.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(most) {
        line.truncate(end);
        line.push('…');
    }
    line
}

/// A command as a shell would read it back, near enough for people.
fn command(instance: &Value) -> String {
    let word = |word: &Value| {
        let word = plain(word);
        if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c == '\'') {
            format!("'{word}'")
        } else {
            word
        }
    };
    items(instance, "command").iter().map(word).collect::<Vec<_>>().join(" ")
}

async fn info(ask: &Ask, name: &str) -> Result<()> {
    let instance = ask.client.get(&path(name)).await?;
    ask.format.answer(&instance, || {
        let usage = instance.get("usage").unwrap_or(&Value::Null);
        let number = |field: &str| usage.get(field).and_then(Value::as_f64).unwrap_or(0.0);
        let exit = instance.get("exit").map(|exit| text(exit, "message")).unwrap_or_default();
        let endpoints = items(&instance, "endpoints")
            .iter()
            .map(|e| format!("{} (port {} inside)", text(e, "url"), text(e, "guest_port")));
        fields(&[
            ("Id", text(&instance, "id")),
            ("Handle", maybe(&instance, "handle")),
            ("State", text(&instance, "state")),
            (
                "Disabled",
                match instance.get("enabled") {
                    Some(Value::Bool(false)) => "yes: nothing wakes it".into(),
                    _ => String::new(),
                },
            ),
            ("Guest", maybe(&instance, "guest_id")),
            ("Parent", maybe(&instance, "parent_id")),
            ("Image", text(&instance, "image_ref")),
            ("Workspace", maybe(&instance, "workspace")),
            ("Secrets", maybe(&instance, "secret_keys")),
            ("Services", maybe(&instance, "host_services")),
            ("Models", maybe(&instance, "llm_models")),
            ("Command", brief_command(&instance, COMMAND_ALONE)),
            (
                "Size",
                format!(
                    "{} CPUs, {} MB memory, {} GB disk",
                    text(&instance, "vcpus"),
                    text(&instance, "memory_mb"),
                    text(&instance, "disk_gb")
                ),
            ),
            (
                "Used",
                format!(
                    "{} CPU, {} MB memory at most, {} disk, up {}",
                    human::seconds(number("cpu_seconds")),
                    number("memory_peak_mb"),
                    human::bytes(number("disk_bytes") as u64),
                    human::seconds(number("uptime_seconds"))
                ),
            ),
            ("May", rights(&instance)),
            ("Tree's limit", six(instance.pointer("/envelope/limit"))),
            ("Tree has left", six(instance.pointer("/envelope/left"))),
            ("Kept awake", lease(&instance)),
            ("Endpoints", endpoints.collect::<Vec<_>>().join("\n")),
            ("Boot id", maybe(&instance, "boot_id")),
            ("Created", when(&instance, "created_at")),
            ("Stopped", when(&instance, "stopped_at")),
            ("Ended", exit),
            ("Error", maybe(&instance, "error")),
        ])
    })
}

async fn verb(ask: &Ask, name: &str, verb: &str) -> Result<()> {
    let answer = ask.client.post(&format!("{}/{verb}", path(name)), None).await?;
    ask.format.answer(&answer, || format!("{}\n", text(&answer, "status")))
}

async fn restart(ask: &Ask, name: &str) -> Result<()> {
    let answer = ask.client.post(&format!("{}/restart", path(name)), None).await?;
    // This word is read by scripts, whatever the daemon calls the state by then.
    ask.format.answer(&answer, || "restarting\n".into())
}

async fn delete(ask: &Ask, names: &[String]) -> Result<()> {
    let mut answers = Vec::new();
    for name in names {
        answers.push(ask.client.delete(&path(name)).await?);
    }
    ask.format.answer(&answers, || {
        let mut words = String::new();
        for (name, answer) in names.iter().zip(&answers) {
            words += &format!("{name}: {}\n", text(answer, "status"));
        }
        words
    })
}

async fn prune(ask: &Ask, older_than: &str) -> Result<()> {
    let path = format!("/v1/instances/prune?older_than={}", escape(older_than));
    let answer = ask.client.post(&path, None).await?;
    ask.format.answer(&answer, || {
        let ids = items(&answer, "ids").iter().map(|id| plain(id) + "\n");
        ids.collect::<String>() + &format!("{} pruned\n", text(&answer, "pruned"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_stand_below_their_parents() {
        let one = |id: &str, parent: &str| json!({ "id": id, "parent_id": parent });
        let list = [one("c", "b"), one("a", ""), one("x", "gone"), one("b", "a"), one("d", "a")];
        let ordered = in_tree_order(&list);
        let ordered: Vec<_> = ordered.iter().map(|(depth, i)| (*depth, text(i, "id"))).collect();
        let expected = [(0, "a"), (1, "b"), (2, "c"), (1, "d"), (0, "x")];
        assert_eq!(ordered, expected.map(|(depth, id)| (depth, id.to_owned())));
    }

    #[test]
    fn a_script_stays_one_line() {
        let instance = json!({ "command": ["sh", "-c", "echo a\n\n  echo ü"] });
        assert_eq!(brief_command(&instance, 60), "sh -c 'echo a echo ü'");
        assert_eq!(brief_command(&instance, 19), "sh -c 'echo a echo …");
    }

    #[test]
    fn commands_read_as_in_a_shell() {
        let instance = json!({ "command": ["sh", "-c", "echo a b", ""] });
        assert_eq!(command(&instance), "sh -c 'echo a b' ''");
    }
}
