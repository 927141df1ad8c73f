//! One call, from its request to its answer.

use aegis_rules::refusal::Refusal;
use aegis_rules::tokens::Short;
use aegis_wire::bounds::{
    LLM_ANSWER_MAX, LLM_BODY_DEADLINE, LLM_BODY_MAX, LLM_DEADLINE, LLM_ERROR_MAX, LLM_VALUES_MAX,
};
use aegis_wire::json::values;
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::Value;
use tokio::time::Instant;

use super::super::answer::{self, Body};
use super::super::machine::{Held, Machine};
use super::draft::{Api, Draft};
use super::models::asker;
use super::problem::{Kind, Problem};
use super::reservation::Reservation;
use super::stream::{self, Plan};
use super::vendors::{Key, Lost, passed_back};
use super::{chat, messages, responses};
use crate::app::llm::NotReserved;
use crate::config::Provider;

/// What a parsed value takes beside its bytes.
const BYTES_PER_VALUE: usize = 128;

/// Answers a call, or says what is wrong.
pub(super) async fn call(
    machine: &Machine,
    provider: &Provider,
    api: Api,
    request: Request<Incoming>,
) -> Result<Response<Body>, Problem> {
    machine.may_call().map_err(too_many)?;
    let (head, body) = request.into_parts();
    let (draft, held, looked_at) = read(machine, api, &head.headers, body).await?;
    check_model(machine, provider, &draft.model).await?;
    let key = Key::of(machine, provider)?;

    let until = Instant::now() + LLM_DEADLINE;
    let (stream, choices, shows_usage) = (draft.stream, draft.choices, draft.shows_usage);
    let (name, ask) = (provider.name.as_str(), draft.ask(provider.output));
    let made = Reservation::make(machine.app(), &machine.id, name, &draft.model, ask).await;
    let (mut reservation, reserved) = match made {
        Ok(made) => made,
        Err(why) => return Err(not_reserved(machine, why).await),
    };
    let bytes = draft.finish(reserved.output);
    drop(looked_at);
    reservation.ask();
    let vendors = &machine.hatch.vendors;
    let asked = vendors.ask(provider, &key, Method::POST, api.path(), &head.headers, bytes);
    let answer = match tokio::time::timeout_at(until, asked).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(Lost::Unreachable)) => {
            reservation.settle(Some(0), "unreachable").await;
            let message = format!("aegis: the provider {} can't be reached", provider.name);
            return Err(Problem::new(Kind::Upstream, message));
        }
        Ok(Err(Lost::Broken)) => {
            reservation.settle(None, "broken").await;
            let message = format!("aegis: the provider {} broke the call off", provider.name);
            return Err(Problem::new(Kind::Upstream, message));
        }
        Err(_) => {
            reservation.settle(None, "late").await;
            return Err(late());
        }
    };
    drop(held);
    if !answer.status().is_success() {
        return refused(answer, &key, reservation).await;
    }
    let events = answer
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    let mut response = if events && stream {
        let output = reserved.output.saturating_mul(choices);
        let plan = Plan { api, output, shows_usage, until };
        let (head, body) = answer.into_parts();
        let mut response = Response::new(stream::pass(plan, body, reservation));
        passed_back(&head.headers, response.headers_mut());
        let live = HeaderValue::from_static("no-cache");
        response.headers_mut().insert(CACHE_CONTROL, live);
        response
    } else {
        whole(api, answer, reservation, until).await?
    };
    response.headers_mut().remove(CONTENT_ENCODING);
    Ok(response)
}

fn late() -> Problem {
    Problem::new(Kind::Late, "aegis: the call took too long")
}

fn ours(error: &str) -> Problem {
    tracing::error!(error, "the LLM door failed");
    Problem::new(Kind::Ours, "aegis: this host failed at this call")
}

/// More calls than one machine may have.
pub(super) fn too_many(allowed: String) -> Problem {
    Problem::new(Kind::Busy, format!("aegis: too many calls: {allowed} are allowed"))
}

/// Reads and parses a body, within bounds of bytes, values and time.
async fn read(
    machine: &Machine,
    api: Api,
    headers: &HeaderMap,
    body: Incoming,
) -> Result<(Draft, Held, Held), Problem> {
    let too_large =
        || Problem::new(Kind::TooLarge, format!("aegis: a body has at most {LLM_BODY_MAX} bytes"));
    if headers.get(CONTENT_ENCODING).is_some_and(|how| how != "identity") {
        return Err(Problem::field("content-encoding", "must be absent"));
    }
    let said =
        body.size_hint().exact().map_or(LLM_BODY_MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
    if said > LLM_BODY_MAX {
        // Who still sends would not see the answer.
        let _ = tokio::time::timeout(LLM_BODY_DEADLINE, drain(body)).await;
        return Err(too_large());
    }
    let full =
        || Problem::new(Kind::Busy, "aegis: too many large calls are on their way from this host");
    let held = machine.hold(said).await.ok_or_else(full)?;
    let read = Limited::new(body, LLM_BODY_MAX).collect();
    let bytes: Bytes = match tokio::time::timeout(LLM_BODY_DEADLINE, read).await {
        Ok(Ok(read)) => read.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
        Ok(Err(_)) => return Err(Problem::field("the body", "broke off")),
        Err(_) => return Err(late()),
    };
    let values = values(&bytes);
    if values > LLM_VALUES_MAX {
        let message = format!("aegis: a body has at most {LLM_VALUES_MAX} JSON values");
        return Err(Problem::new(Kind::TooLarge, message));
    }
    let room = bytes.len() + values * BYTES_PER_VALUE;
    let looked_at = machine.look(room).await.ok_or_else(full)?;
    let parsed: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Problem::new(Kind::Invalid, format!("aegis: the body is no JSON: {e}")))?;
    Ok((Draft::new(api, parsed)?, held, looked_at))
}

/// Reads what nobody wants, within bounds.
async fn drain(mut body: Incoming) {
    let mut left = 4 * LLM_BODY_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            return;
        }
    }
}

async fn check_model(machine: &Machine, provider: &Provider, model: &str) -> Result<(), Problem> {
    let asker = asker(machine)?;
    if provider.models.admit(model) && asker.may_use(model) {
        return Ok(());
    }
    let message = format!("the model {model} is not among those that this machine may use");
    let refusal = Refusal::denied("llm_models", message);
    machine.note("llm", &refusal, Some(model)).await;
    Err(Problem::new(Kind::NoModel, format!("aegis: {refusal}; GET /v1/models lists them")))
}

async fn not_reserved(machine: &Machine, why: NotReserved) -> Problem {
    let said = |refusal: &Refusal| format!("aegis: {refusal}");
    match why {
        NotReserved::Ours(error) => ours(&error),
        NotReserved::Short(Short::Ended(refusal)) => Problem::new(Kind::Forbidden, said(&refusal)),
        NotReserved::Short(Short::Busy(refusal)) => Problem::new(Kind::Busy, said(&refusal)),
        NotReserved::Short(Short::Exhausted(refusal)) => {
            machine.note("llm", &refusal, None).await;
            Problem::new(Kind::Exhausted, said(&refusal))
        }
    }
}

/// Passes a vendor's refusal on. It billed nothing, unless what stands before it gave up on an answer
/// that was on its way.
async fn refused(
    answer: Response<Incoming>,
    key: &Key,
    reservation: Reservation,
) -> Result<Response<Body>, Problem> {
    let (head, body) = answer.into_parts();
    let is_error = head.status.is_client_error() || head.status.is_server_error();
    let may_have_billed = matches!(head.status.as_u16(), 502 | 504 | 520..=527);
    let billed = if may_have_billed { None } else { Some(0) };
    reservation.settle(billed, "refused").await;
    if !is_error {
        let message = format!("aegis: the vendor answered {}, which is not followed", head.status);
        return Err(Problem::new(Kind::Upstream, message));
    }
    let words = Limited::new(body, LLM_ERROR_MAX).collect();
    let words = match tokio::time::timeout(LLM_BODY_DEADLINE, words).await {
        Ok(Ok(words)) => words.to_bytes(),
        Ok(Err(_)) | Err(_) => Bytes::new(),
    };
    let mut response = Response::new(answer::whole(key.redact(&words)));
    *response.status_mut() = head.status;
    passed_back(&head.headers, response.headers_mut());
    Ok(response)
}

/// An answer in one piece: settled before the machine has it.
async fn whole(
    api: Api,
    answer: Response<Incoming>,
    reservation: Reservation,
    until: Instant,
) -> Result<Response<Body>, Problem> {
    let (head, body) = answer.into_parts();
    let read = Limited::new(body, LLM_ANSWER_MAX).collect();
    let bytes = match tokio::time::timeout_at(until, read).await {
        Ok(Ok(read)) => read.to_bytes(),
        Ok(Err(_)) => {
            reservation.settle(None, "broken").await;
            return Err(Problem::new(Kind::Upstream, "aegis: the vendor broke its answer off"));
        }
        Err(_) => {
            reservation.settle(None, "late").await;
            return Err(late());
        }
    };
    let told = serde_json::from_slice::<Value>(&bytes).ok();
    let usage = told.as_ref().and_then(|told| told.get("usage"));
    let reported = usage.and_then(|usage| match api {
        Api::Chat => chat::usage(usage),
        Api::Responses => responses::usage(usage),
        Api::Messages => messages::usage(usage),
    });
    let end = if reported.is_some() { "ok" } else { "unreported" };
    reservation.settle(reported, end).await;
    let mut response = Response::new(answer::whole(bytes));
    *response.status_mut() = StatusCode::OK;
    passed_back(&head.headers, response.headers_mut());
    Ok(response)
}
