//! A double of the LLM vendors, faithful where the door looks: chat completions, responses and
//! messages, in one piece and as events, with usage, limits of the output and errors in their shapes.
//! Switches make it misbehave.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

mod speech;

use speech::{Api, Speech};

/// Pieces of a stream that wait for their reader.
const PIECES: usize = 4;
/// A test that waits longer for the vendor fails.
const PATIENCE: Duration = Duration::from_secs(60);

type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// How it behaves.
#[derive(Clone, Debug)]
pub struct Manners {
    /// Tokens that it takes a prompt for; by its bytes when absent.
    pub prompt: Option<u64>,
    /// Tokens that it would put out; the limit of a call cuts them.
    pub output: u64,
    /// The limit of a call is nothing to it.
    pub ignores_limits: bool,
    /// It never ends a stream.
    pub forever: bool,
    /// It breaks off after so many tokens.
    pub dies_after: Option<u64>,
    /// It does not tell what was used.
    pub mute: bool,
    /// It tells of so much more than it was.
    pub exaggerates: u64,
    /// It answers with this status, and its key in the error.
    pub status: Option<u16>,
}

impl Default for Manners {
    fn default() -> Manners {
        Manners {
            prompt: Some(10),
            output: 5,
            ignores_limits: false,
            forever: false,
            dies_after: None,
            mute: false,
            exaggerates: 0,
            status: None,
        }
    }
}

/// A request that it got.
#[derive(Clone, Debug)]
pub struct Got {
    /// Where.
    pub path: String,
    /// With which headers.
    pub headers: HeaderMap,
    /// With which body.
    pub body: Value,
}

/// A vendor that listens on loopback until it is dropped.
pub struct Vendor {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

struct Shared {
    manners: Mutex<Manners>,
    got: Mutex<Vec<Got>>,
    /// Whether calls are answered, or wait.
    open: watch::Sender<bool>,
    /// Calls that wait, and streams that somebody reads.
    waiting: watch::Sender<usize>,
    streaming: watch::Sender<usize>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap()
}

/// Counts one for as long as it lives.
struct One(Arc<Shared>, fn(&Shared) -> &watch::Sender<usize>);

impl One {
    fn more(shared: &Arc<Shared>, of: fn(&Shared) -> &watch::Sender<usize>) -> One {
        of(shared).send_modify(|n| *n += 1);
        One(Arc::clone(shared), of)
    }
}

impl Drop for One {
    fn drop(&mut self) {
        (self.1)(&self.0).send_modify(|n| *n -= 1);
    }
}

impl Vendor {
    /// Starts one with good manners.
    pub fn start() -> Vendor {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let shared = Arc::new(Shared {
            manners: Mutex::default(),
            got: Mutex::default(),
            open: watch::Sender::new(true),
            waiting: watch::Sender::new(0),
            streaming: watch::Sender::new(0),
        });
        let address = listener.local_addr().unwrap();
        runtime.spawn(accept(listener, Arc::clone(&shared)));
        Vendor { address, shared, runtime: Some(runtime) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Settings of a host that has it as its two providers, `openai` and `anthropic`.
    pub fn settings(&self) -> String {
        let address = self.address;
        format!(
            "[llm.providers.openai]\nkind = \"openai\"\nbase_url = \"http://{address}/v1\"\n\
             secret = \"OPENAI_API_KEY\"\nmodels = [\"gpt-*\"]\n\
             [llm.providers.anthropic]\nkind = \"anthropic\"\nbase_url = \"http://{address}\"\n\
             secret = \"ANTHROPIC_API_KEY\"\nmodels = [\"claude-*\"]\n"
        )
    }

    /// Changes its manners.
    pub fn behave(&self, manners: Manners) {
        *lock(&self.shared.manners) = manners;
    }

    /// Lets calls wait from now on, or answers those that do.
    pub fn answers(&self, open: bool) {
        self.shared.open.send_replace(open);
    }

    /// Waits until so many calls wait.
    #[track_caller]
    pub fn until_waiting(&self, count: usize) {
        self.until(&self.shared.waiting, count, "wait");
    }

    /// Waits until so many streams are read.
    #[track_caller]
    pub fn until_streaming(&self, count: usize) {
        self.until(&self.shared.streaming, count, "are streamed");
    }

    #[track_caller]
    fn until(&self, counter: &watch::Sender<usize>, count: usize, what: &str) {
        let mut counter = counter.subscribe();
        let runtime = self.runtime.as_ref().unwrap();
        let reached = runtime.block_on(async {
            tokio::time::timeout(PATIENCE, counter.wait_for(|n| *n == count)).await.is_ok()
        });
        assert!(reached, "not {count} calls {what}");
    }

    /// Takes what it got since the last time.
    pub fn take(&self) -> Vec<Got> {
        std::mem::take(&mut *lock(&self.shared.got))
    }
}

impl Drop for Vendor {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        let service = service_fn(move |request| {
            let shared = Arc::clone(&shared);
            async move { Ok::<_, Infallible>(answer(&shared, request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection);
    }
}

fn whole(status: u16, body: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(body.to_string()));
    Response::builder()
        .status(status)
        .header(CONTENT_TYPE, "application/json")
        .header("request-id", "req_1")
        .header("openai-organization", "org-of-the-host")
        .header("set-cookie", "session=of-the-host")
        .body(body.map_err(|never| match never {}).boxed_unsync())
        .unwrap()
}

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else { return whole(400, &Value::Null) };
    let body: Value = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
    let path = head.uri.path().to_owned();
    let got = Got { path: path.clone(), headers: head.headers.clone(), body: body.clone() };
    lock(&shared.got).push(got);
    let manners = lock(&shared.manners).clone();
    let api = match (&head.method, path.as_str()) {
        (&Method::POST, "/v1/chat/completions") => Api::Chat,
        (&Method::POST, "/v1/responses") => Api::Responses,
        (&Method::POST, "/v1/messages") => Api::Messages,
        (&Method::GET, "/v1/models") => {
            let named = ["gpt-5", "gpt-5-mini", "o3", "claude-sonnet-4"];
            let data = named.map(|id| json!({"id": id, "object": "model", "owned_by": "them"}));
            return whole(200, &json!({"object": "list", "data": data, "has_more": false}));
        }
        _ => return whole(404, &json!({"error": {"message": "no such route"}})),
    };
    {
        let _waits = One::more(shared, |s| &s.waiting);
        let mut open = shared.open.subscribe();
        if open.wait_for(|open| *open).await.is_err() {
            return whole(500, &Value::Null);
        }
    }
    if let Some(status) = manners.status {
        let key =
            format!("{:?} {:?}", head.headers.get("authorization"), head.headers.get("x-api-key"));
        return whole(status, &json!({"error": {"type": "them", "message": format!("no: {key}")}}));
    }
    let speech = Speech::new(api, &body, &manners);
    if body["stream"] != true {
        return match manners.dies_after {
            // The connection breaks in the middle of the body.
            Some(_) => broken(&speech.whole()),
            None => whole(200, &speech.whole()),
        };
    }
    stream(shared, speech, &manners)
}

fn broken(body: &Value) -> Response<Body> {
    let half = body.to_string();
    let half = Bytes::from(half[..half.len() / 2].to_owned());
    let halves: [Piece; 2] = [Ok(Frame::data(half)), Err("it died".into())];
    let mut response = whole(200, &Value::Null);
    *response.body_mut() = StreamBody::new(futures_util::stream::iter(halves)).boxed_unsync();
    response
}

type Piece = Result<Frame<Bytes>, Box<dyn std::error::Error + Send + Sync>>;

fn pieces(of: mpsc::Receiver<Piece>) -> impl Stream<Item = Piece> + Send + 'static {
    futures_util::stream::unfold(of, |mut of| async move { Some((of.recv().await?, of)) })
}

fn stream(shared: &Arc<Shared>, speech: Speech, manners: &Manners) -> Response<Body> {
    let (send, receive) = mpsc::channel(PIECES);
    let (shared, manners) = (Arc::clone(shared), manners.clone());
    tokio::spawn(async move {
        let _streams = One::more(&shared, |s| &s.streaming);
        let say = async |text: String| send.send(Ok(Frame::data(Bytes::from(text)))).await.is_ok();
        for event in speech.begin() {
            say(event).await;
        }
        let mut said = 0;
        while manners.forever || said < speech.output {
            if manners.dies_after.is_some_and(|most| said >= most) {
                let _ = send.send(Err("it died".into())).await;
                return;
            }
            if !say(speech.word(said)).await {
                return;
            }
            said += 1;
        }
        for event in speech.end() {
            say(event).await;
        }
    });
    let mut response = whole(200, &Value::Null);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, "text/event-stream; charset=utf-8".parse().unwrap());
    *response.body_mut() = StreamBody::new(pieces(receive)).boxed_unsync();
    response
}
