//! Asking the daemon: HTTP over its unix socket, or over TCP with a token.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST};
use hyper::http::request::Builder;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value};
use tokio::net::{TcpStream, UnixStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use crate::failure::{Failure, Refused, Result};
use crate::home::Home;
use crate::ndjson::Lines;

/// Largest answer that is read whole, bytes: a full page of a list fits.
const ANSWER_MAX: usize = 64 << 20;
/// How long a connection may take to come about.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Largest message of a WebSocket, bytes.
const MESSAGE_MAX: usize = 1 << 20;

/// A WebSocket to the daemon.
pub type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Where the daemon is.
#[derive(Clone, Debug)]
enum Place {
    Socket(PathBuf),
    Tcp { authority: String },
}

/// Asks one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    place: Place,
    token: Option<String>,
}

impl Client {
    /// The daemon at `--url`, else the one of this home.
    pub fn new(home: &Home, url: Option<&str>) -> Result<Client> {
        match url {
            None => {
                home.check_length()?;
                Ok(Client { place: Place::Socket(home.socket()), token: None })
            }
            Some(url) => {
                let authority = authority(url)?;
                Ok(Client { place: Place::Tcp { authority }, token: token(home)? })
            }
        }
    }

    /// The same daemon, asked as a guest.
    pub fn as_guest(&self, token: &str) -> Client {
        Client { place: self.place.clone(), token: Some(token.to_owned()) }
    }

    /// GET, the whole answer.
    pub async fn get(&self, path: &str) -> Result<Value> {
        self.ask(Method::GET, path, None, &[]).await
    }

    /// POST, the whole answer.
    pub async fn post(&self, path: &str, body: Option<Value>) -> Result<Value> {
        self.ask(Method::POST, path, body, &[]).await
    }

    /// DELETE, the whole answer.
    pub async fn delete(&self, path: &str) -> Result<Value> {
        self.ask(Method::DELETE, path, None, &[]).await
    }

    /// Asks and reads the whole answer.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> Result<Value> {
        let answer = self.send(method, path, body, headers).await?;
        let bytes = whole(answer.into_body()).await?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes)
            .map_err(|e| Failure::because("the daemon's answer is no JSON", e))
    }

    /// Asks for a stream of JSON lines.
    pub async fn lines(&self, method: Method, path: &str, body: Option<Value>) -> Result<Lines> {
        Ok(Lines::new(self.send(method, path, body, &[]).await?.into_body()))
    }

    /// GET of bytes as they come.
    pub async fn fetch(&self, path: &str) -> Result<Response<Incoming>> {
        self.send(Method::GET, path, None, &[]).await
    }

    /// PUT of bytes as they come, as many as said.
    pub async fn put(
        &self,
        path: &str,
        length: Option<u64>,
        pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<Value> {
        let body = StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync();
        let mut request = self.head(Method::PUT, path);
        if let Some(length) = length {
            request = request.header(CONTENT_LENGTH, length);
        }
        let bytes = whole(self.finish(request, body).await?.into_body()).await?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Failure::because("the daemon's answer is no JSON", e))
    }

    /// POST of bytes as they come, answered by a stream of JSON lines.
    pub async fn upload(
        &self,
        path: &str,
        pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<Lines> {
        let frames = pieces.map(|piece| piece.map(Frame::data));
        let body = StreamBody::new(frames).boxed_unsync();
        let request = self.head(Method::POST, path).header(CONTENT_TYPE, "application/x-tar");
        Ok(Lines::new(self.finish(request, body).await?.into_body()))
    }

    /// GET of server-sent events, as lines.
    pub async fn events(&self, path: &str) -> Result<Lines> {
        let headers = [("accept", "text/event-stream")];
        Ok(Lines::new(self.send(Method::GET, path, None, &headers).await?.into_body()))
    }

    /// Opens a WebSocket.
    pub async fn socket(&self, path: &str) -> Result<Socket> {
        let key = generate_key();
        let headers = [
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", key.as_str()),
        ];
        let answer = self.send(Method::GET, path, None, &headers).await?;
        let accepted = answer.headers().get("sec-websocket-accept").map(|v| v.as_bytes());
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS
            || accepted != Some(derive_accept_key(key.as_bytes()).as_bytes())
        {
            return Err(Failure::here("the daemon does not speak WebSocket there"));
        }
        let stream = TokioIo::new(hyper::upgrade::on(answer).await.map_err(broken)?);
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_MAX))
            .max_frame_size(Some(MESSAGE_MAX));
        Ok(WebSocketStream::from_raw_socket(stream, Role::Client, Some(config)).await)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> Result<Response<Incoming>> {
        let mut request = self.head(method, path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = match body {
            None => Bytes::new(),
            Some(body) => {
                request = request.header(CONTENT_TYPE, "application/json");
                Bytes::from(body.to_string())
            }
        };
        let body = Full::new(body).map_err(|never| match never {}).boxed_unsync();
        self.finish(request, body).await
    }

    fn head(&self, method: Method, path: &str) -> Builder {
        let authority = match &self.place {
            Place::Socket(_) => "localhost",
            Place::Tcp { authority } => authority,
        };
        let request = Request::builder().method(method).uri(path).header(HOST, authority);
        match &self.token {
            Some(token) => request.header(AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    async fn finish(&self, request: Builder, body: Body) -> Result<Response<Incoming>> {
        let request = request
            .body(body)
            .map_err(|e| Failure::because("cannot put the request together", e))?;
        let answer = self.exchange(request).await?;
        if answer.status().is_success() || answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(answer);
        }
        Err(refused(answer).await)
    }

    async fn exchange(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        let connected = tokio::time::timeout(CONNECT_DEADLINE, async {
            match &self.place {
                Place::Socket(path) => {
                    let stream = UnixStream::connect(path).await.map_err(|e| not_there(path, e))?;
                    shake(TokioIo::new(stream)).await
                }
                Place::Tcp { authority } => {
                    let stream = TcpStream::connect(authority.as_str()).await.map_err(|e| {
                        Failure::because(format!("cannot reach {authority}"), e)
                            .fix("check --url or AEGIS_URL, and that aegisd runs there")
                    })?;
                    // Small requests should not wait for company.
                    let _ = stream.set_nodelay(true);
                    shake(TokioIo::new(stream)).await
                }
            }
        });
        let mut sender = connected.await.map_err(|_| {
            Failure::here("the daemon did not take the connection in time")
                .fix("look at its log: data/aegisd.log in its home")
        })??;
        sender.send_request(request).await.map_err(broken)
    }
}

/// The exchange broke after it began: it is not known what the daemon did.
fn broken(e: hyper::Error) -> Failure {
    Failure::because("the connection to the daemon broke", e)
        .fix("see `aegis status`; its log is data/aegisd.log in its home")
}

/// A daemon that is not there.
fn not_there(socket: &Path, e: io::Error) -> Failure {
    use std::io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    let (what, fix) = match e.kind() {
        NotFound | ConnectionRefused => ("aegisd does not run in this home", "start it: aegis up"),
        PermissionDenied => (
            "only the host may ask this daemon",
            "be the user who runs aegisd, or use --url with a token",
        ),
        _ => ("cannot reach aegisd", "see what `aegis doctor` says"),
    };
    Failure::because(format!("{what} ({})", socket.display()), e).fix(fix)
}

/// What is sent: bytes at hand, or as they come.
type Body = UnsyncBoxBody<Bytes, io::Error>;
type Sender = http1::SendRequest<Body>;

async fn shake<T>(io: TokioIo<T>) -> Result<Sender>
where
    TokioIo<T>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(io)
        .await
        .map_err(|e| Failure::because("what listens there does not speak HTTP", e))?;
    // Its errors reach us through the sender and the body.
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

async fn whole(body: Incoming) -> Result<Bytes> {
    Limited::new(body, ANSWER_MAX)
        .collect()
        .await
        .map(|collected| collected.to_bytes())
        .map_err(|e| Failure::because("the daemon's answer broke off", e))
}

/// An error answer, as well as it can be read.
async fn refused(answer: Response<Incoming>) -> Failure {
    let status = answer.status();
    let retry = answer
        .headers()
        .get("retry-after")
        .and_then(|v| v.to_str().ok())
        .map(|seconds| format!("try again in {seconds} s"));
    let bytes = whole(answer.into_body()).await.unwrap_or_default();
    let mut body = match serde_json::from_slice(&bytes) {
        Ok(Value::Object(body)) => body,
        _ => Map::new(),
    };
    if status.as_u16() == 401 {
        let hint = "set AEGIS_TOKEN, or let AEGIS_HOME hold the file host-token";
        body.entry("hint").or_insert_with(|| hint.into());
    }
    if let Some(retry) = retry {
        body.entry("hint").or_insert_with(|| retry.into());
    }
    let sentence = match body.get("error").and_then(Value::as_str) {
        Some(sentence) => sentence.to_owned(),
        None => format!("the daemon answered {status}"),
    };
    body.entry("error").or_insert_with(|| sentence.clone().into());
    Failure::Refused(Refused { status: status.as_u16(), sentence, body })
}

/// The host and port of `http://HOST:PORT`.
fn authority(url: &str) -> Result<String> {
    let bad = |why: &str| Failure::Usage(format!("--url {url}: {why}"));
    let Some(rest) = url.strip_prefix("http://") else {
        return Err(bad(if url.starts_with("https://") {
            "https is not spoken here: use a tunnel (ssh -L) or a proxy on this host"
        } else {
            "must be http://HOST:PORT"
        }));
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.is_empty() || authority.contains(['/', '?', '#', '@', ' ']) {
        return Err(bad("must be http://HOST:PORT and nothing more"));
    }
    let port = authority.rsplit_once(':').map(|(_, port)| port);
    match port {
        Some(port) if port.parse::<u16>().is_ok() => Ok(authority.to_owned()),
        _ => Ok(format!("{authority}:80")),
    }
}

/// The host token: `AEGIS_TOKEN`, else the file that the daemon made. Without either the request
/// goes without, which public routes and `--no-auth` take.
fn token(home: &Home) -> Result<Option<String>> {
    if let Ok(token) = std::env::var("AEGIS_TOKEN")
        && !token.trim().is_empty()
    {
        return Ok(Some(token.trim().to_owned()));
    }
    let path = home.host_token();
    match std::fs::read_to_string(&path) {
        Ok(token) => Ok(Some(token.trim().to_owned()).filter(|token| !token.is_empty())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::file("read", &path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        assert_eq!(authority("http://127.0.0.1:3000").unwrap(), "127.0.0.1:3000");
        assert_eq!(authority("http://[::1]:3000/").unwrap(), "[::1]:3000");
        assert_eq!(authority("http://host").unwrap(), "host:80");
        for bad in ["host:1", "https://host", "http://", "http://h/path", "http://u@h"] {
            assert!(authority(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_daemon_that_is_not_there_is_said_with_its_fix() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(dir.path())).unwrap();
        let failure = Client::new(&home, None).unwrap().get("/v1/status").await.unwrap_err();
        assert!(failure.words().contains("fix: start it: aegis up"), "{}", failure.words());
    }
}
