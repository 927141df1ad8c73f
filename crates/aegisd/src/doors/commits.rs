//! `/v1/commits`, and how they are made: of instances (contracts/aegis.md 7).

use aegis_wire::bounds::HOST_BODY_MAX;
use aegis_wire::host::{CommitBody, ForkBody, StatusWord, body};
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;

use super::State;
use super::answer::Failure;
use super::ask::{HostAuth, JsonBody, Named};
use crate::app::{commits, instances};

type Body = JsonBody<HOST_BODY_MAX>;
type Answer = Result<Response, Failure>;

/// Routes of the host.
pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/v1/instances/{id}/commit", post(commit))
        .route("/v1/instances/{id}/fork", post(fork))
        .route("/v1/commits", get(list))
        .route("/v1/commits/{id}", get(info).delete(remove))
}

async fn commit(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    JsonBody(value): Body,
) -> Answer {
    let (as_name, disk_only) = body::<CommitBody>(value)?.parse()?;
    let made = commits::commit(host, &state.app, &name, as_name, disk_only).await?;
    Ok((StatusCode::CREATED, Json(made)).into_response())
}

async fn fork(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    JsonBody(value): Body,
) -> Answer {
    let fork = body::<ForkBody>(value)?.parse()?;
    let made = commits::fork(host, &state.app, &name, fork).await?;
    let instances: Vec<_> =
        made.instances.iter().map(|i| instances::shape(&state.app, i)).collect();
    let answer = json!({ "commit": made.commit, "instances": instances });
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

async fn list(Extract(state): Extract<State>, HostAuth(host): HostAuth) -> Answer {
    Ok(Json(commits::list(host, &state.app)?).into_response())
}

async fn info(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    Ok(Json(commits::find(host, &state.app, &name)?).into_response())
}

async fn remove(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    commits::remove(host, &state.app, &name).await?;
    Ok(Json(StatusWord { status: "deleted".to_owned() }).into_response())
}
