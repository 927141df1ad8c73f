//! `aegis-worker machine RUN_DIR`: the worker's socket and the one machine behind it.

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::{RPC_DEADLINE, WORKER_LAUNCH_DEADLINE, WORKER_LINE_MAX};
use aegis_wire::channel::guest::RenewToken;
use aegis_wire::channel::rpc::{CODE_INTERNAL, CODE_INVALID, CODE_UNAVAILABLE, RpcError};
use aegis_wire::channel::{ExecStart, StreamHead, method};
use aegis_wire::pipe::peer::CallError;
use aegis_wire::worker::{Event, Launch, MachineState, Reply, Request, Sample};
use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, BufReader, ReadHalf, WriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use crate::birth::{self, Birth};
use crate::exec::{self, Asker};
use crate::life::{Live, Shared, conflict};
use crate::net::Net;
use crate::relay::{Session, USER_STREAMS_MAX};
use crate::run_dir::RunDir;
use crate::terminal::Tap;
use crate::{broker, lines, port, terminal};

/// Connections at a time; more wait in the socket's backlog.
const CONNECTIONS_MAX: usize = 512;
/// How long the end waits for those who listen to hear it.
const FAREWELL: Duration = Duration::from_secs(2);

type Stream = BufReader<UnixStream>;

/// Serves the socket on fd 0 until the machine has ended.
pub async fn run(directory: &Path) -> anyhow::Result<()> {
    let run_dir = RunDir::claim(directory)?;
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener).context("fd 0 is not a listening socket")?;
    let net = Net::start(run_dir.path())?;
    let shared = Arc::new(Shared::new(Arc::clone(&net)));
    let (birth_in, mut births) = mpsc::channel::<Birth>(1);
    let serving = tokio::spawn(accept(listener, Arc::clone(&shared), birth_in));
    let begun = tokio::time::timeout(WORKER_LAUNCH_DEADLINE, births.recv())
        .await
        .ok()
        .flatten()
        .context("nobody said launch")?;
    // Later launches are refused: nobody receives them.
    drop(births);
    let books = birth::open_books(&begun, run_dir, net);
    let end = match &books {
        Ok(books) => birth::live(begun, &shared, Arc::clone(books)).await,
        Err(error) => birth::boot_failed(format!("{error:#}")),
    };
    birth::bury(end, &shared, books.ok()).await;
    // Who listens shall hear it.
    farewell(&mut serving.await?).await;
    Ok(())
}

/// Accepts connections until the machine has ended, and gives those that are still served.
async fn accept(
    listener: UnixListener,
    shared: Arc<Shared>,
    births: mpsc::Sender<Birth>,
) -> JoinSet<()> {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    let mut state = shared.state.subscribe();
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        tokio::select! {
            (slot, accepted) = next => {
                let Ok((stream, _)) = accepted else { continue };
                let (shared, births) = (Arc::clone(&shared), births.clone());
                connections.spawn(async move {
                    if let Err(error) = serve(stream, &shared, births).await {
                        tracing::debug!(%error, "a connection broke");
                    }
                    drop(slot);
                });
            }
            Some(_) = connections.join_next() => {}
            _ = state.wait_for(|s| matches!(s, MachineState::Ended(_))) => return connections,
        }
    }
}

async fn farewell(connections: &mut JoinSet<()>) {
    let all = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FAREWELL, all).await;
}

async fn serve(
    stream: UnixStream,
    shared: &Arc<Shared>,
    births: mpsc::Sender<Birth>,
) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let line = tokio::time::timeout(RPC_DEADLINE, lines::read(&mut stream, WORKER_LINE_MAX)).await;
    let Some(line) = line.map_err(|_| io::ErrorKind::TimedOut)?? else { return Ok(()) };
    let request = match serde_json::from_slice(&line) {
        Ok(request) => request,
        Err(error) => {
            // Without the value: it may hold a secret.
            let text = format!("not a request (line {}, column {})", error.line(), error.column());
            return refuse(&mut stream, RpcError::new(CODE_INVALID, text)).await;
        }
    };
    match request {
        Request::Launch(launch) => match births.try_send(Birth::Launch(launch)) {
            Ok(()) => watch(stream, shared).await,
            Err(_) => refuse(&mut stream, conflict("it was launched already")).await,
        },
        Request::Prepare(spare) => {
            let (launch_in, launch) = oneshot::channel();
            match births.try_send(Birth::Spare(spare, launch)) {
                Ok(()) => serve_spare(stream, shared, launch_in).await,
                Err(_) => refuse(&mut stream, conflict("it was launched already")).await,
            }
        }
        Request::Watch => watch(stream, shared).await,
        Request::Freeze { cut } => {
            if cut {
                shared.net.cut();
            }
            let done = match living(shared) {
                Ok(live) => live.freeze(shared).await,
                Err(error) => Err(error),
            };
            answer(&mut stream, done).await
        }
        Request::Thaw => {
            let done = match living(shared) {
                Ok(live) => live.thaw(shared).await,
                Err(error) => Err(error),
            };
            answer(&mut stream, done).await
        }
        Request::Suspend => {
            let done = match living(shared) {
                Ok(live) => live.suspend(shared).await,
                Err(error) => Err(error),
            };
            answer(&mut stream, done).await
        }
        Request::Commit { dir, memory, durable } => {
            let made = match living(shared) {
                // It ends in order also when nobody waits for it any more.
                Ok(live) => {
                    let work =
                        tokio::spawn(async move { live.commit(&dir, memory, durable).await });
                    until_left(&mut stream, work).await.map(|done| done.unwrap_or_else(lost))
                }
                Err(error) => Some(Err(error)),
            };
            match made {
                Some(Ok(committed)) => {
                    lines::write(&mut stream, &Reply::ok()).await?;
                    lines::write(&mut stream, &committed).await
                }
                Some(Err(error)) => refuse(&mut stream, error).await,
                None => Ok(()),
            }
        }
        Request::Stop { grace_ms } => {
            shared.stop.send_replace(Some(grace_ms));
            let mut state = shared.state.subscribe();
            let _ = state.wait_for(|s| matches!(s, MachineState::Ended(_))).await;
            answer(&mut stream, Ok(())).await
        }
        Request::Exec { exec_id, start, stdin } => match awake(shared) {
            Ok(live) => serve_exec(&live, stream, exec_id, start, &stdin).await,
            Err(error) => refuse(&mut stream, error).await,
        },
        Request::Attach { exec_id, start } => match awake(shared) {
            Ok(live) => {
                let tap = start.tty.is_none().then(|| Tap::new(&live.log, exec_id));
                serve_frames(&live, stream, StreamHead::Exec(start), tap).await
            }
            Err(error) => refuse(&mut stream, error).await,
        },
        Request::Files { ask } => match awake(shared) {
            Ok(live) => serve_frames(&live, stream, StreamHead::Files(ask), None).await,
            Err(error) => refuse(&mut stream, error).await,
        },
        Request::Port { port } => match awake(shared) {
            Ok(live) => serve_port(&live, stream, port).await,
            Err(error) => refuse(&mut stream, error).await,
        },
        Request::Egress(terms) => {
            shared.net.set(&terms);
            answer(&mut stream, Ok(())).await
        }
        Request::TrimEgress { version } => match shared.net.trim(version).await {
            Ok(trimmed) => {
                lines::write(&mut stream, &Reply::ok()).await?;
                lines::write(&mut stream, &trimmed).await
            }
            Err(error) => refuse(&mut stream, error).await,
        },
        Request::Quota { cpu } => {
            let done = match living(shared) {
                Ok(live) => live.set_quota(cpu),
                Err(error) => Err(error),
            };
            answer(&mut stream, done).await
        }
        Request::Broker => shared.broker.serve(stream, ended(shared)).await,
        // Into a frozen machine too: what it asked for before it stood still goes on.
        Request::GuestStream { ticket } => match living(shared) {
            Ok(live) => serve_guest_stream(&live, stream, ticket, shared).await,
            Err(error) => refuse(&mut stream, error).await,
        },
        Request::RenewToken { token } => {
            let done = match awake(shared) {
                Ok(live) => renew_token(&live, token).await,
                Err(error) => Err(error),
            };
            answer(&mut stream, done).await
        }
    }
}

/// Tells how far a spare is, until its launch is said; then goes on as a watch. Who leaves before
/// ends it.
async fn serve_spare(
    stream: Stream,
    shared: &Shared,
    launch_in: oneshot::Sender<Box<Launch>>,
) -> io::Result<()> {
    let (mut read, mut write) = tokio::io::split(stream);
    let mut state = shared.state.subscribe();
    state.mark_changed();
    let line = {
        let mut read = BufReader::new(&mut read);
        let mut line = std::pin::pin!(lines::read(&mut read, WORKER_LINE_MAX));
        loop {
            tokio::select! {
                biased;
                line = &mut line => break line?,
                Ok(()) = state.changed() => {
                    let now = state.borrow_and_update().clone();
                    let ended = matches!(now, MachineState::Ended(_));
                    lines::write(&mut write, &Event::State(now)).await?;
                    if ended {
                        return Ok(());
                    }
                }
            }
        }
    };
    let Some(line) = line else { return Ok(()) };
    let Ok(launch) = serde_json::from_slice(&line) else {
        let text = "a spare expects its launch";
        let reply = Reply::error(RpcError::new(CODE_INVALID, text));
        return lines::write(&mut write, &reply).await;
    };
    // Nobody there to take it: then the watch tells how it ended.
    let _ = launch_in.send(launch);
    tell(read, write, shared).await
}

/// Lines of events, the present state first, until the end or until the watcher leaves.
async fn watch(stream: Stream, shared: &Shared) -> io::Result<()> {
    let (read, write) = tokio::io::split(stream);
    tell(read, write, shared).await
}

async fn tell(
    mut read: ReadHalf<Stream>,
    mut write: WriteHalf<Stream>,
    shared: &Shared,
) -> io::Result<()> {
    let (mut state, mut usage) = (shared.state.subscribe(), shared.usage.subscribe());
    state.mark_changed();
    let mut ignored = [0; 64];
    let mut heard = 0;
    loop {
        tokio::select! {
            biased;
            changed = state.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let now = state.borrow_and_update().clone();
                let ended = matches!(now, MachineState::Ended(_));
                lines::write(&mut write, &Event::State(now)).await?;
                if ended {
                    return Ok(());
                }
            }
            Ok(()) = usage.changed() => {
                let now = *usage.borrow_and_update();
                lines::write(&mut write, &Event::Usage(now)).await?;
            }
            news = shared.net.word(&mut heard) => {
                // What it sent comes before what it needs.
                let now = Sample { egress_bytes: Some(shared.net.carried().0), ..*usage.borrow() };
                lines::write(&mut write, &Event::Usage(now)).await?;
                lines::write(&mut write, &Event::Egress(news)).await?;
            }
            heard = read.read(&mut ignored) => {
                if heard? == 0 {
                    return Ok(());
                }
            }
        }
    }
}

/// Does something over the machine's channel, for whoever asked on this stream, while there is a place
/// for it.
async fn on_session(
    live: &Live,
    mut stream: Stream,
    work: impl AsyncFnOnce(&Session, &mut Stream) -> io::Result<()>,
) -> io::Result<()> {
    let (_place, session) = match place(live).await {
        Ok(found) => found,
        Err(error) => return refuse(&mut stream, error).await,
    };
    match work(&session, &mut stream).await {
        Ok(()) => Ok(()),
        Err(error) => refuse(&mut stream, RpcError::new(CODE_INTERNAL, error.to_string())).await,
    }
}

async fn serve_exec(
    live: &Live,
    stream: Stream,
    exec_id: String,
    start: ExecStart,
    stdin: &str,
) -> io::Result<()> {
    let stdin = STANDARD.decode(stdin).map_err(io::Error::other)?;
    on_session(live, stream, async |session, stream| {
        exec::run(session, &live.log, Asker::new(stream), exec_id, start, &stdin).await
    })
    .await
}

async fn serve_frames(
    live: &Live,
    stream: Stream,
    head: StreamHead,
    tap: Option<Tap<'_>>,
) -> io::Result<()> {
    on_session(live, stream, async |session, stream| {
        terminal::run(session, stream, head, tap).await
    })
    .await
}

async fn serve_port(live: &Live, stream: Stream, port: u16) -> io::Result<()> {
    on_session(live, stream, async |session, stream| port::run(session, stream, port).await).await
}

async fn serve_guest_stream(
    live: &Live,
    stream: Stream,
    ticket: String,
    shared: &Shared,
) -> io::Result<()> {
    on_session(live, stream, async |session, stream| {
        tokio::select! {
            poured = broker::pour(session, stream, ticket) => poured,
            () = ended(shared) => Ok(()),
        }
    })
    .await
}

async fn renew_token(live: &Live, token: String) -> Result<(), RpcError> {
    let session = session(live).await?;
    let renew = RenewToken { token };
    match session.peer.call::<_, Value>(method::RENEW_TOKEN, &renew, RPC_DEADLINE).await {
        Ok(_) => Ok(()),
        Err(CallError::Refused { error, .. }) => Err(error),
        Err(error) => Err(RpcError::new(CODE_INTERNAL, error.to_string())),
    }
}

/// Works as long as somebody waits for it.
async fn until_left<T>(stream: &mut Stream, work: impl Future<Output = T>) -> Option<T> {
    let mut ignored = [0; 64];
    tokio::select! {
        done = work => Some(done),
        _ = stream.read(&mut ignored) => None,
    }
}

/// Completes when the machine has ended.
async fn ended(shared: &Shared) {
    let mut state = shared.state.subscribe();
    let _ = state.wait_for(|s| matches!(s, MachineState::Ended(_))).await;
}

/// A place among the streams that execs and ports may hold, and where to open one.
async fn place(live: &Live) -> Result<(OwnedSemaphorePermit, Session), RpcError> {
    let place = Arc::clone(&live.relay.user_streams).try_acquire_owned();
    let place = place.map_err(|_| crowded())?;
    Ok((place, session(live).await?))
}

async fn session(live: &Live) -> Result<Session, RpcError> {
    match tokio::time::timeout(RPC_DEADLINE, live.relay.session()).await {
        Ok(Ok(session)) => Ok(session),
        Ok(Err(error)) => Err(RpcError::new(CODE_INTERNAL, error.to_string())),
        Err(_) => Err(RpcError::new(CODE_INTERNAL, "nothing inside answers")),
    }
}

fn crowded() -> RpcError {
    // Not a conflict: to wait until the machine runs would not help.
    let message = format!("{USER_STREAMS_MAX} commands and connections are open on this machine");
    RpcError::new(CODE_UNAVAILABLE, message)
}

/// The machine, running or frozen.
fn living(shared: &Shared) -> Result<Arc<Live>, RpcError> {
    shared.live.borrow().clone().ok_or_else(|| conflict("the machine is not running"))
}

/// The machine, running.
fn awake(shared: &Shared) -> Result<Arc<Live>, RpcError> {
    let live = living(shared)?;
    if live.is_frozen() { Err(conflict("the machine is frozen")) } else { Ok(live) }
}

fn lost<T>(error: tokio::task::JoinError) -> Result<T, RpcError> {
    Err(RpcError::new(CODE_INTERNAL, error.to_string()))
}

async fn answer(stream: &mut Stream, done: Result<(), RpcError>) -> io::Result<()> {
    match done {
        Ok(()) => lines::write(stream, &Reply::ok()).await,
        Err(error) => refuse(stream, error).await,
    }
}

async fn refuse(stream: &mut Stream, error: RpcError) -> io::Result<()> {
    lines::write(stream, &Reply::error(error)).await
}
