//! Files of children: what a query asks for, bodies that come as streams, and one that goes as one.

use std::sync::Arc;

use aegis_wire::bounds::{FILE_STALL, OUTPUT_CHUNK_MAX};
use aegis_wire::channel::files::{FileAnswer, FileAsk, FilePath};
use aegis_wire::channel::guest::{StreamedFile, method};
use aegis_wire::channel::output::{Kind, header};
use aegis_wire::files::{FileShape, Head, KIND_HEADER, MODE_HEADER, Sends, parse};
use aegis_wire::pipe::mux::Stream;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Response};
use serde_json::{Map, Value};
use tokio::io::{AsyncWriteExt as _, ReadHalf, WriteHalf};

use super::answer::Refusal;
use super::body::{Body, throw_away};
use super::http::respond;
use super::route::Route;
use super::{Answer, Guest};
use crate::output::read_frame;

const JSON: &str = "application/json";

/// Answers a request about a child's files.
pub async fn answer(
    guest: &Arc<Guest>,
    route: &Route,
    head: &Parts,
    body: Incoming,
) -> Result<Response<Body>, Refusal> {
    let header = |name| head.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let asked = parse(&Head {
        verb: head.method.as_str(),
        watch: head.uri.path().ends_with("/watch"),
        query: head.uri.query().unwrap_or_default(),
        range: header(header::RANGE),
        length: header(header::CONTENT_LENGTH).and_then(|length| length.parse().ok()),
    });
    let ask = asked.map_err(|bad| Refusal::field(bad.field, bad.allowed))?;
    let (call, streamed) = match &ask {
        FileAsk::Stat { .. } => (method::LOOK_AT_CHILD_FILES, false),
        FileAsk::Write { .. } => (method::WRITE_CHILD_FILE, true),
        ask if ask.changes() => (method::CHANGE_CHILD_FILES, false),
        _ => (method::READ_CHILD_FILES, true),
    };
    let mut params = Map::new();
    params.insert("child_id".to_owned(), route.child.clone().unwrap_or_default().into());
    let said = serde_json::to_value(&ask).map_err(|_| Refusal::misunderstood())?;
    params.insert("ask".to_owned(), said);
    match (guest.call(call, params, streamed, None).await?, ask) {
        (Answer::Whole(value), _) => whole(&value, head.method == Method::HEAD),
        (Answer::Stream(stream, _), FileAsk::Write { path, .. }) => {
            let shape = send(body, stream, &path).await?;
            whole(&serde_json::to_value(shape).unwrap_or_default(), false)
        }
        (Answer::Stream(stream, Some(file)), FileAsk::Read { from, length, .. }) => {
            bytes(stream, &file, from, length)
        }
        (Answer::Stream(stream, _), FileAsk::Watch { .. }) => {
            Ok(respond(200, "application/x-ndjson", Body::Stream(stream)))
        }
        (Answer::Stream(stream, _), _) => Ok(respond(200, JSON, Body::Stream(stream))),
    }
}

fn whole(value: &Value, head_only: bool) -> Result<Response<Body>, Refusal> {
    if !head_only {
        let bytes = serde_json::to_vec(value).map_err(|_| Refusal::misunderstood())?;
        return Ok(respond(200, JSON, Body::whole(bytes)));
    }
    let shape: FileShape =
        serde_json::from_value(value.clone()).map_err(|_| Refusal::misunderstood())?;
    let kind = serde_json::to_value(shape.kind).unwrap_or_default();
    let mut response = respond(200, "application/octet-stream", Body::Whole(None));
    set(&mut response, header::CONTENT_LENGTH, &shape.size.to_string());
    set(&mut response, HeaderName::from_static(KIND_HEADER), kind.as_str().unwrap_or_default());
    set(&mut response, HeaderName::from_static(MODE_HEADER), &shape.mode);
    Ok(response)
}

fn bytes(
    stream: Stream,
    file: &StreamedFile,
    from: u64,
    length: Option<u64>,
) -> Result<Response<Body>, Refusal> {
    let sends = Sends::of(file.meta.size, from, length);
    let body = if sends.status == 416 { Body::Whole(None) } else { Body::Stream(stream) };
    let mut response = respond(sends.status, "application/octet-stream", body);
    if let Some(length) = sends.length {
        set(&mut response, header::CONTENT_LENGTH, &length.to_string());
    }
    if let Some(range) = sends.range {
        set(&mut response, header::CONTENT_RANGE, &range);
    }
    set(&mut response, header::ACCEPT_RANGES, "bytes");
    set(&mut response, HeaderName::from_static(MODE_HEADER), &file.meta.mode.to_string());
    Ok(response)
}

fn set(response: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::try_from(value) {
        response.headers_mut().insert(name, value);
    }
}

/// Sends a body into a child's file. Who asked may leave: then nothing of it is there.
async fn send(mut body: Incoming, stream: Stream, path: &FilePath) -> Result<FileShape, Refusal> {
    let (mut from, mut to) = tokio::io::split(stream);
    let said = tokio::select! {
        // A disk that is full says so before the body is over.
        said = answered(&mut from) => said,
        sent = pump(&mut body, &mut to) => match sent {
            Ok(()) => answered(&mut from).await,
            Err(refusal) => return Err(refusal),
        },
    };
    match said.ok_or_else(Refusal::lost)? {
        FileAnswer::Done { meta: Some(meta) } => Ok(FileShape::from(&meta)),
        FileAnswer::Done { meta: None } => Err(Refusal::misunderstood()),
        FileAnswer::Refused { fault } => {
            throw_away(body, 0).await;
            Err(Refusal::of_file(fault, path))
        }
    }
}

async fn answered(from: &mut ReadHalf<Stream>) -> Option<FileAnswer> {
    let mut bytes = Vec::new();
    match read_frame(from, &mut bytes).await {
        Ok(Some(Kind::Answer)) => serde_json::from_slice(&bytes).ok(),
        _ => None,
    }
}

/// The whole body, and that it is whole.
async fn pump(body: &mut Incoming, to: &mut WriteHalf<Stream>) -> Result<(), Refusal> {
    let stall = || Refusal::too_slow();
    loop {
        let frame = tokio::time::timeout(FILE_STALL, body.frame()).await.map_err(|_| stall())?;
        let data = match frame {
            None => break,
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            Some(Err(_)) => return Err(Refusal::malformed("the request body broke off")),
        };
        if pass_on(&data, to).await.is_err() {
            // Why, the other direction says.
            return std::future::pending().await;
        }
    }
    let end = to.write_all(&header(Kind::DataEnd, 0)).await;
    if end.and(to.flush().await).is_err() {
        return std::future::pending().await;
    }
    Ok(())
}

async fn pass_on(data: &Bytes, to: &mut WriteHalf<Stream>) -> std::io::Result<()> {
    for piece in data.chunks(OUTPUT_CHUNK_MAX) {
        to.write_all(&header(Kind::Data, piece.len())).await?;
        to.write_all(piece).await?;
    }
    to.flush().await
}
