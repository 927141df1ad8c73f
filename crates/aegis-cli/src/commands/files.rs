//! `aegis files …`: a machine's files, looked at and tidied.

use aegis_wire::channel::files::{FileKind, FileName};
use aegis_wire::files::{EventShape, FileShape, exact};
use aegis_wire::path::escape;
use clap::Subcommand;
use hyper::Method;
use serde_json::{Value, json};

use super::cp::place::InMachine;
use super::{Ask, when};
use crate::failure::{Failure, Result};
use crate::human;
use crate::output::{Format, clean, data, print_json, table};

/// What can be asked of files.
#[derive(Subcommand, Debug)]
pub enum FilesCommand {
    /// List a directory, or show one file
    #[command(visible_alias = "list", after_help = "Example:\n  aegis files ls web:/var/log")]
    Ls {
        /// NAME:/PATH
        place: InMachine,
    },
    /// Show what is there
    Stat {
        /// NAME:/PATH
        place: InMachine,
    },
    /// Make a directory
    Mkdir {
        /// NAME:/PATH
        place: InMachine,
        /// Also those above it, and nothing where it is there
        #[arg(long, short)]
        parents: bool,
        /// Its permissions, octal
        #[arg(long, value_name = "MODE")]
        mode: Option<String>,
    },
    /// Remove a file or an empty directory
    Rm {
        /// NAME:/PATH
        place: InMachine,
        /// Directories with all that is in them
        #[arg(long, short)]
        recursive: bool,
    },
    /// Rename something
    Mv {
        /// NAME:/PATH
        place: InMachine,
        /// The new path, in the same machine
        #[arg(value_name = "/PATH")]
        to: String,
    },
    /// Show what happens to a file or in a directory, as it happens
    #[command(after_help = "Example:\n  aegis files watch -r web:/srv")]
    Watch {
        /// NAME:/PATH
        place: InMachine,
        /// In all directories below too
        #[arg(long, short)]
        recursive: bool,
    },
}

/// Asks.
pub async fn run(ask: &Ask, command: FilesCommand) -> Result<()> {
    match command {
        FilesCommand::Ls { place } => ls(ask, &place).await,
        FilesCommand::Stat { place } => {
            let shape = ask.client.get(&place.asked("&stat=true")).await?;
            show(ask, &[("", &read(shape)?)])
        }
        FilesCommand::Mkdir { place, parents, mode } => {
            let mut more = "&op=mkdir".to_owned();
            if parents {
                more += "&create_dirs=true";
            }
            if let Some(mode) = mode {
                more += &format!("&mode={}", escape(mode));
            }
            said(ask, &ask.client.post(&place.asked(&more), None).await?, "made")
        }
        FilesCommand::Rm { place, recursive } => {
            let more = if recursive { "&recursive=true" } else { "" };
            said(ask, &ask.client.delete(&place.asked(more)).await?, "removed")
        }
        FilesCommand::Mv { place, to } => {
            let more = format!("&op=rename&to={}", escape(to));
            said(ask, &ask.client.post(&place.asked(&more), None).await?, "renamed")
        }
        FilesCommand::Watch { place, recursive } => watch(ask, &place, recursive).await,
    }
}

fn said(ask: &Ask, answer: &Value, word: &str) -> Result<()> {
    ask.format.answer(answer, || format!("{word}\n"))
}

fn read(value: Value) -> Result<FileShape> {
    serde_json::from_value(value)
        .map_err(|e| Failure::because("the daemon's answer is none about a file", e))
}

async fn ls(ask: &Ask, place: &InMachine) -> Result<()> {
    let shape = read(ask.client.get(&place.asked("&stat=true")).await?)?;
    if shape.kind != FileKind::Dir {
        return show(ask, &[(&place.path.lossy(), &shape)]);
    }
    let entries = list(ask, place).await?;
    let rows: Vec<(String, &FileShape)> =
        entries.iter().map(|(name, shape)| (name.lossy(), shape)).collect();
    let rows: Vec<(&str, &FileShape)> = rows.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    match ask.format {
        Format::Json => print_json(&entries.iter().map(|(_, s)| s).collect::<Vec<_>>()),
        Format::Human => show(ask, &rows),
    }
}

/// The entries of a directory, by name. A name that leads elsewhere is refused, whoever sent it.
pub async fn list(ask: &Ask, place: &InMachine) -> Result<Vec<(FileName, FileShape)>> {
    let listed = ask.client.get(&place.asked("&list=true")).await?;
    if listed.get("truncated") != Some(&Value::Bool(false)) {
        let place = place.to_string();
        return Err(Failure::here(format!("{place} has more entries than are listed")));
    }
    let entries = listed.get("entries").cloned().unwrap_or_default();
    let shapes: Vec<FileShape> = serde_json::from_value(entries)
        .map_err(|e| Failure::because("the daemon's answer is no listing", e))?;
    let mut named = shapes.into_iter().map(named).collect::<Result<Vec<_>>>()?;
    named.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(named)
}

fn named(shape: FileShape) -> Result<(FileName, FileShape)> {
    let name = shape.name.as_deref().and_then(|name| exact(name, shape.name_b64.as_deref()));
    match FileName::try_from(name.unwrap_or_default()) {
        Ok(name) => Ok((name, shape)),
        Err(_) => Err(Failure::here("the machine lists a name that is none: nothing was taken")),
    }
}

fn show(ask: &Ask, files: &[(&str, &FileShape)]) -> Result<()> {
    if ask.format == Format::Json {
        return files.iter().try_for_each(|(_, shape)| print_json(shape));
    }
    let rows = files.iter().map(|(name, shape)| {
        let name = match &shape.target {
            Some(target) => format!("{name} -> {target}"),
            None => (*name).to_owned(),
        };
        let kind = match shape.kind {
            FileKind::File => "file",
            FileKind::Dir => "dir",
            FileKind::Link => "link",
            FileKind::Other => "other",
        };
        let changed = when(&json!({ "mtime": shape.mtime }), "mtime");
        let owner = format!("{}:{}", shape.uid, shape.gid);
        // A newline would make two rows of it.
        let name = clean(&name).replace('\n', "\u{fffd}");
        vec![kind.into(), shape.mode.clone(), owner, human::bytes(shape.size), changed, name]
    });
    let text = table(&["kind", "mode", "owner", "size", "changed", "name"], rows.collect());
    data(text.as_bytes())
}

async fn watch(ask: &Ask, place: &InMachine, recursive: bool) -> Result<()> {
    let path = place.watched(recursive);
    let mut lines = ask.client.lines(Method::GET, &path, None).await?;
    while let Some(line) = lines.next().await? {
        if ask.format == Format::Json {
            data(&[&line[..], b"\n"].concat())?;
            continue;
        }
        // The first line says that it has begun.
        let Ok(event) = serde_json::from_slice::<EventShape>(&line) else { continue };
        let word = json!(event.event);
        let word = word.as_str().unwrap_or_default();
        let path = clean(&event.path).replace('\n', "\u{fffd}");
        data(format!("{word:<9} {path}\n").as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_hostile_machine_lead_nowhere() {
        let shape = |name: &str, b64: Option<&str>| -> FileShape {
            serde_json::from_value(json!({
                "name": name, "name_b64": b64, "kind": "file", "size": 1, "mode": "0644",
                "uid": 0, "gid": 0, "mtime": "2026-01-01T00:00:00Z"
            }))
            .unwrap()
        };
        assert_eq!(named(shape("a b", None)).unwrap().0.as_bytes(), b"a b");
        assert_eq!(named(shape("?", Some("/w=="))).unwrap().0.as_bytes(), b"\xff");
        for (name, b64) in [
            ("..", None),
            ("../x", None),
            ("/etc/passwd", None),
            ("", None),
            (".", None),
            ("a\0", None),
            ("good", Some("Li4=")),
            ("good", Some("Li4vLi4vZXZpbA==")),
            ("good", Some("not base64")),
        ] {
            assert!(named(shape(name, b64)).is_err(), "{name} {b64:?}");
        }
    }
}
