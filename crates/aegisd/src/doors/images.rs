//! `/v1/images` (contracts/aegis.md 1).

use aegis_rules::refusal::Refusal;
use aegis_wire::bounds::HOST_BODY_MAX;
use aegis_wire::host::{StatusWord, body};
use aegis_wire::images::PullBody;
use aegis_wire::words::{BadWord, ImageRef};
use axum::body::Body as Bytes;
use axum::extract::State as Extract;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;

use super::answer::Failure;
use super::ask::{HostAuth, JsonBody, Named, Params};
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
}

async fn import(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Params(query): Params<ImportQuery>,
    archive: Bytes,
) -> Answer {
    let name = query.name.map(parse).transpose()?;
    let archive = archive.into_data_stream();
    Ok(stream::lines(images::import(host, &state.app, name.as_ref(), archive)?))
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
    let all = match query.all.as_deref() {
        None | Some("" | "0" | "false") => false,
        Some("1" | "true") => true,
        Some(_) => return Err(super::ask::bad_query("all", "true or false")),
    };
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
