//! Files of a machine: asked for, read, listed, watched, written, as they come.
//!
//! What a machine answers is parsed into the wire's bounded types; a body that is not what was said
//! of it breaks off, so that no client takes a part for the whole.

use std::io;
use std::pin::pin;
use std::time::Duration;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::{FILE_DEADLINE, FILE_ENTRIES_MAX, FILE_STALL, OUTPUT_CHUNK_MAX};
use aegis_wire::channel::files::{
    Entry, Event, Fault, FileAnswer, FileAsk, FilePath, Happened, Meta,
};
use aegis_wire::channel::output::Kind;
use aegis_wire::files::{EventShape, FileShape, Sends};
use aegis_wire::words::InstanceId;
use axum::body::Bytes;
use futures_util::{Stream, StreamExt as _};
use serde::de::DeserializeOwned;
use tokio::io::{ReadHalf, WriteHalf};

use super::exec::{HOST_WAIT, once_running};
use super::instances::to_run_in;
use super::{App, Error, Host, frames};
use crate::ctx::InUse;
use crate::lifecycle::{self, Connection};

/// A body that nobody wants any more is taken so long: a client that sends before it reads would
/// never see why.
const DISCARD: Duration = Duration::from_secs(10);

/// A question that the machine has agreed to.
pub struct Open {
    /// What it said of the file.
    pub meta: Option<Meta>,
    ask: FileAsk,
    from: ReadHalf<Connection>,
    to: WriteHalf<Connection>,
    /// A machine whose files are in use is no idle one.
    _in_use: InUse,
}

/// Asks in a host's name; waits for a starting machine, wakes a paused one.
pub async fn ask(_: Host, app: &App, name: &str, ask: FileAsk) -> Result<Open, Error> {
    let id = to_run_in(app, name).await?;
    open(app, &id, ask, HOST_WAIT).await
}

/// Asks a machine that was asked to run.
pub(super) async fn open(
    app: &App,
    id: &InstanceId,
    ask: FileAsk,
    wait: Duration,
) -> Result<Open, Error> {
    once_running(app, id, wait, || attempt(app, id, ask.clone())).await
}

/// `None` where the machine does not run at this instant.
async fn attempt(app: &App, id: &InstanceId, ask: FileAsk) -> Result<Option<Open>, Error> {
    let done = lifecycle::files(&app.ctx, id, ask.clone()).await;
    let Some(connection) = frames::connected(id, done)? else { return Ok(None) };
    let in_use = InUse::begin(&app.ctx, id);
    let (mut from, to) = tokio::io::split(connection);
    let meta = answer(&mut from, ask.path()).await?;
    Ok(Some(Open { meta, ask, from, to, _in_use: in_use }))
}

/// The machine's answer.
async fn answer(from: &mut ReadHalf<Connection>, path: &FilePath) -> Result<Option<Meta>, Error> {
    let read = tokio::time::timeout(FILE_DEADLINE, frames::read(from)).await;
    let Ok(read) = read else {
        let seconds = FILE_DEADLINE.as_secs();
        return Err(Error::Machine(format!("the machine did not answer within {seconds}s")));
    };
    match read {
        Ok((Kind::Answer, json)) => match serde_json::from_slice(&json) {
            Ok(FileAnswer::Done { meta }) => Ok(meta),
            Ok(FileAnswer::Refused { fault }) => Err(Error::File { fault, path: path.clone() }),
            Err(_) => Err(odd()),
        },
        Ok(_) => Err(odd()),
        Err(_) => Err(Error::Machine("the machine broke off".to_owned())),
    }
}

fn odd() -> Error {
    Error::Machine("the machine answered what is no answer".to_owned())
}

impl Open {
    /// What is there; a machine that says nothing of it fails.
    pub fn shape(&self) -> Result<FileShape, Error> {
        self.meta.as_ref().map(FileShape::from).ok_or_else(odd)
    }

    /// Whether something is there after this.
    pub fn leaves_something(&self) -> bool {
        !matches!(self.ask, FileAsk::Remove { .. })
    }

    /// Of a file that is read: how it is sent.
    pub fn sends(&self) -> Result<Option<Sends>, Error> {
        match (&self.ask, &self.meta) {
            (FileAsk::Read { from, length, .. }, Some(meta)) => {
                Ok(Some(Sends::of(meta.size, *from, *length)))
            }
            (FileAsk::Read { .. }, None) => Err(odd()),
            _ => Ok(None),
        }
    }

    /// What comes of a read, a list or a watch.
    pub fn body(self) -> Result<Body, Error> {
        let left = self.sends()?.and_then(|sends| sends.length);
        Ok(Body { open: self, left, count: 0, over: false })
    }

    /// Writes what comes. A source that breaks off leaves nothing in the machine.
    pub async fn write(self, source: impl Stream<Item = io::Result<Bytes>>) -> Result<Meta, Error> {
        let Open { ask, mut from, mut to, _in_use, .. } = self;
        let mut source = pin!(source);
        let meta = {
            // It comes early where the disk is full.
            let mut early = pin!(frames::read(&mut from));
            tokio::select! {
                biased;
                early = early.as_mut() => match early {
                    Ok((Kind::Answer, json)) => serde_json::from_slice(&json).ok(),
                    _ => None,
                },
                sent = pump(&mut source, &mut to) => {
                    sent?;
                    let last = tokio::time::timeout(FILE_DEADLINE, early.as_mut()).await;
                    match last {
                        Ok(Ok((Kind::Answer, json))) => serde_json::from_slice(&json).ok(),
                        _ => None,
                    }
                }
            }
        };
        match meta {
            Some(FileAnswer::Done { meta: Some(meta) }) => Ok(meta),
            Some(FileAnswer::Refused { fault }) => {
                let rest = async { while let Some(Ok(_)) = source.next().await {} };
                let _ = tokio::time::timeout(DISCARD, rest).await;
                Err(Error::File { fault, path: ask.path().clone() })
            }
            Some(FileAnswer::Done { meta: None }) => Err(odd()),
            None => Err(Error::Machine("the machine broke off".to_owned())),
        }
    }
}

async fn pump<S>(source: &mut S, to: &mut WriteHalf<Connection>) -> Result<(), Error>
where
    S: Stream<Item = io::Result<Bytes>> + Unpin,
{
    loop {
        let next = tokio::time::timeout(FILE_STALL, source.next()).await;
        let Ok(next) = next else {
            let why = format!("no byte of the body came within {}s", FILE_STALL.as_secs());
            return Err(Refusal::new(Code::MalformedRequest, why).into());
        };
        let piece = match next {
            None => break,
            Some(Ok(piece)) => piece,
            Some(Err(_)) => {
                return Err(Refusal::new(Code::MalformedRequest, "the body broke off").into());
            }
        };
        for piece in piece.chunks(OUTPUT_CHUNK_MAX) {
            if frames::write(to, Kind::Data, piece).await.is_err() {
                // Why, the machine's answer says.
                return std::future::pending().await;
            }
        }
    }
    match frames::write(to, Kind::DataEnd, &[]).await {
        Ok(()) => Ok(()),
        Err(_) => std::future::pending().await,
    }
}

/// Bytes for a client: of a file, of a listing as JSON, of a watch as NDJSON.
pub struct Body {
    open: Open,
    /// Bytes of a file that are to come yet, where that is known.
    left: Option<u64>,
    count: usize,
    over: bool,
}

impl Body {
    /// The next piece; an error where it is not what was said of it, which is the end.
    pub async fn next(&mut self) -> Option<io::Result<Bytes>> {
        if self.over {
            return None;
        }
        let piece = match self.open.ask {
            FileAsk::List { .. } => self.entry().await,
            FileAsk::Watch { .. } => self.event().await,
            _ => self.bytes().await,
        };
        match piece {
            Ok(Some(piece)) => Some(Ok(piece)),
            Ok(None) => {
                self.over = true;
                None
            }
            Err(error) => {
                self.over = true;
                Some(Err(error))
            }
        }
    }

    async fn bytes(&mut self) -> io::Result<Option<Bytes>> {
        match self.frame().await? {
            Some(bytes) => {
                if let Some(left) = &mut self.left {
                    let more = || io::Error::other("the machine sent more than it said");
                    *left = left.checked_sub(bytes.len() as u64).ok_or_else(more)?;
                }
                Ok(Some(bytes.into()))
            }
            None if self.left.is_some_and(|left| left > 0) => {
                Err(io::Error::other("the machine sent less than it said"))
            }
            None => Ok(None),
        }
    }

    async fn entry(&mut self) -> io::Result<Option<Bytes>> {
        let mut text = Vec::new();
        if self.count == 0 {
            text.extend_from_slice(b"{\"entries\":[");
        }
        let next = self.frame().await?;
        let truncated = next.is_some() && self.count >= FILE_ENTRIES_MAX;
        match next.filter(|_| !truncated) {
            Some(json) => {
                let entry: Entry = parsed(&json)?;
                if self.count > 0 {
                    text.push(b',');
                }
                serde_json::to_writer(&mut text, &FileShape::from(&entry))?;
                self.count += 1;
            }
            None => {
                text.extend_from_slice(format!("],\"truncated\":{truncated}}}\n").as_bytes());
                self.over = true;
            }
        }
        Ok(Some(text.into()))
    }

    async fn event(&mut self) -> io::Result<Option<Bytes>> {
        if self.count == 0 {
            self.count = 1;
            // Who waits for a first line must not wait for the first event.
            return Ok(Some(Bytes::from_static(b"{\"event\":\"watching\"}\n")));
        }
        let (kind, json) = frames::read(&mut self.open.from).await?;
        match kind {
            Kind::Data => {
                let event: Event = parsed(&json)?;
                self.over = event.event == Happened::Gone;
                let mut line = serde_json::to_vec(&EventShape::from(&event))?;
                line.push(b'\n');
                Ok(Some(line.into()))
            }
            Kind::DataEnd => Ok(None),
            _ => Err(io::Error::other("the machine sent what is no event")),
        }
    }

    /// The next frame's payload; `None` at the end that says that it was all.
    async fn frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        let read = tokio::time::timeout(FILE_STALL, frames::read(&mut self.open.from)).await;
        match read.map_err(|_| io::ErrorKind::TimedOut)?? {
            (Kind::Data, bytes) => Ok(Some(bytes)),
            (Kind::DataEnd, _) => Ok(None),
            _ => Err(io::Error::other("the machine sent what is no part of a file")),
        }
    }
}

fn parsed<T: DeserializeOwned>(json: &[u8]) -> io::Result<T> {
    serde_json::from_slice(json).map_err(io::Error::other)
}

/// What a machine sends into a child's file, out of its own stream.
pub fn sent(from: ReadHalf<Connection>) -> impl Stream<Item = io::Result<Bytes>> {
    futures_util::stream::unfold(Some(from), |from| async move {
        let mut from = from?;
        match frames::read(&mut from).await {
            Ok((Kind::Data, bytes)) => Some((Ok(bytes.into()), Some(from))),
            Ok((Kind::DataEnd, _)) => None,
            Ok(_) => Some((Err(io::ErrorKind::InvalidData.into()), None)),
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// Says on a machine's stream how its writing ended.
pub async fn tell(to: &mut WriteHalf<Connection>, done: &FileAnswer) -> io::Result<()> {
    frames::write(to, Kind::Answer, &serde_json::to_vec(done)?).await
}

/// How writing ended, as a machine is told.
pub fn fault_of(error: &Error) -> Fault {
    match error {
        Error::File { fault, .. } => *fault,
        _ => Fault::Failed,
    }
}
