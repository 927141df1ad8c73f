//! Starting the programs of this host's own: with nothing of this process but what is said.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

/// A program with a plain environment, in a group of its own: what ends this process by its group
/// does not end that.
pub fn bare(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").process_group(0);
    command
}

/// The same at three pipes.
pub fn piped(program: &Path) -> Command {
    let mut command = bare(program);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}
