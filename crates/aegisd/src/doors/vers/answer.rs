//! Answers in the vers API's envelopes, and bodies read as it reads them.

use aegis_rules::refusal::Code;
use aegis_wire::error::{of_fault, status};
use aegis_wire::vers::{AUTH_TEXT, AppError, BODY_MAX, BranchError, FORBIDDEN, NOT_FOUND};
use aegis_wire::words::Uuid;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use super::super::State;
use super::super::answer::Failure as Ours;
use super::super::ask;
use crate::app::Error;

/// An answer that is no success.
pub(super) enum Failure {
    /// The key is refused: text, and no content type.
    BadKey,
    /// A request that can't be read: text.
    Unreadable(StatusCode, String),
    /// Anything else: the envelope.
    App(StatusCode, String),
    /// The same, where machines were to be made from one.
    Branch(StatusCode, String),
}

impl Failure {
    /// The key is refused.
    pub(super) fn bad_key() -> Failure {
        Failure::BadKey
    }

    /// What this build does not serve.
    pub(super) fn not_here(what: &str) -> Failure {
        Failure::App(StatusCode::NOT_IMPLEMENTED, format!("{what}: this cloud does not serve that"))
    }

    /// Of a commit: what is unknown is told so in that API's words.
    pub(super) fn of_commit(error: Error, unknown: &str) -> Failure {
        match error {
            Error::Refused(refusal) if refusal.code == Code::CommitNotFound => {
                Failure::App(StatusCode::NOT_FOUND, unknown.to_owned())
            }
            other => other.into(),
        }
    }

    /// The same in the envelope of those routes that make machines from one.
    pub(super) fn of_branch(self) -> Failure {
        match self {
            Failure::App(status, error) => Failure::Branch(status, error),
            other => other,
        }
    }

    /// Of a delete: what is unknown is forbidden.
    pub(super) fn of_delete(error: Error) -> Failure {
        match error {
            Error::Refused(refusal) if refusal.code == Code::InstanceNotFound => {
                Failure::App(StatusCode::FORBIDDEN, FORBIDDEN.to_owned())
            }
            other => other.into(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Refused(refusal) => match refusal.code {
                Code::InstanceNotFound => Failure::App(StatusCode::NOT_FOUND, NOT_FOUND.to_owned()),
                // That cloud says so of nodes that are full.
                Code::NoCapacity => {
                    Failure::App(StatusCode::INTERNAL_SERVER_ERROR, refusal.to_string())
                }
                code => {
                    let status = StatusCode::from_u16(status(code));
                    Failure::App(status.unwrap_or(StatusCode::BAD_REQUEST), refusal.to_string())
                }
            },
            Error::File { fault, ref path } => {
                let status = StatusCode::from_u16(of_fault(fault).0);
                let said = fault.sentence(path);
                Failure::App(status.unwrap_or(StatusCode::CONFLICT), said)
            }
            Error::Machine(message) => Failure::App(StatusCode::INTERNAL_SERVER_ERROR, message),
            // The log has the cause, under the id that the body names.
            other => {
                let ours = Ours::from(other);
                let body = ours.body();
                let id = body.error_id.as_deref().unwrap_or("none");
                let said = format!("{} (error id {id})", body.error);
                Failure::App(StatusCode::INTERNAL_SERVER_ERROR, said)
            }
        }
    }
}

impl From<aegis_rules::refusal::Refusal> for Failure {
    fn from(refusal: aegis_rules::refusal::Refusal) -> Failure {
        Error::Refused(refusal).into()
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        match self {
            Failure::BadKey => {
                let mut response = Response::new(AUTH_TEXT.into());
                *response.status_mut() = StatusCode::FORBIDDEN;
                response
            }
            Failure::Unreadable(status, text) => (status, text).into_response(),
            Failure::App(status, error) => {
                (status, Json(AppError { error, success: false })).into_response()
            }
            Failure::Branch(status, error) => {
                (status, Json(BranchError { vms: vec![], error })).into_response()
            }
        }
    }
}

/// A success that made something.
pub(super) fn made(body: impl serde::Serialize) -> Response {
    (StatusCode::CREATED, Json(body)).into_response()
}

/// The id in a path; what is none is told so as text.
pub(super) struct Id(pub(super) Uuid);

impl FromRequestParts<State> for Id {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Id, Failure> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let text = path.map(|Path(text)| text).unwrap_or_default();
        text.to_ascii_lowercase().parse().map(Id).map_err(|_| {
            let text: String = text.chars().take(100).collect();
            let said = format!("Invalid URL: Cannot parse `{text}` to a `Uuid`");
            Failure::Unreadable(StatusCode::BAD_REQUEST, said)
        })
    }
}

/// A JSON body, refused as that API refuses it.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<State> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &State) -> Result<Body<T>, Failure> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        if !kind.is_some_and(|k| k.starts_with("application/json")) {
            let said = "Expected request with `Content-Type: application/json`".to_owned();
            return Err(Failure::Unreadable(StatusCode::UNSUPPORTED_MEDIA_TYPE, said));
        }
        let bytes = read(request).await?;
        parse(&bytes).map(Body)
    }
}

/// A JSON body that may be left out.
pub(super) struct Loose<T>(pub(super) T);

impl<T: DeserializeOwned + Default> FromRequest<State> for Loose<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &State) -> Result<Loose<T>, Failure> {
        let bytes = read(request).await?;
        if bytes.is_empty() { Ok(Loose(T::default())) } else { parse(&bytes).map(Loose) }
    }
}

async fn read(request: Request) -> Result<Bytes, Failure> {
    ask::read(request.into_body(), BODY_MAX).await.map_err(|failure| {
        Failure::Unreadable(StatusCode::PAYLOAD_TOO_LARGE, failure.body().error.clone())
    })
}

/// A JSON text, refused as that API refuses it.
pub(super) fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(text).map_err(|error| match error.classify() {
        Category::Data => Failure::Unreadable(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("Failed to deserialize the JSON body into the target type: {error}"),
        ),
        Category::Syntax | Category::Eof | Category::Io => Failure::Unreadable(
            StatusCode::BAD_REQUEST,
            format!("Failed to parse the request body as JSON: {error}"),
        ),
    })
}
