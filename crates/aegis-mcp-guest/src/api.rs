//! Asking the guest API: HTTP over the machine's loopback, or over its unix socket.

use std::path::PathBuf;
use std::time::Duration;

use aegis_wire::bounds::GUEST_CALL_DEADLINE;
use aegis_wire::channel::guest::{API_ENV, API_SOCKET, API_URL};
use aegis_wire::error::ErrorBody;
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};

/// Largest answer that is read whole, bytes.
const ANSWER_MAX: usize = 1 << 20;
/// Longest line of a stream, bytes: far more than the host's cut of one.
const LINE_MAX: usize = 1 << 20;
/// How long a connection on the same machine may take to come about.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// The harness answers in this time, whatever the host does.
const ANSWER_DEADLINE: Duration = GUEST_CALL_DEADLINE.saturating_add(Duration::from_secs(15));

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The API said no; the agent gets its words as they are.
    #[error("the guest API refused")]
    Refused(Value),
    /// Nothing listens there, or it went away.
    #[error("{0}")]
    Unreachable(String),
    /// What came is not what the API says.
    #[error("{0}")]
    Odd(String),
}

impl ApiError {
    /// What an agent gets to read.
    pub fn body(self) -> Value {
        let (code, hint, sentence) = match self {
            ApiError::Refused(body) => return body,
            ApiError::Unreachable(sentence) => {
                ("unreachable", "try again; this works only inside an Aegis machine", sentence)
            }
            ApiError::Odd(sentence) => ("unexpected_answer", "try again", sentence),
        };
        let mut body = ErrorBody::new(code, sentence);
        body.hint = Some(hint.to_owned());
        serde_json::to_value(body).unwrap_or_default()
    }
}

/// `AEGIS_GUEST_API` says nonsense.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is neither http://HOST:PORT nor unix:/PATH")]
pub struct BadPlace(String);

#[derive(Clone, Debug)]
enum Place {
    Tcp(String),
    Socket(PathBuf),
}

/// The guest API of this machine.
#[derive(Clone, Debug)]
pub struct Api {
    /// Tried in this order.
    places: Vec<Place>,
}

impl Api {
    /// Where `AEGIS_GUEST_API` says; else its usual places.
    pub fn from_env() -> Result<Api, BadPlace> {
        match std::env::var(API_ENV) {
            Ok(place) if !place.is_empty() => Ok(Api { places: vec![parse(&place)?] }),
            // A process in a network of its own has only the socket.
            _ => Ok(Api { places: vec![parse(API_URL)?, Place::Socket(API_SOCKET.into())] }),
        }
    }

    /// Asks, and reads the whole answer.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, ApiError> {
        let asked = async {
            let bytes = whole(self.send(method, path, body).await?).await?;
            if bytes.is_empty() {
                return Ok(Value::Null);
            }
            serde_json::from_slice(&bytes)
                .map_err(|e| ApiError::Odd(format!("the guest API's answer is no JSON: {e}")))
        };
        tokio::time::timeout(ANSWER_DEADLINE, asked).await.unwrap_or_else(|_| Err(late()))
    }

    /// Asks for a stream of JSON lines.
    pub async fn lines(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Lines, ApiError> {
        let asked = self.send(method, path, body);
        let answer =
            tokio::time::timeout(ANSWER_DEADLINE, asked).await.unwrap_or_else(|_| Err(late()))?;
        Ok(Lines { body: answer.into_body(), buffer: BytesMut::new(), searched: 0 })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response<Incoming>, ApiError> {
        let mut request = Request::builder().method(method).uri(path);
        let body = match body {
            None => Bytes::new(),
            Some(body) => {
                request = request.header(CONTENT_TYPE, "application/json");
                Bytes::from(body.to_string())
            }
        };
        let (mut sender, host) = tokio::time::timeout(CONNECT_DEADLINE, self.connect())
            .await
            .unwrap_or_else(|_| Err(late()))?;
        let request = request
            .header(HOST, host)
            .body(Full::new(body))
            .map_err(|e| ApiError::Odd(format!("this makes no request: {e}")))?;
        let answer = sender.send_request(request).await.map_err(|e| {
            ApiError::Unreachable(format!("the connection to the guest API broke: {e}"))
        })?;
        if answer.status().is_success() { Ok(answer) } else { Err(refused(answer).await) }
    }

    /// A connection, and the name under which the API knows itself there: it refuses all others, so
    /// that no web page can ask it.
    async fn connect(&self) -> Result<(Sender, &str), ApiError> {
        let mut why = String::new();
        for place in &self.places {
            let connected = match place {
                Place::Tcp(authority) => match TcpStream::connect(authority).await {
                    Ok(stream) => {
                        // Small requests should not wait for company.
                        let _ = stream.set_nodelay(true);
                        return Ok((shake(TokioIo::new(stream)).await?, authority));
                    }
                    Err(e) => (authority.clone(), e),
                },
                Place::Socket(path) => match UnixStream::connect(path).await {
                    Ok(stream) => return Ok((shake(TokioIo::new(stream)).await?, "localhost")),
                    Err(e) => (path.display().to_string(), e),
                },
            };
            let (at, error) = connected;
            why += &format!("; {at}: {error}");
        }
        Err(ApiError::Unreachable(format!("the guest API does not answer{why}")))
    }
}

type Sender = http1::SendRequest<Full<Bytes>>;

async fn shake<T>(io: TokioIo<T>) -> Result<Sender, ApiError>
where
    TokioIo<T>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(io)
        .await
        .map_err(|e| ApiError::Unreachable(format!("no HTTP is spoken there: {e}")))?;
    // Its errors reach us through the sender and the body.
    tokio::spawn(connection);
    Ok(sender)
}

fn late() -> ApiError {
    ApiError::Unreachable("the guest API did not answer in time".to_owned())
}

async fn whole(answer: Response<Incoming>) -> Result<Bytes, ApiError> {
    Limited::new(answer.into_body(), ANSWER_MAX)
        .collect()
        .await
        .map(|collected| collected.to_bytes())
        .map_err(|e| ApiError::Unreachable(format!("the guest API's answer broke off: {e}")))
}

async fn refused(answer: Response<Incoming>) -> ApiError {
    let status = answer.status();
    let bytes = whole(answer).await.unwrap_or_default();
    match serde_json::from_slice(&bytes) {
        Ok(body @ Value::Object(_)) => ApiError::Refused(body),
        _ => ApiError::Odd(format!("the guest API answered {status} without a reason")),
    }
}

fn parse(place: &str) -> Result<Place, BadPlace> {
    let bad = || BadPlace(place.to_owned());
    if let Some(path) = place.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return if path.starts_with('/') { Ok(Place::Socket(path.into())) } else { Err(bad()) };
    }
    let authority = place.strip_prefix("http://").ok_or_else(bad)?;
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    if authority.is_empty() || authority.contains(['/', '?', '#', '@', ' ']) {
        return Err(bad());
    }
    match authority.rsplit_once(':') {
        Some((_, port)) if port.parse::<u16>().is_ok() => Ok(Place::Tcp(authority.to_owned())),
        _ => Ok(Place::Tcp(format!("{authority}:80"))),
    }
}

/// The lines of an answer that goes on.
pub struct Lines {
    body: Incoming,
    buffer: BytesMut,
    searched: usize,
}

impl Lines {
    /// The next line without its newline; nothing at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            let found = self.buffer[self.searched..].iter().position(|b| *b == b'\n');
            if let Some(found) = found {
                let mut line = self.buffer.split_to(self.searched + found + 1);
                line.truncate(line.len() - 1);
                self.searched = 0;
                if line.is_empty() {
                    continue;
                }
                return Ok(Some(line.freeze()));
            }
            self.searched = self.buffer.len();
            if self.searched > LINE_MAX {
                return Err(ApiError::Odd("the guest API sent a line that is too long".to_owned()));
            }
            match self.body.frame().await {
                None => {
                    self.searched = 0;
                    let rest = self.buffer.split();
                    return Ok((!rest.is_empty()).then(|| rest.freeze()));
                }
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(e)) => {
                    return Err(ApiError::Unreachable(format!("the stream broke off: {e}")));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_apart() {
        assert!(
            matches!(parse("http://127.0.0.1:7777"), Ok(Place::Tcp(at)) if at == "127.0.0.1:7777")
        );
        assert!(
            matches!(parse("unix:/run/x.sock"), Ok(Place::Socket(at)) if at.ends_with("run/x.sock"))
        );
        assert!(matches!(parse("unix:///run/x.sock"), Ok(Place::Socket(_))));
        for bad in ["", "https://h", "http://", "http://u@h", "unix:run", "127.0.0.1:7777"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
