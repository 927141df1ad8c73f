//! Answers that are NDJSON streams: exec and logs.

use std::io;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::WORKER_LINE_MAX;
use aegis_wire::channel::rpc::{CODE_CONFLICT, CODE_NOT_FOUND};
use aegis_wire::logs::ExecDone;
use aegis_wire::worker::Reply;
use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::answer::Failure;
use crate::app::instances::Exec;

const NDJSON: [(header::HeaderName, &str); 1] = [(header::CONTENT_TYPE, "application/x-ndjson")];

/// The NDJSON of an exec. A worker that refuses answers with a status; a stream that breaks off
/// ends with a last line that says so, so that no client waits for an exit code that never comes.
pub(super) async fn exec(exec: Exec) -> Result<Response, Failure> {
    let Exec { instance, exec_id, mut lines } = exec;
    let first = next_line(&mut lines).await.ok().flatten();
    let Some(first) = first else {
        return Err(lost(&instance).into());
    };
    if let Ok(Reply { error: Some(error), .. }) = serde_json::from_slice::<Reply>(&first) {
        return Err(match error.code {
            CODE_CONFLICT => Refusal::new(Code::InstanceState, error.message).into(),
            CODE_NOT_FOUND => Refusal::new(Code::InvalidField, error.message).into(),
            _ => Failure::new(StatusCode::BAD_GATEWAY, "machine_failed", error.message),
        });
    }
    let state = Some((lines, Some(first), exec_id));
    let body = futures_util::stream::unfold(state, |state| async move {
        let (mut lines, first, exec_id) = state?;
        let line = match first {
            Some(first) => Some(first),
            None => next_line(&mut lines).await.ok().flatten(),
        };
        match line {
            Some(line) => {
                let state = if is_done(&line) { None } else { Some((lines, None, exec_id)) };
                Some((Ok::<_, io::Error>(Bytes::from(line)), state))
            }
            None => {
                let done = ExecDone {
                    exec_id,
                    exit_code: None,
                    done: true,
                    error: Some("the machine ended before the command did".to_owned()),
                };
                let mut line = serde_json::to_vec(&done).unwrap_or_default();
                line.push(b'\n');
                Some((Ok(Bytes::from(line)), None))
            }
        }
    });
    Ok((NDJSON, Body::from_stream(body)).into_response())
}

fn lost(instance: &aegis_wire::words::InstanceId) -> Refusal {
    Refusal::new(Code::InstanceState, format!("the machine of {instance} ended"))
}

fn is_done(line: &[u8]) -> bool {
    // Entries are many and long: only a line that begins as the last one is parsed.
    line.len() < 4096 && serde_json::from_slice::<ExecDone>(line).is_ok_and(|d| d.done)
}

async fn next_line(from: &mut BufReader<UnixStream>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    from.take(WORKER_LINE_MAX as u64).read_until(b'\n', &mut line).await?;
    Ok((line.last() == Some(&b'\n')).then_some(line))
}

/// The NDJSON of logs.
pub(super) fn lines(lines: mpsc::Receiver<io::Result<String>>) -> Response {
    let body = futures_util::stream::unfold(lines, |mut lines| async move {
        lines.recv().await.map(|line| (line, lines))
    });
    (NDJSON, Body::from_stream(body)).into_response()
}
