//! `/v1` (contracts/aegis.md 1): instances, as the host asks for them; and `/metrics`.

use std::collections::BTreeMap;

use aegis_rules::instance::{InstanceState, Verb};
use aegis_rules::refusal::Refusal;
use aegis_wire::bounds::{EXEC_BODY_MAX, HOST_BODY_MAX};
use aegis_wire::host::{
    BackendCapabilities, Counts, CreateBody, Created, DaemonStatus, ExecBody, ExposeBody,
    StatusWord, body,
};
use aegis_wire::words::{Port, Time, Tree};
use axum::extract::State as Extract;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::Failure;
use super::ask::{HostAuth, JsonBody, Named, Params, bad_query};
use super::{State, attach, stream};
use crate::app::instances::{self, Created as Made};
use crate::app::{self, audit, logs, ports};
use crate::config::ProvisionerKind;

type Body = JsonBody<HOST_BODY_MAX>;
type Answer = Result<Response, Failure>;

/// Routes of the host.
pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/instances", post(create).get(list))
        .route("/v1/instances/prune", post(prune))
        .route("/v1/instances/{id}", get(info).delete(remove))
        .route("/v1/instances/{id}/start", post(start))
        .route("/v1/instances/{id}/restart", post(restart))
        .route("/v1/instances/{id}/stop", post(stop))
        .route("/v1/instances/{id}/disable", post(disable))
        .route("/v1/instances/{id}/pause", post(pause))
        .route("/v1/instances/{id}/resume", post(resume))
        .route("/v1/instances/{id}/exec", post(exec).get(attach::exec))
        .route("/v1/instances/{id}/logs", get(read_logs))
        .route("/v1/instances/{id}/envelope", get(envelope))
        .route("/v1/instances/{id}/expose", post(expose))
        .route("/v1/instances/{id}/expose/{port}", delete(unexpose))
        .route("/v1/audit", get(export_audit))
        .route("/metrics", get(metrics))
}

async fn status(Extract(state): Extract<State>, HostAuth(host): HostAuth) -> Answer {
    let app = &state.app;
    let all = instances::list(host, app)?;
    let (invites_active, guests_live) =
        app.ctx.ledger.read(|f| f.counts(app.ctx.now())).map_err(app::Error::from)?;
    let machines = all.iter().filter(|i| i.is_live()).count() as u64;
    let probe = app.probe.as_ref().as_ref();
    let mut tasks = BTreeMap::new();
    tasks.insert("drivers".to_owned(), app.lifecycle.drivers().to_string());
    tasks.insert("spares".to_owned(), app.lifecycle.pool().ready().to_string());
    let shape = DaemonStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        backend: "qemu".to_owned(),
        isolation: "vm".to_owned(),
        provisioner: match app.ctx.config.provisioner {
            ProvisionerKind::Local => "local",
            ProvisionerKind::Manual => "manual",
            ProvisionerKind::Vers => "vers",
        }
        .to_owned(),
        capabilities: BackendCapabilities {
            pause_resume: true,
            persistent_pause: false,
            network_backend: "gateway".to_owned(),
            accel: probe.map(|p| p.accel.clone()).unwrap_or_default(),
            cgroups: probe.map(|p| p.cgroups.clone()).unwrap_or_default(),
            limits: probe.map(|p| p.limits.clone()).unwrap_or_default(),
        },
        listen: state.listen.to_string(),
        router: state.app.named_at.map(|at| at.to_string()),
        started_at: app.started_at,
        counts: Counts { invites_active, guests_live, instances: all.len() as u64, machines },
        tasks,
    };
    Ok(Json(shape).into_response())
}

async fn create(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    JsonBody(value): Body,
) -> Answer {
    let ask = body::<CreateBody>(value)?.parse()?;
    let (status, instance) = match instances::create(host, &state.app, ask).await? {
        Made::New(instance) => (StatusCode::CREATED, instance),
        Made::Restarted(instance) => (StatusCode::OK, instance),
    };
    let shape = Created {
        id: instance.id.to_string(),
        state: instance.state.word().to_owned(),
        command: instance.spec.command.clone(),
        handle: instance.spec.handle.as_ref().map(ToString::to_string),
        image_ref: Some(instance.spec.image.to_string()),
    };
    Ok((status, Json(shape)).into_response())
}

#[derive(Deserialize)]
struct InstancesQuery {
    state: Option<String>,
    parent_id: Option<String>,
}

async fn list(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Params(query): Params<InstancesQuery>,
) -> Answer {
    let wanted = match &query.state {
        None => None,
        Some(word) => {
            Some(InstanceState::parse(word).filter(|s| *s != InstanceState::Gone).ok_or_else(
                || bad_query("state", "starting, running, paused, frozen or stopped"),
            )?)
        }
    };
    // By its handle too; children of one that is gone are asked for by its id.
    let parent = query.parent_id.map(|name| match instances::find(host, &state.app, &name) {
        Ok(parent) => parent.id.to_string(),
        Err(_) => name,
    });
    let shapes: Vec<_> = instances::list(host, &state.app)?
        .iter()
        .filter(|i| wanted.is_none_or(|w| i.state == w))
        .map(|i| instances::shape(&state.app, i))
        .filter(|s| parent.as_ref().is_none_or(|p| s.parent_id == *p))
        .collect();
    Ok(Json(shapes).into_response())
}

async fn info(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    let instance = instances::find(host, &state.app, &name)?;
    Ok(Json(instances::full_shape(&state.app, &instance)?).into_response())
}

async fn act(state: State, host: HostAuth, name: &str, verb: Verb) -> Answer {
    let now = instances::act(host.0, &state.app, name, verb).await?;
    let word = match (&now, verb) {
        (None, _) => "deleted",
        (Some(i), Verb::Delete) if i.state == InstanceState::Gone => "deleted",
        (Some(_), Verb::Delete) => "deleting",
        (Some(i), Verb::Disable) if !i.is_live() => "disabled",
        (Some(i), _) => i.state.word(),
    };
    Ok(Json(StatusWord { status: word.to_owned() }).into_response())
}

async fn start(Extract(state): Extract<State>, host: HostAuth, Named(name): Named) -> Answer {
    act(state, host, &name, Verb::Start).await
}

async fn stop(Extract(state): Extract<State>, host: HostAuth, Named(name): Named) -> Answer {
    act(state, host, &name, Verb::Stop).await
}

async fn restart(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    instances::act(host, &state.app, &name, Verb::Stop).await?;
    instances::act(host, &state.app, &name, Verb::Start).await?;
    Ok(Json(StatusWord { status: "restarting".to_owned() }).into_response())
}

async fn disable(Extract(state): Extract<State>, host: HostAuth, Named(name): Named) -> Answer {
    act(state, host, &name, Verb::Disable).await
}

async fn pause(Extract(state): Extract<State>, host: HostAuth, Named(name): Named) -> Answer {
    act(state, host, &name, Verb::Pause).await
}

async fn resume(Extract(state): Extract<State>, host: HostAuth, Named(name): Named) -> Answer {
    act(state, host, &name, Verb::Resume).await
}

async fn remove(Extract(state): Extract<State>, host: HostAuth, Named(name): Named) -> Answer {
    act(state, host, &name, Verb::Delete).await
}

async fn exec(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    JsonBody(value): JsonBody<EXEC_BODY_MAX>,
) -> Answer {
    let ask = body::<ExecBody>(value)?.parse()?;
    let running = instances::exec(host, &state.app, &name, ask).await?;
    Ok(stream::exec(running))
}

#[derive(Deserialize)]
struct LogsQuery {
    follow: Option<String>,
    since: Option<String>,
    tail: Option<String>,
    exec_id: Option<String>,
}

async fn read_logs(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    Params(query): Params<LogsQuery>,
) -> Answer {
    let ask = logs::Ask {
        since: match &query.since {
            None => None,
            Some(text) => {
                Some(text.parse::<Time>().map_err(|_| bad_query("since", "an RFC 3339 time"))?)
            }
        },
        tail: match &query.tail {
            None => None,
            Some(text) => {
                let most = logs::TAIL_MAX;
                let n = text.parse().ok().filter(|n| *n <= most);
                let bad = || bad_query("tail", &format!("a whole number up to {most}"));
                Some(n.ok_or_else(bad)?)
            }
        },
        exec_id: query.exec_id,
        follow: match query.follow.as_deref() {
            None | Some("" | "0" | "false") => false,
            Some("1" | "true") => true,
            Some(_) => return Err(bad_query("follow", "true or false")),
        },
    };
    let instance = instances::find(host, &state.app, &name)?;
    Ok(stream::lines(logs::read(&state.app, &instance.id, ask)))
}

async fn envelope(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
) -> Answer {
    let instance = instances::find(host, &state.app, &name)?;
    Ok(Json(instances::full_shape(&state.app, &instance)?.envelope).into_response())
}

async fn expose(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    JsonBody(value): Body,
) -> Answer {
    let ask = body::<ExposeBody>(value)?.parse()?;
    Ok(Json(ports::expose(host, &state.app, &name, ask).await?).into_response())
}

async fn unexpose(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named((name, port)): Named<(String, String)>,
) -> Answer {
    let port = port.parse::<u64>().ok().and_then(|n| Port::try_from(n).ok());
    let port = port.ok_or_else(|| Refusal::field("guest_port", "a port from 1 to 65535"))?;
    ports::unexpose(host, &state.app, &name, port).await?;
    Ok(Json(StatusWord { status: "unexposed".to_owned() }).into_response())
}

#[derive(Deserialize)]
struct AuditQuery {
    tree: Option<String>,
    after: Option<String>,
}

async fn export_audit(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Params(query): Params<AuditQuery>,
) -> Answer {
    let tree = query
        .tree
        .map(|text| text.parse::<Tree>())
        .transpose()
        .map_err(|_| bad_query("tree", "the id of an invite or of a host's own instance"))?;
    let after = match &query.after {
        None => 0,
        Some(text) => text.parse::<u64>().map_err(|_| bad_query("after", "the seq of an event"))?,
    };
    Ok(stream::lines(audit::export(host, &state.app, tree, after)))
}

/// Prometheus' text format, by its own name.
const METRICS: [(HeaderName, &str); 1] =
    [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];

async fn metrics(Extract(state): Extract<State>, HostAuth(host): HostAuth) -> Answer {
    Ok((METRICS, app::metrics::scrape(host, &state.app)?).into_response())
}

#[derive(Deserialize)]
struct PruneQuery {
    older_than: Option<String>,
    stopped_older_than: Option<String>,
}

async fn prune(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Params(query): Params<PruneQuery>,
) -> Answer {
    let text = query.older_than.or(query.stopped_older_than).unwrap_or_else(|| "7d".to_owned());
    let older_ms = age_ms(&text).ok_or_else(|| {
        Refusal::field("older_than", "a length of time as in 30s, 10m, 12h or 7d")
    })?;
    let ids = instances::prune(host, &state.app, older_ms).await?;
    let ids: Vec<Value> = ids.iter().map(|id| json!(id.as_str())).collect();
    Ok(Json(json!({ "pruned": ids.len(), "ids": ids })).into_response())
}

/// `7d` in milliseconds.
fn age_ms(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let unit_ms: u64 = match unit {
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit_ms)
}
