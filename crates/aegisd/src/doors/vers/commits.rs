//! Commits by the vers API: taken, listed, removed; and machines from them.

use aegis_wire::vers::{
    BAD_REF, COMMIT_NOT_FOUND, Commit, CommitId, Commits, FromCommit, TAG_NOT_FOUND, VmId, VmIds,
};
use aegis_wire::words::Uuid;
use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;

use super::super::State;
use super::answer::{Body, Failure, Id, Loose, made};
use super::{Answer, Borrower};
use crate::app::{Error, vers};

/// Rows of the one page that there is.
const PAGE: usize = 1000;

pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/vm/from_commit", post(from_commit))
        .route("/vm/{vm_id}/commit", post(commit))
        .route("/vm/{vm_id}/branch", post(branch))
        .route("/vm/branch/by_vm/{id}", post(branch_by_vm))
        .route("/vm/branch/by_commit/{id}", post(branch_by_commit))
        .route("/vm/branch/by_tag/{tag}", post(branch_by_tag))
        .route("/vm/branch/by_ref/{repo}/{tag}", post(branch_by_ref))
        .route("/commits", get(list))
        .route("/commits/public", get(public))
        .route("/commits/{commit_id}", delete(remove))
}

#[derive(Deserialize)]
struct How {
    #[serde(default)]
    keep_paused: bool,
    count: Option<u8>,
}

async fn from_commit(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Body(ask): Body<FromCommit>,
) -> Answer {
    let none = |text: &str| Failure::App(StatusCode::NOT_FOUND, text.to_owned());
    match ask {
        FromCommit::CommitId(id) => {
            let made_of = vers::from_commit(host, &state.app, &id).await;
            let vm = made_of.map_err(|e| Failure::of_commit(e, COMMIT_NOT_FOUND))?;
            Ok(made(VmId { vm_id: vers::vm_id(&vm.id) }))
        }
        // There are no tags, and no repositories.
        FromCommit::TagName(_) => Err(none(TAG_NOT_FOUND)),
        FromCommit::Ref(text) => match text.split_once(':') {
            Some((repo, tag)) if !repo.is_empty() && !tag.is_empty() => {
                Err(none(aegis_wire::vers::NOT_FOUND))
            }
            _ => Err(Failure::App(StatusCode::BAD_REQUEST, BAD_REF.to_owned())),
        },
    }
}

/// The body may be left out.
async fn commit(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    Query(how): Query<How>,
    Loose(ask): Loose<Commit>,
) -> Answer {
    if ask.commit_id.is_some() {
        return Err(Failure::not_here("a commit_id of the asker's"));
    }
    let commit_id = vers::commit(host, &state.app, &vm, ask, how.keep_paused).await?;
    Ok(made(CommitId { commit_id }))
}

fn ids(vms: Vec<Uuid>) -> VmIds {
    VmIds { vms: vms.into_iter().map(|vm_id| VmId { vm_id }).collect() }
}

/// Of a machine, or else of a commit.
async fn branch(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(id): Id,
    Query(how): Query<How>,
) -> Answer {
    let count = how.count.unwrap_or(1);
    let vms = match vers::find(host, &state.app, &id) {
        Ok(_) => vers::branch(host, &state.app, &id, count).await,
        Err(_) => vers::branch_commit(host, &state.app, &id, count).await,
    };
    vms.map(|vms| made(ids(vms))).map_err(no_branch)
}

async fn branch_by_vm(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(id): Id,
    Query(how): Query<How>,
) -> Answer {
    let vms = vers::branch(host, &state.app, &id, how.count.unwrap_or(1)).await;
    vms.map(|vms| made(ids(vms))).map_err(no_branch)
}

async fn branch_by_commit(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(id): Id,
    Query(how): Query<How>,
) -> Answer {
    let vms = vers::branch_commit(host, &state.app, &id, how.count.unwrap_or(1)).await;
    vms.map(|vms| made(ids(vms))).map_err(no_branch)
}

fn no_branch(error: Error) -> Failure {
    Failure::of_commit(error, COMMIT_NOT_FOUND).of_branch()
}

async fn branch_by_tag(_: Borrower) -> Answer {
    Err(Failure::Branch(StatusCode::NOT_FOUND, TAG_NOT_FOUND.to_owned()))
}

async fn branch_by_ref(_: Borrower) -> Answer {
    Err(Failure::Branch(StatusCode::NOT_FOUND, aegis_wire::vers::NOT_FOUND.to_owned()))
}

fn page(commits: Vec<aegis_wire::vers::CommitInfo>) -> axum::response::Response {
    let total = commits.len();
    Json(Commits { commits, total, limit: total.max(PAGE), offset: 0 }).into_response()
}

async fn list(Extract(state): Extract<State>, Borrower(host): Borrower) -> Answer {
    Ok(page(vers::list_commits(host, &state.app)))
}

async fn public(_: Borrower) -> Answer {
    Ok(page(Vec::new()))
}

async fn remove(Extract(state): Extract<State>, Borrower(host): Borrower, Id(id): Id) -> Answer {
    vers::remove_commit(host, &state.app, &id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
