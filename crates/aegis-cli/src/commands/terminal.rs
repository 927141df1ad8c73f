//! `aegis exec -t`: this terminal becomes that of a command inside. Raw while it runs, and as it was
//! before on every way out.

use aegis_wire::bounds::TERMINAL_SIDE_MAX;
use aegis_wire::channel::{Term, Tty, WindowSize};
use aegis_wire::host::{AttachBody, AttachControl};
use aegis_wire::logs::ExecDone;
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_tungstenite::tungstenite::Message;

use super::Ask;
use super::attach::{self, To, Way};
use super::ends::Ends;
use crate::failure::{Failure, Result};

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
    attach::check(ask)?;
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

/// Runs it, and tells how it ended.
pub async fn run(ask: &Ask, path: &str, body: &AttachBody) -> Result<ExecDone> {
    let on = |kind| signal(kind).map_err(|e| Failure::because("cannot listen to signals", e));
    // What of these the keyboard makes goes to the command while the terminal is raw.
    let mut ends = Ends::listen()?;
    let resized = on(SignalKind::window_change())?;
    let continued = on(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()))?;
    let session = async {
        let (mut to, mut from) = attach::open(ask, path, body).await?;
        // Until it runs this is an ordinary terminal: Ctrl-C ends the waiting.
        if let Some(done) = attach::begun(&mut from).await? {
            return Ok(done);
        }
        let raw = Raw::enter()?;
        tokio::select! {
            done = attach::show(&mut from, Way::Terminal) => done,
            failure = speak(&mut to, &raw, resized, continued) => Err(failure),
        }
    };
    tokio::select! {
        done = session => done,
        // The session, dropped, gives the terminal back and hangs up.
        code = ends.first() => Err(Failure::Exit(code)),
    }
}

/// Sends what is typed and how large this terminal is, until that can't go on.
async fn speak(to: &mut To, raw: &Raw, mut resized: Signal, mut continued: Signal) -> Failure {
    let mut typed = attach::input();
    // It may have changed before anybody listened.
    let mut shown = None;
    loop {
        let now = size();
        if shown.replace(now) != Some(now)
            && attach::say(to, &AttachControl::Resize(now)).await.is_err()
        {
            // Why, the other direction knows better.
            return std::future::pending().await;
        }
        tokio::select! {
            bytes = typed.next() => {
                let Some(Ok(bytes)) = bytes else { return Failure::here("this terminal is gone") };
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
