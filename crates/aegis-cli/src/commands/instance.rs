//! `aegis instance …`: machines of this host.

use clap::{Args, Subcommand};
use serde_json::Value;

use super::run::Shape;
use super::{Ask, items, maybe, text, when};
use crate::client::escape;
use crate::failure::Result;
use crate::human;
use crate::output::{fields, plain, table};

/// What can be asked of instances.
#[derive(Subcommand, Debug)]
pub enum InstanceCommand {
    /// Make a new machine, or start one that is stopped
    Start(StartArgs),
    /// List them
    #[command(visible_alias = "ls")]
    List {
        /// Only those in this state
        #[arg(long, value_name = "STATE", value_parser = ["starting", "running", "paused", "frozen", "stopped"])]
        state: Option<String>,
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
  aegis instance start web          again, from its stored settings")]
pub struct StartArgs {
    /// Id or handle of a stopped one
    #[arg(required_unless_present = "command", conflicts_with = "command")]
    existing: Option<String>,
    #[command(flatten)]
    shape: Shape,
    /// The primary process of a new one, after `--`
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
        InstanceCommand::Start(args) => start(ask, args).await,
        InstanceCommand::List { state } => list(ask, state).await,
        InstanceCommand::Info(name) => info(ask, &name.name).await,
        InstanceCommand::Stop(name) => verb(ask, &name.name, "stop").await,
        InstanceCommand::Disable(name) => verb(ask, &name.name, "disable").await,
        InstanceCommand::Pause(name) => verb(ask, &name.name, "pause").await,
        InstanceCommand::Resume(name) => verb(ask, &name.name, "resume").await,
        InstanceCommand::Restart(name) => restart(ask, &name.name).await,
        InstanceCommand::Delete(names) => delete(ask, &names.names).await,
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
        None => ask.client.post("/v1/instances", Some(args.shape.body(&args.command))).await?,
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

async fn list(ask: &Ask, state: Option<String>) -> Result<()> {
    let query = state.map(|state| format!("?state={}", escape(&state))).unwrap_or_default();
    let answer = ask.client.get(&format!("/v1/instances{query}")).await?;
    ask.format.answer(&answer, || {
        let rows = items(&answer, "instances").iter().map(|instance| {
            let endpoints = items(instance, "endpoints").iter().map(|e| text(e, "url"));
            vec![
                text(instance, "id"),
                text(instance, "handle"),
                text(instance, "state"),
                text(instance, "image_ref"),
                command(instance),
                when(instance, "created_at"),
                endpoints.collect::<Vec<_>>().join(" "),
            ]
        });
        table(
            &["id", "handle", "state", "image", "command", "created", "endpoints"],
            rows.collect(),
        )
    })
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
            ("Command", command(&instance)),
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
    use serde_json::json;

    use super::*;

    #[test]
    fn commands_read_as_in_a_shell() {
        let instance = json!({ "command": ["sh", "-c", "echo a b", ""] });
        assert_eq!(command(&instance), "sh -c 'echo a b' ''");
    }
}
