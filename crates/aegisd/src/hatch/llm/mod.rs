//! The LLM door: `http://llm.aegis/` inside.
//!
//! ```text
//! /NAME/v1/chat/completions ─▶ draft: what may it cost? ─▶ model allowed? ─▶ reserved, on disk
//! /NAME/v1/responses            (unknowable: 400)            (else 404)        (nothing left: 429)
//! /NAME/v1/messages                                                                  │ key added
//!        answer ◀─ stream: counted, cut at its reservation ◀─ settled, on disk ◀── vendor
//! ```
//! A refusal has the shape of the vendor's own errors, so that its SDK raises its own exception.

mod call;
mod chat;
mod draft;
mod messages;
mod models;
mod problem;
mod reservation;
mod responses;
mod sse;
mod stream;
#[cfg(test)]
mod tests;
mod vendors;

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::{Method, Request, Response};

use super::answer::Body;
use super::machine::Machine;
use crate::config::{Provider, Vendor};
use draft::Api;
pub(super) use problem::Exhausted;
use problem::{Kind, Problem};
pub(super) use vendors::Vendors;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Call(Api),
    Models,
}

/// Answers one request.
pub(super) async fn serve(machine: Arc<Machine>, request: Request<Incoming>) -> Response<Body> {
    let providers = machine.app().ctx.config.providers.clone();
    let (provider, wish) = match route(&providers, request.method(), request.uri().path()) {
        Ok(found) => found,
        Err((vendor, problem)) => return problem.answer(vendor),
    };
    let answered = match wish {
        Wish::Call(api) => call::call(&machine, provider, api, request).await,
        Wish::Models => models::list(&machine, provider, request.headers()).await,
    };
    answered.unwrap_or_else(|problem| problem.answer(provider.vendor))
}

/// Whom a path means, and what of it: `/NAME/…`, or a path alone for the first provider that speaks
/// so.
fn route<'a>(
    providers: &'a [Provider],
    method: &Method,
    path: &str,
) -> Result<(&'a Provider, Wish), (Vendor, Problem)> {
    let named = path
        .strip_prefix('/')
        .and_then(|p| p.split_once('/'))
        .and_then(|(name, rest)| Some((providers.iter().find(|p| p.name.as_str() == name)?, rest)));
    let first = |vendor| providers.iter().find(|p| p.vendor == vendor);
    let (provider, rest) = match named {
        Some(named) => named,
        None => {
            let rest = path.trim_start_matches('/');
            let vendor = match rest {
                "v1/messages" => Vendor::Anthropic,
                _ => Vendor::OpenAi,
            };
            let other = || providers.first().filter(|_| rest == "v1/models");
            match first(vendor).or_else(other) {
                Some(provider) => (provider, rest),
                None => {
                    let message = "aegis: this host has no provider for that";
                    return Err((vendor, Problem::new(Kind::NoRoute, message)));
                }
            }
        }
    };
    // An SDK's base URL ends with the version or not.
    let rest = rest.strip_prefix("v1/").unwrap_or(rest);
    let wish = match (provider.vendor, method, rest) {
        (Vendor::OpenAi, &Method::POST, "chat/completions") => Wish::Call(Api::Chat),
        (Vendor::OpenAi, &Method::POST, "responses") => Wish::Call(Api::Responses),
        (Vendor::Anthropic, &Method::POST, "messages") => Wish::Call(Api::Messages),
        (_, &Method::GET, "models") => Wish::Models,
        _ => {
            let path: String = path.chars().take(100).collect();
            let message = format!("aegis: {method} {path} is not served here");
            return Err((provider.vendor, Problem::new(Kind::NoRoute, message)));
        }
    };
    Ok((provider, wish))
}
