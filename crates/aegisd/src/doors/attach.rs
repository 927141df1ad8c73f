//! `GET /v1/instances/{id}/exec` as a WebSocket (contracts/aegis.md 1): a command whose client stays
//! with it, at a terminal or at pipes. Messages of bytes are its input and its output, messages of
//! text are JSON.

use std::pin::pin;
use std::sync::Arc;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::{ATTACHED_DEADLINE, ATTACHED_MAX, ATTACHED_PING, HOST_BODY_MAX};
use aegis_wire::channel::ExecStart;
use aegis_wire::host::{ATTACHED_STDERR, ATTACHED_STDOUT, AttachBody, AttachControl, body};
use aegis_wire::logs::{ExecDone, Stream as Which};
use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::Response;
use futures_util::stream::{SplitSink, SplitStream, unfold};
use futures_util::{SinkExt as _, StreamExt as _};
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::State;
use super::answer::Failure;
use super::ask::{HostAuth, Named};
use crate::app::attach::{self, Attached, Input, Next, Output};
use crate::app::instances;

type To = SplitSink<WebSocket, Message>;
type From = SplitStream<WebSocket>;

/// Takes the upgrade of a client that may ask; all else is said on it.
pub(super) async fn exec(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    Named(name): Named,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Failure> {
    let upgrade = upgrade.map_err(|_| {
        let sentence = "this is a WebSocket; a command without a client that stays is a POST";
        Failure::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", sentence)
    })?;
    instances::find(host, &state.app, &name)?;
    let slot = Arc::clone(&state.attached).try_acquire_owned().map_err(|_| {
        let most = ATTACHED_MAX;
        let message = format!("clients are attached to {most} commands");
        let mut refusal = Refusal::new(Code::NoCapacity, message);
        refusal.allowed = Some(most.to_string());
        refusal
    })?;
    let upgrade = upgrade.max_message_size(HOST_BODY_MAX).max_frame_size(HOST_BODY_MAX);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let (mut to, mut from) = socket.split();
        let mut stopped = state.stopped.clone();
        let session = async {
            let start = begin(&mut from).await?;
            let tty = start.tty.is_some();
            let attached = attach::open(host, &state.app, &name, start).await?;
            Ok(stay(attached, tty, &mut to, &mut from).await)
        };
        let end = tokio::select! {
            end = session => end.unwrap_or_else(End::Refused),
            () = async { let _ = stopped.wait_for(|s| *s).await; } => End::Refused(stopping()),
        };
        // A client that is gone, or takes nothing, is not waited for.
        let _ = tokio::time::timeout(ATTACHED_DEADLINE, farewell(end, to, from)).await;
        drop(slot);
    }))
}

/// How it ended.
enum End {
    Done(ExecDone),
    Refused(Failure),
    Left,
}

fn stopping() -> Failure {
    let sentence = "the daemon is stopping; attached commands end with it";
    Failure::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", sentence)
}

/// The first message: what to run.
async fn begin(from: &mut From) -> Result<ExecStart, Failure> {
    let bad = |why: String| Failure::from(Refusal::new(Code::InvalidField, why));
    let first = tokio::time::timeout(ATTACHED_DEADLINE, from.next()).await;
    let Ok(Some(Ok(Message::Text(text)))) = first else {
        let seconds = ATTACHED_DEADLINE.as_secs();
        return Err(bad(format!("the first message says within {seconds}s, as text, what to run")));
    };
    let value = serde_json::from_str(&text).map_err(|e| bad(format!("malformed JSON: {e}")))?;
    Ok(body::<AttachBody>(value)?.parse()?)
}

/// Carries both directions until the command or its client ends.
async fn stay(attached: Attached, tty: bool, to: &mut To, from: &mut From) -> End {
    let Attached { started, output, input } = attached;
    if say(to, &started).await.is_err() {
        return End::Left;
    }
    tokio::select! {
        end = show(output, tty, to) => end,
        end = obey(input, tty, from) => end,
    }
}

/// Passes on what the command puts out, and asks in between whether anybody is there to hear it.
async fn show(output: Output, tty: bool, to: &mut To) -> End {
    let mut all = pin!(unfold(output, |mut output| async { Some((output.next().await, output)) }));
    let mut ping = interval_at(Instant::now() + ATTACHED_PING, ATTACHED_PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            Some(next) = all.next() => match next {
                Next::Bytes(_, bytes) if tty => Message::Binary(bytes.into()),
                Next::Bytes(which, bytes) => Message::Binary(marked(which, &bytes)),
                Next::Done(done) => return End::Done(done),
            },
            _ = ping.tick() => Message::Ping(Bytes::new()),
        };
        if to.send(message).await.is_err() {
            return End::Left;
        }
    }
}

/// Output with a first byte that says which.
fn marked(which: Which, bytes: &[u8]) -> Bytes {
    let mark = match which {
        Which::Stdout => ATTACHED_STDOUT,
        Which::Stderr => ATTACHED_STDERR,
    };
    [&[mark], bytes].concat().into()
}

async fn obey(mut input: Input, tty: bool, from: &mut From) -> End {
    let mut over = false;
    let no = |why: &str| End::Refused(Refusal::new(Code::InvalidField, why).into());
    loop {
        let passed = match from.next().await {
            Some(Ok(Message::Binary(_))) if over => return no("input after its end"),
            Some(Ok(Message::Binary(bytes))) => input.give(&bytes).await,
            Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                Ok(AttachControl::Resize(size)) if tty => input.resize(size).await,
                Ok(AttachControl::StdinEnd) if !tty && !over => {
                    over = true;
                    input.end().await
                }
                Ok(_) => return no("a control that means nothing to this command now"),
                Err(error) => return no(&format!("a message of text is a control: {error}")),
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(()),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return End::Left,
        };
        if passed.is_err() {
            // It has ended: how, its output will say.
            return std::future::pending().await;
        }
    }
}

async fn say<T: Serialize>(to: &mut To, what: &T) -> Result<(), axum::Error> {
    let text = serde_json::to_string(what).map_err(axum::Error::new)?;
    to.send(Message::Text(text.into())).await
}

/// The last message, and the close. What the client still sends is read: a socket closed on unread
/// bytes would take the last message with it.
async fn farewell(end: End, mut to: To, mut from: From) -> Result<(), axum::Error> {
    match &end {
        End::Done(done) => say(&mut to, done).await?,
        End::Refused(failure) => say(&mut to, failure.body()).await?,
        End::Left => {}
    }
    to.close().await?;
    while let Some(Ok(_)) = from.next().await {}
    Ok(())
}
