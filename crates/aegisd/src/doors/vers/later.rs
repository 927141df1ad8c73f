//! What that API has and this cloud has not: said so, clearly. Commits, and machines from them, belong
//! here as soon as the daemon has verbs for them.

use aegis_wire::vers::{BAD_REF, FromCommit, TAG_NOT_FOUND};
use axum::Router;
use axum::extract::State as Extract;
use axum::http::{StatusCode, Uri};
use axum::routing::{get, patch, post};

use super::super::State;
use super::answer::{Body, Failure, Id};
use super::{Answer, Borrower};
use crate::app::vers;

pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/vm/from_commit", post(from_commit))
        .route("/vm/{vm_id}/commit", post(of_a_machine))
        .route("/vm/{vm_id}/branch", post(branch))
        .route("/vm/branch/by_vm/{id}", post(branch))
        .route("/vm/branch/by_commit/{id}", post(branch))
        .route("/vm/branch/by_tag/{tag}", post(branch_by_name))
        .route("/vm/branch/by_ref/{repo}/{tag}", post(branch_by_name))
        .route("/vm/{vm_id}/ssh_key", get(of_a_machine))
        .route("/vm/{vm_id}/disk", patch(of_a_machine))
        .route("/vm/{vm_id}/files", get(of_a_machine).put(of_a_machine))
        .route("/vm/{vm_id}/logs", get(of_a_machine))
        .route("/vm/{vm_id}/exec/stream/attach", post(of_a_machine))
        .route("/commits", get(absent))
        .route("/commits/public", get(absent))
        .route("/commit_tags", get(absent).post(absent))
}

async fn from_commit(_: Borrower, Body(ask): Body<FromCommit>) -> Answer {
    Err(match ask {
        FromCommit::CommitId(_) => Failure::not_here("from_commit"),
        // There are none.
        FromCommit::TagName(_) => Failure::App(StatusCode::NOT_FOUND, TAG_NOT_FOUND.to_owned()),
        FromCommit::Ref(text) if text.split_once(':').is_none() => {
            Failure::App(StatusCode::BAD_REQUEST, BAD_REF.to_owned())
        }
        FromCommit::Ref(_) => Failure::not_here("repositories"),
    })
}

/// Of a machine that is there; of another one nothing is said.
async fn of_a_machine(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    uri: Uri,
) -> Answer {
    vers::find(host, &state.app, &vm)?;
    let what = uri.path().rsplit('/').next().unwrap_or_default();
    Err(Failure::not_here(what))
}

fn no_branch() -> Failure {
    let said = "branch: this cloud does not serve that".to_owned();
    Failure::Branch(StatusCode::NOT_IMPLEMENTED, said)
}

async fn branch(_: Borrower, _: Id) -> Answer {
    Err(no_branch())
}

async fn branch_by_name(_: Borrower) -> Answer {
    Err(no_branch())
}

async fn absent(_: Borrower, uri: Uri) -> Answer {
    Err(Failure::not_here(uri.path().rsplit('/').next().unwrap_or_default()))
}
