//! The listeners of the guest API, and one task per connection.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aegis_wire::bounds::{
    GUEST_BODIES_MAX, GUEST_CONNECTIONS_MAX, GUEST_HEAD_MAX, GUEST_READ_DEADLINE,
    GUEST_WRITE_DEADLINE,
};
use aegis_wire::channel::guest::{API_PORT, API_SOCKET};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::Semaphore;

use super::answer::Refusal;
use super::body::{self, Body};
use super::patience::Patient;
use super::route::route;
use super::{Answer, Guest, files};
use crate::note::note;

/// Connections that wait for their turn; who comes to a full queue tries again only seconds later.
const BACKLOG: u32 = 1024;
/// Before the next try, after no connection could be taken: no files, or no memory.
const BREATHER: Duration = Duration::from_millis(100);

/// Both ways in. Bound in the golden machine, so that births take no longer for them.
pub struct Doors {
    tcp: TcpListener,
    unix: UnixListener,
}

/// Which way a request came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Door {
    /// Browsers reach it too.
    Tcp,
    /// Only programs that know its path.
    Unix,
}

/// How long slow ones are waited for.
#[derive(Clone, Copy)]
pub struct Times {
    /// For a head, and for a body.
    pub read: Duration,
    /// For the other side to take anything.
    pub write: Duration,
}

/// What all connections share.
struct Hall {
    guest: Arc<Guest>,
    times: Times,
    /// Bytes of request bodies.
    room: Arc<Semaphore>,
}

impl Doors {
    /// Binds both.
    pub fn open() -> io::Result<Doors> {
        Doors::open_at(API_PORT, Path::new(API_SOCKET))
    }

    /// Binds a port of loopback, and a socket that is made anew.
    pub fn open_at(port: u16, socket: &Path) -> io::Result<Doors> {
        let tcp = TcpSocket::new_v4()?;
        tcp.bind((Ipv4Addr::LOCALHOST, port).into())?;
        let tcp = tcp.listen(BACKLOG)?;
        if let Some(parent) = socket.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        let unix = UnixListener::bind(socket)?;
        // As with the port: whoever is inside may ask.
        fs::set_permissions(socket, fs::Permissions::from_mode(0o666))?;
        Ok(Doors { tcp, unix })
    }

    /// The port, as bound.
    #[cfg(test)]
    pub fn port(&self) -> u16 {
        self.tcp.local_addr().map(|address| address.port()).unwrap_or_default()
    }

    /// Serves for ever.
    pub async fn serve(self, guest: Arc<Guest>) {
        let times = Times { read: GUEST_READ_DEADLINE, write: GUEST_WRITE_DEADLINE };
        self.serve_within(guest, times).await;
    }

    /// Serves for ever, with other patience.
    pub async fn serve_within(self, guest: Arc<Guest>, times: Times) {
        let room = Arc::new(Semaphore::new(GUEST_BODIES_MAX));
        let hall = Arc::new(Hall { guest, times, room });
        let slots = Arc::new(Semaphore::new(GUEST_CONNECTIONS_MAX));
        loop {
            // Who comes while all slots are taken waits in the backlog.
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let hall = Arc::clone(&hall);
            let accepted = tokio::select! {
                accepted = self.tcp.accept() => accepted.map(|(stream, _)| {
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(async move {
                        serve(hall, stream, Door::Tcp).await;
                        drop(slot);
                    });
                }),
                accepted = self.unix.accept() => accepted.map(|(stream, _)| {
                    tokio::spawn(async move {
                        serve(hall, stream, Door::Unix).await;
                        drop(slot);
                    });
                }),
            };
            if let Err(error) = accepted {
                note(&format!("guest API: {error}"));
                tokio::time::sleep(BREATHER).await;
            }
        }
    }
}

async fn serve<S>(hall: Arc<Hall>, stream: S, door: Door)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let times = hall.times;
    let service = service_fn(move |request| {
        let hall = Arc::clone(&hall);
        async move {
            let answer = answer(&hall, request, door).await;
            Ok::<_, Infallible>(answer.unwrap_or_else(refuse))
        }
    });
    let io = TokioIo::new(Patient::new(stream, times.write));
    // Whatever goes wrong on a connection is its end, and no more than that.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(times.read)
        .max_buf_size(GUEST_HEAD_MAX)
        .max_header_size(GUEST_HEAD_MAX)
        .serve_connection(io, service)
        .await;
}

async fn answer(
    hall: &Hall,
    request: Request<Incoming>,
    door: Door,
) -> Result<Response<Body>, Refusal> {
    let (head, body) = request.into_parts();
    check_origin(&head, door)?;
    let route = route(head.method.as_str(), head.uri.path())?;
    if route.is_of_files() {
        return files::answer(&hall.guest, &route, &head, body).await;
    }
    let read = body::read(body, hall.times.read, &hall.room).await?;
    let params = route.params(head.uri.query(), &read.bytes)?;
    // The room is held on: as params the body takes more of it, not less.
    let body::Read { bytes, held } = read;
    drop(bytes);
    let asked = Instant::now();
    match hall.guest.call(route.call, params, route.streamed(), held).await? {
        Answer::Whole(value) => {
            let bytes = serde_json::to_vec(&value).map_err(|_| Refusal::misunderstood())?;
            let mut response = respond(route.status(), "application/json", Body::whole(bytes));
            // What of the wait was the host's.
            let host = format!("host;dur={:.3}", asked.elapsed().as_secs_f64() * 1e3);
            if let Ok(timing) = HeaderValue::try_from(host) {
                response.headers_mut().insert("server-timing", timing);
            }
            Ok(response)
        }
        Answer::Stream(stream, _) => {
            Ok(respond(route.status(), "application/x-ndjson", Body::Stream(stream)))
        }
    }
}

/// A page in a browser inside must not get at this API, under whatever name it knows the address
/// (DNS rebinding). Programs send no `Origin`, and the name that they were given.
fn check_origin(head: &Parts, door: Door) -> Result<(), Refusal> {
    if head.headers.contains_key(header::ORIGIN) {
        return Err(Refusal::foreign("Origin"));
    }
    if door == Door::Unix {
        return Ok(());
    }
    let named = head.headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes);
    let asked = head.uri.authority().map(|authority| authority.as_str().as_bytes());
    match named.chain(asked).all(is_ours) {
        true => Ok(()),
        false => Err(Refusal::foreign("Host")),
    }
}

fn is_ours(host: &[u8]) -> bool {
    let name = match host.iter().position(|b| *b == b':') {
        Some(at) if &host[at + 1..] == API_PORT.to_string().as_bytes() => &host[..at],
        Some(_) => return false,
        None => host,
    };
    name == b"127.0.0.1" || name.eq_ignore_ascii_case(b"localhost")
}

fn refuse(refusal: Refusal) -> Response<Body> {
    let Refusal { status, body, allow, last } = refusal;
    let body = serde_json::to_vec(&body).unwrap_or_default();
    let mut response = respond(status, "application/json", Body::whole(body));
    let headers = response.headers_mut();
    if let Some(Ok(allow)) = allow.map(HeaderValue::try_from) {
        headers.insert(header::ALLOW, allow);
    }
    if status == StatusCode::TOO_MANY_REQUESTS {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if last {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// An answer with a body of some kind.
pub fn respond(status: u16, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    // A page that got here all the same must not make a document of it.
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_are_ours() {
        for ours in ["127.0.0.1", "127.0.0.1:7777", "localhost", "LocalHost:7777"] {
            assert!(is_ours(ours.as_bytes()), "{ours}");
        }
        let others = [
            "",
            ":7777",
            "evil.example",
            "evil.example:7777",
            "127.0.0.1:80",
            "localhost.evil",
            "127.0.0.1.evil:7777",
            "localhost:7777:7777",
            "127.0.0.1 ",
            "[::1]:7777",
        ];
        for other in others {
            assert!(!is_ours(other.as_bytes()), "{other}");
        }
    }
}
