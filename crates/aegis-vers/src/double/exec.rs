//! Commands, as if they ran: what they put out is worked out at once, kept, and given out in chunks.

use std::collections::BTreeMap;

use aegis_wire::bounds::OUTPUT_CHUNK_MAX;
use aegis_wire::vers::{
    Attach, Exec, ExecDone, FileContent, LogEntry, Logs, PutFile, StreamLine, StreamName, VmState,
};
use aegis_wire::words::Uuid;
use axum::Router;
use axum::extract::{Json, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::answers::{self, Answer, Id};
use crate::{Double, Shared, world};

/// Most bytes that `bytes N` puts out.
const BYTES_MAX: usize = 64 << 20;
/// Commands of one machine that are kept.
const KEPT_MAX: usize = 64;

/// A command that ran.
#[derive(Clone)]
pub(crate) struct Ran {
    id: Uuid,
    at: String,
    code: i32,
    out: Vec<u8>,
    err: Vec<u8>,
}

pub(crate) fn routes() -> Router<Shared> {
    Router::new()
        .route("/vm/{vm_id}/exec", post(exec))
        .route("/vm/{vm_id}/exec/stream", post(stream))
        .route("/vm/{vm_id}/exec/stream/attach", post(attach))
        .route("/vm/{vm_id}/logs", get(logs))
        .route("/vm/{vm_id}/files", get(get_file).put(put_file))
}

impl Ran {
    fn of(id: Uuid, ask: &Exec) -> Ran {
        let mut ran = Ran { id, at: world::now(), code: 0, out: vec![], err: vec![] };
        let words: Vec<&str> = ask.command.iter().skip(1).map(String::as_str).collect();
        let number = || words.first().and_then(|w| w.parse::<i64>().ok()).unwrap_or(0);
        let program = ask.command.first().map_or("", String::as_str);
        match program {
            "echo" => ran.out = format!("{}\n", words.join(" ")).into_bytes(),
            "err" => ran.err = format!("{}\n", words.join(" ")).into_bytes(),
            "cat" => ran.out = ask.stdin.clone().unwrap_or_default().into_bytes(),
            "pwd" => {
                let directory = ask.working_dir.as_deref().unwrap_or("/root");
                ran.out = format!("{directory}\n").into_bytes();
            }
            "env" => {
                let lines =
                    ask.env.iter().flatten().map(|(name, value)| format!("{name}={value}\n"));
                ran.out = lines.collect::<String>().into_bytes();
            }
            "true" => {}
            "false" => ran.code = 1,
            "exit" => ran.code = i32::try_from(number()).unwrap_or(1),
            "bytes" => {
                let n = usize::try_from(number()).unwrap_or(0).min(BYTES_MAX);
                ran.out = (0..n).map(|i| (i % 256) as u8).collect();
            }
            _ => {
                ran.code = 127;
                ran.err = format!("{program}: not found\n").into_bytes();
            }
        }
        ran
    }

    fn lines(&self) -> Vec<StreamLine> {
        let chunks = |bytes: &[u8], stream| -> Vec<(StreamName, String)> {
            let pieces = bytes.chunks(OUTPUT_CHUNK_MAX).map(|c| (stream, STANDARD.encode(c)));
            pieces.collect()
        };
        let all = chunks(&self.out, StreamName::Stdout)
            .into_iter()
            .chain(chunks(&self.err, StreamName::Stderr));
        let mut lines: Vec<StreamLine> = (1..)
            .zip(all)
            .map(|(cursor, (stream, data_b64))| StreamLine::Chunk {
                exec_id: self.id.clone(),
                cursor,
                stream,
                data_b64,
            })
            .collect();
        let cursor = lines.len() as u64 + 1;
        lines.push(StreamLine::Exit { exec_id: self.id.clone(), cursor, exit_code: self.code });
        lines
    }
}

fn run(double: &Double, vm: &Uuid, ask: &Exec) -> Result<Ran, Response> {
    let mut world = double.world();
    let state = world.machines.iter().find(|m| m.vm == *vm).map(|m| world.state(m));
    let machine = world.own(vm).ok_or_else(answers::not_found)?;
    if state != Some(VmState::Running) {
        return Err(answers::app(409, "VM is not running"));
    }
    if ask.command.is_empty() {
        return Err(answers::app(400, "command is empty"));
    }
    let id = match &ask.exec_id {
        Some(id) => id.clone(),
        None => world::uuid().map_err(|e| answers::app(500, e.to_string()))?,
    };
    let ran = Ran::of(id, ask);
    if machine.execs.len() >= KEPT_MAX {
        machine.execs.remove(0);
    }
    machine.execs.push(ran.clone());
    Ok(ran)
}

async fn exec(State(double): State<Shared>, Id(vm): Id, Json(ask): Json<Exec>) -> Answer {
    let ran = run(&double, &vm, &ask)?;
    Ok(answers::fine(ExecDone {
        exit_code: ran.code,
        stdout: String::from_utf8_lossy(&ran.out).into_owned(),
        stderr: String::from_utf8_lossy(&ran.err).into_owned(),
        exec_id: Some(ran.id),
    }))
}

fn ndjson(lines: &[StreamLine]) -> Response {
    let mut text = String::new();
    for line in lines {
        text.push_str(&serde_json::to_string(line).unwrap_or_default());
        text.push('\n');
    }
    ([(CONTENT_TYPE, "application/x-ndjson")], text).into_response()
}

async fn stream(State(double): State<Shared>, Id(vm): Id, Json(ask): Json<Exec>) -> Answer {
    Ok(ndjson(&run(&double, &vm, &ask)?.lines()))
}

async fn attach(State(double): State<Shared>, Id(vm): Id, Json(ask): Json<Attach>) -> Answer {
    let mut world = double.world();
    let machine = world.own(&vm).ok_or_else(answers::not_found)?;
    let found = machine.execs.iter().find(|ran| ran.id == ask.exec_id);
    let lines = found.ok_or_else(answers::not_found)?.lines();
    let last = lines.len() as u64;
    // What is to come of a command that has ended is its end.
    let behind = match (ask.from_latest, ask.cursor) {
        (Some(true), _) => last - 1,
        (_, cursor) => cursor.unwrap_or(0),
    };
    let from = usize::try_from(behind.min(last)).unwrap_or(lines.len());
    Ok(ndjson(&lines[from..]))
}

#[derive(Deserialize)]
struct LogsQuery {
    offset: Option<usize>,
    max_entries: Option<usize>,
    stream: Option<StreamName>,
}

async fn logs(State(double): State<Shared>, Id(vm): Id, Query(query): Query<LogsQuery>) -> Answer {
    let mut world = double.world();
    let machine = world.own(&vm).ok_or_else(answers::not_found)?;
    let mut all = Vec::new();
    for ran in &machine.execs {
        for line in ran.lines() {
            let StreamLine::Chunk { exec_id, stream, data_b64, .. } = line else { continue };
            if query.stream.is_none_or(|wanted| wanted == stream) {
                let timestamp = ran.at.clone();
                all.push(LogEntry { exec_id: Some(exec_id), timestamp, stream, data_b64 });
            }
        }
    }
    let total = all.len();
    let from = query.offset.unwrap_or(0).min(total);
    let page = all.into_iter().skip(from).take(query.max_entries.unwrap_or(1000).min(1000));
    let entries: Vec<LogEntry> = page.collect();
    let next = from + entries.len();
    Ok(answers::fine(Logs { entries, next_offset: next as u64, eof: next >= total }))
}

async fn get_file(
    State(double): State<Shared>,
    Id(vm): Id,
    Query(query): Query<BTreeMap<String, String>>,
) -> Answer {
    let mut world = double.world();
    let machine = world.own(&vm).ok_or_else(answers::not_found)?;
    let path = query.get("path").filter(|p| p.starts_with('/'));
    let path = path.ok_or_else(|| answers::app(400, "path must be absolute"))?;
    let content = machine.files.get(path).ok_or_else(answers::not_found)?;
    Ok(answers::fine(FileContent { content_b64: STANDARD.encode(content) }))
}

async fn put_file(State(double): State<Shared>, Id(vm): Id, Json(ask): Json<PutFile>) -> Answer {
    let mut world = double.world();
    let machine = world.own(&vm).ok_or_else(answers::not_found)?;
    if !ask.path.starts_with('/') {
        return Err(answers::app(400, "path must be absolute"));
    }
    let content = STANDARD.decode(&ask.content_b64);
    let content = content.map_err(|_| answers::app(400, "content_b64 is not base64"))?;
    machine.files.insert(ask.path, content);
    Ok(answers::empty())
}
