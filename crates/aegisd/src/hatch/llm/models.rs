//! Which models a machine may ask for.

use aegis_wire::bounds::{LLM_ANSWER_MAX, LLM_BODY_DEADLINE};
use http_body_util::{BodyExt as _, Limited};
use hyper::{HeaderMap, Method, Response, StatusCode};
use serde_json::{Value, json};

use super::super::answer::{self, Body};
use super::super::machine::Machine;
use super::call::too_many;
use super::problem::{Kind, Problem};
use super::vendors::Key;
use crate::app::llm::Asker;
use crate::config::{Provider, Vendor};

/// The provider's models, as far as the machine may use them.
pub(super) async fn list(
    machine: &Machine,
    provider: &Provider,
    headers: &HeaderMap,
) -> Result<Response<Body>, Problem> {
    machine.may_call().map_err(too_many)?;
    let asker = asker(machine)?;
    let asked = tokio::time::timeout(LLM_BODY_DEADLINE, ask(machine, provider, headers)).await;
    let all = match asked {
        Ok(Ok(all)) => all,
        // Then what the settings name in full.
        Ok(Err(problem)) if problem.kind == Kind::Upstream => named(provider),
        Ok(Err(problem)) => return Err(problem),
        Err(_) => named(provider),
    };
    let may = |model: &Value| {
        let id = model.get("id").and_then(Value::as_str).unwrap_or_default();
        provider.models.admit(id) && asker.may_use(id)
    };
    let models: Vec<Value> = all.into_iter().filter(may).collect();
    let id = |model: Option<&Value>| model.map_or(Value::Null, |m| m["id"].clone());
    let body = match provider.vendor {
        Vendor::OpenAi => json!({"object": "list", "data": models}),
        Vendor::Anthropic => json!({
            "first_id": id(models.first()), "last_id": id(models.last()), "has_more": false,
            "data": models,
        }),
    };
    Ok(answer::json(StatusCode::OK, &body))
}

/// The machine, where it is served.
pub(super) fn asker(machine: &Machine) -> Result<Asker, Problem> {
    machine.asker().map_err(|error| match error {
        crate::app::Error::Refused(refusal) => {
            Problem::new(Kind::Forbidden, format!("aegis: {refusal}"))
        }
        ours => {
            tracing::error!(error = %ours, "the LLM door failed");
            Problem::new(Kind::Ours, "aegis: this host failed at this call")
        }
    })
}

async fn ask(
    machine: &Machine,
    provider: &Provider,
    headers: &HeaderMap,
) -> Result<Vec<Value>, Problem> {
    let path = match provider.vendor {
        Vendor::OpenAi => "/models",
        Vendor::Anthropic => "/v1/models?limit=1000",
    };
    let upstream = || Problem::new(Kind::Upstream, "aegis: the vendor does not tell its models");
    let key = Key::of(machine, provider)?;
    let vendors = &machine.hatch.vendors;
    let answer = vendors
        .ask(provider, &key, Method::GET, path, headers, Vec::new())
        .await
        .map_err(|_| upstream())?;
    if !answer.status().is_success() {
        return Err(upstream());
    }
    let body = Limited::new(answer.into_body(), LLM_ANSWER_MAX).collect().await;
    let bytes = body.map_err(|_| upstream())?.to_bytes();
    let mut told: Value = serde_json::from_slice(&bytes).map_err(|_| upstream())?;
    match told.get_mut("data").map(Value::take) {
        Some(Value::Array(models)) => Ok(models),
        _ => Err(upstream()),
    }
}

/// Models that the settings name in full.
fn named(provider: &Provider) -> Vec<Value> {
    let names = provider.models.texts().iter().filter(|name| !name.contains('*'));
    let of = |name: &String| match provider.vendor {
        Vendor::OpenAi => json!({"id": name, "object": "model", "created": 0, "owned_by": "aegis"}),
        Vendor::Anthropic => json!({
            "id": name, "type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z",
        }),
    };
    names.map(of).collect()
}
