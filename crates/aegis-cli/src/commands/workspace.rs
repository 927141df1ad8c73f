//! `aegis workspace …`: folders of the host that machines get by name.

use aegis_wire::path::escape;
use clap::Subcommand;
use serde_json::Value;

use super::{Ask, items, text};
use crate::failure::Result;
use crate::human;
use crate::output::{plain, say, table};

/// What can be asked of workspaces.
#[derive(Subcommand, Debug)]
pub enum WorkspaceCommand {
    /// List the named ones: what lies in them, and who has them
    #[command(
        visible_alias = "ls",
        after_help = "\
A workspace is made when a machine first names it, and stays when the machine goes:

  aegis run --workspace notes -- sh -c 'date >> /workspace/log'
  aegis run --workspace ~/src/project -- make -C /workspace
  aegis run --workspace /srv/data:ro -- ls /workspace"
    )]
    List,
    /// Remove one, with all that is in it
    #[command(visible_alias = "delete")]
    Rm {
        /// Its name
        name: String,
    },
}

/// Asks.
pub async fn run(ask: &Ask, command: WorkspaceCommand) -> Result<()> {
    match command {
        WorkspaceCommand::List => {
            let all = ask.client.get("/v1/workspaces").await?;
            ask.format.answer(&all, || words(&all))
        }
        WorkspaceCommand::Rm { name } => {
            let path = format!("/v1/workspaces/{}", escape(&name));
            let gone = ask.client.delete(&path).await?;
            ask.format.answer(&gone, || format!("{}\n", text(&gone, "status")))
        }
    }
}

fn words(all: &Value) -> String {
    let number = |of: &Value, name: &str| of.get(name).and_then(Value::as_u64).unwrap_or(0);
    let rows: Vec<Vec<String>> = items(all, "workspaces")
        .iter()
        .map(|one| {
            let more = if one["more"] == true { "more than " } else { "" };
            let users: Vec<String> = items(one, "used_by").iter().map(plain).collect();
            vec![
                text(one, "name"),
                format!("{more}{}", human::bytes(number(one, "bytes"))),
                format!("{more}{}", number(one, "files")),
                users.join(" "),
                text(one, "path"),
            ]
        })
        .collect();
    if rows.is_empty() {
        say("there are none; `aegis run --workspace NAME` makes one");
        return String::new();
    }
    table(&["name", "size", "files", "used by", "path"], rows)
}
