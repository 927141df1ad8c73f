//! Commands in machines that are lent: in one piece, and as they put out.

use std::io;

use aegis_wire::host::{Exec as Command, ExecBody};
use aegis_wire::logs::{Entry, ExecDone as Done, ExecStarted, Stream};
use aegis_wire::vers::{Exec, ExecDone, StreamLine, StreamName};
use aegis_wire::words::Uuid;
use axum::body::{Body as Bytes, Bytes as Chunk};
use axum::extract::State as Extract;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse as _;
use axum::routing::post;
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::super::State;
use super::answer::{Body, Failure, Id};
use super::{Answer, Borrower};
use crate::app::exec::Running;
use crate::app::vers;

/// What a command may put out where it is asked for in one piece, bytes of either stream.
const PIECE_MAX: usize = 8 * 1024 * 1024;
/// The exit code of a command that had none.
const NO_CODE: i32 = -1;

pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/vm/{vm_id}/exec", post(exec))
        .route("/vm/{vm_id}/exec/stream", post(stream))
}

/// What of it can be done here.
fn start(ask: Exec) -> Result<Command, Failure> {
    if ask.exec_id.is_some() {
        return Err(Failure::not_here("an exec_id of the asker's"));
    }
    let body = ExecBody {
        command: ask.command,
        env: ask.env.unwrap_or_default(),
        cwd: ask.working_dir,
        tty: false,
        timeout_secs: ask.timeout_secs.filter(|seconds| *seconds > 0),
        stdin: ask.stdin,
        stdin_b64: None,
    };
    Ok(body.parse()?)
}

/// A command that runs, as that API tells of it.
struct Told {
    running: Running,
    id: Option<Uuid>,
    cursor: u64,
    done: bool,
}

impl Told {
    fn new(running: Running) -> Told {
        Told { running, id: None, cursor: 0, done: false }
    }

    /// What comes next; `None` after the end.
    async fn next(&mut self) -> Option<StreamLine> {
        while !self.done {
            let Some(line) = self.running.next_line().await else {
                self.done = true;
                continue;
            };
            if let Some(told) = self.told(&line) {
                return Some(told);
            }
        }
        None
    }

    fn told(&mut self, line: &[u8]) -> Option<StreamLine> {
        if let Ok(entry) = serde_json::from_slice::<Entry>(line) {
            let stream = match entry.stream {
                Stream::Stdout => StreamName::Stdout,
                Stream::Stderr => StreamName::Stderr,
            };
            let data_b64 = STANDARD.encode(entry.bytes());
            let (exec_id, cursor) = self.named()?;
            return Some(StreamLine::Chunk { exec_id, cursor, stream, data_b64 });
        }
        if let Ok(done) = serde_json::from_slice::<Done>(line) {
            self.done = true;
            let (exec_id, cursor) = self.named()?;
            let exit_code = done.exit_code.unwrap_or(NO_CODE);
            return Some(StreamLine::Exit { exec_id, cursor, exit_code });
        }
        if let Ok(started) = serde_json::from_slice::<ExecStarted>(line) {
            self.id = started.exec_id.parse().ok();
        }
        None
    }

    fn named(&mut self) -> Option<(Uuid, u64)> {
        self.cursor += 1;
        Some((self.id.clone()?, self.cursor))
    }
}

async fn exec(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    Body(ask): Body<Exec>,
) -> Answer {
    let mut told = Told::new(vers::exec(host, &state.app, &vm, start(ask)?).await?);
    let (mut out, mut err, mut code) = (Vec::new(), Vec::new(), NO_CODE);
    while let Some(line) = told.next().await {
        match line {
            StreamLine::Chunk { stream, data_b64, .. } => {
                let to = match stream {
                    StreamName::Stdout => &mut out,
                    StreamName::Stderr => &mut err,
                };
                to.extend(STANDARD.decode(data_b64).unwrap_or_default());
                if to.len() > PIECE_MAX {
                    let most = format!("it put out more than {PIECE_MAX} bytes; use exec/stream");
                    return Err(Failure::App(StatusCode::PAYLOAD_TOO_LARGE, most));
                }
            }
            StreamLine::Exit { exit_code, .. } => code = exit_code,
        }
    }
    Ok(Json(ExecDone {
        exit_code: code,
        stdout: String::from_utf8_lossy(&out).into_owned(),
        stderr: String::from_utf8_lossy(&err).into_owned(),
        exec_id: told.id,
    })
    .into_response())
}

async fn stream(
    Extract(state): Extract<State>,
    Borrower(host): Borrower,
    Id(vm): Id,
    Body(ask): Body<Exec>,
) -> Answer {
    let told = Told::new(vers::exec(host, &state.app, &vm, start(ask)?).await?);
    let lines = futures_util::stream::unfold(told, |mut told| async move {
        let line = told.next().await?;
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        Some((Ok::<_, io::Error>(Chunk::from(text)), told))
    });
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((kind, Bytes::from_stream(lines)).into_response())
}
