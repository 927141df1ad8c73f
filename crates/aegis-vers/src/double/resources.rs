//! Commits and tags.

use aegis_wire::vers::{CommitInfo, Commits};
use aegis_wire::words::Uuid;
use axum::Router;
use axum::extract::{Json, Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use axum::routing::{get, patch};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Shared;
use crate::answers::{self, Answer, Id};
use crate::world::{self, Tag};

pub(crate) fn routes() -> Router<Shared> {
    Router::new()
        .route("/commits", get(commits))
        .route("/commits/public", get(public))
        .route("/commits/{commit_id}", patch(publish).delete(remove))
        .route("/vm/commits/{commit_id}/parents", get(parents))
        .route("/commit_tags", get(tags).post(add_tag))
        .route("/commit_tags/{tag}", get(tag).patch(move_tag).delete(remove_tag))
}

fn page(commits: Vec<CommitInfo>) -> Commits {
    let total = commits.len();
    Commits { commits, total, limit: total.max(50), offset: 0 }
}

async fn commits(State(double): State<Shared>) -> Answer {
    Ok(answers::fine(page(double.world().commits.clone())))
}

async fn public(State(double): State<Shared>) -> Answer {
    let world = double.world();
    Ok(answers::fine(page(world.commits.iter().filter(|c| c.is_public).cloned().collect())))
}

#[derive(Deserialize)]
struct Publish {
    is_public: bool,
}

async fn publish(State(double): State<Shared>, Id(id): Id, Json(body): Json<Publish>) -> Answer {
    let mut world = double.world();
    let found = world.commits.iter_mut().find(|c| c.commit_id == id);
    let commit = found.ok_or_else(answers::not_found)?;
    commit.is_public = body.is_public;
    Ok(answers::fine(commit.clone()))
}

async fn remove(State(double): State<Shared>, Id(id): Id) -> Answer {
    let mut world = double.world();
    let active = world.machines.iter().filter(|m| m.parent.as_ref() == Some(&id)).count();
    if active > 0 {
        return Err(answers::app(409, format!("commit still has {active} active VM(s)")));
    }
    let before = world.commits.len();
    world.commits.retain(|c| c.commit_id != id);
    if world.commits.len() == before {
        return Err(answers::not_found());
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The commit, and those that it came from.
async fn parents(State(double): State<Shared>, Id(id): Id) -> Answer {
    let world = double.world();
    let mut chain: Vec<&CommitInfo> = Vec::new();
    let mut next = Some(id);
    while let Some(commit) = next.and_then(|id| world.commits.iter().find(|c| c.commit_id == id)) {
        // Whoever names a commit twice gets no endless answer.
        if chain.iter().any(|c| c.commit_id == commit.commit_id) {
            break;
        }
        next = commit.grandparent_commit_id.clone();
        chain.push(commit);
    }
    if chain.is_empty() {
        return Err(answers::not_found());
    }
    let rows = chain.into_iter().map(|c| {
        json!({"id": c.commit_id, "name": c.name, "description": c.description,
               "owner_id": c.owner_id, "is_public": c.is_public, "created_at": c.created_at,
               "parent_vm_id": c.parent_vm_id, "grandparent_commit_id": c.grandparent_commit_id})
    });
    Ok(answers::fine(rows.collect::<Vec<_>>()))
}

fn shape(name: &str, tag: &Tag) -> Value {
    json!({"tag_id": tag.id, "tag_name": name, "commit_id": tag.commit,
           "description": tag.description, "created_at": tag.created_at,
           "updated_at": tag.updated_at})
}

#[derive(Deserialize)]
struct NewTag {
    tag_name: String,
    commit_id: Uuid,
    description: Option<String>,
}

async fn add_tag(State(double): State<Shared>, Json(body): Json<NewTag>) -> Answer {
    let mut world = double.world();
    if !world.commits.iter().any(|c| c.commit_id == body.commit_id) {
        return Err(answers::app(404, aegis_wire::vers::COMMIT_NOT_FOUND));
    }
    if world.tags.contains_key(&body.tag_name) {
        return Err(answers::app(409, "tag name is taken"));
    }
    let id = world::uuid().map_err(|e| answers::app(500, e.to_string()))?;
    let now = world::now();
    let tag = Tag {
        id,
        commit: body.commit_id,
        description: body.description,
        created_at: now.clone(),
        updated_at: now,
    };
    let made = json!({"tag_id": tag.id, "tag_name": body.tag_name, "commit_id": tag.commit});
    world.tags.insert(body.tag_name, tag);
    Ok(answers::made(made))
}

async fn tags(State(double): State<Shared>) -> Answer {
    let world = double.world();
    let tags: Vec<Value> = world.tags.iter().map(|(name, tag)| shape(name, tag)).collect();
    Ok(answers::fine(json!({"tags": tags})))
}

async fn tag(State(double): State<Shared>, Path(name): Path<String>) -> Answer {
    let world = double.world();
    Ok(answers::fine(shape(&name, world.tags.get(&name).ok_or_else(answers::not_found)?)))
}

#[derive(Deserialize)]
struct MoveTag {
    commit_id: Option<Uuid>,
    description: Option<String>,
}

async fn move_tag(
    State(double): State<Shared>,
    Path(name): Path<String>,
    Json(body): Json<MoveTag>,
) -> Answer {
    let mut world = double.world();
    let tag = world.tags.get_mut(&name).ok_or_else(answers::not_found)?;
    if let Some(commit) = body.commit_id {
        tag.commit = commit;
    }
    tag.description = body.description.or(tag.description.take());
    tag.updated_at = world::now();
    Ok(answers::fine(shape(&name, tag)))
}

async fn remove_tag(State(double): State<Shared>, Path(name): Path<String>) -> Answer {
    double.world().tags.remove(&name).ok_or_else(answers::not_found)?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
