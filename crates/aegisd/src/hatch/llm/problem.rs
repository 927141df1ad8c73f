//! Refusals of the LLM door, in the error shape of the vendor that the client believes to speak to.

use hyper::header::{HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use super::super::answer::{self, Body};
use crate::config::Vendor;

/// Says to the vendors' SDKs whether to try again by themselves.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The request.
    Invalid,
    /// The request's length.
    TooLarge,
    /// This machine may not.
    Forbidden,
    /// Nothing is there.
    NoRoute,
    /// The model is none that may be asked for.
    NoModel,
    /// The budget is used up.
    Exhausted,
    /// Calls that run hold what is left of the budget, or there are too many calls.
    Busy,
    /// The host lacks something.
    Unconfigured,
    /// The vendor does not answer as it should.
    Upstream,
    /// The call took too long.
    Late,
    /// This host failed.
    Ours,
}

/// A call that is refused, or can't go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) kind: Kind,
    /// One sentence.
    pub(super) message: String,
    /// Of the request, which field.
    pub(super) param: Option<String>,
}

/// Marks an answer that says that nothing is left: what follows from that, a freeze say, begins when
/// the answer is out.
#[derive(Clone, Copy)]
pub(in crate::hatch) struct Exhausted;

impl Problem {
    pub(super) fn new(kind: Kind, message: impl Into<String>) -> Problem {
        Problem { kind, message: message.into(), param: None }
    }

    /// A field that can't be taken.
    pub(super) fn field(param: &str, why: &str) -> Problem {
        let param: String = param.chars().take(100).collect();
        let message = format!("aegis: {param} {why}");
        Problem { kind: Kind::Invalid, message, param: Some(param) }
    }

    fn status(&self) -> u16 {
        match self.kind {
            Kind::Invalid => 400,
            Kind::TooLarge => 413,
            Kind::Forbidden => 403,
            Kind::NoRoute | Kind::NoModel => 404,
            Kind::Exhausted | Kind::Busy => 429,
            Kind::Ours => 500,
            Kind::Upstream => 502,
            Kind::Unconfigured => 503,
            Kind::Late => 504,
        }
    }

    /// The vendor's error object.
    pub(super) fn body(&self, vendor: Vendor) -> Value {
        let message = &self.message;
        match vendor {
            Vendor::OpenAi => {
                let (kind, code) = match self.kind {
                    Kind::Invalid | Kind::TooLarge => ("invalid_request_error", None),
                    Kind::NoRoute => ("invalid_request_error", Some("unknown_url")),
                    Kind::NoModel => ("invalid_request_error", Some("model_not_found")),
                    Kind::Forbidden => ("permission_error", Some("permission_denied")),
                    Kind::Exhausted => ("insufficient_quota", Some("insufficient_quota")),
                    Kind::Busy => ("tokens", Some("rate_limit_exceeded")),
                    Kind::Unconfigured | Kind::Upstream | Kind::Late | Kind::Ours => {
                        ("server_error", None)
                    }
                };
                json!({"error": {
                    "message": message, "type": kind, "param": self.param, "code": code,
                }})
            }
            Vendor::Anthropic => {
                let kind = match self.kind {
                    Kind::Invalid => "invalid_request_error",
                    Kind::TooLarge => "request_too_large",
                    Kind::Forbidden => "permission_error",
                    Kind::NoRoute | Kind::NoModel => "not_found_error",
                    Kind::Exhausted | Kind::Busy => "rate_limit_error",
                    Kind::Unconfigured | Kind::Upstream | Kind::Ours => "api_error",
                    Kind::Late => "timeout_error",
                };
                json!({"type": "error", "error": {"type": kind, "message": message}})
            }
        }
    }

    /// The answer.
    pub(super) fn answer(&self, vendor: Vendor) -> Response<Body> {
        let status =
            StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = answer::json(status, &self.body(vendor));
        if self.kind == Kind::Exhausted {
            response.extensions_mut().insert(Exhausted);
        }
        let headers = response.headers_mut();
        let retry = match self.kind {
            // No wait brings tokens back.
            Kind::Exhausted | Kind::Unconfigured | Kind::Ours => "false",
            Kind::Busy => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
                "true"
            }
            _ => return response,
        };
        headers.insert(SHOULD_RETRY, HeaderValue::from_static(retry));
        response
    }

    /// The same as an event of a stream that was begun.
    pub(super) fn event(&self, vendor: Vendor, named: bool) -> String {
        let body = self.body(vendor);
        match (vendor, named) {
            (Vendor::Anthropic, _) => format!("event: error\ndata: {body}\n\n"),
            (Vendor::OpenAi, false) => format!("data: {body}\n\n"),
            // The responses API has an event of its own for it.
            (Vendor::OpenAi, true) => {
                let error = &body["error"];
                let data = json!({
                    "type": "error", "code": error["code"], "message": error["message"],
                    "param": null, "sequence_number": 0,
                });
                format!("event: error\ndata: {data}\n\n")
            }
        }
    }
}
