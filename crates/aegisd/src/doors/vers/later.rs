//! What that API has and this cloud has not: said so, clearly.

use axum::Router;
use axum::extract::State as Extract;
use axum::http::Uri;
use axum::routing::{get, patch, post};

use super::super::State;
use super::answer::{Failure, Id};
use super::{Answer, Borrower};
use crate::app::vers;

pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/vm/{vm_id}/ssh_key", get(of_a_machine))
        .route("/vm/{vm_id}/disk", patch(of_a_machine))
        .route("/vm/{vm_id}/logs", get(of_a_machine))
        .route("/vm/{vm_id}/exec/stream/attach", post(of_a_machine))
        .route("/vm/commits/{commit_id}/parents", get(absent))
        .route("/commit_tags", get(absent).post(absent))
        .route("/repositories", get(absent).post(absent))
}

/// Of a machine that is there; of another one nothing is said.
async fn of_a_machine(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    uri: Uri,
) -> Answer {
    vers::find(host, &state.app, &vm)?;
    Err(not_served(&uri))
}

async fn absent(_: Borrower, uri: Uri) -> Answer {
    Err(not_served(&uri))
}

fn not_served(uri: &Uri) -> Failure {
    Failure::not_here(uri.path().rsplit('/').next().unwrap_or_default())
}
