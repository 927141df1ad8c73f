//! The client: one request after the other, with deadlines and bounded bodies. The key is in one header,
//! marked as secret, and nowhere else.

use std::collections::BTreeMap;
use std::time::Duration;

use aegis_wire::vers::{ANSWER_MAX, FromCommit, SetLabels, SetState, Vm, VmMetadata, WrittenState};
use aegis_wire::words::Uuid;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use crate::answer::{self, Answer, Created, Deleted, Failure, again};
use crate::key::ApiKey;

/// A connection comes about within this.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Connections that nobody uses are closed after this, before the other side does it.
const IDLE: Duration = Duration::from_secs(15);

/// How long requests may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// A create.
    pub create: Duration,
    /// Anything else, one try of it.
    pub other: Duration,
}

/// A client of one account. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    http: Http<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base: String,
    authorization: HeaderValue,
    deadlines: Deadlines,
}

/// An address under which there can't be an API.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be http://HOST or https://HOST, with or without a path, and nothing more")]
pub struct BadBase;

/// Checks the address of an API: returns it without a slash at its end, and its host.
pub fn base(url: &str) -> Result<(String, String), BadBase> {
    let url = url.trim_end_matches('/');
    let uri: Uri = url.parse().map_err(|_| BadBase)?;
    let plain = matches!(uri.scheme_str(), Some("http" | "https")) && uri.query().is_none();
    match uri.authority() {
        Some(at) if plain && !at.as_str().contains('@') => {
            Ok((url.to_owned(), at.host().to_owned()))
        }
        _ => Err(BadBase),
    }
}

impl Client {
    /// A client of the API at `base`, which is what [`base()`] returned.
    pub fn new(
        base: &str,
        key: &ApiKey,
        tls: rustls::ClientConfig,
        deadlines: Deadlines,
    ) -> Client {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_DEADLINE));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let http = Http::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            // A create that met a connection just closed is not sent again by the way.
            .retry_canceled_requests(false)
            .build(connector);
        let bearer = Zeroizing::new(format!("Bearer {}", key.reveal()));
        let mut authorization =
            HeaderValue::from_str(&bearer).expect("a key has only letters, digits and hyphens");
        authorization.set_sensitive(true);
        Client { http, base: base.to_owned(), authorization, deadlines }
    }

    /// All machines of the organisation, also those of others.
    pub async fn vms(&self) -> Result<Vec<Vm>, Failure> {
        self.read(Method::GET, "/vms", None).await
    }

    /// One machine.
    pub async fn status(&self, vm: &Uuid) -> Result<Vm, Failure> {
        self.read(Method::GET, &format!("/vm/{vm}/status"), None).await
    }

    /// Where a machine comes from.
    pub async fn metadata(&self, vm: &Uuid) -> Result<VmMetadata, Failure> {
        self.read(Method::GET, &format!("/vm/{vm}/metadata"), None).await
    }

    /// Has a machine made from a commit. Sent once, whatever comes of it.
    pub async fn from_commit(&self, commit: &Uuid) -> Created {
        let body = to_json(&FromCommit::CommitId(commit.clone()));
        let sent = self.once(&Method::POST, "/vm/from_commit", Some(body), self.deadlines.create);
        answer::created(sent.await)
    }

    /// Stops a machine's clock, lets it go on, or wakes it.
    pub async fn set_state(&self, vm: &Uuid, state: WrittenState) -> Result<(), Failure> {
        let body = to_json(&SetState { state });
        self.judge(Method::PATCH, &format!("/vm/{vm}/state?skip_wait_boot=true"), Some(body)).await
    }

    /// Sets a machine's labels, all of them.
    pub async fn label(&self, vm: &Uuid, labels: BTreeMap<String, String>) -> Result<(), Failure> {
        let body = to_json(&SetLabels { labels });
        self.judge(Method::PATCH, &format!("/vm/{vm}/label"), Some(body)).await
    }

    /// Ends a machine. Whether it is gone a list must show afterwards.
    pub async fn delete(&self, vm: &Uuid) -> Result<(), Failure> {
        // Nobody waits for a machine to come up that is to end.
        let path = format!("/vm/{vm}?skip_wait_boot=true");
        for woken in [false, true] {
            let answer = self.ask(Method::DELETE, &path, None).await?;
            match answer::deleted(&answer)? {
                Deleted::Gone => return Ok(()),
                Deleted::GoneIfKeyPasses => return self.vms().await.map(drop),
                Deleted::Asleep if woken => answer::judge(&answer).map(drop)?,
                Deleted::Asleep => self.set_state(vm, WrittenState::Running).await?,
            }
        }
        Err(Failure::Conflict("it sleeps, though it was woken".to_owned()))
    }

    async fn read<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<T, Failure> {
        answer::read(&self.ask(method, path, body).await?)
    }

    async fn judge(&self, method: Method, path: &str, body: Option<Bytes>) -> Result<(), Failure> {
        answer::judge(&self.ask(method, path, body).await?).map(drop)
    }

    /// Asks something idempotent, again where that may help; the last answer is what counts.
    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Answer, Failure> {
        let mut tries = 0;
        loop {
            let came = self.once(&method, path, body.clone(), self.deadlines.other).await;
            let failure = match &came {
                Ok(answer) => match answer::judge(answer) {
                    Ok(_) => return came,
                    Err(failure) => failure,
                },
                Err(failure) => failure.clone(),
            };
            let Some(pause) = again(&failure, tries) else { return came };
            tracing::debug!(%method, path, %failure, "asked again");
            tokio::time::sleep(pause).await;
            tries += 1;
        }
    }

    async fn once(
        &self,
        method: &Method,
        path: &str,
        body: Option<Bytes>,
        deadline: Duration,
    ) -> Result<Answer, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}/api/v1{path}", self.base))
            .header(AUTHORIZATION, self.authorization.clone())
            .header(ACCEPT, HeaderValue::from_static("application/json"));
        if body.is_some() {
            let json = HeaderValue::from_static("application/json");
            request = request.header(CONTENT_TYPE, json);
        }
        let request = request
            .body(Full::new(body.unwrap_or_default()))
            .map_err(|e| Failure::Unreachable(e.to_string()))?;
        let exchange = async {
            let response = self.http.request(request).await.map_err(|error| {
                let text = chain(&error);
                if error.is_connect() { Failure::Unreachable(text) } else { Failure::Broken(text) }
            })?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_MAX).collect().await;
            let body = body.map_err(|error| Failure::Broken(chain(error.as_ref())))?;
            Ok(Answer {
                status: head.status.as_u16(),
                retry_after: retry_after(&head.headers),
                body: body.to_bytes().to_vec(),
            })
        };
        match tokio::time::timeout(deadline, exchange).await {
            Ok(came) => came,
            Err(_) => Err(Failure::Broken(format!("none within {} s", deadline.as_secs_f32()))),
        }
    }
}

fn to_json(body: &impl Serialize) -> Bytes {
    serde_json::to_vec(body).expect("shapes of text and numbers are JSON").into()
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    answer::retry_after(text("retry-after-ms"), text(RETRY_AFTER.as_str()))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_a_place_and_nothing_more() {
        let (url, host) = base("https://api.vers.sh/").unwrap();
        assert_eq!((url.as_str(), host.as_str()), ("https://api.vers.sh", "api.vers.sh"));
        assert_eq!(base("http://127.0.0.1:8000").unwrap().1, "127.0.0.1");
        for bad in ["", "api.vers.sh", "ftp://x", "https://key@x", "https://x?key=1"] {
            assert_eq!(base(bad), Err(BadBase), "{bad}");
        }
    }
}
