//! A small HTTP client: one connection per request, over TCP or a unix socket.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use aegis_wire::door::Knock;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

/// No answer takes longer: the daemon's own deadlines are shorter.
const DEADLINE: Duration = Duration::from_secs(150);

/// Any failure below HTTP.
pub type Broken = Box<dyn std::error::Error + Send + Sync>;

/// Where a client knocks.
#[derive(Clone, Debug)]
enum Door {
    Tcp(SocketAddr),
    Unix(PathBuf),
    /// A machine's hatch: this line is said first.
    Hatch(PathBuf, String),
}

/// Asks one daemon, with or without a bearer token.
#[derive(Clone, Debug)]
pub struct Client {
    door: Door,
    headers: Vec<(HeaderName, String)>,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("no JSON ({e}): {} {:?}", self.status, self.body))
    }

    /// The body as JSON, of an answer that must have this status.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{text}");
        self.json()
    }

    /// An error of this status must say a sentence and a word, and name this field.
    #[track_caller]
    pub fn refused(&self, status: u16, field: &str) -> Value {
        let body = self.expect(status);
        assert!(body["error"].as_str().is_some_and(|e| !e.is_empty()), "{body}");
        assert!(body["code"].as_str().is_some_and(|e| !e.is_empty()), "{body}");
        if !field.is_empty() {
            assert_eq!(body["field"], field, "{body}");
        }
        body
    }

    /// The lines of an NDJSON body.
    pub fn lines(&self) -> Vec<Value> {
        self.body
            .split(|b| *b == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect()
    }
}

impl Client {
    /// Over TCP, without a token.
    pub fn tcp(address: SocketAddr) -> Client {
        Client { door: Door::Tcp(address), headers: Vec::new() }
    }

    /// Over a unix socket.
    pub fn unix(path: PathBuf) -> Client {
        Client { door: Door::Unix(path), headers: Vec::new() }
    }

    /// Through a machine's hatch, as its gateway does it.
    pub fn hatch(path: PathBuf, knock: &Knock) -> Client {
        let line = serde_json::to_string(knock).unwrap() + "\n";
        Client { door: Door::Hatch(path, line), headers: Vec::new() }
    }

    /// The same, with one more header; replaces one of the same name.
    pub fn with(&self, name: HeaderName, value: &str) -> Client {
        let mut client = self.clone();
        client.headers.retain(|(n, _)| *n != name);
        client.headers.push((name, value.to_owned()));
        client
    }

    /// The same, with a bearer token.
    pub fn bearer(&self, token: &str) -> Client {
        self.with(header::AUTHORIZATION, &format!("Bearer {token}"))
    }

    /// GET.
    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.must(Method::GET, path, None)
    }

    /// POST of a JSON body.
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.must(Method::POST, path, Some(body))
    }

    /// PUT of a JSON body.
    #[track_caller]
    pub fn put(&self, path: &str, body: &Value) -> Answer {
        self.must(Method::PUT, path, Some(body))
    }

    /// POST without a body.
    #[track_caller]
    pub fn act(&self, path: &str) -> Answer {
        self.must(Method::POST, path, None)
    }

    /// DELETE.
    #[track_caller]
    pub fn delete(&self, path: &str) -> Answer {
        self.must(Method::DELETE, path, None)
    }

    #[track_caller]
    fn must(&self, method: Method, path: &str, body: Option<&Value>) -> Answer {
        match self.ask(method, path, body) {
            Ok(answer) => answer,
            Err(error) => panic!("{path}: {error}"),
        }
    }

    /// Asks; a daemon that goes away in between is no failure of the test yet.
    pub fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Answer, Broken> {
        let bytes = body.map(|b| Bytes::from(b.to_string())).unwrap_or_default();
        self.send(method, path, bytes)
    }

    /// Asks with whatever bytes as the body.
    pub fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Answer, Broken> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let exchange = async {
                let (head, body) = self.begin(method, path, body).await?.into_parts();
                let body = body.collect().await?.to_bytes();
                Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
            };
            tokio::time::timeout(DEADLINE, exchange).await?
        })
    }

    /// Asks, and gives the answer as it begins; the connection ends with its body.
    pub(crate) async fn begin(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, Broken> {
        let mut request = Request::builder().method(method).uri(path);
        if !self.headers.iter().any(|(n, _)| *n == header::HOST) {
            request = request.header(header::HOST, "localhost");
        }
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(body))?;
        match &self.door {
            Door::Tcp(address) => exchange(TcpStream::connect(address).await?, request).await,
            Door::Unix(path) => exchange(UnixStream::connect(path).await?, request).await,
            Door::Hatch(path, line) => {
                let mut stream = UnixStream::connect(path).await?;
                stream.write_all(line.as_bytes()).await?;
                exchange(stream, request).await
            }
        }
    }
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Broken>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the body, or with the runtime.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}
