//! `GET /v1/instances/{id}/exec` as a WebSocket (contracts/aegis.md 1): a command at a terminal.
//! Messages of bytes are what is typed and shown, messages of text are JSON.

use std::sync::Arc;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::{HOST_BODY_MAX, TERMINAL_DEADLINE, TERMINALS_MAX};
use aegis_wire::host::{TerminalBody, TerminalControl, body};
use aegis_wire::logs::ExecDone;
use axum::extract::State as Extract;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::Response;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use serde::Serialize;

use super::State;
use super::answer::Failure;
use super::ask::{HostAuth, Named};
use crate::app::instances;
use crate::app::terminal::{self, Keys, Screen, Shows, Terminal};

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
        let sentence = "this is a WebSocket; a command without a terminal is a POST";
        Failure::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", sentence)
    })?;
    instances::find(host, &state.app, &name)?;
    let slot = Arc::clone(&state.terminals).try_acquire_owned().map_err(|_| {
        let most = TERMINALS_MAX;
        let mut refusal = Refusal::new(Code::NoCapacity, format!("{most} terminals are open"));
        refusal.allowed = Some(most.to_string());
        refusal
    })?;
    let upgrade = upgrade.max_message_size(HOST_BODY_MAX).max_frame_size(HOST_BODY_MAX);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let (mut to, mut from) = socket.split();
        let mut stopped = state.stopped.clone();
        let session = async {
            let start = begin(&mut from).await?;
            let terminal = terminal::open(host, &state.app, &name, start).await?;
            Ok(sit(terminal, &mut to, &mut from).await)
        };
        let end = tokio::select! {
            end = session => end.unwrap_or_else(End::Refused),
            () = async { let _ = stopped.wait_for(|s| *s).await; } => End::Refused(stopping()),
        };
        // A client that is gone, or takes nothing, is not waited for.
        let _ = tokio::time::timeout(TERMINAL_DEADLINE, farewell(end, to, from)).await;
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
    let sentence = "the daemon is stopping; a terminal ends with it";
    Failure::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", sentence)
}

/// The first message: what to run.
async fn begin(from: &mut From) -> Result<aegis_wire::channel::ExecStart, Failure> {
    let bad = |why: String| Failure::from(Refusal::new(Code::InvalidField, why));
    let first = tokio::time::timeout(TERMINAL_DEADLINE, from.next()).await;
    let Ok(Some(Ok(Message::Text(text)))) = first else {
        let seconds = TERMINAL_DEADLINE.as_secs();
        return Err(bad(format!("the first message says within {seconds}s, as text, what to run")));
    };
    let value = serde_json::from_str(&text).map_err(|e| bad(format!("malformed JSON: {e}")))?;
    Ok(body::<TerminalBody>(value)?.parse()?)
}

/// Carries both directions until the command or its client ends.
async fn sit(terminal: Terminal, to: &mut To, from: &mut From) -> End {
    let Terminal { started, screen, keys } = terminal;
    if say(to, &started).await.is_err() {
        return End::Left;
    }
    tokio::select! {
        end = show(screen, to) => end,
        end = obey(keys, from) => end,
    }
}

async fn show(mut screen: Screen, to: &mut To) -> End {
    loop {
        match screen.next().await {
            Shows::Bytes(bytes) => {
                if to.send(Message::Binary(bytes.into())).await.is_err() {
                    return End::Left;
                }
            }
            Shows::Done(done) => return End::Done(done),
        }
    }
}

async fn obey(mut keys: Keys, from: &mut From) -> End {
    loop {
        let passed = match from.next().await {
            Some(Ok(Message::Binary(bytes))) => keys.typed(&bytes).await,
            Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                Ok(TerminalControl::Resize(size)) => keys.resize(size).await,
                Err(error) => {
                    let why = format!("a message of text is a control: {error}");
                    return End::Refused(Refusal::new(Code::InvalidField, why).into());
                }
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(()),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return End::Left,
        };
        if passed.is_err() {
            // It has ended: how, the screen will say.
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
