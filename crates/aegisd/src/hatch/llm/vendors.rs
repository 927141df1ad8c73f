//! Asking vendors: HTTP/1.1 with or without TLS, keys added here, nothing followed.

use std::time::Duration;

use aegis_wire::bounds::DOOR_CONNECT_DEADLINE;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT,
};
use hyper::{Method, Request, Response, Uri};
use hyper_rustls::{HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tower::BoxError;
use tower::timeout::Timeout;
use tower::util::BoxCloneSyncService;
use zeroize::Zeroizing;

use super::super::machine::Machine;
use super::problem::{Kind, Problem};
use crate::config::{Provider, Vendor};
use crate::roots;

/// Connections that nobody uses are closed after this, before the other side does it.
const IDLE: Duration = Duration::from_secs(15);
/// What a vendor may learn of its client; all else stays here.
const PASSED_ON: [HeaderName; 4] = [
    HeaderName::from_static("anthropic-version"),
    HeaderName::from_static("anthropic-beta"),
    HeaderName::from_static("openai-beta"),
    USER_AGENT,
];
/// What a client may learn of its vendor: nothing of whose account it is.
const PASSED_BACK: [&str; 8] = [
    "content-type",
    "openai-processing-ms",
    "openai-version",
    "request-id",
    "retry-after",
    "retry-after-ms",
    "x-request-id",
    "x-should-retry",
];
const VERSION: (HeaderName, HeaderValue) =
    (HeaderName::from_static("anthropic-version"), HeaderValue::from_static("2023-06-01"));

/// Connects within a deadline, TLS included.
type Connector = BoxCloneSyncService<Uri, MaybeHttpsStream<TokioIo<TcpStream>>, BoxError>;

/// Asks vendors, over connections that are kept for a while.
pub(in super::super) struct Vendors {
    client: Client<Connector, Full<Bytes>>,
}

/// Why nothing came back.
pub(super) enum Lost {
    /// It was never asked.
    Unreachable,
    /// It was asked, and did not answer.
    Broken,
}

/// A provider's key, open.
pub(super) struct Key(Option<Zeroizing<String>>);

impl Vendors {
    pub(in super::super) fn new() -> Vendors {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        let tls = HttpsConnectorBuilder::new().with_tls_config(roots::client());
        let connector = tls.https_or_http().enable_http1().wrap_connector(http);
        let connector = Timeout::new(connector, DOOR_CONNECT_DEADLINE);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(BoxCloneSyncService::new(connector));
        Vendors { client }
    }

    /// Asks a provider. What comes back is its answer's head, and a body that is on its way.
    pub(super) async fn ask(
        &self,
        provider: &Provider,
        key: &Key,
        method: Method,
        path: &str,
        from: &HeaderMap,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, Lost> {
        let uri = format!("{}{path}", provider.base_url);
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(headers) = request.headers_mut() {
            for name in &PASSED_ON {
                headers.extend(from.get_all(name).iter().map(|v| (name.clone(), v.clone())));
            }
            // What is read here must be readable.
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            if !body.is_empty() {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            }
            if provider.vendor == Vendor::Anthropic {
                headers.entry(VERSION.0).or_insert(VERSION.1);
            }
            if let Some((name, value)) = key.header(provider.vendor) {
                headers.insert(name, value);
            }
        }
        let request = request.body(Full::from(body)).map_err(|_| Lost::Unreachable)?;
        self.client.request(request).await.map_err(|error| {
            let unreachable = error.is_connect();
            // Its words may hold the address, never the key.
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(provider = %provider.name, error, "a vendor did not answer");
            if unreachable { Lost::Unreachable } else { Lost::Broken }
        })
    }
}

impl Key {
    /// The key of a provider, if it needs one.
    pub(super) fn of(machine: &Machine, provider: &Provider) -> Result<Key, Problem> {
        let Some(name) = &provider.secret else { return Ok(Key(None)) };
        match machine.app().ctx.secret(name) {
            Ok(Some(secret)) => Ok(Key(Some(secret.value))),
            Ok(None) => {
                let message = format!(
                    "aegis: this host keeps no secret {name}, the key of its provider {}",
                    provider.name
                );
                Err(Problem::new(Kind::Unconfigured, message))
            }
            Err(error) => {
                tracing::error!(%error, "a vendor's key was not opened");
                Err(Problem::new(Kind::Ours, "aegis: this host failed at this call"))
            }
        }
    }

    fn header(&self, vendor: Vendor) -> Option<(HeaderName, HeaderValue)> {
        let key = self.0.as_ref()?;
        let (name, mut value) = match vendor {
            Vendor::OpenAi => {
                let bearer = Zeroizing::new(format!("Bearer {}", **key));
                (AUTHORIZATION, HeaderValue::from_str(&bearer).ok()?)
            }
            Vendor::Anthropic => {
                (HeaderName::from_static("x-api-key"), HeaderValue::from_str(key).ok()?)
            }
        };
        value.set_sensitive(true);
        Some((name, value))
    }

    /// Takes the key out of a vendor's words about it.
    pub(super) fn redact(&self, bytes: &[u8]) -> Vec<u8> {
        let Some(key) = self.0.as_ref().filter(|k| !k.is_empty()) else { return bytes.to_vec() };
        let text = String::from_utf8_lossy(bytes);
        if !text.contains(key.as_str()) {
            return bytes.to_vec();
        }
        text.replace(key.as_str(), "[key]").into_bytes()
    }
}

/// Of an answer's headers, what a client may see.
pub(super) fn passed_back(from: &HeaderMap, to: &mut HeaderMap) {
    for name in PASSED_BACK {
        if let Some(value) = from.get(name) {
            to.insert(HeaderName::from_static(name), value.clone());
        }
    }
}
