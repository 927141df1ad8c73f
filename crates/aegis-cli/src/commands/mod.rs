//! One file per noun, each function one question to the daemon.

mod attach;
pub mod audit;
mod build;
pub mod commit;
pub mod cp;
pub mod daemon;
mod ends;
pub mod events;
pub mod exec;
pub mod files;
pub mod guest;
pub mod image;
pub mod instance;
pub mod invite;
mod kit;
pub mod logs;
pub mod mcp;
mod pieces;
pub mod reach;
pub mod redeem;
pub mod run;
pub mod secret;
pub mod shape;
mod terminal;
pub mod vers;
pub mod workspace;

use clap::CommandFactory as _;
use serde_json::Value;

use crate::cli::{Cli, Command};
use crate::client::Client;
use crate::failure::Result;
use crate::home::Home;
use crate::output::{self, Format};

/// Whom to ask, and how to answer.
pub struct Ask {
    /// This host's Aegis.
    pub home: Home,
    /// The daemon.
    pub client: Client,
    /// How to answer.
    pub format: Format,
    /// The daemon is asked over TCP: it may be another host's.
    pub remote: bool,
}

/// Asks.
pub async fn run(ask: &Ask, command: Command) -> Result<()> {
    match command {
        Command::Up(args) => daemon::up(ask, args).await,
        Command::Down(args) => daemon::down(ask, args).await,
        Command::Status => daemon::status(ask).await,
        Command::Run(args) => run::run(ask, *args).await,
        Command::Exec(args) => exec::exec(ask, args).await,
        Command::Cp(args) => cp::cp(ask, args).await,
        Command::Files(command) => files::run(ask, command).await,
        Command::Logs(args) => logs::logs(ask, args).await,
        Command::Commit(args) => commit::commit(ask, args).await,
        Command::Commits(command) => commit::run(ask, command).await,
        Command::Fork(args) => commit::fork(ask, args).await,
        Command::Image(command) => image::run(ask, command).await,
        Command::Instance(command) => instance::run(ask, command).await,
        Command::Invite(command) => invite::run(ask, command).await,
        Command::Guest(command) => guest::run(ask, command).await,
        Command::Secret(command) => secret::run(ask, command).await,
        Command::Workspace(command) => workspace::run(ask, command).await,
        Command::VersKey => vers::key(ask).await,
        Command::Redeem(args) => redeem::redeem(ask, args).await,
        Command::Events(args) => events::events(ask, args).await,
        Command::Audit(command) => audit::run(ask, command).await,
        Command::Mcp(command) => mcp::run(ask.format, command),
        // These ask no daemon, and main does them.
        Command::Setup(_) | Command::Doctor | Command::Completion { .. } => Ok(()),
    }
}

/// Prints a completion script.
pub fn completion(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "aegis", &mut script);
    output::data(&script)
}

/// A field of an answer as text; `-` where it is absent.
fn text(value: &Value, field: &str) -> String {
    output::plain(value.get(field).unwrap_or(&Value::Null))
}

/// A field of an answer as text; nothing where it is absent.
fn maybe(value: &Value, field: &str) -> String {
    match value.get(field) {
        None | Some(Value::Null) => String::new(),
        Some(value) => output::plain(value),
    }
}

/// A time field, seen from now.
fn when(value: &Value, field: &str) -> String {
    match value.get(field).and_then(Value::as_str) {
        None => String::new(),
        Some(time) => crate::human::relative(time, jiff::Timestamp::now()),
    }
}

/// A list in an answer: the answer itself, or its field `name`.
fn items<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    let list = value.as_array().or_else(|| value.get(name)?.as_array());
    list.map(Vec::as_slice).unwrap_or_default()
}

/// `KEY=VALUE`, as environments are given.
fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("must be NAME=VALUE".into()),
    }
}
