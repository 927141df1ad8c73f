//! `aegis commit`, `aegis commits …`, `aegis fork`: keeping a machine that runs, and starting others
//! from it.

use aegis_wire::path::escape;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Ask, items, maybe, text, when};
use crate::failure::Result;
use crate::human;
use crate::output::{Work, table};

/// What `aegis commit` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
The machine stands still for some milliseconds and goes on. Machines that start from the commit go on \
where it was, each with an id, a token, a host name, randomness and a clock of its own. A commit with \
memory belongs to this host's QEMU, kernel and base image; after an upgrade of one its disk still \
serves (--disk-only).

Examples:
  aegis commit web --as golden
  aegis instance start --commit golden
  aegis invite create --golden commit-…        what redeems it goes on from there")]
pub struct CommitArgs {
    /// Id or handle
    name: String,
    /// A name of your own for the commit
    #[arg(long = "as", value_name = "NAME")]
    as_name: Option<String>,
    /// Keep its disk alone: machines boot from it
    #[arg(long)]
    disk_only: bool,
}

/// What `aegis fork` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  aegis fork web
  aegis fork web -n 20 --name try        try-1 to try-20")]
pub struct ForkArgs {
    /// Id or handle of a machine that runs
    name: String,
    /// How many
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 1)]
    count: u32,
    /// Name of the new one; of several the beginning
    #[arg(long = "name", value_name = "HANDLE")]
    handle: Option<String>,
    /// Boot from its disk alone
    #[arg(long)]
    disk_only: bool,
}

/// What can be asked of commits.
#[derive(Subcommand, Debug)]
pub enum CommitsCommand {
    /// List them
    #[command(visible_alias = "ls")]
    List,
    /// Show all about one
    Info {
        /// Id or name
        name: String,
    },
    /// Delete one that no machine starts from
    #[command(visible_alias = "delete")]
    Rm {
        /// Id or name
        name: String,
    },
}

/// Keeps a machine.
pub async fn commit(ask: &Ask, args: CommitArgs) -> Result<()> {
    let mut body = json!({ "disk_only": args.disk_only });
    if let Some(name) = args.as_name {
        body["name"] = name.into();
    }
    let path = format!("/v1/instances/{}/commit", escape(&args.name));
    let work = Work::begin("commit", &args.name);
    let made = ask.client.post(&path, Some(body)).await?;
    work.done("kept");
    ask.format.answer(&made, || {
        let bytes = made.get("bytes").and_then(Value::as_u64).unwrap_or(0);
        format!(
            "{}\nstood still for {} ms, takes {}\n",
            text(&made, "id"),
            text(&made, "stopped_ms"),
            human::bytes(bytes)
        )
    })
}

/// Makes machines of one that runs.
pub async fn fork(ask: &Ask, args: ForkArgs) -> Result<()> {
    let mut body = json!({ "count": args.count, "disk_only": args.disk_only });
    if let Some(handle) = args.handle {
        body["handle"] = handle.into();
    }
    let path = format!("/v1/instances/{}/fork", escape(&args.name));
    let work = Work::begin("fork", &args.name);
    let made = ask.client.post(&path, Some(body)).await?;
    work.done("forked");
    ask.format.answer(&made, || {
        let name = |one: &Value| format!("{} {}", text(one, "id"), maybe(one, "handle"));
        let lines = items(&made, "instances").iter().map(name);
        lines.map(|line| format!("{}\n", line.trim_end())).collect()
    })
}

/// Asks.
pub async fn run(ask: &Ask, command: CommitsCommand) -> Result<()> {
    match command {
        CommitsCommand::List => {
            let all = ask.client.get("/v1/commits").await?;
            ask.format.answer(&all, || words(items(&all, "commits")))
        }
        CommitsCommand::Info { name } => {
            let one = ask.client.get(&path(&name)).await?;
            ask.format.answer(&one, || words(std::slice::from_ref(&one)))
        }
        CommitsCommand::Rm { name } => {
            let gone = ask.client.delete(&path(&name)).await?;
            ask.format.answer(&gone, || format!("{}\n", text(&gone, "status")))
        }
    }
}

fn path(name: &str) -> String {
    format!("/v1/commits/{}", escape(name))
}

fn words(all: &[Value]) -> String {
    let rows = all.iter().map(|one| {
        let memory = one.get("memory").and_then(Value::as_bool).unwrap_or(false);
        vec![
            text(one, "id"),
            maybe(one, "name"),
            text(one, "image_ref"),
            if memory { "memory, disk" } else { "disk" }.to_owned(),
            human::bytes(one.get("bytes").and_then(Value::as_u64).unwrap_or(0)),
            text(one, "in_use"),
            when(one, "created_at"),
        ]
    });
    table(&["id", "name", "image", "holds", "size", "in use", "created"], rows.collect())
}
