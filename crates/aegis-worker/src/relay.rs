//! The control channel of one machine: sessions over its byte pipe, and who may use them.
//!
//! The relay never looks into what crosses. It bounds it: frames, streams and windows by the wire
//! crate, calls by the broker, sessions here. A machine whose sessions die one after the other is
//! given up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::{IDENTIFY_DEADLINE, RPC_VALUES_MAX, STREAMS_MAX};
use aegis_wire::channel::rpc::{CODE_METHOD, CODE_UNAVAILABLE, RpcError};
use aegis_wire::channel::{ProcessExit, StreamHead, method};
use aegis_wire::pipe::mux::{self, Mux, Stream};
use aegis_wire::pipe::peer::{Handler, Peer};
use aegis_wire::pipe::session::{Pipe, SESSION_BUFFER};
use aegis_wire::pipe::write_message;
use anyhow::Context as _;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::broker::Broker;
use crate::qemu::Wires;

/// So many lost sessions within [`LOSSES_WITHIN`] end the machine.
const LOSSES_MAX: usize = 5;
const LOSSES_WITHIN: Duration = Duration::from_secs(10);
/// Streams that execs and ports may hold together: the control and log streams have theirs.
pub const USER_STREAMS_MAX: usize = STREAMS_MAX - 8;

/// One session: opens streams, calls methods. Cheap to clone; useless once the session ended.
#[derive(Clone)]
pub struct Session {
    /// Opens streams.
    pub mux: Mux,
    /// Calls methods.
    pub peer: Peer,
    /// The machine's other port, of the same process.
    pub workspace: Arc<UnixStream>,
}

/// A machine's channel as a whole.  Cheap to clone.
#[derive(Clone)]
pub struct Relay {
    /// The session of now; `None` while one is being opened.
    pub session: watch::Receiver<Option<Session>>,
    /// How the primary process ended, once the machine told.
    pub exited: watch::Receiver<Option<ProcessExit>>,
    /// Why the channel was given up, once it was.
    pub dead: watch::Receiver<Option<String>>,
    /// Counts the streams of execs and ports.
    pub user_streams: Arc<Semaphore>,
    // Byte pipes of later processes of the same machine.
    plugs: mpsc::Sender<Wires>,
}

/// Takes note of what the machine says by itself, and passes on what it asks for.
struct FromMachine {
    exited: watch::Sender<Option<ProcessExit>>,
    // A golden machine is nobody's: it can ask for nothing.
    broker: Option<Arc<Broker>>,
    session: Mux,
}

impl Handler for FromMachine {
    const VALUES_MAX: usize = RPC_VALUES_MAX;

    async fn request(&self, method: String, params: Value) -> Result<Value, RpcError> {
        let Some(broker) = &self.broker else {
            return Err(RpcError::new(CODE_METHOD, format!("{method:.40} is not served")));
        };
        tokio::select! {
            answer = broker.call(method, params) => answer,
            // Nobody can hear the answer any more: its place is free for the next session.
            () = self.session.closed() => {
                Err(RpcError::new(CODE_UNAVAILABLE, "the session has ended"))
            }
        }
    }

    fn notification(&self, name: String, params: Value) {
        if name != method::PROCESS_EXITED {
            return;
        }
        let Ok(exit) = serde_json::from_value::<ProcessExit>(params) else { return };
        // The first word counts; a machine can't change its story.
        self.exited.send_if_modified(|told| {
            let first = told.is_none();
            if first {
                *told = Some(exit);
            }
            first
        });
    }
}

/// Opens one session, works with it, and leaves it: for machines that live for one piece of work.
pub async fn one_session<T>(
    pipe: &mut Pipe<UnixStream>,
    deadline: Duration,
    work: impl AsyncFnOnce(Peer) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let epoch = new_epoch()?;
    tokio::time::timeout(deadline, pipe.open(epoch))
        .await
        .with_context(|| format!("nothing inside answered within {}s", deadline.as_secs()))?
        .context("the control channel broke")?;
    let (app, ours) = tokio::io::duplex(SESSION_BUFFER);
    let (mux, inbound) = mux::start(ours, true);
    tokio::spawn(refuse(inbound));
    let (exited, _) = watch::channel(None);
    let done = tokio::select! {
        done = async { work(converse(mux, exited, None).await?.1).await } => done?,
        ended = pipe.carry(epoch, app) => {
            ended.context("the control channel broke")?;
            anyhow::bail!("the control channel's session ended")
        }
    };
    tokio::time::timeout(deadline, pipe.leave(epoch))
        .await
        .with_context(|| {
            format!("the session was not cleared away within {}s", deadline.as_secs())
        })?
        .context("the control channel broke")?;
    Ok(done)
}

impl Relay {
    /// Starts to open sessions on a machine's byte pipe, one after the other, for ever. While
    /// `frozen` nobody inside can answer, and nobody is blamed for it. What the machine asks for goes
    /// to `broker`.
    pub fn start(wires: Wires, frozen: watch::Receiver<bool>, broker: Arc<Broker>) -> Relay {
        let (session_in, session) = watch::channel(None);
        let (exited_in, exited) = watch::channel(None);
        let (dead_in, dead) = watch::channel(None);
        let (plugs, plugged) = mpsc::channel(1);
        tokio::spawn(async move {
            let why = sessions(wires, plugged, frozen, &session_in, &exited_in, &broker).await;
            session_in.send_replace(None);
            dead_in.send_replace(Some(why));
        });
        let user_streams = Arc::new(Semaphore::new(USER_STREAMS_MAX));
        Relay { session, exited, dead, user_streams, plugs }
    }

    /// Goes on over the byte pipes of another process, which took the machine over while it stood
    /// still.
    pub async fn plug(&self, wires: Wires) -> anyhow::Result<()> {
        self.plugs.send(wires).await.context("the control channel ended")
    }

    /// The session of now, or the next one.
    pub async fn session(&self) -> anyhow::Result<Session> {
        let mut session = self.session.clone();
        let mut dead = self.dead.clone();
        tokio::select! {
            found = session.wait_for(Option::is_some) => {
                let found = found.context("the control channel ended")?;
                found.clone().context("the control channel ended")
            }
            why = dead.wait_for(Option::is_some) => {
                let why = why.ok().and_then(|w| w.clone()).unwrap_or_default();
                anyhow::bail!("{why}")
            }
        }
    }
}

/// Opens a stream and says what it is for; `first` goes right behind the head.
pub async fn open_stream(mux: &Mux, head: &StreamHead, first: &[u8]) -> std::io::Result<Stream> {
    let mut stream = mux.open().await?;
    write_message(&mut stream, head).await?;
    if !first.is_empty() {
        stream.write_all(first).await?;
        stream.flush().await?;
    }
    Ok(stream)
}

async fn sessions(
    wires: Wires,
    mut plugged: mpsc::Receiver<Wires>,
    mut frozen: watch::Receiver<bool>,
    session: &watch::Sender<Option<Session>>,
    exited: &watch::Sender<Option<ProcessExit>>,
    broker: &Arc<Broker>,
) -> String {
    let (mut pipe, mut workspace) = plug(wires);
    let mut losses: VecDeque<Instant> = VecDeque::with_capacity(LOSSES_MAX);
    loop {
        let epoch = match new_epoch() {
            Ok(epoch) => epoch,
            Err(error) => return format!("{error:#}"),
        };
        match tokio::time::timeout(IDENTIFY_DEADLINE, pipe.open(epoch)).await {
            Ok(Ok(())) => {}
            // A suspended machine has no process; the next one brings its own pipe.
            Ok(Err(_)) if *frozen.borrow() => match plugged.recv().await {
                Some(wires) => {
                    (pipe, workspace) = plug(wires);
                    continue;
                }
                None => return "the machine is gone".to_owned(),
            },
            Ok(Err(error)) => match plugged.try_recv() {
                // It goes on already.
                Ok(wires) => {
                    (pipe, workspace) = plug(wires);
                    continue;
                }
                Err(_) => return format!("the control channel broke: {error}"),
            },
            Err(_) if *frozen.borrow() => {
                // It may be suspended before it goes on.
                tokio::select! {
                    thawed = frozen.wait_for(|frozen| !frozen) => if thawed.is_err() {
                        return "the machine is gone".to_owned();
                    },
                    Some(wires) = plugged.recv() => (pipe, workspace) = plug(wires),
                }
                continue;
            }
            Err(_) => {
                let seconds = IDENTIFY_DEADLINE.as_secs();
                return format!("nothing inside answered within {seconds}s");
            }
        }
        let (app, ours) = tokio::io::duplex(SESSION_BUFFER);
        let (mux, inbound) = mux::start(ours, true);
        tokio::spawn(refuse(inbound));
        let converse = async {
            match converse(mux.clone(), exited.clone(), Some(Arc::clone(broker))).await {
                Ok((mux, peer)) => {
                    let workspace = Arc::clone(&workspace);
                    session.send_replace(Some(Session { mux, peer, workspace }))
                }
                Err(_) => None,
            };
            mux.closed().await;
        };
        let ended = tokio::select! {
            ended = pipe.carry(epoch, app) => ended,
            () = converse => Ok(()),
        };
        session.send_replace(None);
        if *frozen.borrow() {
            continue;
        }
        tracing::warn!(error = ?ended.err(), "the control channel's session was lost");
        let now = Instant::now();
        if losses.len() == LOSSES_MAX {
            losses.pop_front();
        }
        losses.push_back(now);
        if losses.len() == LOSSES_MAX && losses.iter().all(|t| now - *t < LOSSES_WITHIN) {
            return format!(
                "the control channel was lost {LOSSES_MAX} times within {}s",
                LOSSES_WITHIN.as_secs()
            );
        }
    }
}

fn plug(wires: Wires) -> (Pipe<UnixStream>, Arc<UnixStream>) {
    (Pipe::new(wires.ctl), Arc::new(wires.workspace))
}

async fn converse(
    mux: Mux,
    exited: watch::Sender<Option<ProcessExit>>,
    broker: Option<Arc<Broker>>,
) -> anyhow::Result<(Mux, Peer)> {
    let control = open_stream(&mux, &StreamHead::Control, &[]).await?;
    let peer = Peer::start(control, FromMachine { exited, broker, session: mux.clone() });
    Ok((mux, peer))
}

/// The host opens every stream of this generation; what the machine opens is closed.
async fn refuse(mut inbound: mpsc::Receiver<Stream>) {
    while let Some(stream) = inbound.recv().await {
        drop(stream);
    }
}

/// Of a session.
pub fn new_epoch() -> anyhow::Result<[u8; 8]> {
    let mut epoch = [0; 8];
    random(&mut epoch)?;
    Ok(epoch)
}

/// Fills a buffer with the host's randomness.
pub fn random(buffer: &mut [u8]) -> anyhow::Result<()> {
    let got = rustix::rand::getrandom(&mut *buffer, rustix::rand::GetRandomFlags::empty())?;
    anyhow::ensure!(got == buffer.len(), "the host gave too little randomness");
    Ok(())
}

#[cfg(test)]
mod tests;
