//! Answers that are no success, byte for byte (contracts/vers.md 4).

use aegis_wire::vers::{AUTH_TEXT, AppError, BranchError, FORBIDDEN, NOT_FOUND};
use aegis_wire::words::Uuid;
use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequestParts, Path};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};

/// A success, or what is said instead.
pub(crate) type Answer = Result<Response, Response>;

fn status(code: u16) -> StatusCode {
    StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// No key, or none that is known: text, and no content type.
pub(crate) fn bad_key() -> Response {
    let mut response = Response::new(Body::from(AUTH_TEXT));
    *response.status_mut() = StatusCode::FORBIDDEN;
    response
}

/// The envelope of application errors.
pub(crate) fn app(code: u16, error: impl Into<String>) -> Response {
    (status(code), Json(AppError { error: error.into(), success: false })).into_response()
}

/// The envelope of the routes that make machines from one.
pub(crate) fn branch(code: u16, error: impl Into<String>) -> Response {
    (status(code), Json(BranchError { vms: vec![], error: error.into() })).into_response()
}

/// What is unknown, or somebody else's.
pub(crate) fn not_found() -> Response {
    app(404, NOT_FOUND)
}

/// The same, of a machine that was to be deleted.
pub(crate) fn forbidden() -> Response {
    app(403, FORBIDDEN)
}

/// A machine without a node.
pub(crate) fn asleep() -> Response {
    app(409, "VM is sleeping and has no node")
}

/// Too many requests.
pub(crate) fn limited(seconds: f64) -> Response {
    let mut response = app(429, "rate limit exceeded");
    let (name, value) = if seconds.fract() == 0.0 {
        ("retry-after", format!("{seconds}"))
    } else {
        ("retry-after-ms", format!("{}", (seconds * 1000.0) as u64))
    };
    if let Ok(value) = value.parse() {
        response.headers_mut().insert(name, value);
    }
    response
}

/// A success without a body.
pub(crate) fn empty() -> Response {
    StatusCode::OK.into_response()
}

/// A success that made something.
pub(crate) fn made(body: impl serde::Serialize) -> Response {
    (StatusCode::CREATED, Json(body)).into_response()
}

/// A success.
pub(crate) fn fine(body: impl serde::Serialize) -> Response {
    Json(body).into_response()
}

/// The id in a path; what is none is told so as text.
pub(crate) struct Id(pub(crate) Uuid);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Id, Response> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(text) = path.map_err(IntoResponse::into_response)?;
        text.to_ascii_lowercase().parse().map(Id).map_err(|_| {
            let text: String = text.chars().take(100).collect();
            let said = format!("Invalid URL: Cannot parse `{text}` to a `Uuid`");
            (StatusCode::BAD_REQUEST, said).into_response()
        })
    }
}
