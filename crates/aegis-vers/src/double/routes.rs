//! Machines: made, looked at, changed, ended.

use std::sync::Arc;
use std::time::Duration;

use aegis_wire::vers::{
    BAD_REF, COMMIT_NOT_FOUND, Commit, CommitId, FromCommit, NewRoot, SetDisk, SetLabels, SetState,
    TAG_NOT_FOUND, VmId, VmIds, VmState, WrittenState,
};
use aegis_wire::words::Uuid;
use axum::extract::{Json, Path, Query, State};
use axum::response::Response;
use axum::routing::{delete, get, patch, post};
use axum::{Router, http::StatusCode};
use serde::Deserialize;
use serde_json::json;

use crate::answers::{self, Answer, Id};
use crate::faults::{self, Create};
use crate::world::{self, World};
use crate::{Double, Shared, Version};

/// As now.
pub(crate) fn now() -> Router<Shared> {
    Router::new()
        .route("/vms", get(list))
        .route("/vm/new_root", post(new_root))
        .route("/vm/from_commit", post(from_commit))
        // No such route: nobody shall build on it.
        .route("/vm/{vm_id}", delete(remove).get(nothing))
        .route("/vm/{vm_id}/status", get(status))
        .route("/vm/{vm_id}/metadata", get(metadata))
        .route("/vm/{vm_id}/ssh_key", get(ssh_key))
        .route("/vm/{vm_id}/state", patch(set_state))
        .route("/vm/{vm_id}/disk", patch(set_disk))
        .route("/vm/{vm_id}/label", patch(label))
        .route("/vm/{vm_id}/commit", post(commit))
        .route("/vm/{vm_id}/branch", post(branch))
        .route("/vm/branch/by_vm/{vm_id}", post(branch_by_vm))
        .route("/vm/branch/by_commit/{commit_id}", post(branch_by_commit))
        .route("/vm/branch/by_tag/{tag_name}", post(branch_by_tag))
        .route("/vm/branch/by_ref/{repo}/{tag}", post(branch_by_ref))
}

/// As in December 2025.
pub(crate) fn before() -> Router<Shared> {
    Router::new()
        .route("/vms", get(list))
        .route("/vm/new_root", post(new_root))
        .route("/vm/from_commit", post(from_commit))
        .route("/vm/{vm_id}", delete(remove).get(nothing))
        .route("/vm/{vm_id}/ssh_key", get(ssh_key))
        .route("/vm/{vm_id}/state", patch(set_state))
        .route("/vm/{vm_id}/commit", post(commit))
        .route("/vm/{vm_id}/branch", post(branch))
}

async fn nothing() -> StatusCode {
    StatusCode::NOT_FOUND
}

fn ours(error: std::io::Error) -> Response {
    answers::app(500, error.to_string())
}

async fn list(State(double): State<Shared>) -> Answer {
    let mut world = double.world();
    world.bring_foreign().map_err(ours)?;
    Ok(answers::fine(world.machines.iter().map(|m| world.vm(m)).collect::<Vec<_>>()))
}

#[derive(Deserialize)]
struct Wait {
    #[serde(default)]
    wait_boot: bool,
    #[serde(default)]
    skip_wait_boot: bool,
}

impl Wait {
    /// Waits until the machine is up, unless the asker does not want to.
    async fn until_up(&self, double: &Double, vm: &Uuid) {
        let left = {
            let world = double.world();
            let found = world.machines.iter().find(|m| m.vm == *vm);
            found.map(|m| m.boot.saturating_sub(m.born.elapsed()))
        };
        if let (Some(left), false) = (left, self.skip_wait_boot) {
            tokio::time::sleep(left).await;
        }
    }
}

async fn new_root(
    State(double): State<Shared>,
    Query(wait): Query<Wait>,
    Json(body): Json<NewRoot>,
) -> Answer {
    let (vm, boot) = {
        let mut world = double.world();
        let owner = world.owner.clone();
        let labels = body.vm_config.labels.unwrap_or_default();
        (world.make(owner, None, labels).map_err(ours)?, world.boot)
    };
    if wait.wait_boot {
        tokio::time::sleep(boot).await;
    }
    Ok(answers::made(VmId { vm_id: vm }))
}

async fn from_commit(State(double): State<Shared>, Json(body): Json<FromCommit>) -> Answer {
    let (next, commit, late) = {
        let mut world = double.world();
        world.creates += 1;
        let commit = find_commit(&world, &body)?;
        let late = Duration::from_millis(world.faults.late_ms);
        (world.faults.next_create(), commit, late)
    };
    let make = |double: &Double| {
        let mut world = double.world();
        let owner = world.owner.clone();
        world.make(owner, Some(commit.clone()), Default::default())
    };
    match next {
        Create::Fine => Ok(answers::made(VmId { vm_id: make(&double).map_err(ours)? })),
        Create::Wrong { made, answered } => {
            if made {
                make(&double).map_err(ours)?;
            }
            if !answered {
                std::future::pending::<()>().await;
            }
            Err(answers::app(500, "Internal Server Error"))
        }
        Create::Late => {
            let there = Arc::clone(&double);
            let commit = commit.clone();
            tokio::spawn(async move {
                tokio::time::sleep(late).await;
                let mut world = there.world();
                let owner = world.owner.clone();
                let _ = world.make(owner, Some(commit), Default::default());
            });
            std::future::pending().await
        }
    }
}

fn find_commit(world: &World, body: &FromCommit) -> Result<Uuid, Response> {
    let commit = match body {
        FromCommit::CommitId(id) => id.clone(),
        FromCommit::TagName(tag) => {
            let tag = world.tags.get(tag).ok_or_else(|| answers::app(404, TAG_NOT_FOUND))?;
            tag.commit.clone()
        }
        FromCommit::Ref(text) => match text.split_once(':') {
            Some((repo, tag)) if !repo.is_empty() && !tag.is_empty() && !tag.contains(':') => {
                return Err(answers::not_found());
            }
            _ => return Err(answers::app(400, BAD_REF)),
        },
    };
    let there = world.commits.iter().any(|c| c.commit_id == commit);
    there.then_some(commit).ok_or_else(|| answers::app(404, COMMIT_NOT_FOUND))
}

async fn status(State(double): State<Shared>, Id(vm): Id) -> Answer {
    let mut world = double.world();
    if world.own(&vm).is_none() {
        return Err(answers::not_found());
    }
    let found = world.machines.iter().find(|m| m.vm == vm).map(|m| world.vm(m));
    match found {
        Some(vm) if vm.state == VmState::Sleeping => Err(answers::asleep()),
        Some(vm) => Ok(answers::fine(vm)),
        None => Err(answers::not_found()),
    }
}

async fn metadata(State(double): State<Shared>, Id(vm): Id) -> Answer {
    let world = double.world();
    let found = world.machines.iter().find(|m| m.vm == vm).ok_or_else(answers::not_found)?;
    Ok(answers::fine(world.metadata(found)))
}

async fn ssh_key(State(double): State<Shared>, Id(vm): Id) -> Answer {
    double.world().own(&vm).ok_or_else(answers::not_found)?;
    let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nZG91Ymxl\n-----END OPENSSH PRIVATE KEY-----\n";
    Ok(answers::fine(json!({"ssh_port": 22, "ssh_private_key": key})))
}

async fn set_state(
    State(double): State<Shared>,
    Id(vm): Id,
    Query(wait): Query<Wait>,
    Json(body): Json<SetState>,
) -> Answer {
    wait.until_up(&double, &vm).await;
    let mut world = double.world();
    let now = world.machines.iter().find(|m| m.vm == vm).map(|m| world.state(m));
    let machine = world.own(&vm).ok_or_else(answers::not_found)?;
    match (now, body.state) {
        (Some(VmState::Dead), _) => return Err(answers::app(409, "VM is dead")),
        (Some(VmState::Sleeping), WrittenState::Paused) => return Err(answers::asleep()),
        (_, WrittenState::Paused) => machine.set = VmState::Paused,
        (_, WrittenState::Running) => machine.set = VmState::Running,
    }
    Ok(answers::empty())
}

async fn set_disk(
    State(double): State<Shared>,
    Id(vm): Id,
    Query(wait): Query<Wait>,
    Json(body): Json<SetDisk>,
) -> Answer {
    wait.until_up(&double, &vm).await;
    let mut world = double.world();
    let machine = world.own(&vm).ok_or_else(answers::not_found)?;
    if body.fs_size_mib < machine.disk_mib {
        return Err(answers::app(400, "disks can only grow"));
    }
    machine.disk_mib = body.fs_size_mib;
    Ok(answers::empty())
}

async fn label(State(double): State<Shared>, Id(vm): Id, Json(body): Json<SetLabels>) -> Answer {
    let mut world = double.world();
    if faults::take(&mut world.faults.labels_500) {
        return Err(answers::app(500, "Internal Server Error"));
    }
    world.own(&vm).ok_or_else(answers::not_found)?.labels = body.labels;
    Ok(answers::empty())
}

async fn remove(State(double): State<Shared>, Id(vm): Id, Query(wait): Query<Wait>) -> Answer {
    wait.until_up(&double, &vm).await;
    let mut world = double.world();
    let Some(machine) = world.own(&vm) else { return Err(answers::forbidden()) };
    if machine.set == VmState::Sleeping {
        return Err(answers::asleep());
    }
    if faults::take(&mut world.faults.deletes_asleep) {
        if let Some(machine) = world.own(&vm) {
            machine.set = VmState::Sleeping;
        }
        return Err(answers::asleep());
    }
    if faults::take(&mut world.faults.deletes_500) {
        return Err(answers::app(500, "Internal Server Error"));
    }
    if !faults::take(&mut world.faults.deletes_lie) {
        world.deleted += 1;
        world.machines.retain(|m| m.vm != vm);
    }
    Ok(match double.version {
        Version::April2026 => answers::fine(VmId { vm_id: vm }),
        Version::December2025 => answers::fine(json!({"deleted_ids": [vm]})),
    })
}

async fn commit(
    State(double): State<Shared>,
    Id(vm): Id,
    Query(wait): Query<Wait>,
    body: Option<Json<Commit>>,
) -> Answer {
    wait.until_up(&double, &vm).await;
    let body = body.map(|Json(body)| body).unwrap_or_default();
    let mut world = double.world();
    let from = world.own(&vm).ok_or_else(answers::not_found)?.parent.clone();
    let id = match body.commit_id {
        Some(id) => id,
        None => world::uuid().map_err(ours)?,
    };
    let name = body.name.unwrap_or_default();
    world.add_commit(id.clone(), name, body.description, Some(vm), from);
    Ok(match double.version {
        Version::April2026 => answers::made(CommitId { commit_id: id }),
        Version::December2025 => {
            answers::made(json!({"commit_id": id, "host_architecture": "x86_64"}))
        }
    })
}

#[derive(Deserialize)]
struct Count {
    count: Option<u8>,
}

async fn branch(State(double): State<Shared>, Id(id): Id, Query(query): Query<Count>) -> Answer {
    let is_vm = double.world().own(&id).is_some();
    if double.version == Version::December2025 {
        let made = if is_vm { branches(&double, &id, 1) } else { copies(&double, id, 1) }?;
        let one = made.vms.into_iter().next().ok_or_else(answers::not_found)?;
        return Ok(answers::made(one));
    }
    let count = query.count.unwrap_or(1);
    let made = if is_vm { branches(&double, &id, count) } else { copies(&double, id, count) };
    made.map(answers::made)
}

async fn branch_by_vm(
    State(double): State<Shared>,
    Id(id): Id,
    Query(query): Query<Count>,
) -> Answer {
    branches(&double, &id, query.count.unwrap_or(1)).map(answers::made)
}

async fn branch_by_commit(
    State(double): State<Shared>,
    Id(id): Id,
    Query(query): Query<Count>,
) -> Answer {
    copies(&double, id, query.count.unwrap_or(1)).map(answers::made)
}

async fn branch_by_tag(
    State(double): State<Shared>,
    Path(tag): Path<String>,
    Query(query): Query<Count>,
) -> Answer {
    let commit = double.world().tags.get(&tag).map(|t| t.commit.clone());
    let commit = commit.ok_or_else(|| answers::branch(404, TAG_NOT_FOUND))?;
    copies(&double, commit, query.count.unwrap_or(1)).map(answers::made)
}

async fn branch_by_ref() -> Response {
    answers::branch(404, aegis_wire::vers::NOT_FOUND)
}

/// Machines that go on where one is: each is a copy of a commit that nobody sees.
fn branches(double: &Double, vm: &Uuid, count: u8) -> Result<VmIds, Response> {
    let mut world = double.world();
    let known = world.own(vm).map(|m| (m.parent.clone(), m.files.clone()));
    let (parent, files) = known.ok_or_else(|| answers::branch(404, aegis_wire::vers::NOT_FOUND))?;
    make(&mut world, parent, count, files)
}

fn copies(double: &Double, commit: Uuid, count: u8) -> Result<VmIds, Response> {
    let mut world = double.world();
    if !world.commits.iter().any(|c| c.commit_id == commit) {
        return Err(answers::branch(404, COMMIT_NOT_FOUND));
    }
    make(&mut world, Some(commit), count, Default::default())
}

fn make(
    world: &mut World,
    parent: Option<Uuid>,
    count: u8,
    files: std::collections::BTreeMap<String, Vec<u8>>,
) -> Result<VmIds, Response> {
    let mut vms = Vec::new();
    for _ in 0..count {
        let owner = world.owner.clone();
        let made = world.make(owner, parent.clone(), Default::default());
        let vm_id = made.map_err(|e| answers::branch(500, e.to_string()))?;
        if let Some(machine) = world.own(&vm_id) {
            machine.files = files.clone();
        }
        vms.push(VmId { vm_id });
    }
    Ok(VmIds { vms })
}
