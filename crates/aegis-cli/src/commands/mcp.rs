//! `aegis mcp …`: tells agents of the MCP server that every machine has.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use aegis_wire::channel::guest::MCP_PATH;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::output::Format;

/// What can be asked about MCP.
#[derive(Subcommand, Debug)]
pub enum McpCommand {
    /// Write .mcp.json, so that an agent that runs inside a machine finds the server
    Install(InstallArgs),
}

/// What `aegis mcp install` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
The file belongs into the directory of a project in which an agent works inside a machine: there \
the server is /usr/bin/aegis-mcp-guest. Other servers in the file stay.

Examples:
  aegis mcp install
  aegis mcp install --dir ~/projects/site")]
pub struct InstallArgs {
    /// Directory of the project [default: this one]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// What the agent calls the server
    #[arg(long, value_name = "NAME", default_value = "aegis")]
    name: String,
}

/// Does it.
pub fn run(format: Format, command: McpCommand) -> Result<()> {
    let McpCommand::Install(args) = command;
    let directory = args.dir.unwrap_or_else(|| PathBuf::from("."));
    let path = directory.join(".mcp.json");
    let old = match std::fs::read_to_string(&path) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(Failure::file("read", &path, e)),
    };
    let new = with_server(&path, old.as_deref(), &args.name)?;
    write(&directory, &path, &new)?;
    let told = json!({ "path": path, "server": args.name, "command": MCP_PATH });
    format.answer(&told, || format!("{}: server {} is {MCP_PATH}\n", path.display(), args.name))
}

/// The file with the server in it, and all else as it was.
fn with_server(path: &Path, old: Option<&str>, name: &str) -> Result<Value> {
    let odd = || {
        Failure::here(format!("{} is not what agents read", path.display()))
            .fix("it must be an object with an object \"mcpServers\"; mend it or move it away")
    };
    let mut file: Value = match old {
        None => json!({}),
        Some(text) => serde_json::from_str(text)
            .map_err(|e| Failure::because(format!("{} is no JSON", path.display()), e))?,
    };
    let servers = file
        .as_object_mut()
        .ok_or_else(odd)?
        .entry("mcpServers")
        .or_insert_with(|| json!({}))
        .as_object_mut()
        .ok_or_else(odd)?;
    servers.insert(name.to_owned(), json!({ "command": MCP_PATH, "args": [] }));
    Ok(file)
}

/// Whole or not at all.
fn write(directory: &Path, path: &Path, file: &Value) -> Result<()> {
    let failed = |e| Failure::file("write", path, e);
    let text = format!("{file:#}\n");
    let mut draft = tempfile::Builder::new()
        .prefix(".mcp.json.")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(directory)
        .map_err(failed)?;
    draft.write_all(text.as_bytes()).map_err(failed)?;
    draft.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_servers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".mcp.json");
        std::fs::write(&path, r#"{"mcpServers": {"other": {"command": "x"}}, "more": 1}"#).unwrap();
        for _ in 0..2 {
            let args = InstallArgs { dir: Some(dir.path().into()), name: "aegis".into() };
            run(Format::Json, McpCommand::Install(args)).unwrap();
        }
        let file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            file,
            json!({ "more": 1, "mcpServers": { "other": { "command": "x" },
                "aegis": { "command": "/usr/bin/aegis-mcp-guest", "args": [] } } })
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_none_is_left_alone() {
        for text in ["nonsense", "[]", r#"{"mcpServers": []}"#] {
            assert!(with_server(Path::new("x"), Some(text), "aegis").is_err(), "{text}");
        }
    }
}
