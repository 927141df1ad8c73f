//! Files of machines that are lent.

use aegis_wire::vers::{FileContent, PutFile};
use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use axum::routing::get;
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::super::State;
use super::answer::{Body, Id};
use super::{Answer, Borrower};
use crate::app::vers;

pub(super) fn routes() -> Router<State> {
    Router::new().route("/vm/{vm_id}/files", get(read).put(write))
}

#[derive(Deserialize)]
struct Which {
    #[serde(default)]
    path: String,
}

async fn read(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    Query(which): Query<Which>,
) -> Answer {
    let bytes = vers::read_file(host, &state.app, &vm, &which.path).await?;
    Ok(Json(FileContent { content_b64: STANDARD.encode(bytes) }).into_response())
}

async fn write(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    Body(ask): Body<PutFile>,
) -> Answer {
    vers::write_file(host, &state.app, &vm, ask).await?;
    Ok(StatusCode::OK.into_response())
}
