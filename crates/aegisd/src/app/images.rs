//! Images, as the host asks for them (contracts/aegis.md 1).

use std::collections::BTreeMap;
use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use aegis_rules::capacity::{self, Need};
use aegis_rules::instance::Instance;
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::host::Create;
use aegis_wire::images::{Credentials, ImageShape, Task};
use aegis_wire::words::{DiskBytes, ImageRef, Reference};
use axum::body::BodyDataStream;
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc};

use super::instances::{DEFAULT_CPU, DEFAULT_MEMORY};
use super::{App, Error, Host};
use crate::config::Config;
use crate::images::{self, Failed, Image, Images, Teller};
use crate::lifecycle;

/// Progress that waits for a slow reader.
const LINES_WAITING: usize = 64;
/// Most names of images that a refusal lists.
const NAMED: usize = 10;

/// Lines of a pull or import: progress, and a last one.
pub type Lines = mpsc::Receiver<io::Result<String>>;

/// The image; one that this host does not have is refused: who asks now can still choose another.
pub(super) fn check(config: &Config, field: &str, image: &ImageRef) -> Result<Image, Refusal> {
    let images = Images::of(&config.home);
    if let Some(found) = images.find(image) {
        return Ok(found);
    }
    let fetched = images.names().into_iter().filter_map(|(name, _)| name);
    let mut names: Vec<String> = images.local_names().into_iter().chain(fetched).collect();
    names.truncate(NAMED);
    let mut refusal = Refusal::field(field, format!("an image of this host: {}", names.join(", ")));
    refusal.requested = Some(image.to_string());
    Err(refusal.hint(missing(image)))
}

/// What to do about an image that is not there.
pub(super) fn missing(image: &ImageRef) -> String {
    if images::is_ours(image) {
        return format!("`aegis setup` makes the image {image}");
    }
    format!("`aegis image pull {image}` fetches it; `aegis setup` makes the image base")
}

fn reference(image: &ImageRef) -> Result<Reference, Refusal> {
    Reference::of(image).map_err(|e| Refusal::field("image_ref", e.expected))
}

/// Has an image pulled that is not there, where the settings say so, and waits for it; else `refusal`
/// stays.
pub(super) async fn provide(app: &App, image: &ImageRef, refusal: Refusal) -> Result<(), Error> {
    let config = &app.ctx.config;
    if !config.images.pull_missing || images::is_ours(image) {
        return Err(refusal.into());
    }
    let reference = reference(image)?;
    let _one = app.fetching.lock().await;
    if Images::of(&config.home).find(image).is_some() {
        return Ok(());
    }
    let work = async {
        let task = images::pull(config, &reference, None).await?;
        get(app, task, None, Some(&reference), None).await
    };
    work.await.map(drop).map_err(|failed: Failed| {
        let message = format!("the image {image} is not on this host: {failed}");
        Error::Image(Failed { message, ..failed })
    })
}

/// As [`pull`], of an image that a machine is about to be made of: one that is there stays as it is.
pub fn pull_missing(
    host: Host,
    app: &App,
    image: &ImageRef,
    said: Option<Credentials>,
) -> Result<Lines, Error> {
    let config = &app.ctx.config;
    if let Some(there) = Images::of(&config.home).find(image) {
        let shape = shape(image.as_str(), &there, 0);
        return Ok(told(app, |_, _| async move { Ok(Done(shape)) }));
    }
    if !config.images.pull_missing || images::is_ours(image) {
        check(config, "image_ref", image)?;
    }
    pull(host, app, image, said)
}

/// Pulls an image. The lines end with one of it, or of why there is none; the pull ends when nobody
/// reads them any more.
pub fn pull(
    _: Host,
    app: &App,
    image: &ImageRef,
    said: Option<Credentials>,
) -> Result<Lines, Error> {
    let reference = reference(image)?;
    let images = Images::of(&app.ctx.config.home);
    if images.local(image.as_str()).is_some() || images::is_ours(image) {
        let refusal =
            Refusal::field("image_ref", "another name: this one is of an image made here");
        return Err(refusal.hint(format!("write {reference}")).into());
    }
    Ok(told(app, |app, tell| async move {
        let task = images::pull(&app.ctx.config, &reference, said).await?;
        get(&app, task, None, Some(&reference), Some(&tell)).await
    }))
}

/// Takes an image out of an archive, or of a tree; `name` is what it is called, where the archive
/// does not say.
pub fn import(
    _: Host,
    app: &App,
    name: Option<&ImageRef>,
    task: Task,
    archive: BodyDataStream,
) -> Result<Lines, Error> {
    let name = name.map(reference).transpose()?;
    Ok(told(app, |app, tell| async move {
        get(&app, task, Some(archive), name.as_ref(), Some(&tell)).await
    }))
}

/// Runs a fetch whose progress goes to whoever reads the lines.
fn told<W, F>(app: &App, work: W) -> Lines
where
    W: FnOnce(App, Teller) -> F + Send + 'static,
    F: Future<Output = Result<Done, Failed>> + Send,
{
    let (lines, reader) = mpsc::channel(LINES_WAITING);
    let app = app.clone();
    tokio::spawn(async move {
        let fetching = app.fetching.clone();
        let work = async {
            let _one = fetching.lock().await;
            work(app.clone(), lines.clone()).await
        };
        let done = tokio::select! {
            done = work => done,
            // Dropped, it ends.
            () = lines.closed() => return,
        };
        let line = match done {
            Ok(Done(shape)) => {
                let mut line = json!(shape);
                line["event"] = "done".into();
                line
            }
            Err(failed) => {
                json!({ "event": "failed", "error": failed.message, "code": failed.code })
            }
        };
        let _ = lines.send(Ok(format!("{line}\n"))).await;
    });
    reader
}

/// While a snapshot is made, how often who waits hears of it.
const WARMING_EVERY: Duration = Duration::from_secs(1);
/// Snapshots that are made at a time: each is a machine that boots.
static WARMING: Mutex<()> = Mutex::const_new(());

/// Makes the snapshot of which machines of a kind are cloned, if it is not there. The lines tell how
/// long it takes, and end with one of it, or of why there is none.
pub fn warm(_: Host, app: &App, kind: Create) -> Result<Lines, Error> {
    let config = &app.ctx.config;
    let name = kind.image.unwrap_or_else(|| config.default_image.clone());
    let image = check(config, "image_ref", &name)?;
    let cpu = kind.cpu.unwrap_or(DEFAULT_CPU);
    let memory = kind.memory.unwrap_or(DEFAULT_MEMORY);
    let need = Need { memory, disk: DiskBytes(0), vcpus: cpu.vcpus() };
    capacity::admit(&config.capacity, &app.ctx.ledger.read(|f| f.held())?, &need)?;
    let (lines, reader) = mpsc::channel(LINES_WAITING);
    let ctx = app.ctx.clone();
    tokio::spawn(async move {
        let began = Instant::now();
        let work = async {
            let _one = WARMING.lock().await;
            lifecycle::warm(&ctx, &image, cpu, memory).await
        };
        let mut work = pin!(work);
        let done = loop {
            tokio::select! {
                done = &mut work => break done,
                // One that is under way goes on without this.
                () = lines.closed() => return,
                () = tokio::time::sleep(WARMING_EVERY) => {
                    let ms = began.elapsed().as_millis() as u64;
                    let line = json!({ "event": "making", "elapsed_ms": ms });
                    let _ = lines.try_send(Ok(format!("{line}\n")));
                }
            }
        };
        let line = match done {
            Ok(ready) => json!({
                "event": "done", "reference": name.as_str(), "vcpus": cpu.vcpus(),
                "memory_mb": memory.0, "cached": ready.cached, "elapsed_ms": ready.elapsed_ms,
            }),
            Err(e) => json!({ "event": "failed", "error": e.to_string(), "code": "image_failed" }),
        };
        let _ = lines.send(Ok(format!("{line}\n"))).await;
    });
    Ok(reader)
}

/// What a pull or import brought.
struct Done(ImageShape);

/// Does a job and keeps what it made. Only for who holds the lock of fetches.
async fn get(
    app: &App,
    task: Task,
    archive: Option<BodyDataStream>,
    name: Option<&Reference>,
    tell: Option<&Teller>,
) -> Result<Done, Failed> {
    let made = images::fetch(&app.ctx.config, task, archive, tell).await?;
    let mut names: Vec<String> = name.map(ToString::to_string).into_iter().collect();
    if names.is_empty() {
        let own = made.names.iter().filter_map(|name| name.parse::<ImageRef>().ok());
        names.extend(own.filter_map(|n| Some(Reference::of(&n).ok()?.to_string())));
    }
    let first = names.first().cloned().unwrap_or_else(|| made.digest.clone());
    let (images, now) = (Images::of(&app.ctx.config.home), app.ctx.now());
    let kept = tokio::task::spawn_blocking(move || images.keep(made, &names, now)).await;
    let image = kept.map_err(|e| Failed::new("image_failed", e.to_string()))??;
    Ok(Done(shape(&first, &image, 0)))
}

fn shape(name: &str, image: &Image, in_use: u64) -> ImageShape {
    ImageShape {
        reference: name.to_owned(),
        digest: image.digest.clone(),
        bytes: image.bytes,
        created_at: image.created_at,
        in_use,
        command: image.run.command(),
    }
}

/// Instances by the image that they have: its digest, or the name of one made here.
fn uses(app: &App, images: &Images) -> Result<BTreeMap<String, u64>, Error> {
    let mut uses = BTreeMap::new();
    for instance in app.ctx.ledger.read(|f| f.instances())? {
        *uses.entry(key(app, images, &instance)).or_insert(0) += 1;
    }
    for kept in app.ctx.commits.all() {
        let key = kept.digest.unwrap_or_else(|| kept.commit.image.to_string());
        *uses.entry(key).or_insert(0) += 1;
    }
    Ok(uses)
}

fn key(app: &App, images: &Images, instance: &Instance) -> String {
    let found = lifecycle::image(&app.ctx, instance);
    let name = || instance.spec.image.to_string();
    match found {
        Some(image) => image.digest.unwrap_or_else(name),
        None => images.digest_of(&instance.spec.image).unwrap_or_else(name),
    }
}

/// All images, by all their names.
pub fn list(_: Host, app: &App) -> Result<Vec<ImageShape>, Error> {
    let images = Images::of(&app.ctx.config.home);
    let uses = uses(app, &images)?;
    let used = |key: &str| uses.get(key).copied().unwrap_or(0);
    let mut all = Vec::new();
    for name in images.local_names() {
        if let Some(image) = images.local(&name) {
            all.push(shape(&name, &image, used(&name)));
        }
    }
    for (name, digest) in images.names() {
        if let Some(image) = images.fetched(&digest) {
            all.push(shape(name.as_deref().unwrap_or(&digest), &image, used(&digest)));
        }
    }
    Ok(all)
}

/// Forgets a name, and the image with its last one, unless an instance has it.
pub async fn remove(_: Host, app: &App, image: &ImageRef) -> Result<(), Error> {
    let _one = app.fetching.lock().await;
    let images = Images::of(&app.ctx.config.home);
    let uses = uses(app, &images)?;
    let free = |key: &str| match uses.get(key) {
        None => Ok(()),
        Some(n) => {
            let message = format!("the image {image} is in use by {n} instances and commits");
            Err(Refusal::new(Code::ImageInUse, message).hint("delete them first"))
        }
    };
    if images.local(image.as_str()).is_some() {
        free(image.as_str())?;
        return Ok(images.forget_local(image.as_str())?);
    }
    let absent = || Refusal::new(Code::ImageNotFound, format!("this host has no image {image}"));
    let digest = images.digest_of(image).ok_or_else(absent)?;
    free(&digest)?;
    let name = match Reference::of(image) {
        Ok(reference)
            if images.names().contains(&(Some(reference.to_string()), digest.clone())) =>
        {
            reference.to_string()
        }
        _ => digest.clone(),
    };
    images.forget(&name, &digest)?;
    Ok(())
}

/// Forgets images that have no name any more, and with `all` those that no instance has; and what of
/// layers no image needs. What was made here stays.
pub async fn prune(_: Host, app: &App, all: bool) -> Result<Value, Error> {
    let _one = app.fetching.lock().await;
    let images = Images::of(&app.ctx.config.home);
    let uses = uses(app, &images)?;
    let (mut gone, mut bytes) = (Vec::new(), 0);
    for (name, digest) in images.names() {
        if uses.contains_key(&digest) || (name.is_some() && !all) {
            continue;
        }
        let size = images.fetched(&digest).map_or(0, |image| image.bytes);
        if images.forget(name.as_deref().unwrap_or(&digest), &digest)? {
            bytes += size;
            gone.push(digest);
        }
    }
    bytes += images.prune_blobs()?;
    Ok(json!({ "pruned": gone.len(), "digests": gone, "bytes": bytes }))
}
