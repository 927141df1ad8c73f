//! The guest API over real sockets, before a host that is played.

use std::path::PathBuf;
use std::time::Duration;

use aegis_wire::bounds::{GUEST_BODY_MAX, GUEST_CONNECTIONS_MAX, GUEST_HEAD_MAX, TICKETS_MAX};
use aegis_wire::channel::guest::method;
use aegis_wire::channel::rpc::{CODE_DENIED, CODE_NOT_FOUND, CODE_RATE, RpcError};
use aegis_wire::pipe::mux::{self, Mux};
use aegis_wire::pipe::peer::{Handler, NoCalls};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Mutex as Turn, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::http::Times;
use super::*;

const READ: Duration = Duration::from_millis(400);
const PATIENT: Duration = Duration::from_secs(20);

/// A host that answers with what it was asked.
struct Host {
    guest: Arc<Guest>,
    mux: Mux,
    arrived: Turn<mpsc::Receiver<Stream>>,
    // Told when the other side of a stream is gone.
    left: mpsc::Sender<()>,
}

impl Handler for Host {
    async fn request(&self, name: String, params: Value) -> Result<Value, RpcError> {
        let child = params["child_id"].as_str().unwrap_or_default().to_owned();
        match child.as_str() {
            "denied" => {
                let data = json!({"error": "no", "code": "capability_denied", "rule": "spawn"});
                Err(RpcError { code: CODE_DENIED, message: "no".to_owned(), data })
            }
            "nobody" => Err(RpcError::new(CODE_NOT_FOUND, "no such child")),
            "hasty" => Err(RpcError::new(CODE_RATE, "too fast")),
            "slow" => std::future::pending().await,
            "lost" => Ok(json!({"ticket": "never"})),
            "long" => Ok(json!("x".repeat(1000 * 1000))),
            _ if matches!(name.as_str(), method::EXEC_CHILD | method::CHILD_LOGS) => {
                let stream = self.stream(&child).await;
                let lines = params["lines"].as_u64();
                tokio::spawn(pour(stream, lines, self.left.clone()));
                Ok(json!({"ticket": child}))
            }
            _ => Ok(json!({"method": name, "params": params})),
        }
    }

    fn notification(&self, _: String, _: Value) {}
}

impl Host {
    /// Opens a stream, and sees to it that the machine has it.
    async fn stream(&self, ticket: &str) -> Stream {
        let mut arrived = self.arrived.lock().await;
        let mut ours = self.mux.open().await.unwrap();
        ours.write_all(b".").await.unwrap();
        ours.flush().await.unwrap();
        let mut theirs = arrived.recv().await.unwrap();
        theirs.read_u8().await.unwrap();
        self.guest.arrived(ticket.to_owned(), theirs);
        ours
    }
}

/// So many lines, or lines for ever.
async fn pour(mut stream: Stream, lines: Option<u64>, left: mpsc::Sender<()>) {
    let mut n = 0;
    while lines.is_none_or(|lines| n < lines) {
        n += 1;
        let line = format!("{{\"line\":{n}}}\n");
        if stream.write_all(line.as_bytes()).await.is_err() || stream.flush().await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    let _ = stream.shutdown().await;
    let _ = stream.read(&mut [0; 16]).await;
    let _ = left.send(()).await;
}

struct Inside {
    guest: Arc<Guest>,
    port: u16,
    socket: PathBuf,
    host: Peer,
    wire: JoinHandle<()>,
    session: Option<Session>,
    left: mpsc::Receiver<()>,
    _dir: tempfile::TempDir,
}

struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn refusal(&self) -> (u16, String) {
        let body = self.json();
        assert!(body["error"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
        (self.status, body["code"].as_str().unwrap().to_owned())
    }
}

impl Inside {
    async fn new() -> Inside {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("aegis/guestd.sock");
        let doors = Doors::open_at(0, &socket).unwrap();
        let port = doors.port();
        let guest = Arc::new(Guest::new());
        let times = Times { read: READ, write: PATIENT };
        tokio::spawn(doors.serve_within(Arc::clone(&guest), times));
        let (a, b) = tokio::io::duplex(1 << 17);
        let (mux, _) = mux::start(a, true);
        let (_machine, arrived) = mux::start(b, false);
        let (told, left) = mpsc::channel(64);
        let host = Host { guest: Arc::clone(&guest), mux, arrived: Turn::new(arrived), left: told };
        let (ours, mut one) = tokio::io::duplex(1 << 17);
        let (mut other, theirs) = tokio::io::duplex(1 << 17);
        let wire = tokio::spawn(async move {
            let _ = tokio::io::copy_bidirectional(&mut one, &mut other).await;
        });
        let host = Peer::start(theirs, host);
        let session = Some(guest.session(Peer::start(ours, NoCalls)));
        guest.hold(Some("secret".to_owned()));
        Inside { guest, port, socket, host, wire, session, left, _dir: dir }
    }

    /// One that opens no streams.
    fn another_host(&self) -> Host {
        let (mux, _) = mux::start(tokio::io::duplex(64).0, true);
        let (arrived, left) = (Turn::new(mpsc::channel(1).1), mpsc::channel(1).0);
        Host { guest: Arc::clone(&self.guest), mux, arrived, left }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).await.unwrap()
    }

    async fn send(&self, request: &[u8]) -> Reply {
        exchange(self.connect().await, request).await
    }

    async fn ask(&self, verb: &str, path: &str, body: &str) -> Reply {
        self.send(request(verb, path, "", body).as_bytes()).await
    }
}

fn request(verb: &str, path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1:7777\r\nConnection: close\r\n{headers}\
         Content-Length: {length}\r\n\r\n{body}"
    )
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &[u8]) -> Reply {
    // Who is refused early may be refused before all was said.
    let _ = stream.write_all(request).await;
    let mut all = Vec::new();
    let reading = stream.read_to_end(&mut all);
    tokio::time::timeout(PATIENT, reading).await.expect("an answer").unwrap();
    parse(&all)
}

fn parse(all: &[u8]) -> Reply {
    let at = all.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8(all[..at].to_vec()).unwrap().to_ascii_lowercase();
    let status = head[9..12].parse().unwrap();
    let mut body = all[at + 4..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        body = dechunk(&body).expect("a whole body");
    }
    Reply { status, head, body }
}

/// `None` when the last chunk is missing.
fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let at = rest.windows(2).position(|w| w == b"\r\n")?;
        let length = std::str::from_utf8(&rest[..at]).ok()?;
        let length = usize::from_str_radix(length, 16).ok()?;
        if length == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(at + 2..at + 2 + length)?);
        rest = rest.get(at + 4 + length..)?;
    }
}

#[tokio::test]
async fn requests_become_calls_with_the_token() {
    let inside = Inside::new().await;
    let got = inside.ask("GET", "/v1/self", "").await;
    assert_eq!(got.status, 200);
    assert!(got.head.contains("content-type: application/json"), "{}", got.head);
    assert_eq!(got.json(), json!({"method": "guest.self_info", "params": {"token": "secret"}}));
    let spawn = r#"{"command":["a"],"token":"forged"}"#;
    let got = inside.ask("POST", "/v1/instances", spawn).await;
    assert_eq!(got.status, 201);
    let params = json!({"token": "secret", "request": {"command": ["a"], "token": "forged"}});
    assert_eq!(got.json(), json!({"method": "guest.spawn", "params": params}));
    let lease = r#"{"ttl_ms":5,"token":"forged"}"#;
    let got = inside.ask("POST", "/v1/self/keepalive", lease).await;
    assert_eq!(got.json()["params"], json!({"token": "secret", "ttl_ms": 5}));
    inside.guest.hold(Some("renewed".to_owned()));
    let got = inside.ask("DELETE", "/v1/self/expose/80", "").await;
    assert_eq!(got.json()["params"], json!({"token": "renewed", "guest_port": 80}));
    // The same over the socket, under whatever host name.
    let unix = UnixStream::connect(&inside.socket).await.unwrap();
    let get = b"GET /v1/self HTTP/1.1\r\nHost: aegis\r\nConnection: close\r\n\r\n";
    assert_eq!(exchange(unix, get).await.status, 200);
}

#[tokio::test]
async fn errors_of_the_host_keep_their_words() {
    let inside = Inside::new().await;
    let got = inside.ask("GET", "/v1/instances/denied", "").await;
    assert_eq!(got.refusal(), (403, "capability_denied".to_owned()));
    assert_eq!(got.json()["rule"], "spawn");
    let got = inside.ask("DELETE", "/v1/instances/nobody", "").await;
    assert_eq!(got.refusal(), (404, "instance_not_found".to_owned()));
    let got = inside.ask("POST", "/v1/instances/hasty/exec", r#"{"command":["a"]}"#).await;
    assert_eq!(got.refusal(), (429, "rate_limited".to_owned()));
    assert!(got.head.contains("retry-after: 1"));
    assert_eq!(inside.ask("GET", "/v1/instances/long", "").await.body.len(), 1000 * 1000 + 2);
}

#[tokio::test]
async fn without_a_token_nothing_is_asked() {
    let inside = Inside::new().await;
    inside.guest.hold(None);
    let got = inside.ask("GET", "/v1/self", "").await;
    assert_eq!(got.refusal(), (503, "not_ready".to_owned()));
}

#[tokio::test]
async fn a_lost_session_fails_its_calls_and_the_next_one_serves() {
    let mut inside = Inside::new().await;
    let slow = inside.connect().await;
    let slow = tokio::spawn(async move {
        exchange(slow, request("GET", "/v1/instances/slow", "", "").as_bytes()).await
    });
    while inside.guest.calls.available_permits() == RPC_IN_FLIGHT_MAX {
        tokio::task::yield_now().await;
    }
    // Both ways end in the middle of the call.
    inside.wire.abort();
    let got = tokio::time::timeout(BROKER_WAIT, slow).await.expect("at once").unwrap();
    assert_eq!(got.refusal(), (503, "unavailable".to_owned()));
    assert!(got.json()["error"].as_str().unwrap().contains("may have been done"));
    // The session is dead, though nobody has noticed yet.
    let dead = inside.ask("GET", "/v1/self", "");
    let got = tokio::time::timeout(BROKER_WAIT, dead).await.expect("at once");
    assert_eq!(got.refusal(), (503, "unavailable".to_owned()));
    let first = inside.session.take();
    drop(first);
    let waiting = inside.connect().await;
    let waiting = tokio::spawn(async move {
        exchange(waiting, request("GET", "/v1/self", "", "").as_bytes()).await
    });
    tokio::task::yield_now().await;
    let (ours, theirs) = tokio::io::duplex(1 << 17);
    let host = inside.another_host();
    inside.host = Peer::start(theirs, host);
    let second = inside.guest.session(Peer::start(ours, NoCalls));
    assert_eq!(waiting.await.unwrap().status, 200);
    // A third one, and only then the end of the second: it is not the end of the third.
    let (ours, theirs) = tokio::io::duplex(1 << 17);
    let _host = Peer::start(theirs, inside.another_host());
    let _third = inside.guest.session(Peer::start(ours, NoCalls));
    drop(second);
    assert_eq!(inside.ask("GET", "/v1/self", "").await.status, 200);
}

#[tokio::test]
async fn streams_come_as_they_come() {
    let mut inside = Inside::new().await;
    let got = inside.ask("POST", "/v1/instances/one/exec", r#"{"lines":3}"#).await;
    assert_eq!(got.status, 200);
    assert!(got.head.contains("content-type: application/x-ndjson"), "{}", got.head);
    assert_eq!(got.body, b"{\"line\":1}\n{\"line\":2}\n{\"line\":3}\n");
    inside.left.recv().await.unwrap();
    // Who leaves in the middle of an endless one ends it.
    let mut stream = inside.connect().await;
    let get = request("GET", "/v1/instances/two/logs?follow=1", "", "");
    stream.write_all(get.as_bytes()).await.unwrap();
    let mut some = vec![0; 4096];
    assert!(stream.read(&mut some).await.unwrap() > 0);
    drop(stream);
    tokio::time::timeout(PATIENT, inside.left.recv()).await.expect("it ends").unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn who_leaves_a_quiet_stream_ends_it_too() {
    let mut inside = Inside::new().await;
    let (mux, mut arrived, _peer) = {
        let (a, b) = tokio::io::duplex(1 << 16);
        let (mux, _) = mux::start(a, true);
        let (peer, arrived) = mux::start(b, false);
        (mux, arrived, peer)
    };
    let mut ours = mux.open().await.unwrap();
    ours.write_all(b"{}\n").await.unwrap();
    ours.flush().await.unwrap();
    inside.guest.arrived("never".to_owned(), arrived.recv().await.unwrap());
    let mut stream = inside.connect().await;
    let get = request("GET", "/v1/instances/lost/logs?follow=1", "", "");
    stream.write_all(get.as_bytes()).await.unwrap();
    assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
    drop(stream);
    let read = async { ours.read(&mut [0; 16]).await.unwrap_or(0) };
    assert_eq!(tokio::time::timeout(PATIENT, read).await.expect("it ends"), 0);
    inside.left.close();
}

#[tokio::test]
async fn streams_that_nobody_claims_take_no_more_than_their_room() {
    let inside = Inside::new().await;
    let (a, b) = tokio::io::duplex(1 << 17);
    let (mux, _) = mux::start(a, true);
    let (_machine, mut arrived) = mux::start(b, false);
    let mut kept = Vec::new();
    for n in 0..TICKETS_MAX + 1 {
        let mut ours = mux.open().await.unwrap();
        ours.write_all(b".").await.unwrap();
        ours.flush().await.unwrap();
        inside.guest.arrived(format!("t{n}"), arrived.recv().await.unwrap());
        kept.push(ours);
    }
    let last = kept.last_mut().unwrap();
    let closed = tokio::time::timeout(PATIENT, last.read(&mut [0; 1])).await.expect("closed");
    assert_eq!(closed.unwrap_or(0), 0);
    let claimed = tokio::time::timeout(PATIENT, inside.guest.tickets.claim("t0")).await;
    assert_eq!(claimed.unwrap().read_u8().await.unwrap(), b'.');
    let none = tokio::time::timeout(READ, inside.guest.tickets.claim("t0")).await;
    assert!(none.is_err(), "a ticket is used once");
}

#[tokio::test]
async fn pages_of_a_browser_get_nothing() {
    let inside = Inside::new().await;
    for bad in ["Origin: http://127.0.0.1:7777\r\n", "Origin: null\r\n"] {
        let got = inside.send(request("GET", "/v1/self", bad, "").as_bytes()).await;
        assert_eq!(got.refusal(), (403, "foreign_origin".to_owned()));
    }
    let hosts = ["evil.example", "evil.example:7777", "127.0.0.1:80", "localhost@evil", ""];
    for host in hosts {
        let get = format!("GET /v1/self HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        assert_eq!(inside.send(get.as_bytes()).await.status, 403, "{host}");
    }
    let twice = request("GET", "/v1/self", "Host: evil.example\r\n", "");
    assert_eq!(inside.send(twice.as_bytes()).await.status, 403);
    let absolute = request("GET", "http://evil.example/v1/self", "", "");
    assert_eq!(inside.send(absolute.as_bytes()).await.status, 403);
    for host in ["localhost", "localhost:7777", "127.0.0.1"] {
        let get = format!("GET /v1/self HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        assert_eq!(inside.send(get.as_bytes()).await.status, 200, "{host}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_said_so() {
    let inside = Inside::new().await;
    let got = inside.ask("GET", "/v1/secrets", "").await;
    assert_eq!(got.refusal(), (404, "not_found".to_owned()));
    let got = inside.ask("PATCH", "/v1/instances", "{}").await;
    assert_eq!(got.refusal(), (405, "method_not_allowed".to_owned()));
    assert!(got.head.contains("allow: get, post"), "{}", got.head);
}

#[tokio::test]
async fn what_is_too_large_is_refused_and_what_just_fits_is_not() {
    let inside = Inside::new().await;
    let body = |length: usize| format!("\"{}\"", "x".repeat(length - 2));
    let got = inside.ask("POST", "/v1/instances", &body(GUEST_BODY_MAX)).await;
    assert_eq!(got.status, 201);
    let got = inside.ask("POST", "/v1/instances", &body(GUEST_BODY_MAX + 1)).await;
    assert_eq!(got.refusal(), (413, "body_too_large".to_owned()));
    let got = inside.ask("POST", "/v1/instances", &body(3 * GUEST_BODY_MAX)).await;
    assert_eq!(got.status, 413);
    // In chunks, of which nobody knows the sum before.
    let mut chunked = b"POST /v1/instances HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
        Transfer-Encoding: chunked\r\n\r\n"
        .to_vec();
    for _ in 0..5 {
        chunked.extend_from_slice(b"10000\r\n");
        chunked.extend_from_slice(&[b' '; 0x10000]);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    assert_eq!(inside.send(&chunked).await.status, 413);
    // Numbers that take more room than they came in.
    let numbers = format!("[{}1]", "1e9,".repeat(GUEST_BODY_MAX / 4 - 2));
    assert_eq!(inside.ask("POST", "/v1/instances", &numbers).await.status, 413);
    let header = format!("X-Long: {}\r\n", "x".repeat(GUEST_HEAD_MAX));
    let got = inside.send(request("GET", "/v1/self", &header, "").as_bytes()).await;
    assert_eq!(got.status, 431);
    let many: String = (0..500).map(|n| format!("X-{n}: y\r\n")).collect();
    assert_eq!(inside.send(request("GET", "/v1/self", &many, "").as_bytes()).await.status, 431);
    let long = format!("/v1/self?{}", "x".repeat(2 * GUEST_HEAD_MAX));
    let got = inside.send(request("GET", &long, "", "").as_bytes()).await;
    assert!(matches!(got.status, 414 | 431), "{}", got.status);
    // All of it is free again.
    assert_eq!(inside.ask("POST", "/v1/instances", &body(GUEST_BODY_MAX)).await.status, 201);
}

#[tokio::test]
async fn rubbish_is_refused() {
    let inside = Inside::new().await;
    let deep = "[".repeat(100_000);
    for body in ["", "{", "{\"a\":}", "nul", &deep] {
        let got = inside.ask("POST", "/v1/instances", body).await;
        assert_eq!(got.refusal(), (400, "malformed_request".to_owned()), "{body:.10}");
    }
    let head = "POST /v1/instances HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: 9\r\n\r\n";
    let invalid = [head.as_bytes(), b"{\"a\":\"\xff\"}"].concat();
    assert_eq!(inside.send(&invalid).await.refusal().0, 400);
    let got = inside.ask("POST", "/v1/self/keepalive", "[]").await;
    assert_eq!(got.refusal(), (400, "malformed_request".to_owned()));
    for noise in [&b"\0\0\0\0\r\n\r\n"[..], b"GET\r\n\r\n", &[0xFF; 4096], b"\r\n\r\n\r\nx y z\r\n"]
    {
        let mut stream = inside.connect().await;
        let _ = stream.write_all(noise).await;
        let _ = stream.shutdown().await;
        let mut end = Vec::new();
        let reading = stream.read_to_end(&mut end);
        // An answer or none: but an end.
        let _ = tokio::time::timeout(PATIENT, reading).await.expect("an end");
    }
    assert_eq!(inside.ask("GET", "/v1/self", "").await.status, 200);
}

#[tokio::test]
async fn who_is_slow_is_not_waited_for() {
    let inside = Inside::new().await;
    let heads = [
        "",
        "GET /v1/self HT",
        "GET /v1/self HTTP/1.1\r\nHost: localhost\r\n",
        // Answered, and idle then.
        "GET /v1/self HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ];
    for head in heads {
        let mut stream = inside.connect().await;
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut end = Vec::new();
        let reading = stream.read_to_end(&mut end);
        let _ = tokio::time::timeout(PATIENT, reading).await.expect("an end");
    }
    let half = request("POST", "/v1/instances", "", "{}");
    let half = half.trim_end_matches('}');
    let got = inside.send(half.as_bytes()).await;
    assert_eq!(got.refusal(), (408, "timeout".to_owned()));
    // One byte from time to time counts as slow too.
    let mut stream = inside.connect().await;
    let (tell, told) = oneshot::channel::<()>();
    let head = "POST /v1/instances HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let dripping = tokio::spawn(async move {
        tokio::select! {
            _ = told => {}
            () = async {
                while write.write_all(b" ").await.is_ok() {
                    tokio::time::sleep(READ / 10).await;
                }
            } => {}
        }
    });
    let mut all = vec![0; 4096];
    let reading = read.read(&mut all);
    let n = tokio::time::timeout(PATIENT, reading).await.expect("an end").unwrap();
    assert_eq!(parse(&all[..n]).status, 408);
    drop(tell);
    dripping.await.unwrap();
}

#[tokio::test]
async fn a_flood_of_connections_passes() {
    let inside = Inside::new().await;
    let mut idle = Vec::new();
    for _ in 0..GUEST_CONNECTIONS_MAX + 20 {
        idle.push(inside.connect().await);
    }
    // Waits until the idle ones are sent away.
    assert_eq!(inside.ask("GET", "/v1/self", "").await.status, 200);
}

#[tokio::test]
async fn a_flood_of_calls_is_told_to_wait() {
    let inside = Inside::new().await;
    let mut waiting = Vec::new();
    for _ in 0..RPC_IN_FLIGHT_MAX {
        let mut stream = inside.connect().await;
        let get = request("GET", "/v1/instances/slow", "", "");
        stream.write_all(get.as_bytes()).await.unwrap();
        waiting.push(stream);
    }
    while inside.guest.calls.available_permits() > 0 {
        tokio::task::yield_now().await;
    }
    let got = inside.ask("GET", "/v1/self", "").await;
    assert_eq!(got.refusal(), (429, "rate_limited".to_owned()));
    // Who leaves has asked all the same.
    drop(waiting);
    let got = inside.ask("GET", "/v1/self", "").await;
    assert_eq!(got.status, 429);
}
