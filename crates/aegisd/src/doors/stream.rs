//! Answers that are NDJSON streams: exec, logs, the audit trail.

use std::io;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use tokio::sync::mpsc;

use crate::app::exec::Running;

const NDJSON: [(header::HeaderName, &str); 1] = [(header::CONTENT_TYPE, "application/x-ndjson")];

/// The NDJSON of an exec.
pub(super) fn exec(running: Running) -> Response {
    let body = futures_util::stream::unfold(running, |mut running| async move {
        let line = running.next_line().await?;
        Some((Ok::<_, io::Error>(Bytes::from(line)), running))
    });
    (NDJSON, Body::from_stream(body)).into_response()
}

/// The NDJSON of logs or of the audit trail.
pub(super) fn lines(lines: mpsc::Receiver<io::Result<String>>) -> Response {
    let body = futures_util::stream::unfold(lines, |mut lines| async move {
        lines.recv().await.map(|line| (line, lines))
    });
    (NDJSON, Body::from_stream(body)).into_response()
}
