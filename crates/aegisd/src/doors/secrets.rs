//! `/v1/secrets` and what machines get of them (contracts/aegis.md 1). No answer holds a value.

use aegis_rules::refusal::Refusal;
use aegis_wire::bounds::HOST_BODY_MAX;
use aegis_wire::host::{SecretBody, SecretList, SecretShape, SecretsBody, StatusWord, body};
use aegis_wire::words::SecretName;
use axum::extract::State as Extract;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use zeroize::Zeroizing;

use super::State;
use super::answer::Failure;
use super::ask::{HostAuth, JsonBody, Named};
use crate::app::secrets;

type Body = JsonBody<HOST_BODY_MAX>;
type Answer = Result<Response, Failure>;

/// Routes of the host.
pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/v1/secrets", get(list))
        .route("/v1/secrets/{name}", get(show).put(set).delete(forget))
        .route("/v1/instances/{id}/secrets", put(inject))
}

fn parse(name: &str) -> Result<SecretName, Refusal> {
    name.parse().map_err(|e: aegis_wire::words::BadWord| Refusal::field("name", e.expected))
}

async fn list(Extract(state): Extract<State>, HostAuth(host): HostAuth) -> Answer {
    let secrets: Vec<SecretShape> =
        secrets::list(host, &state.app)?.into_iter().map(Into::into).collect();
    Ok(Json(SecretList { secrets }).into_response())
}

async fn show(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    let secret = secrets::get(host, &state.app, &parse(&name)?)?;
    Ok(Json(SecretShape::from(secret)).into_response())
}

async fn set(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    JsonBody(value): Body,
) -> Answer {
    let name = parse(&name)?;
    // What serde says of a bad body may quote it.
    let ask = body::<SecretBody>(value).map_err(|_| {
        Refusal::field(
            "value",
            "a text, beside nothing but proxy, true or false, and hosts, a list",
        )
    })?;
    let (value, hosts) = ask.parse()?;
    let secret = secrets::set(host, &state.app, name, Zeroizing::new(value), hosts).await?;
    Ok(Json(SecretShape::from(secret)).into_response())
}

async fn forget(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    secrets::delete(host, &state.app, parse(&name)?).await?;
    Ok(Json(StatusWord { status: "deleted".to_owned() }).into_response())
}

async fn inject(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    JsonBody(value): Body,
) -> Answer {
    let secrets = body::<SecretsBody>(value)?.parse()?;
    secrets::inject(host, &state.app, &name, secrets.clone()).await?;
    Ok(Json(SecretsBody { secrets: secrets.texts() }).into_response())
}
