//! `/v1/workspaces` (contracts/aegis.md 1).

use aegis_rules::refusal::Refusal;
use aegis_wire::host::StatusWord;
use aegis_wire::words::{BadWord, Handle};
use axum::extract::State as Extract;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get};
use axum::{Json, Router};

use super::State;
use super::answer::Failure;
use super::ask::{HostAuth, Named};
use crate::app::workspaces;

type Answer = Result<Response, Failure>;

/// Routes of the host.
pub(super) fn routes() -> Router<State> {
    Router::new().route("/v1/workspaces", get(list)).route("/v1/workspaces/{name}", delete(remove))
}

async fn list(Extract(state): Extract<State>, HostAuth(host): HostAuth) -> Answer {
    Ok(Json(workspaces::list(host, &state.app).await?).into_response())
}

async fn remove(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    let name: Handle = name.try_into().map_err(|e: BadWord| Refusal::field("name", e.expected))?;
    workspaces::remove(host, &state.app, name).await?;
    Ok(Json(StatusWord { status: "deleted".to_owned() }).into_response())
}
