//! `aegis exec -t`: this terminal becomes that of a command inside. Raw while it runs, and as it was
//! before on every way out.

use std::pin::pin;

use aegis_wire::bounds::TERMINAL_SIDE_MAX;
use aegis_wire::channel::{Term, Tty, WindowSize};
use aegis_wire::error::ErrorBody;
use aegis_wire::host::{TerminalBody, TerminalControl};
use aegis_wire::logs::ExecDone;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use super::Ask;
use crate::client::Socket;
use crate::failure::{Failure, Result};
use crate::output::{self, Format};

/// Read from the keyboard at a time, bytes.
const TYPED: usize = 8 * 1024;
/// Reads of the keyboard that wait for the daemon.
const TYPED_WAITING: usize = 16;

/// This terminal, raw until dropped.
struct Raw {
    before: Termios,
}

impl Raw {
    fn enter() -> Result<Raw> {
        let raw = Raw { before: tcgetattr(stdin()).map_err(unable)? };
        raw.again()?;
        Ok(raw)
    }

    /// Another process had the terminal meanwhile.
    fn again(&self) -> Result<()> {
        let mut modes = self.before.clone();
        modes.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &modes).map_err(unable)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // At once: a terminal that takes no output must not keep the program. One that is gone needs
        // nothing.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}

fn unable(e: rustix::io::Errno) -> Failure {
    Failure::because("cannot use this terminal", e)
}

/// What of the machine's command can be a terminal's: refused before anything is asked.
pub fn check(ask: &Ask) -> Result<()> {
    if ask.format == Format::Json {
        return Err(Failure::Usage("-t shows a terminal, which is no JSON: leave one out".into()));
    }
    if !isatty(stdin()) {
        let why = "-t needs a terminal as standard input: leave it out for a command without one";
        return Err(Failure::Usage(why.into()));
    }
    Ok(())
}

/// This terminal as the machine is told of it.
pub fn here() -> Tty {
    let term = std::env::var("TERM").ok().and_then(|name| Term::try_from(name).ok());
    Tty { size: size(), term }
}

fn size() -> WindowSize {
    let side = |n: u16| u64::from(n.min(TERMINAL_SIDE_MAX));
    tcgetwinsize(stdin())
        .ok()
        .and_then(|size| WindowSize::new(side(size.ws_row), side(size.ws_col)).ok())
        .unwrap_or(WindowSize::USUAL)
}

/// Signals that mean something here.
struct Signals {
    ends: [(Signal, u8); 4],
    resized: Signal,
    continued: Signal,
}

impl Signals {
    fn listen() -> Result<Signals> {
        let on = |kind| signal(kind).map_err(|e| Failure::because("cannot listen to signals", e));
        // What of these the keyboard makes goes to the command while the terminal is raw.
        let end = |kind: SignalKind| Ok((on(kind)?, 128 + kind.as_raw_value() as u8));
        Ok(Signals {
            ends: [
                end(SignalKind::interrupt())?,
                end(SignalKind::terminate())?,
                end(SignalKind::hangup())?,
                end(SignalKind::quit())?,
            ],
            resized: on(SignalKind::window_change())?,
            continued: on(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()))?,
        })
    }
}

/// The exit code after whichever of the signals comes first.
async fn ended_by([a, b, c, d]: &mut [(Signal, u8); 4]) -> u8 {
    tokio::select! {
        _ = a.0.recv() => a.1,
        _ = b.0.recv() => b.1,
        _ = c.0.recv() => c.1,
        _ = d.0.recv() => d.1,
    }
}

/// Runs it, and tells how it ended.
pub async fn run(ask: &Ask, path: &str, body: &TerminalBody) -> Result<ExecDone> {
    let Signals { mut ends, resized, continued } = Signals::listen()?;
    let session = async {
        let (mut to, mut from) = ask.client.socket(path).await?.split();
        let text = serde_json::to_string(body)
            .map_err(|e| Failure::because("cannot put the request together", e))?;
        to.send(Message::Text(text.into())).await.map_err(broken)?;
        // Until it runs this is an ordinary terminal: Ctrl-C ends the waiting.
        let begun = hear(&mut from, false).await?;
        if let Some(done) = begun {
            return Ok(done);
        }
        let raw = Raw::enter()?;
        let mut screen = pin!(async {
            loop {
                if let Some(done) = hear(&mut from, true).await? {
                    return Ok(done);
                }
            }
        });
        tokio::select! {
            done = &mut screen => done,
            failure = speak(&mut to, &raw, resized, continued) => Err(failure),
        }
    };
    tokio::select! {
        done = session => done,
        // The session, dropped, gives the terminal back and hangs up.
        code = ended_by(&mut ends) => Err(Failure::Exit(code)),
    }
}

/// Takes one message: shows it, or gives how it ended.
async fn hear(from: &mut SplitStream<Socket>, running: bool) -> Result<Option<ExecDone>> {
    match from.next().await {
        Some(Ok(Message::Binary(bytes))) => output::data(&bytes).map(|()| None),
        Some(Ok(Message::Text(text))) => said(&text),
        Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) if running => Ok(None),
        Some(Err(error)) => Err(broken(error)),
        Some(Ok(_)) | None => Err(Failure::here("the daemon left before the command ended")
            .fix("the command was hung up; see `aegis status`")),
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

fn broken(error: tokio_tungstenite::tungstenite::Error) -> Failure {
    Failure::because("the connection to the daemon broke", error)
}

/// Sends what is typed and how large this terminal is, until that can't go on.
async fn speak(
    to: &mut SplitSink<Socket, Message>,
    raw: &Raw,
    mut resized: Signal,
    mut continued: Signal,
) -> Failure {
    let mut typed = keyboard();
    // It may have changed before anybody listened.
    let mut shown = None;
    loop {
        let now = size();
        if shown.replace(now) != Some(now) {
            let control = TerminalControl::Resize(now);
            let text = serde_json::to_string(&control).unwrap_or_default();
            if to.send(Message::Text(text.into())).await.is_err() {
                // Why, the other direction knows better.
                return std::future::pending().await;
            }
        }
        tokio::select! {
            bytes = typed.recv() => {
                let Some(bytes) = bytes else { return Failure::here("this terminal is gone") };
                if to.send(Message::Binary(bytes)).await.is_err() {
                    return std::future::pending().await;
                }
            }
            _ = resized.recv() => {}
            _ = continued.recv() => if let Err(failure) = raw.again() {
                return failure;
            },
        }
    }
}

/// What is typed, from a thread of its own: it waits in a read that nothing can end, and ends with
/// the program.
fn keyboard() -> mpsc::Receiver<Bytes> {
    let (to, typed) = mpsc::channel(TYPED_WAITING);
    std::thread::spawn(move || {
        let mut buffer = [0; TYPED];
        loop {
            match rustix::io::read(stdin(), &mut buffer) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) | Ok(0) => return,
                Ok(n) => {
                    if to.blocking_send(Bytes::copy_from_slice(&buffer[..n])).is_err() {
                        return;
                    }
                }
            }
        }
    });
    typed
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
