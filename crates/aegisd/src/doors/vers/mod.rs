//! The vers API, where the settings open it (contracts/vers.md 2 to 4): its shapes, its envelopes, its
//! plain texts. What is asked is done by `app/vers.rs`.

mod answer;
mod commits;
mod exec;
mod files;
mod later;

use aegis_wire::vers::{NewRoot, SetLabels, SetState, VmId};
use aegis_wire::words::Uuid;
use axum::extract::{FromRequestParts, Query, State as Extract};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::IntoResponse as _;
use axum::routing::{delete, get, patch, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;

use self::answer::{Body, Failure, Id, made};
use super::State;
use super::answer::Failure as Refused;
use super::ask::{HostAuth, Peer, bearer, peer};
use crate::app::{Host, vers};

type Answer = Result<axum::response::Response, Failure>;

/// Routes of the API, and the host's own for its key; none where it is not open.
pub(super) fn routes(state: &State) -> Router<State> {
    let own = Router::new().route("/v1/vers/key", post(issue));
    if !state.app.ctx.config.vers_api {
        return own;
    }
    let api = Router::new()
        .route("/vms", get(list))
        .route("/vm/new_root", post(new_root))
        // Lists and status show machines; there is no such route for one.
        .route("/vm/{vm_id}", delete(remove).get(nothing))
        .route("/vm/{vm_id}/status", get(status))
        .route("/vm/{vm_id}/metadata", get(metadata))
        .route("/vm/{vm_id}/state", patch(set_state))
        .route("/vm/{vm_id}/label", patch(label))
        .merge(commits::routes())
        .merge(exec::routes())
        .merge(files::routes())
        .merge(later::routes());
    own.nest("/api/v1", api).route("/health", get(health))
}

/// Whoever shows the key, or is the host by its socket.
struct Borrower(Host);

impl FromRequestParts<State> for Borrower {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Borrower, Failure> {
        let is_host = matches!(peer(parts), Some(Peer::Unix));
        let admitted = || {
            let lender = &state.app.ctx.keys.lender;
            bearer(&parts.headers).is_some_and(|shown| lender.admits(shown))
        };
        if is_host || admitted() {
            return Ok(Borrower(Host::authenticated()));
        }
        Err(Failure::bad_key())
    }
}

async fn health() -> StatusCode {
    StatusCode::OK
}

async fn nothing(_: Borrower) -> StatusCode {
    StatusCode::NOT_FOUND
}

/// A new key; the one before is worth nothing from now on.
async fn issue(
    Extract(state): Extract<State>,
    HostAuth(_): HostAuth,
) -> Result<Json<serde_json::Value>, Refused> {
    if !state.app.ctx.config.vers_api {
        let closed =
            "the vers API is not open here: set enabled = true in [vers_api] of aegis.toml";
        return Err(Refused::new(StatusCode::CONFLICT, "vers_api_closed", closed));
    }
    let key = state.app.ctx.keys.lender.issue().map_err(crate::app::Error::Io)?;
    Ok(Json(json!({"api_key": key.reveal(), "base_url": format!("http://{}", state.listen)})))
}

#[derive(Deserialize)]
struct Wait {
    #[serde(default)]
    wait_boot: bool,
    #[serde(default)]
    skip_wait_boot: bool,
}

async fn list(Extract(state): Extract<State>, Borrower(host): Borrower) -> Answer {
    Ok(Json(vers::list(host, &state.app)?).into_response())
}

async fn new_root(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Query(wait): Query<Wait>,
    Body(ask): Body<NewRoot>,
) -> Answer {
    let vm_id = vers::new_root(host, &state.app, ask.vm_config, wait.wait_boot).await?;
    Ok(made(VmId { vm_id }))
}

async fn status(Extract(state): Extract<State>, Borrower(host): Borrower, Id(vm): Id) -> Answer {
    let found = vers::find(host, &state.app, &vm)?;
    Ok(Json(vers::shape(&state.app, &found)).into_response())
}

async fn metadata(Extract(state): Extract<State>, Borrower(host): Borrower, Id(vm): Id) -> Answer {
    let found = vers::find(host, &state.app, &vm)?;
    Ok(Json(vers::metadata(&state.app, &found)).into_response())
}

async fn set_state(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    Query(wait): Query<Wait>,
    Body(ask): Body<SetState>,
) -> Answer {
    unless_skipped(&state, host, &vm, &wait).await?;
    vers::set_state(host, &state.app, &vm, ask.state).await?;
    Ok(StatusCode::OK.into_response())
}

/// Waits until a machine is up, unless the asker does not want to.
async fn unless_skipped(state: &State, host: Host, vm: &Uuid, wait: &Wait) -> Result<(), Failure> {
    if !wait.skip_wait_boot {
        let found = vers::find(host, &state.app, vm)?;
        vers::until_up(&state.app, &found).await?;
    }
    Ok(())
}

async fn label(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    Body(ask): Body<SetLabels>,
) -> Answer {
    vers::label(host, &state.app, &vm, ask.labels).await?;
    Ok(StatusCode::OK.into_response())
}

/// What is unknown here is forbidden, and says no more than that.
async fn remove(Extract(state): Extract<State>, Borrower(host): Borrower, Id(vm): Id) -> Answer {
    match vers::remove(host, &state.app, &vm).await {
        Ok(()) => Ok(Json(VmId { vm_id: vm }).into_response()),
        Err(error) => Err(Failure::of_delete(error)),
    }
}
