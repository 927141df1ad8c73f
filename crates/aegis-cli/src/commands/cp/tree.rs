//! The walk: one entry after the other, into an open place.

use std::pin::Pin;

use aegis_wire::channel::files::{FileKind, FileName, Mode};
use aegis_wire::files::MODE_HEADER;
use aegis_wire::path::escape;
use futures_util::StreamExt as _;
use hyper::Response;
use hyper::body::Incoming;
use hyper::header::CONTENT_LENGTH;

use super::place::InMachine;
use super::{Done, Into, Node, Source, bytes_of, here};
use crate::commands::Ask;
use crate::failure::{Failure, Result};

/// Levels of directories that are copied: each holds an open directory.
const DEPTH_MAX: usize = 256;

/// Copies one entry, and all below it.
pub fn copy<'a>(
    ask: &'a Ask,
    node: Node,
    into: &'a Into,
    done: &'a mut Done,
    depth: usize,
) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>> {
    Box::pin(async move {
        match node.found.kind {
            FileKind::File => {
                file(ask, &node, into, done).await?;
                done.files += 1;
            }
            FileKind::Link => {
                link(ask, &node, into).await?;
                done.links += 1;
            }
            FileKind::Other => done.skipped.push(node.source.to_string()),
            FileKind::Dir => {
                if depth >= DEPTH_MAX {
                    let what = format!("{} lies deeper than {DEPTH_MAX} levels", node.source);
                    return Err(Failure::here(what));
                }
                let below = enter(ask, into, &node.name, node.found.mode).await?;
                for entry in node.source.list(ask).await? {
                    copy(ask, entry, &below, done, depth + 1).await?;
                }
                if let Into::Here(directory) = &below {
                    // Only now: it may forbid to write into it.
                    directory.finish(node.found.mode)?;
                }
                done.directories += 1;
            }
        }
        Ok(())
    })
}

fn target(place: &InMachine, name: &FileName) -> Result<InMachine> {
    place.join(name).ok_or_else(|| Failure::here(format!("a path in {place} is too long")))
}

async fn enter(ask: &Ask, into: &Into, name: &FileName, mode: Mode) -> Result<Into> {
    match into {
        Into::Here(directory) => Ok(Into::Here(directory.enter(name)?)),
        Into::Machine(place) => {
            let to = target(place, name)?;
            let more = format!("&op=mkdir&create_dirs=true&mode={mode}");
            ask.client.post(&to.asked(&more), None).await?;
            Ok(Into::Machine(to))
        }
    }
}

async fn link(ask: &Ask, node: &Node, into: &Into) -> Result<()> {
    let Some(points) = &node.found.target else { return Ok(()) };
    match into {
        Into::Here(directory) => directory.link(&node.name, points),
        Into::Machine(place) => {
            let more = format!("&op=symlink&target={}", escape(points.as_bytes()));
            let to = target(place, &node.name)?;
            ask.client.post(&to.asked(&more), None).await.map(drop)
        }
    }
}

/// The permissions of a file whose bytes come: those of what a link leads to, not its own.
fn mode_of(answer: &Response<Incoming>) -> Option<Mode> {
    Mode::parse(answer.headers().get(MODE_HEADER)?.to_str().ok()?).ok()
}

async fn file(ask: &Ask, node: &Node, into: &Into, done: &mut Done) -> Result<()> {
    let put = |place: &InMachine, mode: Mode| -> Result<String> {
        Ok(target(place, &node.name)?.asked(&format!("&mode={mode}")))
    };
    match (&node.source, into) {
        (Source::Machine(from), Into::Here(directory)) => {
            let answer = ask.client.fetch(&from.asked("")).await?;
            let mode = mode_of(&answer).unwrap_or(node.found.mode);
            let mut wrote = |n| done.add(&node.source, n);
            directory.write(&node.name, mode, bytes_of(answer.into_body()), &mut wrote).await?;
        }
        (Source::Here(path), Into::Machine(place)) => {
            let (size, bytes) = here::read(path)?;
            let (counted, mut count) = tokio::sync::watch::channel(0u64);
            let bytes = bytes.inspect(move |piece| {
                let n = piece.as_ref().map_or(0, |piece| piece.len() as u64);
                counted.send_modify(|count| *count += n);
            });
            let mut shown = 0;
            let path = put(place, node.found.mode)?;
            let mut sent = std::pin::pin!(ask.client.put(&path, Some(size), bytes));
            loop {
                tokio::select! {
                    biased;
                    Ok(()) = count.changed() => {
                        let now = *count.borrow_and_update();
                        done.add(&node.source, now - shown);
                        shown = now;
                    }
                    answer = &mut sent => { answer?; break }
                }
            }
        }
        (Source::Machine(from), Into::Machine(place)) => {
            let answer = ask.client.fetch(&from.asked("")).await?;
            let mode = mode_of(&answer).unwrap_or(node.found.mode);
            let length = answer.headers().get(CONTENT_LENGTH);
            let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
            let bytes = bytes_of(answer.into_body());
            let bytes = bytes.map(|piece| piece.map_err(|e| std::io::Error::other(e.words())));
            let made = ask.client.put(&put(place, mode)?, length, bytes).await?;
            let size = made.get("size").and_then(serde_json::Value::as_u64);
            done.add(&node.source, size.unwrap_or(0));
        }
        (Source::Here(_), Into::Here(_)) => {
            return Err(Failure::Usage("one end must be in a machine".into()));
        }
    }
    Ok(())
}
