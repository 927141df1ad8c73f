//! The web server: pages of any size, redirects to anywhere, repositories.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONNECTION, HOST, HeaderValue, LOCATION, UPGRADE};
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::git;
use super::seen::{Port, Request, Seen};

pub(super) type Body = BoxBody<Bytes, Infallible>;

/// Bytes that are given at once.
const PIECE: usize = 64 * 1024;

/// A body that is there.
pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// A body of so many bytes.
fn bytes(count: u64) -> Body {
    let piece = Bytes::from_static(&[b'x'; PIECE]);
    let pieces = futures_util::stream::unfold(count, move |left| {
        let n = left.min(PIECE as u64);
        let frame = Frame::data(piece.slice(..n as usize));
        async move { (n > 0).then_some((Ok(frame), left - n)) }
    });
    BoxBody::new(StreamBody::new(pieces))
}

/// What all ports of the web server have in common.
pub(super) struct Web {
    pub(super) seen: Arc<Seen>,
    pub(super) tls: TlsAcceptor,
    /// Where repositories lie.
    pub(super) git: PathBuf,
}

impl Web {
    /// Serves a port, with TLS or without, for ever.
    pub(super) async fn serve(
        self: Arc<Web>,
        number: u16,
        listener: TcpListener,
        tls: bool,
    ) -> io::Result<()> {
        let port = self.seen.port(number);
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(Arc::clone(&self).connection(number, Arc::clone(&port), stream, tls));
        }
    }

    async fn connection(
        self: Arc<Web>,
        number: u16,
        port: Arc<Port>,
        stream: tokio::net::TcpStream,
        tls: bool,
    ) {
        // Below TLS: what came over the wire counts.
        let stream = port.connected(stream);
        if !tls {
            return self.converse(number, None, stream).await;
        }
        let Ok(stream) = self.tls.accept(stream).await else { return };
        let sni = stream.get_ref().1.server_name().unwrap_or_default().to_owned();
        self.converse(number, Some(sni), stream).await;
    }

    async fn converse<S>(self: Arc<Web>, port: u16, sni: Option<String>, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let service = service_fn(|request: hyper::Request<Incoming>| {
            let (web, sni) = (Arc::clone(&self), sni.clone());
            async move {
                web.seen.request(noted(port, sni, &request));
                Ok::<_, Infallible>(web.answer(request).await)
            }
        });
        // A client that goes away is no failure of the server's.
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
    }

    async fn answer(&self, request: hyper::Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let query = request.uri().query().unwrap_or_default().to_owned();
        let say = |status: u16, body: String| {
            let mut response = Response::new(full(body));
            *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
            response
        };
        if let Some(inside) = path.strip_prefix(git::PREFIX) {
            return self.git(format!("/{inside}"), query, request).await;
        }
        let mut words = path.trim_start_matches('/').splitn(2, '/');
        let (word, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let number = rest.parse::<u64>().ok();
        match (word, number) {
            ("", _) => {
                let host = request.headers().get(HOST).and_then(|h| h.to_str().ok());
                say(200, format!("outside, as {}\n", host.unwrap_or("nobody")))
            }
            ("bytes", Some(count)) => Response::new(bytes(count)),
            ("status", Some(code)) => say(code as u16, format!("{code}\n")),
            // To what follows `?`, as it stands.
            ("redirect", _) => {
                let mut response = say(302, String::new());
                let to = HeaderValue::from_str(&query);
                response
                    .headers_mut()
                    .insert(LOCATION, to.unwrap_or(HeaderValue::from_static("/")));
                response
            }
            ("headers", _) => {
                let headers = request.headers().iter();
                let text = |v: &HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
                let headers: Vec<_> = headers.map(|(k, v)| json!([k.as_str(), text(v)])).collect();
                say(200, json!(headers).to_string())
            }
            // Something else than HTTP from here on, which says back what it hears.
            ("speak", _) => {
                let switched = hyper::upgrade::on(request);
                tokio::spawn(async move {
                    let Ok(stream) = switched.await else { return };
                    let (mut from, mut to) = tokio::io::split(TokioIo::new(stream));
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
                let mut response = say(101, String::new());
                let headers = response.headers_mut();
                headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(UPGRADE, HeaderValue::from_static("echo"));
                response
            }
            ("upload", _) => match request.into_body().collect().await {
                Ok(body) => say(200, json!({"bytes": body.to_bytes().len()}).to_string()),
                Err(_) => say(400, "the body broke off\n".to_owned()),
            },
            _ => say(404, "no such page\n".to_owned()),
        }
    }

    async fn git(
        &self,
        path: String,
        query: String,
        request: hyper::Request<Incoming>,
    ) -> Response<Body> {
        let (head, body) = request.into_parts();
        let failed = |why: String| {
            let mut response = Response::new(full(why));
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            response
        };
        let body = match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return failed(error.to_string()),
        };
        let root = self.git.clone();
        let answer = tokio::task::spawn_blocking(move || {
            git::answer(&root, head.method.as_str(), &path, &query, &head.headers, &body)
        });
        match answer.await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => failed(error.to_string()),
            Err(error) => failed(error.to_string()),
        }
    }
}

fn noted(port: u16, sni: Option<String>, request: &hyper::Request<Incoming>) -> Request {
    let text = |v: &HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
    Request {
        port,
        sni,
        host: request.headers().get(HOST).map(text),
        method: request.method().to_string(),
        path: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
        headers: request.headers().iter().map(|(k, v)| (k.to_string(), text(v))).collect(),
    }
}
