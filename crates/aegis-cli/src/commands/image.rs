//! `aegis image …`: images that machines are made of.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;

use aegis_wire::images::{Part, Progress};
use aegis_wire::path::escape;
use aegis_wire::words::CommitId;
use bytes::Bytes;
use clap::Subcommand;
use futures_util::Stream;
use hyper::Method;
use serde_json::{Value, json};

use super::pieces::{self, PIECE, Pieces};
use super::{Ask, build, maybe, text, when};
use crate::failure::{Failure, Result};
use crate::human;
use crate::ndjson::Lines;
use crate::output::{Format, Work, clean, print_json, say, table};

/// What is shown of a digest.
const DIGEST_SHOWN: usize = 19;

/// What can be asked of images.
#[derive(Subcommand, Debug)]
pub enum ImageCommand {
    /// Fetch an image from a registry
    #[command(after_help = "\
Credentials are those of the daemon's ~/.docker/config.json (docker login). What breaks off is \
continued by the next pull.

Examples:
  aegis image pull python:3.12-alpine
  aegis image pull ghcr.io/acme/bot@sha256:…
  aegis image pull localhost:5000/bot        without TLS, as every registry on loopback")]
    Pull {
        /// [REGISTRY/]NAME[:TAG][@DIGEST]
        image: String,
    },
    /// Take an image out of an archive
    #[command(after_help = "\
The archive is what `docker save` writes, or an OCI layout, as a tar or a directory.

Examples:
  docker save bot | aegis image import -
  aegis image import --name bot:1 bot.tar
  skopeo copy docker://alpine oci:alpine:1 && aegis image import alpine --name alpine:1")]
    Import {
        /// The archive; - for stdin
        #[arg(value_name = "FILE")]
        from: PathBuf,
        /// How it is called, where the archive does not say
        #[arg(long, value_name = "IMAGE")]
        name: Option<String>,
    },
    /// Make one: of a directory, or of the distribution's packages
    #[command(after_help = "\
A directory becomes the root file system as it is: with owners, permissions and links, without \
extended attributes. With --debian mmdebstrap puts it together on this host, as `aegis setup` does.

Examples:
  aegis image build bot --from ./rootfs -- /usr/bin/bot --serve
  aegis image build tools --debian --include python3-pip,jq
  aegis run --image tools -- jq --version")]
    Build(build::BuildArgs),
    /// Make its snapshot ahead, of which its machines are cloned: their first start is quick then
    #[command(after_help = "\
A snapshot is of an image, its virtual CPUs and its memory; the first machine of a kind makes it \
otherwise.

Example:
  aegis image warm python:3.12-alpine --memory 1G --cpus 2")]
    Warm(build::WarmArgs),
    /// List them
    #[command(visible_alias = "ls")]
    List,
    /// Forget a name; with the last one the image is deleted
    #[command(visible_alias = "delete")]
    Rm {
        /// A name, or a digest for the image with all its names
        image: String,
    },
    /// Delete images without a name, and layers that no image needs
    Prune {
        /// Delete all fetched images that no machine has
        #[arg(long)]
        all: bool,
    },
}

/// Asks.
pub async fn run(ask: &Ask, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Pull { image } => {
            let body = json!({ "image_ref": image });
            let lines = ask.client.lines(Method::POST, "/v1/images", Some(body)).await?;
            let done = follow(lines, &image).await?;
            ended(ask.format, &done, "pulled")
        }
        ImageCommand::Import { from, name } => {
            let path = match &name {
                Some(name) => format!("/v1/images/import?name={}", escape(name)),
                None => "/v1/images/import".to_owned(),
            };
            let lines = ask.client.upload(&path, archive(&from)?).await?;
            let done = follow(lines, &from.display().to_string()).await?;
            ended(ask.format, &done, "imported")
        }
        ImageCommand::Build(args) => build::build(ask, args).await,
        ImageCommand::Warm(args) => build::warm(ask, args).await,
        ImageCommand::List => {
            let images = ask.client.get("/v1/images").await?;
            ask.format.answer(&images, || words(&images))
        }
        ImageCommand::Rm { image } => {
            let gone = ask.client.delete(&format!("/v1/images/{}", escape(&image))).await?;
            ask.format.answer(&gone, || format!("{}\n", text(&gone, "status")))
        }
        ImageCommand::Prune { all } => {
            let path = if all { "/v1/images/prune?all=true" } else { "/v1/images/prune" };
            let pruned = ask.client.post(path, None).await?;
            let bytes = pruned.get("bytes").and_then(Value::as_u64).unwrap_or(0);
            let words = || format!("{} images, {}\n", text(&pruned, "pruned"), human::bytes(bytes));
            ask.format.answer(&pruned, words)
        }
    }
}

/// Has the image of a machine that is about to be made pulled, if it is not there, and shows how far
/// that is.
pub async fn provide(ask: &Ask, machine: &Value) -> Result<()> {
    let Some(image) = machine.get("image_ref").and_then(Value::as_str) else { return Ok(()) };
    if image.parse::<CommitId>().is_ok() {
        return Ok(());
    }
    let body = json!({ "image_ref": image, "if_missing": true });
    let lines = ask.client.lines(Method::POST, "/v1/images", Some(body)).await?;
    follow(lines, image).await.map(drop).map_err(|failure| match failure {
        Failure::Here { what, source, .. } => {
            let what = format!("the image {image} is not on this host: {what}");
            let fix = format!(
                "`aegis image pull {image}` fetches it; `aegis setup` makes the image base"
            );
            Failure::Here { what, fix: Some(fix), source }
        }
        other => other,
    })
}

/// Shows progress up to the last line, which it gives.
pub(super) async fn follow(mut lines: Lines, name: &str) -> Result<Value> {
    let mut shown = Shown::default();
    while let Some(line) = lines.next().await? {
        let value: Value = serde_json::from_slice(&line)
            .map_err(|e| Failure::because("the daemon's answer is no JSON", e))?;
        match value.get("event").and_then(Value::as_str) {
            Some("done") => {
                shown.end(&value);
                return Ok(value);
            }
            Some("failed") => {
                return Err(Failure::here(format!("{name}: {}", clean(&text(&value, "error")))));
            }
            // A daemon of another version may say more.
            _ => {
                if let Ok(progress) = serde_json::from_value(value) {
                    shown.show(name, &progress);
                }
            }
        }
    }
    Err(Failure::here("the daemon's answer broke off").fix("try again: what came is kept"))
}

/// How far a fetch is.
#[derive(Default)]
struct Shown {
    work: Option<Work>,
    layers: BTreeMap<String, (u64, u64)>,
}

impl Shown {
    fn show(&mut self, name: &str, progress: &Progress) {
        match progress {
            Progress::Layers { layers } => {
                let each = |part: &Part| (part.digest.clone(), (0, part.bytes));
                self.layers = layers.iter().map(each).collect();
                let total: u64 = self.layers.values().map(|(_, all)| *all).sum();
                let what = format!("{name}: {} layers, {}", layers.len(), human::bytes(total));
                self.work = Some(Work::begin("pull", &what));
            }
            Progress::Layer { digest, bytes } => {
                if let Some((done, all)) = self.layers.get_mut(digest) {
                    *done = (*bytes).min(*all);
                }
                let (done, all) =
                    self.layers.values().fold((0, 0), |(d, a), (done, all)| (d + done, a + all));
                if let Some(work) = &self.work {
                    work.at(done, all);
                }
            }
            Progress::Unpack { layer, of } => {
                let work = self.work.get_or_insert_with(|| Work::begin("image", name));
                // One line for all of them, where lines can't move.
                if io::stderr().is_terminal() || *layer == 1 {
                    work.now(&format!("unpacking {of} layers"));
                }
            }
            Progress::Done(_) | Progress::Failed { .. } => {}
        }
    }

    fn end(&mut self, done: &Value) {
        if let Some(work) = self.work.take() {
            let bytes = done.get("bytes").and_then(Value::as_u64).unwrap_or(0);
            work.done(&format!("{} is there ({})", text(done, "reference"), human::bytes(bytes)));
        }
    }
}

pub(super) fn ended(format: Format, done: &Value, verb: &str) -> Result<()> {
    match format {
        Format::Json => {
            let mut image = done.clone();
            if let Some(image) = image.as_object_mut() {
                image.remove("event");
            }
            print_json(&image)
        }
        Format::Human => {
            let line = format!(
                "Image {verb}: {}\nDigest: {}\n",
                text(done, "reference"),
                text(done, "digest")
            );
            crate::output::data(clean(&line).as_bytes())
        }
    }
}

fn words(images: &Value) -> String {
    let rows: Vec<Vec<String>> = images
        .as_array()
        .into_iter()
        .flatten()
        .map(|image| {
            let digest: String = maybe(image, "digest").chars().take(DIGEST_SHOWN).collect();
            let bytes = image.get("bytes").and_then(Value::as_u64).unwrap_or(0);
            vec![
                text(image, "reference"),
                if digest.is_empty() { "made here".to_owned() } else { digest },
                human::bytes(bytes),
                when(image, "created_at"),
                text(image, "in_use"),
            ]
        })
        .collect();
    if rows.is_empty() {
        say("no images are there; `aegis setup` makes one, `aegis image pull NAME` fetches one");
        return String::new();
    }
    table(&["reference", "digest", "size", "created", "in use"], rows)
}

/// An archive's bytes; of a directory a tar.
pub(super) fn archive(
    from: &Path,
) -> Result<Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send + 'static>>> {
    let failed = |e| Failure::file("read", from, e);
    if from == Path::new("-") {
        if io::stdin().is_terminal() {
            return Err(Failure::Usage("stdin is a terminal: pipe an archive into it".into()));
        }
        return Ok(Box::pin(pieces::by(|to| pieces::pump(io::stdin().lock(), &to))));
    }
    if from.is_dir() {
        let from = from.to_owned();
        return Ok(Box::pin(pieces::by(move |to| {
            let mut tar = tar::Builder::new(Chunks(to.clone()));
            tar.follow_symlinks(false);
            let done = tar.append_dir_all("", &from).and_then(|()| tar.into_inner().map(drop));
            if let Err(e) = done {
                let _ = to.blocking_send(Err(e));
            }
        })));
    }
    let file = File::open(from).map_err(failed)?;
    Ok(Box::pin(pieces::by(move |to| pieces::pump(file, &to))))
}

/// Writes into a channel.
struct Chunks(Pieces);

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = Bytes::copy_from_slice(&bytes[..bytes.len().min(PIECE)]);
        let n = piece.len();
        self.0.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;

    #[test]
    fn a_directory_is_read_as_a_tar() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        std::fs::write(dir.path().join("index.json"), b"{}").unwrap();
        std::fs::write(dir.path().join("blobs/x"), vec![7; PIECE * 3]).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let pieces = archive(dir.path()).unwrap();
        let bytes = runtime.block_on(pieces.map(|p| p.unwrap().to_vec()).concat());
        let mut tar = tar::Archive::new(&bytes[..]);
        let found = tar.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            (entry.path().unwrap().display().to_string(), entry.size())
        });
        let found: BTreeMap<String, u64> = found.collect();
        assert_eq!((found["index.json"], found["blobs/x"]), (2, PIECE as u64 * 3));
    }

    #[test]
    fn a_list_shows_what_is_made_here() {
        let images = json!([
            { "reference": "base", "bytes": 1000, "in_use": 2, "created_at": "2026-01-01T00:00:00Z" },
            { "reference": "docker.io/library/a:1", "digest": format!("sha256:{}", "a".repeat(64)),
              "bytes": 5, "in_use": 0, "created_at": "2026-01-01T00:00:00Z" }
        ]);
        let words = words(&images);
        assert!(words.contains("made here") && words.contains("sha256:aaaaaaaaaaaa"), "{words}");
        assert!(!words.contains(&"a".repeat(20)), "{words}");
    }
}
