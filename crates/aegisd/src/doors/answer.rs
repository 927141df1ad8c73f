//! Answers: JSON, and the one way from an error to a status and a body.

use std::any::Any;

use aegis_wire::error::{ErrorBody, of_fault, status};
use axum::Json;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};

use super::limit::TooMany;
use crate::app;
use crate::keys;

/// An answer that is no success.
pub(super) struct Failure {
    status: StatusCode,
    body: ErrorBody,
    retry_after: Option<u64>,
}

impl Failure {
    /// With a status, a stable word and a sentence.
    pub(super) fn new(status: StatusCode, code: &str, error: impl Into<String>) -> Failure {
        Failure { status, body: ErrorBody::new(code, error), retry_after: None }
    }

    /// What it says, where no status can go with it.
    pub(super) fn body(&self) -> &ErrorBody {
        &self.body
    }
}

impl From<app::Error> for Failure {
    fn from(error: app::Error) -> Failure {
        match error {
            app::Error::Refused(refusal) => Failure {
                status: StatusCode::from_u16(status(refusal.code))
                    .unwrap_or(StatusCode::BAD_REQUEST),
                body: (&refusal).into(),
                retry_after: None,
            },
            app::Error::Machine(message) => {
                Failure::new(StatusCode::BAD_GATEWAY, "machine_failed", message)
            }
            app::Error::Image(failed) => {
                let status = match failed.code.as_str() {
                    "image_not_found" => StatusCode::NOT_FOUND,
                    "image_denied" => StatusCode::FORBIDDEN,
                    "image_refused" => StatusCode::UNPROCESSABLE_ENTITY,
                    _ => StatusCode::BAD_GATEWAY,
                };
                Failure::new(status, &failed.code, failed.message)
            }
            app::Error::File { fault, path } => Failure {
                status: StatusCode::from_u16(of_fault(fault).0).unwrap_or(StatusCode::CONFLICT),
                body: ErrorBody::of_file(fault, &path),
                retry_after: None,
            },
            // The fault is ours: the client gets an id, the log the whole chain under it.
            ours => {
                let id = keys::uuid().unwrap_or_default();
                let chain = anyhow::Error::from(ours);
                tracing::error!(error_id = %id, error = format!("{chain:#}"), "a request failed");
                let mut failure = Failure::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "internal",
                    "the daemon failed; its log has the cause under error_id",
                );
                failure.body.error_id = Some(id);
                failure
            }
        }
    }
}

impl From<aegis_rules::refusal::Refusal> for Failure {
    fn from(refusal: aegis_rules::refusal::Refusal) -> Failure {
        app::Error::Refused(refusal).into()
    }
}

impl From<TooMany> for Failure {
    fn from(too_many: TooMany) -> Failure {
        let mut failure = Failure::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limited",
            format!("too many requests from this address: {} are allowed", too_many.allowed),
        );
        failure.body.allowed = Some(too_many.allowed);
        failure.retry_after = Some(too_many.retry_after);
        failure
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// No such route.
pub(super) async fn unknown_route(uri: Uri) -> Failure {
    // Of the path only: a query may hold a token.
    let path: String = uri.path().chars().take(200).collect();
    Failure::new(StatusCode::NOT_FOUND, "unknown_route", format!("no route {path}"))
}

/// The route exists, not with this method.
pub(super) async fn wrong_method() -> Failure {
    Failure::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "wrong_method",
        "this route does not take that method",
    )
}

/// A bug met a request: the request fails, the daemon goes on.
pub(super) fn panicked(_: Box<dyn Any + Send>) -> Response {
    Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the daemon failed at this request")
        .into_response()
}
