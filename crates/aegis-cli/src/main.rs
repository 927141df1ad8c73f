//! `aegis`: asks the daemon, prepares a host, says what is missing. It decides nothing.
//!
//! Start reading at [`cli`] for what can be asked, then at `commands/` for how.

mod cli;
mod client;
mod commands;
mod doctor;
mod failure;
mod home;
mod human;
mod ndjson;
mod output;
mod setup;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command};
use crate::client::Client;
use crate::failure::{Failure, Result};
use crate::home::Home;
use crate::output::Format;

fn main() -> ExitCode {
    // Unknown flags and bad values end here, with exit code 2.
    let cli = Cli::parse();
    let format = if cli.global.json { Format::Json } else { Format::Human };
    match run(cli, format) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure, Failure::Exit(_)) {
                let words = match format {
                    Format::Human => output::clean(&failure.words()),
                    Format::Json => format!("{}\n", failure.json()),
                };
                let _ = std::io::stderr().write_all(words.as_bytes());
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: Cli, format: Format) -> Result<()> {
    let home = || Home::resolve(cli.global.home.as_deref());
    match cli.command {
        Command::Completion { shell } => commands::completion(shell),
        Command::Setup(args) => setup::run(&home()?, args, format),
        Command::Doctor => doctor::run(&home()?, format),
        command => {
            let home = home()?;
            let client = Client::new(&home, cli.global.url.as_deref())?;
            let ask = commands::Ask { home, client, format, remote: cli.global.url.is_some() };
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| Failure::because("cannot start", e))?
                .block_on(commands::run(&ask, command))
        }
    }
}
