//! `/couch/guests/{id}/…`: what a guest may reach and spend, changed while it lives.

use aegis_wire::bounds::COUCH_BODY_MAX;
use aegis_wire::host::{EgressBody, RaiseBody, body, requests};
use aegis_wire::refusal::{Code, Refusal};
use axum::extract::State as Extract;
use axum::response::IntoResponse as _;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde_json::json;

use super::State;
use super::ask::{HostAuth, JsonBody, Named};
use super::couch::{Answer, guest_id, status_of};
use crate::app::{couch, limits};

type Body = JsonBody<COUCH_BODY_MAX>;

/// Routes of the host.
pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/couch/guests/{id}/egress", get(egress).put(set_egress))
        .route("/couch/guests/{id}/limits", put(set_limits))
        .route("/couch/guests/{id}/denials", get(denials))
        .route("/couch/guests/{id}/requests", get(list_requests))
        .route("/couch/guests/{id}/requests/{number}/grant", post(grant))
        .route("/couch/guests/{id}/requests/{number}/deny", post(deny))
}

async fn egress(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
) -> Answer {
    Ok(Json(limits::egress(host, &state.app, &guest_id(&id)?)?).into_response())
}

async fn set_egress(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
    Body { 0: asked }: Body,
) -> Answer {
    let ask = body::<EgressBody>(asked)?.parse("egress")?;
    let set = limits::set_egress(host, &state.app, guest_id(&id)?, ask).await?;
    Ok(Json(set).into_response())
}

async fn set_limits(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
    Body { 0: asked }: Body,
) -> Answer {
    let raise = body::<RaiseBody>(asked)?.parse()?;
    let found = limits::set_limits(host, &state.app, guest_id(&id)?, raise).await?;
    Ok(status_of(&state, &found))
}

async fn denials(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
) -> Answer {
    let found = limits::denials(host, &state.app, &guest_id(&id)?)?;
    Ok(Json(json!({ "count": found.len(), "denials": found })).into_response())
}

async fn list_requests(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
) -> Answer {
    let found = requests(&couch::guest(host, &state.app, &guest_id(&id)?)?.guest);
    Ok(Json(json!({ "count": found.len(), "requests": found })).into_response())
}

async fn grant(state: Extract<State>, auth: HostAuth, path: Named<(String, String)>) -> Answer {
    decide(state, auth, path, true).await
}

async fn deny(state: Extract<State>, auth: HostAuth, path: Named<(String, String)>) -> Answer {
    decide(state, auth, path, false).await
}

async fn decide(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named((id, number)): Named<(String, String)>,
    grant: bool,
) -> Answer {
    let number =
        number.parse().map_err(|_| Refusal::new(Code::RequestNotFound, "request not found"))?;
    let found = limits::decide(host, &state.app, guest_id(&id)?, number, grant).await?;
    let requests = requests(&found.guest);
    let decided = requests.into_iter().find(|r| r.number == number);
    Ok(Json(decided).into_response())
}
