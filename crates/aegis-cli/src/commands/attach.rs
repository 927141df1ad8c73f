//! `aegis exec -i`, and what it has in common with `-t`: a command inside, and the WebSocket over which
//! this program stays with it.

use std::io::{self, Read};
use std::pin::{Pin, pin};

use aegis_wire::error::ErrorBody;
use aegis_wire::host::{ATTACHED_STDERR, ATTACHED_STDOUT, AttachBody, AttachControl};
use aegis_wire::logs::ExecDone;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, Stream, StreamExt as _};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::stdin;
use serde::Serialize;
use serde_json::Value;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{Ask, pieces};
use crate::client::Socket;
use crate::failure::{Failure, Result};
use crate::output::{self, Format};

/// Where input and words about it go.
pub type To = SplitSink<Socket, Message>;
/// Where output comes from.
pub type From = SplitStream<Socket>;

/// How output comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As a terminal shows it.
    Terminal,
    /// With a first byte that says which it is.
    Pipes,
}

/// Refused before anything is asked.
pub fn check(ask: &Ask) -> Result<()> {
    match ask.format {
        Format::Human => Ok(()),
        Format::Json => {
            let why = "-i and -t pass on bytes, which are no JSON: leave --json out";
            Err(Failure::Usage(why.into()))
        }
    }
}

/// Runs a command with this program's standard input, and tells how it ended.
pub async fn run(ask: &Ask, path: &str, body: &AttachBody) -> Result<ExecDone> {
    let (mut to, mut from) = open(ask, path, body).await?;
    if let Some(done) = begun(&mut from).await? {
        return Ok(done);
    }
    tokio::select! {
        done = show(&mut from, Way::Pipes) => done,
        failure = give(&mut to) => Err(failure),
    }
}

/// Asks for a command.
pub async fn open(ask: &Ask, path: &str, body: &AttachBody) -> Result<(To, From)> {
    let (mut to, from) = ask.client.socket(path).await?.split();
    say(&mut to, body).await.map_err(broken)?;
    Ok((to, from))
}

/// Waits until it runs; or tells how it ended without that.
pub async fn begun(from: &mut From) -> Result<Option<ExecDone>> {
    loop {
        match from.next().await {
            Some(Ok(Message::Text(text))) => return said(&text),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            other => return Err(left(other)),
        }
    }
}

/// Shows what it puts out, and tells how it ended.
pub async fn show(from: &mut From, way: Way) -> Result<ExecDone> {
    loop {
        match from.next().await {
            Some(Ok(Message::Binary(bytes))) => match (way, bytes.split_first()) {
                (Way::Terminal, _) => output::data(&bytes)?,
                (Way::Pipes, Some((&ATTACHED_STDOUT, bytes))) => output::data(bytes)?,
                (Way::Pipes, Some((&ATTACHED_STDERR, bytes))) => output::data_err(bytes)?,
                // Something that a later daemon adds.
                (Way::Pipes, _) => {}
            },
            Some(Ok(Message::Text(text))) => {
                if let Some(done) = said(&text)? {
                    return Ok(done);
                }
            }
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
            other => return Err(left(other)),
        }
    }
}

fn left(last: Option<Result<Message, Error>>) -> Failure {
    match last {
        Some(Err(error)) => broken(error),
        _ => Failure::here("the daemon left before the command ended")
            .fix("the command was hung up; see `aegis status`"),
    }
}

/// What a message of text says: the start, the end, or why not.
fn said(text: &str) -> Result<Option<ExecDone>> {
    let bad = |e| Failure::because("the daemon sent a message that is none of the contract's", e);
    let value: Value = serde_json::from_str(text).map_err(bad)?;
    if value.get("done").and_then(Value::as_bool) == Some(true) {
        return serde_json::from_value(value).map(Some).map_err(bad);
    }
    if value.get("code").is_some() {
        let refused: ErrorBody = serde_json::from_value(value).map_err(bad)?;
        let failure = Failure::here(format!("{} ({})", refused.error, refused.code));
        return Err(match refused.hint {
            Some(hint) => failure.fix(hint),
            None => failure,
        });
    }
    Ok(None)
}

fn broken(error: Error) -> Failure {
    Failure::because("the connection to the daemon broke", error)
}

/// Says something in JSON.
pub async fn say(to: &mut To, what: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string(what).unwrap_or_default();
    to.send(Message::Text(text.into())).await
}

/// Sends all of this program's input and its end; returns only where that can't go on.
async fn give(to: &mut To) -> Failure {
    let mut input = pin!(input());
    while let Some(piece) = input.next().await {
        let sent = match piece {
            Ok(bytes) => to.send(Message::Binary(bytes)).await,
            // Not its end: a part must not be taken for the whole.
            Err(e) => return Failure::because("cannot read the standard input", e),
        };
        if sent.is_err() {
            // Why, the other direction knows better.
            return std::future::pending().await;
        }
    }
    let _ = say(to, &AttachControl::StdinEnd).await;
    std::future::pending().await
}

/// Standard input as it comes, read by a thread that ends with the program: nothing can end a read.
pub fn input() -> Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>> {
    Box::pin(pieces::by(|to| pieces::pump(Here, &to)))
}

/// Standard input, also where another process has said that it never blocks.
struct Here;

impl Read for Here {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(stdin(), &mut *buffer) {
                Err(Errno::AGAIN) => {
                    let stdin = stdin();
                    poll(&mut [PollFd::new(&stdin, PollFlags::IN)], None)?;
                }
                done => return Ok(done?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_text_are_told_apart() {
        let start = r#"{"exec_id":"x","started_at":"2026-02-18T00:00:00Z"}"#;
        assert_eq!(said(start).unwrap(), None);
        let done = said(r#"{"exec_id":"x","exit_code":7,"done":true}"#).unwrap().unwrap();
        assert_eq!(done.exit_code, Some(7));
        let no = said(r#"{"error":"not so","code":"invalid_field","hint":"so"}"#).unwrap_err();
        assert_eq!(no.words(), "error: not so (invalid_field)\n  fix: so\n");
        assert!(said("nonsense").is_err());
    }
}
