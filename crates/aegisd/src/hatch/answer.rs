//! Answers of the hatch's own.

use aegis_rules::refusal::Refusal;
use aegis_wire::error::{ErrorBody, status};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

/// Why a body broke off.
pub(super) type Broken = Box<dyn std::error::Error + Send + Sync>;
/// Any body that is passed to a machine.
pub(super) type Body = UnsyncBoxBody<Bytes, Broken>;

/// A body that is there already.
pub(super) fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// JSON.
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(whole(bytes));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

/// An error that is no refusal.
pub(super) fn problem(status: StatusCode, code: &str, error: impl Into<String>) -> Response<Body> {
    json(status, &ErrorBody::new(code, error))
}

/// A refusal.
pub(super) fn refused(refusal: &Refusal) -> Response<Body> {
    let status = StatusCode::from_u16(status(refusal.code)).unwrap_or(StatusCode::FORBIDDEN);
    json(status, &ErrorBody::from(refusal))
}
