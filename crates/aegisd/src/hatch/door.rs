//! One machine's socket: connections, what they begin with, and their end.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aegis_wire::bounds::{
    DOOR_CONNECTIONS_MAX, DOOR_HEAD_DEADLINE, DOOR_HEAD_MAX, KNOCK_DEADLINE, KNOCK_MAX,
};
use aegis_wire::door::Knock;
use aegis_wire::words::Limit;
use aegis_wire::worker::run_dir;
use hyper::Request;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::forward::{self, Line};
use super::machine::Machine;
use super::{llm, tls};
use crate::app::limits;
use crate::ctx::InUse;

/// Headers of a request.
const HEADERS_MAX: usize = 128;
/// Out of files, say: those that are there will free some.
const ACCEPT_AGAIN: Duration = Duration::from_millis(10);

/// Listens for a machine until this is dropped; with it go all of its connections.
pub(super) async fn serve(machine: Arc<Machine>) {
    let path = machine.app().ctx.run_dir(&machine.id).join(run_dir::DOOR);
    let listener = match bind(&path) {
        Ok(listener) => listener,
        Err(error) => {
            // A run directory that is gone is a machine that has ended already.
            tracing::debug!(instance = %machine.id, %error, "its hatch stays shut");
            return;
        }
    };
    let slots = Arc::new(Semaphore::new(DOOR_CONNECTIONS_MAX));
    let mut commits = machine.app().ctx.ledger.commits();
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            accepted = next(&listener, &slots) => match accepted {
                Ok((stream, slot)) => {
                    let machine = Arc::clone(&machine);
                    open.spawn(async move {
                        connection(machine, stream).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(instance = %machine.id, %error, "a knock was not heard");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
            Some(_) = open.join_next() => {}
            changed = commits.changed(), if !open.is_empty() => {
                if changed.is_err() {
                    return;
                }
                if !machine.is_served() {
                    open.abort_all();
                }
            }
        }
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The next connection; with as many as there may be, it waits in the backlog.
async fn next(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(UnixStream, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    Ok((listener.accept().await?.0, slot))
}

async fn connection(machine: Arc<Machine>, stream: UnixStream) {
    let mut stream = BufReader::new(stream);
    let knock = match tokio::time::timeout(KNOCK_DEADLINE, read_knock(&mut stream)).await {
        Ok(Ok(knock)) => knock,
        Ok(Err(error)) => {
            tracing::debug!(instance = %machine.id, %error, "a knock that is none");
            return;
        }
        Err(_) => return,
    };
    if !machine.is_served() {
        return;
    }
    // Who waits for an answer from here is not idle.
    let _in_use = InUse::begin(&machine.app().ctx, &machine.id);
    let served = match knock {
        Knock::Llm => {
            let spent = Arc::new(AtomicBool::new(false));
            let serve = |machine, request| {
                let spent = Arc::clone(&spent);
                async move {
                    let mut answer = llm::serve(machine, request).await;
                    if answer.extensions().get::<llm::Exhausted>().is_some() {
                        spent.store(true, Ordering::Relaxed);
                        // Nothing but this answer is to be waited for.
                        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                    }
                    answer
                }
            };
            let served = converse(&machine, stream, serve).await;
            if spent.load(Ordering::Relaxed) {
                // A task of its own: what follows may end this one.
                tokio::spawn(exhausted(Arc::clone(&machine)));
            }
            served
        }
        Knock::Https { ref host, .. } => match tls::accept(&machine, host, stream).await {
            Ok(stream) => pass_on(&machine, stream, knock).await,
            Err(error) => {
                tracing::debug!(instance = %machine.id, %error, "no TLS with a machine");
                return;
            }
        },
        Knock::Service { .. } | Knock::Http { .. } => pass_on(&machine, stream, knock).await,
    };
    if let Err(error) = served {
        tracing::debug!(instance = %machine.id, %error, "a connection to the hatch failed");
    }
}

/// The machine was told that nothing is left: what the invite says of that follows.
async fn exhausted(machine: Arc<Machine>) {
    let Ok(asker) = machine.asker() else { return };
    if let Err(error) = limits::exhausted(machine.app(), &asker.instance, Limit::Tokens).await {
        tracing::error!(instance = %machine.id, %error, "an end of tokens was not noted");
    }
}

async fn pass_on<S>(machine: &Arc<Machine>, stream: S, knock: Knock) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let line = Arc::new(Line::new(knock));
    let serve = |machine, request| {
        let line = Arc::clone(&line);
        async move { forward::serve(machine, line, request).await }
    };
    let served = converse(machine, stream, serve).await;
    // What became of the connection when it is HTTP no more.
    line.tunnel().await;
    served
}

async fn read_knock(from: &mut BufReader<UnixStream>) -> io::Result<Knock> {
    let mut line = Vec::new();
    from.take(KNOCK_MAX as u64).read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::InvalidData.into());
    }
    serde_json::from_slice(&line).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

async fn converse<S, F, A>(machine: &Arc<Machine>, stream: S, serve: F) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn(Arc<Machine>, Request<Incoming>) -> A,
    A: Future<Output = hyper::Response<super::answer::Body>>,
{
    let service = service_fn(|request| {
        let answer = serve(Arc::clone(machine), request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(DOOR_HEAD_DEADLINE)
        .max_buf_size(DOOR_HEAD_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await
}
