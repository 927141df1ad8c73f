//! What can be asked: commands, flags, and the help that teaches them.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    audit, commit, cp, daemon, events, exec, files, guest, image, instance, invite, logs, mcp,
    redeem, run, secret, workspace,
};
use crate::setup::SetupArgs;

/// Lends someone a sandboxed VM with a spending limit that can be trusted.
#[derive(Parser, Debug)]
#[command(
    name = "aegis",
    version,
    propagate_version = true,
    after_help = "\
First steps on a new host:
  aegis setup --install             tools, guest kernel, base image
  aegis doctor                      what is there, what is missing, what it costs
  aegis up                          start the daemon
  aegis run -- uname -a             a command in a machine of its own, which is gone afterwards

Lending a machine to somebody:
  aegis invite create --label \"for ty\" --hours 72      prints a code
  aegis redeem inv_… --name ty --wait                  what the guest does with it
  aegis guest list                                     who is here, and what they used
  aegis guest kill ID                                  end it, with a verified receipt

Machines that spawn machines:
  aegis instance start --can-spawn --name bot -- python3 bot.py
  aegis instance start --kit kit.toml                  the same from a file
  aegis instance list                                  who spawned whom

Exit codes: that of the command for exec and run; 2 wrong usage; 1 everything else.
Data goes to stdout, words to stderr; --json makes every answer JSON."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Args, Debug)]
pub struct Global {
    /// Answer in JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Directory of this Aegis [default: ~/.aegis]
    #[arg(long, global = true, env = "AEGIS_HOME", value_name = "DIR", hide_env_values = true)]
    pub home: Option<PathBuf>,
    /// Ask a daemon over TCP, with AEGIS_TOKEN or the home's host-token
    #[arg(
        long,
        global = true,
        env = "AEGIS_URL",
        value_name = "http://HOST:PORT",
        hide_env_values = true
    )]
    pub url: Option<String>,
}

/// One verb or noun.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Prepare this host: tools, guest kernel, base image
    Setup(SetupArgs),
    /// Say what this host has, what each lack costs, and how to mend it
    #[command(after_help = "Exit code: 0 when machines can run, 1 when not.")]
    Doctor,
    /// Start the daemon in the background
    Up(daemon::UpArgs),
    /// Stop the daemon; machines run on unless --all is given
    Down(daemon::DownArgs),
    /// Say how the daemon is
    Status,
    /// Run a command in a new machine, which is deleted afterwards
    Run(Box<run::RunArgs>),
    /// Run a command in a machine
    Exec(exec::ExecArgs),
    /// Copy files into machines, out of them, between them
    Cp(cp::CpArgs),
    /// Look at files of a machine, and tidy them
    #[command(subcommand)]
    Files(files::FilesCommand),
    /// Show what a machine's processes said
    Logs(logs::LogsArgs),
    /// Keep a machine that runs, as it is now
    Commit(commit::CommitArgs),
    /// What was kept of machines
    #[command(subcommand)]
    Commits(commit::CommitsCommand),
    /// Make machines of one that runs: each goes on where it was
    Fork(commit::ForkArgs),
    /// Images that machines are made of
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Machines of this host
    #[command(subcommand)]
    Instance(instance::InstanceCommand),
    /// Invites: codes that lend somebody a machine
    #[command(subcommand)]
    Invite(invite::InviteCommand),
    /// Guests: who redeemed an invite
    #[command(subcommand)]
    Guest(guest::GuestCommand),
    /// Secrets that machines get by name, or only a placeholder of
    #[command(subcommand)]
    Secret(secret::SecretCommand),
    /// Make a key with which others use this host as a vers cloud
    #[command(
        after_help = "The key before is worth nothing from then on. It is shown once; the host keeps \
                      only its hash. [vers_api] enabled = true in aegis.toml opens the API.\n\n\
                      Example:\n  eval \"$(aegis vers-key)\"\n  \
                      curl -H \"Authorization: Bearer $VERS_API_KEY\" $VERS_BASE_URL/api/v1/vms"
    )]
    VersKey,
    /// Folders of this host that machines have as /workspace
    #[command(subcommand)]
    Workspace(workspace::WorkspaceCommand),
    /// Redeem an invite (what a guest does)
    Redeem(redeem::RedeemArgs),
    /// Show what happens on this host, or what has happened
    Events(events::EventsArgs),
    /// The audit trail: who did what, chained by hashes
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// The MCP server that every machine has
    #[command(subcommand)]
    Mcp(mcp::McpCommand),
    /// Print a completion script
    #[command(
        after_help = "Example:\n  mkdir -p ~/.local/share/bash-completion/completions\n  aegis completion bash > ~/.local/share/bash-completion/completions/aegis"
    )]
    Completion {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn unknown_flags_are_refused() {
        for args in [
            &["aegis", "status", "--surprise"][..],
            &["aegis", "exec", "web", "ls"],
            &["aegis", "exec", "web", "--pty", "--", "ls"],
            &["aegis", "run", "--memory", "lots", "--", "ls"],
            &["aegis", "instance", "start"],
            &["aegis", "instance", "start", "web", "--kit", "kit.toml"],
            &["aegis", "run", "--can-spawn"],
            &["aegis", "surprise"],
        ] {
            let error = Cli::try_parse_from(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn what_follows_two_dashes_is_the_commands() {
        let cli =
            Cli::parse_from(["aegis", "exec", "web", "--json", "--", "ls", "--json", "--", "-x"]);
        assert!(cli.global.json);
        let Command::Exec(args) = cli.command else { panic!("exec") };
        assert_eq!(args.command, ["ls", "--json", "--", "-x"]);
    }
}
