//! Every request has an id: given back to who asked, in front of all that the log says of it, and
//! counted by its route. Of a request the log shows its method, its route as a pattern, its status
//! and its time; never a path, a query, a header or a body, which may hold secrets.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State as Extract};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument as _;

use super::State;
use crate::keys;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that a client may give its request, bytes.
const REQUEST_ID_MAX: usize = 64;

/// Gives a request its id, a span and a count.
pub(super) async fn traced(
    Extract(state): Extract<State>,
    request: Request,
    next: Next,
) -> Response {
    let begun = Instant::now();
    let id = request_id(request.headers());
    let method = method_word(request.method());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unknown", MatchedPath::as_str);
    // Of the highest level: where little is logged, that little has its id too.
    let span = tracing::error_span!("request", request_id = %id, method, route);
    let mut response = next.run(request).instrument(span.clone()).await;
    let status = response.status().as_u16();
    let ms = begun.elapsed().as_micros() as f64 / 1000.0;
    span.in_scope(|| match (method, status) {
        // Who waits for something looks often: what changed nothing is not for every log.
        ("GET" | "HEAD", 200..400) => tracing::debug!(status, ms, "answered"),
        _ => tracing::info!(status, ms, "answered"),
    });
    state.app.ctx.metrics.request(method, route, status);
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// A client may make up words; these are the ones we know.
fn method_word(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "OTHER",
    }
}

fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    match given.filter(|id| is_sane(id)) {
        Some(id) => id.to_owned(),
        None => keys::uuid().unwrap_or_default(),
    }
}

/// Whether an id may go to the log. Every code and token of ours has an underscore or is longer.
fn is_sane(id: &str) -> bool {
    let fits = (1..=REQUEST_ID_MAX).contains(&id.len());
    fits && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::is_sane;

    #[test]
    fn ids_are_short_and_plain() {
        for yes in ["a", "0af7651916cd43dd8448eb211c80319c", "req-1.2", &"x".repeat(64)] {
            assert!(is_sane(yes), "{yes}");
        }
        for no in ["", "a b", "a\nb", "inv_x", "guest_x", "\u{e4}", "{}", &"x".repeat(65)] {
            assert!(!is_sane(no), "{no}");
        }
    }
}
