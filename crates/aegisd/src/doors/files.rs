//! `/v1/instances/{id}/files` (README, "Files of machines"): files of a machine, as they come.

use aegis_wire::channel::files::FileAsk;
use aegis_wire::files::{FileShape, Head, KIND_HEADER, MODE_HEADER, Sends, parse};
use aegis_wire::host::StatusWord;
use axum::body::Body;
use axum::extract::{Request, State as Extract};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures_util::TryStreamExt as _;

use super::State;
use super::answer::Failure;
use super::ask::{HostAuth, Named, bad_query, discard};
use crate::app::files::{self, Open};

/// Routes of the host.
pub(super) fn routes() -> Router<State> {
    let all = get(answer).put(answer).post(answer).delete(answer);
    Router::new()
        .route("/v1/instances/{id}/files", all)
        .route("/v1/instances/{id}/files/watch", get(answer))
}

async fn answer(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    request: Request,
) -> Result<Response, Failure> {
    let (head, body) = request.into_parts();
    let ask = match asked(&head) {
        Ok(ask) => ask,
        Err(failure) => {
            discard(body).await;
            return Err(failure);
        }
    };
    let is_write = matches!(ask, FileAsk::Write { .. });
    let kind = match &ask {
        FileAsk::Read { .. } => "application/octet-stream",
        FileAsk::Watch { .. } => "application/x-ndjson",
        _ => "application/json",
    };
    let goes_on = ask.goes_on();
    let open = match files::ask(host, &state.app, &name, ask).await {
        Ok(open) => open,
        Err(error) => {
            discard(body).await;
            return Err(error.into());
        }
    };
    if is_write {
        let body = body.into_data_stream().map_err(std::io::Error::other);
        return Ok(Json(FileShape::from(&open.write(body).await?)).into_response());
    }
    if goes_on {
        return sent(open, kind);
    }
    if !open.leaves_something() {
        return Ok(Json(StatusWord { status: "removed".to_owned() }).into_response());
    }
    let shape = open.shape()?;
    if head.method != Method::HEAD {
        return Ok(Json(shape).into_response());
    }
    let kind = serde_json::to_value(shape.kind).unwrap_or_default();
    let mut headers = HeaderMap::new();
    put(&mut headers, header::CONTENT_LENGTH, &shape.size.to_string());
    put(&mut headers, HeaderName::from_static(KIND_HEADER), kind.as_str().unwrap_or_default());
    put(&mut headers, HeaderName::from_static(MODE_HEADER), &shape.mode);
    Ok((headers, Body::empty()).into_response())
}

fn asked(head: &Parts) -> Result<FileAsk, Failure> {
    let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
    let asked = parse(&Head {
        verb: head.method.as_str(),
        watch: head.uri.path().ends_with("/files/watch"),
        query: head.uri.query().unwrap_or_default(),
        range: text(header::RANGE),
        length: text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok()),
    });
    asked.map_err(|bad| bad_query(bad.field, bad.allowed))
}

fn sent(open: Open, kind: &'static str) -> Result<Response, Failure> {
    let mut headers = HeaderMap::new();
    put(&mut headers, header::CONTENT_TYPE, kind);
    let mut status = StatusCode::OK;
    if let Some(Sends { status: said, length, range }) = open.sends()? {
        status = StatusCode::from_u16(said).unwrap_or_default();
        put(&mut headers, header::ACCEPT_RANGES, "bytes");
        put(&mut headers, HeaderName::from_static(MODE_HEADER), &open.shape()?.mode);
        if let Some(range) = range {
            put(&mut headers, header::CONTENT_RANGE, &range);
        }
        if let Some(length) = length {
            put(&mut headers, header::CONTENT_LENGTH, &length.to_string());
        }
    }
    if status == StatusCode::RANGE_NOT_SATISFIABLE {
        return Ok((status, headers, Body::empty()).into_response());
    }
    let pieces = futures_util::stream::unfold(open.body()?, |mut body| async move {
        body.next().await.map(|piece| (piece, body))
    });
    Ok((status, headers, Body::from_stream(pieces)).into_response())
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        headers.insert(name, value);
    }
}
