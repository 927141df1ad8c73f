//! One port for all machines: HTTP and WebSockets by name (contracts/aegis.md 9).
//!
//! ```text
//! http://web.localhost:8099/        the instance with the handle (or id) `web`, its first exposed port
//! http://9000.web.localhost:8099/   its exposed port 9000
//! X-Aegis-Instance: web             the same by a header, whatever the Host
//! ```
//! Nothing else named, and exactly one instance that is not stopped: that one. One that starts is
//! waited for, one that sleeps is woken; what is not exposed is not reached.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aegis_rules::instance::{Instance, InstanceState};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::error::{ErrorBody, status};
use aegis_wire::words::Handle;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::app::App;
use crate::ctx::InUse;
use crate::passing::{is_upgrade, strip};

/// Connections at a time; more wait in the backlog.
const CONNECTIONS_MAX: usize = 1024;
/// The whole head of a request comes within this.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
const HEAD_MAX: usize = 64 * 1024;
/// Between two tries to accept where the first failed.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Names an instance, whatever the Host.
const INSTANCE: &str = "x-aegis-instance";

type Broken = Box<dyn std::error::Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, Broken>;

/// Listens; where the port is taken, there is no such way in, and the log says so.
pub async fn bind(listen: Option<SocketAddr>) -> Option<TcpListener> {
    match TcpListener::bind(listen?).await {
        Ok(listener) => Some(listener),
        Err(error) => {
            tracing::warn!(?listen, %error, "machines can't be reached by name: [router] listen");
            None
        }
    }
}

/// Serves until this is dropped.
pub async fn run(app: App, listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut open = tokio::task::JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let app = app.clone();
        open.spawn(async move {
            converse(app, stream).await;
            drop(slot);
        });
    }
}

async fn converse(app: App, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let app = app.clone();
        async move { Ok::<_, Infallible>(serve(&app, request).await.unwrap_or_else(refused)) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection by name ended");
    }
}

async fn serve(app: &App, mut request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
    let (instance, port) = find(app, &request)?;
    // As long as anything is on its way to or from it.
    let in_use = Arc::new(InUse::begin(&app.ctx, &instance.id));
    let failed = |what: &str| Refusal::new(Code::NoCapacity, format!("{} {what}", instance.name()));
    let machine = app.lifecycle.reach_port(&instance.id, port).await.map_err(|error| {
        tracing::debug!(instance = %instance.id, port, %error, "it is not reached by name");
        failed("does not answer there")
    })?;
    let (mut sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(machine))
        .await
        .map_err(|_| failed("does not speak HTTP"))?;
    let of_answer = Arc::clone(&in_use);
    tokio::spawn(async move {
        let _ = driver.with_upgrades().await;
        drop(of_answer);
    });
    let upgrade = is_upgrade(request.headers());
    let outside = upgrade.then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    strip(&mut head.headers, upgrade);
    head.headers.remove(INSTANCE);
    if !head.headers.contains_key(HOST) {
        head.headers.insert(HOST, HeaderValue::from_static("localhost"));
    }
    let sent = sender.send_request(Request::from_parts(head, body)).await;
    let mut response = sent.map_err(|_| failed("broke the connection off"))?;
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    if let (true, Some(outside)) = (switched, outside) {
        let inside = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            if let (Ok(inside), Ok(outside)) = tokio::join!(inside, outside) {
                let (mut inside, mut outside) = (TokioIo::new(inside), TokioIo::new(outside));
                // Either side may break off as it likes.
                let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
            }
            drop(in_use);
        });
    }
    let (mut head, body) = response.into_parts();
    strip(&mut head.headers, switched);
    Ok(Response::from_parts(head, body.map_err(Into::into).boxed_unsync()))
}

/// What a request names: an instance, and perhaps one of its ports.
#[derive(Debug, PartialEq, Eq)]
struct Named {
    name: String,
    port: Option<u16>,
}

/// Of a `Host`: `NAME.localhost` or `PORT.NAME.localhost`, whatever domain is in the place of
/// `localhost`; an address names nobody.
fn named_by_host(host: &str) -> Option<Named> {
    let host = host.rsplit_once(':').map_or(host, |(name, port)| {
        if port.bytes().all(|b| b.is_ascii_digit()) { name } else { host }
    });
    if host.starts_with('[') || host.parse::<std::net::Ipv4Addr>().is_ok() {
        return None;
    }
    let (first, rest) = host.split_once('.')?;
    match (first.parse::<u16>(), rest.split_once('.')) {
        (Ok(port), Some((name, _))) => Some(Named { name: name.to_owned(), port: Some(port) }),
        _ => Some(Named { name: first.to_owned(), port: None }),
    }
}

fn find(app: &App, request: &Request<Incoming>) -> Result<(Instance, u16), Refusal> {
    let text = |name| request.headers().get(name).and_then(|v: &HeaderValue| v.to_str().ok());
    let named = match text(INSTANCE) {
        Some(name) => Some(Named { name: name.to_owned(), port: None }),
        None => text(HOST.as_str()).and_then(named_by_host),
    };
    let not_found = || Refusal::new(Code::InstanceNotFound, "no instance is named by this request");
    let read = |e| {
        tracing::error!(error = %e, "an instance could not be looked up");
        not_found()
    };
    let ledger = &app.ctx.ledger;
    let (instance, port) = match named {
        Some(Named { name, port }) => {
            let by_id = name.to_uppercase().replace("INST-", "inst-").parse();
            let found = ledger.read(|f| {
                if let Ok(id) = by_id
                    && let Some(found) = f.instance(&id)?
                {
                    return Ok(Some(found));
                }
                match Handle::try_from(name) {
                    Ok(handle) => f.instance_by_handle(&handle),
                    Err(_) => Ok(None),
                }
            });
            (found.map_err(read)?.ok_or_else(not_found)?, port)
        }
        None => {
            let all = ledger.read(|f| f.instances()).map_err(read)?;
            let mut up = all.into_iter().filter(|i| i.state != InstanceState::Stopped);
            match (up.next(), up.next()) {
                (Some(only), None) => (only, None),
                _ => return Err(not_found().hint("name one: http://HANDLE.localhost/")),
            }
        }
    };
    if instance.state == InstanceState::Gone || !instance.enabled {
        return Err(not_found());
    }
    let exposes = &instance.spec.exposes;
    let expose = match port {
        Some(port) => exposes.iter().find(|e| e.guest_port.get() == port),
        None => exposes.first(),
    };
    let port = expose.map(|e| e.guest_port.get());
    let port = port.ok_or_else(|| {
        Refusal::new(Code::InstanceNotFound, format!("{} exposes no such port", instance.name()))
            .hint("aegis instance start --expose PORT, or POST /v1/instances/{id}/expose")
    })?;
    Ok((instance, port))
}

fn refused(refusal: Refusal) -> Response<Body> {
    let bytes = serde_json::to_vec(&ErrorBody::from(&refusal)).unwrap_or_default();
    let body = Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    let code = status(refusal.code);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_GATEWAY);
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_name_instances_and_ports() {
        let named = |host: &str| named_by_host(host).map(|n| (n.name, n.port));
        let of = |name: &str, port| Some((name.to_owned(), port));
        assert_eq!(named("web.localhost:8099"), of("web", None));
        assert_eq!(named("web.localhost"), of("web", None));
        assert_eq!(named("9000.web.localhost:8099"), of("web", Some(9000)));
        assert_eq!(named("9000.localhost"), of("9000", None), "a handle may be a number");
        assert_eq!(named("web.example.com"), of("web", None));
        for nobody in ["localhost:8099", "127.0.0.1:8099", "[::1]:8099", "", "localhost"] {
            assert_eq!(named(nobody), None, "{nobody}");
        }
    }
}
