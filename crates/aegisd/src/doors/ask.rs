//! Requests: who asks, and bodies and parameters read with bounds.

use std::net::SocketAddr;
use std::time::Duration;

use aegis_wire::bounds::PAGE_MAX;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request, State as Extract};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Deserialize;
use serde_json::Value;

use super::State;
use super::answer::Failure;
use crate::app::Host;

/// A client has this long to send a body.
const BODY_DEADLINE: Duration = Duration::from_secs(30);

/// A body that nobody wants is taken while more of it comes within this.
const DISCARD: Duration = Duration::from_secs(5);
/// All of it is taken for so long.
const DISCARD_ALL: Duration = Duration::from_secs(60);

/// By which listener a request came.
#[derive(Clone, Copy, Debug)]
pub(super) enum Peer {
    /// The host's own socket.
    Unix,
    /// TCP, from this address.
    Tcp(SocketAddr),
}

/// By which listener a request came.
pub(super) fn peer(parts: &Parts) -> Option<Peer> {
    parts.extensions.get::<Peer>().copied()
}

/// The bearer token of a request.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Proof that the host asks; a handler that does not ask for it has no argument for a host's verb.
pub(super) struct HostAuth(pub(super) Host);

impl FromRequestParts<State> for HostAuth {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<HostAuth, Failure> {
        let trusted = match peer(parts) {
            Some(Peer::Unix) => true,
            // local_only has looked at Host and Origin.
            Some(Peer::Tcp(_)) if state.app.ctx.config.no_auth => true,
            Some(Peer::Tcp(_)) => {
                bearer(&parts.headers).is_some_and(|t| state.app.ctx.keys.is_host_token(t))
            }
            None => false,
        };
        if trusted {
            return Ok(HostAuth(Host::authenticated()));
        }
        Err(Failure::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "this route needs the host's token: Authorization: Bearer …",
        ))
    }
}

/// Counts public requests per address; the host's own socket is not counted.
pub(super) async fn rate_limited(
    Extract(state): Extract<State>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    if let Some(Peer::Tcp(from)) = request.extensions().get::<Peer>() {
        state.rate.check(from.ip())?;
    }
    Ok(next.run(request).await)
}

/// Without authentication only pages and programs of this machine may ask: a foreign `Host` is a
/// rebound name, a foreign `Origin` another site's page (contracts/couch.md 1).
pub(super) async fn local_only(
    Extract(state): Extract<State>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let unix = matches!(request.extensions().get::<Peer>(), Some(Peer::Unix));
    if state.app.ctx.config.no_auth && !unix {
        let headers = request.headers();
        let text = |name| headers.get(name).map(|v| v.to_str().unwrap_or("?"));
        let host = text(header::HOST).is_some_and(is_local);
        let origin = text(header::ORIGIN).is_none_or(|o| {
            o.strip_prefix("http://").or_else(|| o.strip_prefix("https://")).is_some_and(is_local)
        });
        if !(host && origin) {
            return Err(Failure::new(
                StatusCode::FORBIDDEN,
                "foreign_origin",
                "without authentication only requests to and from localhost are served",
            ));
        }
    }
    Ok(next.run(request).await)
}

/// Whether `name[:port]` is this machine's loopback.
fn is_local(authority: &str) -> bool {
    let name = match authority.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => authority,
    };
    matches!(name, "localhost" | "127.0.0.1" | "[::1]")
}

/// A JSON body of at most `MAX` bytes; an empty one is `null`.
pub(super) struct JsonBody<const MAX: usize>(pub(super) Value);

impl<const MAX: usize> FromRequest<State> for JsonBody<MAX> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &State) -> Result<JsonBody<MAX>, Failure> {
        let bytes = read(request.into_body(), MAX).await?;
        if bytes.is_empty() {
            return Ok(JsonBody(Value::Null));
        }
        serde_json::from_slice(&bytes).map(JsonBody).map_err(|e| {
            Failure::new(StatusCode::BAD_REQUEST, "malformed_json", format!("malformed JSON: {e}"))
        })
    }
}

/// Takes a body that nobody wants, for a while: a client that sends before it reads would never see
/// why.
pub(super) async fn discard(body: Body) {
    let mut pieces = body.into_data_stream();
    let all =
        async { while let Ok(Some(Ok(_))) = tokio::time::timeout(DISCARD, pieces.next()).await {} };
    let _ = tokio::time::timeout(DISCARD_ALL, all).await;
}

/// Reads a body of at most so many bytes, within its deadline.
pub(super) async fn read(body: Body, max: usize) -> Result<Bytes, Failure> {
    let collected = tokio::time::timeout(BODY_DEADLINE, Limited::new(body, max).collect()).await;
    match collected {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Failure::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            format!("the body has more than {max} bytes"),
        )),
        Ok(Err(_)) => {
            Err(Failure::new(StatusCode::BAD_REQUEST, "body_broken", "the body broke off"))
        }
        Err(_) => Err(Failure::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_too_slow",
            format!("the body did not arrive within {}s", BODY_DEADLINE.as_secs()),
        )),
    }
}

/// `?status=&limit=&cursor=` of a list.
#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    pub(super) status: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

impl ListQuery {
    /// After which row: an id, as the page before named it.
    pub(super) fn cursor<I: std::str::FromStr>(&self) -> Result<Option<&str>, Failure> {
        match &self.cursor {
            Some(text) if text.parse::<I>().is_err() => {
                Err(bad_query("cursor", "the nextCursor of an earlier page"))
            }
            cursor => Ok(cursor.as_deref()),
        }
    }

    /// How many rows: all that a page may have, or fewer.
    pub(super) fn limit(&self) -> Result<usize, Failure> {
        match &self.limit {
            None => Ok(PAGE_MAX),
            Some(text) => match text.parse() {
                Ok(n) if (1..=PAGE_MAX).contains(&n) => Ok(n),
                _ => Err(bad_query("limit", &format!("a whole number from 1 to {PAGE_MAX}"))),
            },
        }
    }
}

/// The name in a path, or several; what is no text is not found, as JSON.
pub(super) struct Named<T = String>(pub(super) T);

impl<T: serde::de::DeserializeOwned + Send> FromRequestParts<State> for Named<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Named<T>, Failure> {
        let Ok(Path(name)) = Path::<T>::from_request_parts(parts, state).await else {
            let code = "unknown_route";
            return Err(Failure::new(StatusCode::NOT_FOUND, code, "the path is no text"));
        };
        Ok(Named(name))
    }
}

/// Parameters of the query; what does not parse is refused as JSON.
pub(super) struct Params<T>(pub(super) T);

impl<T: serde::de::DeserializeOwned> FromRequestParts<State> for Params<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &State) -> Result<Params<T>, Failure> {
        Query::<T>::try_from_uri(&parts.uri)
            .map(|Query(value)| Params(value))
            .map_err(|_| bad_query("the query", "name=value pairs, each name once"))
    }
}

/// A parameter that can't be taken.
pub(super) fn bad_query(name: &str, allowed: &str) -> Failure {
    aegis_rules::refusal::Refusal::field(name, allowed).into()
}

#[cfg(test)]
mod tests {
    use super::is_local;

    #[test]
    fn only_loopback_names_are_local() {
        for yes in ["localhost", "localhost:3000", "127.0.0.1:1", "[::1]:3000", "[::1]"] {
            assert!(is_local(yes), "{yes}");
        }
        for no in ["evil.example", "localhost.evil.example:3000", "127.0.0.1.nip.io", "", "[::2]"] {
            assert!(!is_local(no), "{no}");
        }
    }
}
