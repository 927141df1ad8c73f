//! `/couch` (contracts/couch.md): the public router and the host's router, apart.

use aegis_rules::guest::GuestStatus;
use aegis_rules::invite::InviteStatus;
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::COUCH_BODY_MAX;
use aegis_wire::couch::{
    self as wire, GuestShape, GuestStatusShape, InviteShape, KilledShape, OwnStatus, RedeemedShape,
    UsageShape,
};
use aegis_wire::words::{GuestId, InviteId};
use axum::extract::State as Extract;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::State;
use super::answer::Failure;
use super::ask::{HostAuth, JsonBody, ListQuery, Named, Params, bad_query, bearer, rate_limited};
use super::events::events;
use crate::app::{self, Public};

type Body = JsonBody<COUCH_BODY_MAX>;
pub(super) type Answer = Result<Response, Failure>;

/// Longest `Idempotency-Key`, bytes.
const IDEMPOTENCY_KEY_MAX: usize = 255;

/// Routes that anybody may use, rate limited.
pub(super) fn public(state: &State) -> Router<State> {
    Router::new()
        .route("/couch/redeem", post(redeem))
        .route("/couch/status", get(own_status))
        .layer(axum::middleware::from_fn_with_state(state.clone(), rate_limited))
}

/// Routes of the host.
pub(super) fn host() -> Router<State> {
    Router::new()
        .route("/couch/invites", post(create_invite).get(invites))
        .route("/couch/invites/{id}", delete(revoke_invite))
        .route("/couch/guests", get(guests))
        .route("/couch/guests/{id}", delete(kill))
        .route("/couch/guests/{id}/status", get(guest_status))
        .route("/couch/guests/{id}/activate", post(activate))
        .route("/couch/guests/{id}/usage", put(report_usage))
        .route("/couch/guests/{id}/freeze", post(freeze))
        .route("/couch/guests/{id}/thaw", post(thaw))
        .route("/couch/events", get(events))
}

async fn redeem(
    Extract(state): Extract<State>,
    headers: HeaderMap,
    Body { 0: body }: Body,
) -> Answer {
    let (code, name, key) = wire::redeem(&body)?;
    let idempotency = match headers.get("idempotency-key").map(|v| v.to_str()) {
        None => None,
        Some(Ok(key)) if (1..=IDEMPOTENCY_KEY_MAX).contains(&key.len()) => Some(key),
        Some(_) => {
            return Err(bad_query("Idempotency-Key", "1 to 255 printable characters"));
        }
    };
    let (guest, token) =
        app::couch::redeem(Public::route(), &state.app, code, name, key, idempotency).await?;
    let shape = RedeemedShape::new(&guest, token, state.app.ctx.now());
    Ok((StatusCode::CREATED, Json(shape)).into_response())
}

#[derive(Deserialize)]
struct TokenQuery {
    token: Option<String>,
}

async fn own_status(
    Extract(state): Extract<State>,
    headers: HeaderMap,
    Params(query): Params<TokenQuery>,
) -> Answer {
    let token = query.token.as_deref().or_else(|| bearer(&headers)).filter(|t| !t.is_empty());
    let Some(token) = token else {
        let code = "invalid_field";
        return Err(Failure::new(StatusCode::BAD_REQUEST, code, "token query parameter required"));
    };
    let found = app::couch::own_status(Public::route(), &state.app, token)?;
    Ok(Json(OwnStatus::new(&found.guest, &found.usage, state.app.ctx.now())).into_response())
}

async fn create_invite(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Body { 0: body }: Body,
) -> Answer {
    let ask = wire::create_invite(&body)?;
    let invite = app::couch::create_invite(host, &state.app, ask).await?;
    Ok((StatusCode::CREATED, Json(invite_shape(&state, &invite))).into_response())
}

fn invite_shape(state: &State, invite: &aegis_rules::invite::Invite) -> InviteShape {
    let ctx = &state.app.ctx;
    InviteShape::new(invite, ctx.keys.invite_code(&invite.id).to_string(), ctx.now())
}

async fn invites(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Params(query): Params<ListQuery>,
) -> Answer {
    let status = match &query.status {
        None => None,
        Some(word) => Some(
            InviteStatus::parse(word)
                .ok_or_else(|| bad_query("status", "active, redeemed, revoked or expired"))?,
        ),
    };
    let after = query.cursor::<InviteId>()?;
    let page = app::couch::invites(host, &state.app, status, after, query.limit()?)?;
    let rows: Vec<_> = page.rows.iter().map(|i| invite_shape(&state, i)).collect();
    Ok(list("invites", json!(rows), rows.len(), page.next))
}

fn list(name: &str, rows: Value, count: usize, next: Option<String>) -> Response {
    let mut body = json!({ name: rows, "count": count });
    if let Some(next) = next {
        body["nextCursor"] = json!(next);
    }
    Json(body).into_response()
}

async fn revoke_invite(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
) -> Answer {
    let id: InviteId =
        id.parse().map_err(|_| Refusal::new(Code::InviteNotFound, "invite not found"))?;
    let invite = app::couch::revoke_invite(host, &state.app, id).await?;
    Ok(Json(invite_shape(&state, &invite)).into_response())
}

pub(super) fn guest_id(text: &str) -> Result<GuestId, Failure> {
    text.parse().map_err(|_| Refusal::new(Code::GuestNotFound, "guest not found").into())
}

async fn guests(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Params(query): Params<ListQuery>,
) -> Answer {
    let status = match &query.status {
        None => None,
        Some(word) => Some(GuestStatus::parse(word).ok_or_else(|| {
            bad_query("status", "provisioning, running, frozen, stopped, expired or revoked")
        })?),
    };
    let after = query.cursor::<GuestId>()?;
    let page = app::couch::guests(host, &state.app, status, after, query.limit()?)?;
    let now = state.app.ctx.now();
    let rows: Vec<_> = page.rows.iter().map(|m| GuestShape::new(&m.guest, &m.usage, now)).collect();
    Ok(list("guests", json!(rows), rows.len(), page.next))
}

pub(super) fn status_of(state: &State, found: &app::couch::Metered) -> Response {
    Json(GuestStatusShape::new(&found.guest, &found.usage, state.app.ctx.now())).into_response()
}

async fn guest_status(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
) -> Answer {
    let found = app::couch::guest(host, &state.app, &guest_id(&id)?)?;
    Ok(status_of(&state, &found))
}

async fn activate(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
    Body { 0: body }: Body,
) -> Answer {
    let (vm_id, endpoint) = wire::activate(&body)?;
    let found = app::couch::activate(host, &state.app, guest_id(&id)?, vm_id, endpoint).await?;
    let shape = GuestShape::new(&found.guest, &found.usage, state.app.ctx.now());
    Ok(Json(shape).into_response())
}

async fn report_usage(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
    Body { 0: body }: Body,
) -> Answer {
    let asked = wire::usage(&body)?;
    let found = app::couch::report_usage(host, &state.app, guest_id(&id)?, asked).await?;
    Ok(Json(UsageShape::new(&found.guest, &found.usage, state.app.ctx.now())).into_response())
}

async fn freeze(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
) -> Answer {
    let found = app::couch::freeze(host, &state.app, guest_id(&id)?).await?;
    Ok(status_of(&state, &found))
}

async fn thaw(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
) -> Answer {
    let found = app::couch::thaw(host, &state.app, guest_id(&id)?).await?;
    Ok(status_of(&state, &found))
}

async fn kill(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(id): Named,
) -> Answer {
    let guest = app::kill::kill(host, &state.app, guest_id(&id)?).await?;
    let proven = guest.receipt.is_some();
    let shape = KilledShape {
        id: guest.id.to_string(),
        status: guest.status.word(),
        stopped_at: guest.stopped_at,
        receipt: guest.receipt.as_ref().map(Into::into),
        destroying: (!proven).then_some(true),
    };
    let status = if proven { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(shape)).into_response())
}
