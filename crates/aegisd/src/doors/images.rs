//! `/v1/images` (contracts/aegis.md 1).

use aegis_rules::refusal::Refusal;
use aegis_wire::bounds::HOST_BODY_MAX;
use aegis_wire::host::{CreateBody, StatusWord, body};
use aegis_wire::images::{PullBody, RunConfig, Task, WarmBody};
use aegis_wire::words::{BadWord, ImageRef};
use axum::body::Body as Bytes;
use axum::extract::State as Extract;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;

use super::answer::Failure;
use super::ask::{HostAuth, JsonBody, Named, Params, bad_query, discard};
use super::{State, stream};
use crate::app::images;

type Body = JsonBody<HOST_BODY_MAX>;
type Answer = Result<Response, Failure>;

/// Routes of the host.
pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/v1/images", get(list).post(pull))
        .route("/v1/images/import", post(import))
        .route("/v1/images/prune", post(prune))
        .route("/v1/images/warm", post(warm))
        .route("/v1/images/{name}", delete(remove))
}

fn parse(name: String) -> Result<ImageRef, Refusal> {
    name.try_into().map_err(|e: BadWord| Refusal::field("image_ref", e.expected))
}

async fn list(Extract(state): Extract<State>, HostAuth(host): HostAuth) -> Answer {
    Ok(Json(images::list(host, &state.app)?).into_response())
}

async fn pull(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    JsonBody(value): Body,
) -> Answer {
    // What serde says of a bad body may quote it.
    let bad =
        |_| Refusal::field("image_ref", "a text, beside nothing but credentials and if_missing");
    let ask = body::<PullBody>(value).map_err(bad)?;
    let image = parse(ask.image_ref)?;
    let pull = if ask.if_missing { images::pull_missing } else { images::pull };
    Ok(stream::lines(pull(host, &state.app, &image, ask.credentials)?))
}

#[derive(Deserialize)]
struct ImportQuery {
    name: Option<String>,
    /// The archive is a root file system.
    tree: Option<String>,
    /// JSON: the words of its command.
    command: Option<String>,
}

async fn import(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Params(query): Params<ImportQuery>,
    archive: Bytes,
) -> Answer {
    let (name, task) = match wanted(query) {
        Ok(wanted) => wanted,
        Err(failure) => {
            discard(archive).await;
            return Err(failure);
        }
    };
    let archive = archive.into_data_stream();
    Ok(stream::lines(images::import(host, &state.app, name.as_ref(), task, archive)?))
}

fn wanted(query: ImportQuery) -> Result<(Option<ImageRef>, Task), Failure> {
    let name = query.name.map(parse).transpose()?;
    let task = match (flag("tree", query.tree.as_deref())?, query.command) {
        (false, None) => Task::Archive,
        (false, Some(_)) => return Err(bad_query("command", "left out: an archive has its own")),
        (true, _) if name.is_none() => return Err(bad_query("name", "the name of the new image")),
        (true, command) => {
            let words = command.as_deref().map(serde_json::from_str).transpose();
            let cmd = words.map_err(|_| bad_query("command", "a JSON list of words"))?;
            let config = RunConfig { cmd: cmd.unwrap_or_default(), ..RunConfig::default() };
            if !config.is_bounded() {
                return Err(bad_query("command", "a command that a process can be given"));
            }
            Task::Tree { config }
        }
    };
    Ok((name, task))
}

fn flag(name: &str, text: Option<&str>) -> Result<bool, Failure> {
    match text {
        None | Some("" | "0" | "false") => Ok(false),
        Some("1" | "true") => Ok(true),
        Some(_) => Err(bad_query(name, "true or false")),
    }
}

async fn warm(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    JsonBody(value): Body,
) -> Answer {
    let WarmBody { image_ref, vcpus, memory_mb } = body(value)?;
    let kind = CreateBody { image_ref, vcpus, memory_mb, ..CreateBody::default() }.parse()?;
    Ok(stream::lines(images::warm(host, &state.app, kind)?))
}

#[derive(Deserialize)]
struct PruneQuery {
    all: Option<String>,
}

async fn prune(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Params(query): Params<PruneQuery>,
) -> Answer {
    let all = flag("all", query.all.as_deref())?;
    Ok(Json(images::prune(host, &state.app, all).await?).into_response())
}

async fn remove(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    images::remove(host, &state.app, &parse(name)?).await?;
    Ok(Json(StatusWord { status: "removed".to_owned() }).into_response())
}
