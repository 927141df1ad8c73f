//! What only a double has: a look behind the curtain, and faults while it runs. No key is asked for: it
//! listens where its starter says.

use std::collections::BTreeMap;

use aegis_wire::vers::VmState;
use aegis_wire::words::Uuid;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::{get, patch, post};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::answers::{self, Answer, Id};
use crate::{Shared, world};

pub(crate) fn routes() -> Router<Shared> {
    Router::new()
        .route("/state", get(state))
        .route("/faults", patch(set_faults))
        .route("/vms", post(add))
        .route("/vms/{vm_id}", patch(set).delete(lose))
}

/// Everything that is there.
async fn state(State(double): State<Shared>) -> Answer {
    let world = double.world();
    let vms: Vec<Value> = world
        .machines
        .iter()
        .map(|m| {
            json!({"vm_id": m.vm, "state": world.state(m), "labels": m.labels,
                   "parent_commit_id": m.parent, "foreign": m.owner != world.owner})
        })
        .collect();
    Ok(answers::fine(json!({
        "vms": vms, "creates": world.creates, "made": world.made, "deleted": world.deleted,
        "faults": world.faults,
    })))
}

fn bad(what: impl std::fmt::Display) -> axum::response::Response {
    answers::app(400, what.to_string())
}

/// Changes the faults that are named.
async fn set_faults(State(double): State<Shared>, body: Bytes) -> Answer {
    let asked: BTreeMap<String, Value> = serde_json::from_slice(&body).map_err(bad)?;
    let mut world = double.world();
    let mut now = serde_json::to_value(&world.faults).map_err(bad)?;
    for (name, value) in asked {
        now[name] = value;
    }
    world.faults = serde_json::from_value(now).map_err(bad)?;
    Ok(answers::fine(&world.faults))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Add {
    /// Somebody else's, or the key's own.
    #[serde(default)]
    foreign: bool,
    parent_commit_id: Option<Uuid>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// A machine out of nowhere.
async fn add(State(double): State<Shared>, body: Bytes) -> Answer {
    let asked: Add = serde_json::from_slice(&body).map_err(bad)?;
    let mut world = double.world();
    let owner =
        if asked.foreign { world::uuid().map_err(bad)?.to_string() } else { world.owner.clone() };
    let vm = world.make(owner, asked.parent_commit_id, asked.labels).map_err(bad)?;
    Ok(answers::made(json!({"vm_id": vm})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    state: VmState,
}

/// A machine is so from now on: `dead`, `sleeping`, …
async fn set(State(double): State<Shared>, Id(vm): Id, body: Bytes) -> Answer {
    let asked: Set = serde_json::from_slice(&body).map_err(bad)?;
    let mut world = double.world();
    let found = world.machines.iter_mut().find(|m| m.vm == vm);
    found.ok_or_else(answers::not_found)?.set = asked.state;
    Ok(answers::empty())
}

/// A machine vanishes without a word.
async fn lose(State(double): State<Shared>, Id(vm): Id) -> Answer {
    double.world().machines.retain(|m| m.vm != vm);
    Ok(answers::empty())
}
