//! The doors: bytes come in, parsed words and a proof of who asks go on to a verb of `app`, and
//! what it says goes out. No door decides anything.

mod answer;
mod ask;
mod attach;
mod commits;
mod couch;
mod events;
mod files;
mod guests;
mod host;
mod images;
mod limit;
mod secrets;
mod stream;
mod trace;
mod vers;
mod workspaces;

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::{ATTACHED_MAX, EVENT_FOLLOWERS_MAX};
use anyhow::Context as _;
use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tower::ServiceExt as _;

use crate::app::App;
use crate::config::Config;
use ask::Peer;
use limit::RateLimit;

/// Connections at a time, per listener.
const CONNECTIONS_MAX: usize = 4096;
/// A client has this long to send a request's head.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// A quiet client is asked this often whether it is still there; three times in vain is the end.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Requests that run when the daemon stops have this long to end.
const DRAIN: Duration = Duration::from_secs(5);

/// What routes need.
#[derive(Clone)]
pub(crate) struct State {
    app: App,
    rate: Arc<RateLimit>,
    /// Where the API really listens.
    listen: SocketAddr,
    /// Who may follow events yet.
    followers: Arc<Semaphore>,
    /// Who may attach to a command yet.
    attached: Arc<Semaphore>,
    /// Answers that go on without end, end when this says so.
    stopped: watch::Receiver<bool>,
}

/// Bound, but not served yet.
pub struct Listeners {
    /// Where TCP is bound; tells the port when 0 was asked for.
    pub address: SocketAddr,
    tcp: TcpListener,
    unix: UnixListener,
}

/// Binds TCP and `HOME/aegisd.sock` (0600: who may open it is the host).
pub async fn bind(config: &Config) -> anyhow::Result<Listeners> {
    let tcp = TcpListener::bind(config.listen).await.with_context(|| {
        format!("cannot listen on {}; choose another with --listen", config.listen)
    })?;
    let path = config.home.join("aegisd.sock");
    // The home is locked by this process: a socket that is there is a dead daemon's.
    let _ = std::fs::remove_file(&path);
    let unix = UnixListener::bind(&path)
        .with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(Listeners { address: tcp.local_addr()?, tcp, unix })
}

/// Served listeners.
pub struct Doors {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    attached: Arc<Semaphore>,
}

impl Doors {
    /// Takes no new connections, lets running requests end (for a while), and returns.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        for task in self.tasks {
            let _ = task.await;
        }
        // Who is attached to a command is told.
        let told = self.attached.acquire_many(ATTACHED_MAX as u32);
        let _ = tokio::time::timeout(DRAIN, told).await;
    }
}

/// Serves both listeners.
pub fn open(listeners: Listeners, app: App) -> Doors {
    let (per_second, burst) = (app.ctx.config.rate_per_second, app.ctx.config.rate_burst);
    let (stop, stopped) = watch::channel(false);
    let state = State {
        rate: Arc::new(RateLimit::new(per_second, burst)),
        listen: listeners.address,
        followers: Arc::new(Semaphore::new(EVENT_FOLLOWERS_MAX)),
        attached: Arc::new(Semaphore::new(ATTACHED_MAX)),
        stopped: stopped.clone(),
        app,
    };
    let attached = Arc::clone(&state.attached);
    let router = routes(state);
    let tcp = tokio::spawn(serve(router.clone(), stopped.clone(), listeners.tcp));
    let unix = tokio::spawn(serve(router, stopped, listeners.unix));
    Doors { stop, tasks: vec![tcp, unix], attached }
}

/// Public and host routes are separate routers; what is in neither is a 404 or a 405.
fn routes(state: State) -> Router {
    Router::new()
        .merge(couch::public(&state))
        .merge(couch::host())
        .merge(files::routes())
        .merge(guests::routes())
        .merge(host::routes())
        .merge(images::routes())
        .merge(commits::routes())
        .merge(secrets::routes())
        .merge(workspaces::routes())
        .merge(vers::routes(&state))
        .fallback(answer::unknown_route)
        .method_not_allowed_fallback(answer::wrong_method)
        .layer(axum::middleware::from_fn_with_state(state.clone(), ask::local_only))
        .layer(tower_http::catch_panic::CatchPanicLayer::custom(answer::panicked))
        .layer(axum::middleware::from_fn_with_state(state.clone(), trace::traced))
        .with_state(state)
}

/// What both listeners can: the next connection, and by which door it came.
trait Listen: Send + Sync + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Peer)>> + Send;
}

impl Listen for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<(TcpStream, Peer)> {
        let (stream, from) = self.accept().await?;
        stream.set_nodelay(true)?;
        // A client that vanished without a word must not keep its terminal, or anything else.
        let _ = keep_alive(&stream);
        Ok((stream, Peer::Tcp(from)))
    }
}

fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEP_ALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE)?;
    sockopt::set_tcp_keepcnt(stream, 3)
}

impl Listen for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<(UnixStream, Peer)> {
        Ok((self.accept().await?.0, Peer::Unix))
    }
}

async fn serve<L: Listen>(router: Router, mut stopped: watch::Receiver<bool>, listener: L) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { break };
        let (stream, peer) = tokio::select! {
            accepted = listener.next() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of files, say: the clients that are there will free some.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
            () = async { let _ = stopped.wait_for(|s| *s).await; } => break,
        };
        let router = router.clone();
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            let mut request: Request = request.map(axum::body::Body::new);
            request.extensions_mut().insert(peer);
            router.clone().oneshot(request)
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_DEADLINE)
            .max_headers(64)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut stopping = stopped.clone();
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = async { let _ = stopping.wait_for(|s| *s).await; } => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a client's connection failed");
            }
            drop(slot);
        });
    }
    // All slots are free once every connection has ended.
    let _ = tokio::time::timeout(DRAIN, slots.acquire_many(CONNECTIONS_MAX as u32)).await;
}
