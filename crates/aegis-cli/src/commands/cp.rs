//! `aegis cp`: files into machines, out of them, and between them.

mod here;
pub mod place;
mod tree;

use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};

use aegis_wire::channel::files::{FileKind, FileName, FilePath, LinkTarget, Mode};
use aegis_wire::files::{FileShape, exact};
use bytes::Bytes;
use clap::Args;
use futures_util::{Stream, StreamExt as _};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde::Serialize;

use self::here::Directory;
use self::place::{End, InMachine};
use super::{Ask, files, pieces};
use crate::failure::{EXIT_INTERRUPTED, Failure, Result};
use crate::human;
use crate::output::{self, Format, Work, print_json, say};

/// Work with more bytes than this shows how far it is.
const LONG: u64 = 8 << 20;

/// What `aegis cp` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
A place in a machine is NAME:/PATH. What is copied into a directory that is there keeps its name. \
Permissions and links are kept, owners are not; what comes out of a machine is never a set-user-id \
program, and never lands outside of the place that was named. A file is seen whole or not at all.

Examples:
  aegis cp report.pdf web:/root/
  aegis cp -r web:/var/log logs
  aegis cp web:/etc/hosts -                     to stdout
  pg_dump shop | aegis cp - web:/root/shop.sql
  aegis cp -r web:/srv/site other:/srv/site")]
pub struct CpArgs {
    /// NAME:/PATH, a path here, or - for stdin
    #[arg(value_name = "SRC")]
    from: End,
    /// NAME:/PATH, a path here, or - for stdout
    #[arg(value_name = "DST")]
    to: End,
    /// Directories with all that is in them
    #[arg(long, short)]
    recursive: bool,
}

/// What is somewhere.
#[derive(Clone, Debug)]
struct Found {
    kind: FileKind,
    mode: Mode,
    size: u64,
    target: Option<LinkTarget>,
}

/// Where something is copied from.
#[derive(Clone, Debug)]
enum Source {
    Machine(InMachine),
    Here(PathBuf),
}

/// One entry of a directory that is copied.
struct Node {
    name: FileName,
    found: Found,
    source: Source,
}

/// A directory that is copied into.
enum Into {
    Machine(InMachine),
    Here(Directory),
}

/// What was copied.
#[derive(Default, Serialize)]
struct Done {
    files: u64,
    directories: u64,
    links: u64,
    bytes: u64,
    /// Pipes, sockets and devices: they are not copied.
    skipped: Vec<String>,
    #[serde(skip)]
    work: Option<Work>,
    #[serde(skip)]
    total: Option<u64>,
}

/// Copies.
pub async fn cp(ask: &Ask, args: CpArgs) -> Result<()> {
    if args.from == End::Pipe && args.to == End::Pipe {
        return Err(Failure::Usage("one end must be in a machine".into()));
    }
    if let (End::Here(_) | End::Pipe, End::Here(_) | End::Pipe) = (&args.from, &args.to) {
        return Err(Failure::Usage("one end must be in a machine: NAME:/PATH".into()));
    }
    let to_stdout = args.to == End::Pipe;
    let done = tokio::select! {
        done = copy(ask, args) => done?,
        // Dropped on the way it leaves nothing half done.
        _ = tokio::signal::ctrl_c() => return Err(Failure::Exit(EXIT_INTERRUPTED)),
    };
    if let Some(work) = &done.work {
        work.clear();
    }
    for skipped in &done.skipped {
        say(&output::clean(&format!("not copied, as it is no file: {skipped}")));
    }
    match ask.format {
        Format::Json if !to_stdout => print_json(&done),
        _ if to_stdout => Ok(()),
        _ => {
            let what = if done.files == 1 { "file" } else { "files" };
            say(&format!("{} {what}, {}", done.files, human::bytes(done.bytes)));
            Ok(())
        }
    }
}

async fn copy(ask: &Ask, args: CpArgs) -> Result<Done> {
    let mut done = Done::default();
    let mut source = match args.from {
        End::Pipe => {
            let End::Machine(to) = args.to else { return Ok(done) };
            return from_stdin(ask, &to, done).await;
        }
        End::Machine(place) => Source::Machine(place),
        End::Here(path) => Source::Here(path),
    };
    let mut found = source.look(ask).await?;
    // What was named itself is followed; what lies below a directory is copied as it is.
    let name = source.name();
    let is_link = found.kind == FileKind::Link && !args.recursive;
    if is_link {
        (source, found) = source.followed(found)?;
    }
    if args.to == End::Pipe {
        return to_stdout(ask, &source, done).await;
    }
    if found.kind == FileKind::Dir && !args.recursive {
        return Err(Failure::Usage(format!("{source} is a directory: copy it with -r")));
    }
    let (into, name) = Into::of(ask, &args.to, name).await?;
    if found.kind == FileKind::File && !is_link {
        done.total = Some(found.size);
    }
    tree::copy(ask, Node { name, found, source }, &into, &mut done, 0).await?;
    Ok(done)
}

async fn from_stdin(ask: &Ask, to: &InMachine, mut done: Done) -> Result<Done> {
    if io::stdin().is_terminal() {
        return Err(Failure::Usage("stdin is a terminal: pipe something into it".into()));
    }
    let bytes = pieces::by(|to| pieces::pump(io::stdin().lock(), &to));
    let made = ask.client.put(&to.asked(""), None, bytes).await?;
    done.files = 1;
    done.bytes = made.get("size").and_then(serde_json::Value::as_u64).unwrap_or(0);
    Ok(done)
}

async fn to_stdout(ask: &Ask, source: &Source, done: Done) -> Result<Done> {
    let Source::Machine(place) = source else { return Ok(done) };
    let answer = ask.client.fetch(&place.asked("")).await?;
    let mut bytes = bytes_of(answer.into_body());
    while let Some(piece) = bytes.next().await {
        output::data(&piece?)?;
    }
    Ok(done)
}

/// A body's bytes. One that is not whole is an error.
fn bytes_of(body: Incoming) -> impl Stream<Item = Result<Bytes>> + Unpin + Send {
    Box::pin(futures_util::stream::unfold(body, |mut body| async move {
        loop {
            return match body.frame().await? {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => Some((Ok(data), body)),
                    Err(_) => continue,
                },
                Err(e) => Some((Err(Failure::because("what was copied broke off", e)), body)),
            };
        }
    }))
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Machine(place) => place.fmt(f),
            Source::Here(path) => path.display().fmt(f),
        }
    }
}

impl Source {
    /// Its last part, where it has one.
    fn name(&self) -> Option<FileName> {
        match self {
            Source::Machine(place) => place.path.name(),
            Source::Here(path) => {
                let real = path.file_name().map(ToOwned::to_owned);
                let real = real.or_else(|| Some(path.canonicalize().ok()?.file_name()?.to_owned()));
                real?.into_encoded_bytes().try_into().ok()
            }
        }
    }

    async fn look(&self, ask: &Ask) -> Result<Found> {
        match self {
            Source::Here(path) => here::look(path),
            Source::Machine(place) => {
                let shape = ask.client.get(&place.asked("&stat=true")).await?;
                let shape: FileShape = serde_json::from_value(shape)
                    .map_err(|e| Failure::because("the daemon's answer is none about a file", e))?;
                found(&shape)
            }
        }
    }

    /// What a link leads to; of one in a machine its bytes will tell.
    fn followed(self, link: Found) -> Result<(Source, Found)> {
        match self {
            Source::Machine(_) => Ok((self, Found { kind: FileKind::File, ..link })),
            Source::Here(path) => {
                let real = path.canonicalize().map_err(|e| Failure::file("follow", &path, e))?;
                let found = here::look(&real)?;
                Ok((Source::Here(real), found))
            }
        }
    }

    async fn list(&self, ask: &Ask) -> Result<Vec<Node>> {
        match self {
            Source::Here(path) => here::list(path),
            Source::Machine(place) => {
                let entries = files::list(ask, place).await?;
                entries
                    .into_iter()
                    .map(|(name, shape)| {
                        let long = || Failure::here(format!("a path in {place} is too long"));
                        let source = Source::Machine(place.join(&name).ok_or_else(long)?);
                        Ok(Node { name, found: found(&shape)?, source })
                    })
                    .collect()
            }
        }
    }
}

fn found(shape: &FileShape) -> Result<Found> {
    let odd = |what: &str| Failure::here(format!("the machine says what is no {what}"));
    let target = shape.target.as_deref().map(|text| exact(text, shape.target_b64.as_deref()));
    let target = match (shape.kind, target.flatten()) {
        (FileKind::Link, Some(bytes)) => {
            Some(LinkTarget::try_from(bytes).map_err(|_| odd("link"))?)
        }
        (FileKind::Link, None) => return Err(odd("link")),
        _ => None,
    };
    let mode = Mode::parse(&shape.mode).map_err(|_| odd("mode"))?;
    Ok(Found { kind: shape.kind, mode, size: shape.size, target })
}

impl Into {
    /// The directory that is copied into, and under which name: into one that is there under the
    /// source's own, else under the one that was given.
    async fn of(ask: &Ask, to: &End, own: Option<FileName>) -> Result<(Into, FileName)> {
        let nameless = || Failure::Usage("name what is to be copied: it has no name".into());
        match to {
            End::Machine(place) => {
                if place.path.as_bytes().ends_with(b"/") || is_directory(ask, place).await? {
                    return Ok((Into::Machine(place.clone()), own.ok_or_else(nameless)?));
                }
                let name = place.path.name().ok_or_else(nameless)?;
                let above = parent(&place.path).ok_or_else(nameless)?;
                Ok((Into::Machine(InMachine { name: place.name.clone(), path: above }), name))
            }
            End::Here(path) if path.is_dir() => {
                Ok((Into::Here(Directory::named(path)?), own.ok_or_else(nameless)?))
            }
            End::Here(path) => {
                if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
                    let what = format!("{} is no directory", path.display());
                    return Err(Failure::here(what).fix("make it, or leave out the last slash"));
                }
                let name = path.file_name().map(|name| name.as_encoded_bytes().to_vec());
                let name = name.and_then(|name| name.try_into().ok()).ok_or_else(nameless)?;
                let above = path.parent().unwrap_or(Path::new("."));
                Ok((Into::Here(Directory::named(above)?), name))
            }
            End::Pipe => Err(nameless()),
        }
    }
}

/// Whether a directory is there, perhaps behind a link: it can be listed.
async fn is_directory(ask: &Ask, place: &InMachine) -> Result<bool> {
    match ask.client.get(&place.asked("&stat=true")).await {
        Ok(shape) => match shape.get("kind").and_then(serde_json::Value::as_str) {
            Some("link") => {
                let below = format!("{}/.", place.path.lossy());
                let path = FilePath::try_from(below.into_bytes());
                let path = path.map_err(|_| Failure::here("the path is too long"))?;
                let below = InMachine { name: place.name.clone(), path };
                Ok(ask.client.get(&below.asked("&stat=true")).await.is_ok())
            }
            kind => Ok(kind == Some("dir")),
        },
        Err(Failure::Refused(refused)) if refused.status == 404 => {
            match refused.body.get("code").and_then(serde_json::Value::as_str) {
                Some("file_not_found") => Ok(false),
                _ => Err(Failure::Refused(refused)),
            }
        }
        Err(failure) => Err(failure),
    }
}

fn parent(path: &FilePath) -> Option<FilePath> {
    let name = path.name()?;
    let bytes = path.as_bytes();
    let end = bytes.iter().rposition(|b| *b != b'/')? + 1 - name.as_bytes().len();
    bytes[..end].to_vec().try_into().ok()
}

impl Done {
    /// So many more bytes.
    fn add(&mut self, what: &Source, bytes: u64) {
        self.bytes += bytes;
        if self.bytes < LONG {
            return;
        }
        let work = self.work.get_or_insert_with(|| Work::begin("cp", &what.to_string()));
        match self.total {
            Some(total) => work.at(self.bytes, total),
            None => {
                if io::stderr().is_terminal() {
                    work.now(&format!("{} files, {}", self.files, human::bytes(self.bytes)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_path() {
        let above = |path: &str| {
            let path = FilePath::try_from(path.as_bytes().to_vec()).unwrap();
            parent(&path).map(|p| p.lossy())
        };
        assert_eq!(above("/a").as_deref(), Some("/"));
        assert_eq!(above("/a/b//").as_deref(), Some("/a/"));
        assert_eq!(above("/"), None);
    }

    #[test]
    fn what_a_machine_says_is_looked_at() {
        let shape = |kind: &str, mode: &str, target: serde_json::Value| -> FileShape {
            serde_json::from_value(serde_json::json!({
                "kind": kind, "size": 1, "mode": mode, "uid": 0, "gid": 0, "target": target,
                "mtime": "2026-01-01T00:00:00Z"
            }))
            .unwrap()
        };
        assert!(found(&shape("file", "0644", serde_json::Value::Null)).is_ok());
        assert!(found(&shape("file", "rwx", serde_json::Value::Null)).is_err());
        assert!(found(&shape("link", "0777", serde_json::Value::Null)).is_err());
        assert!(found(&shape("link", "0777", "".into())).is_err());
        assert!(found(&shape("link", "0777", "../x".into())).is_ok());
    }
}
