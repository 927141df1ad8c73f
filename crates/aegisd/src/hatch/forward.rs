//! HTTP to a host service, and HTTP, plain or inside of TLS, to an address that the egress policy
//! allowed: passed on as it is, with secrets in the places of their placeholders.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::DOOR_CONNECT_DEADLINE;
use aegis_wire::door::Knock;
use aegis_wire::egress::{HostName, never};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ALT_SVC, HOST, HeaderMap, HeaderValue};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::Hatch;
use super::answer::{self, Body};
use super::machine::Machine;
use super::placeholder::{self, Placeholder};
use super::tls::{self, NoTls};
use crate::app;
use crate::passing::{is_upgrade, strip};

/// One connection from a machine, and the one that goes on from it.
pub(super) struct Line {
    knock: Knock,
    onward: tokio::sync::Mutex<Onward>,
    tunnel: Mutex<Option<(OnUpgrade, OnUpgrade)>>,
}

#[derive(Default)]
struct Onward {
    sender: Option<SendRequest<Incoming>>,
    /// Ends with the line.
    driver: JoinSet<()>,
}

/// Where a request goes.
struct Goal {
    to: SocketAddr,
    /// What secrets' hosts are compared with.
    host: String,
    /// The `Host` that is sent.
    sent_host: String,
    /// By TLS, with `host` as the name.
    tls: bool,
}

impl Line {
    pub(super) fn new(knock: Knock) -> Line {
        Line { knock, onward: tokio::sync::Mutex::default(), tunnel: Mutex::default() }
    }

    /// Passes bytes on, where both sides agreed to speak something else than HTTP.
    pub(super) async fn tunnel(&self) {
        let ends = self.tunnel.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((inside, outside)) = ends else { return };
        if let (Ok(inside), Ok(outside)) = tokio::join!(inside, outside) {
            let (mut inside, mut outside) = (TokioIo::new(inside), TokioIo::new(outside));
            // Either side may break off as it likes.
            let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
        }
    }

    /// Sends a request on; a connection that is there is used again.
    async fn send(
        &self,
        hatch: &Hatch,
        goal: &Goal,
        request: Request<Incoming>,
    ) -> Result<Response<Incoming>, Lost> {
        let mut onward = self.onward.lock().await;
        let ready = match &mut onward.sender {
            Some(sender) => sender.ready().await.is_ok(),
            None => false,
        };
        if !ready {
            let connected =
                tokio::time::timeout(DOOR_CONNECT_DEADLINE, onward.connect(hatch, goal));
            connected.await.map_err(|_| Lost::Unreachable)??;
        }
        let sender = onward.sender.as_mut().ok_or(Lost::Broken)?;
        sender.send_request(request).await.map_err(|_| Lost::Broken)
    }
}

impl Onward {
    async fn connect(&mut self, hatch: &Hatch, goal: &Goal) -> Result<(), Lost> {
        let stream = TcpStream::connect(goal.to).await.map_err(|_| Lost::Unreachable)?;
        let _ = stream.set_nodelay(true);
        if !goal.tls {
            return self.begin(stream).await;
        }
        let connector = hatch.tls.as_ref().ok_or(Lost::NoTls(NoTls::Failed))?;
        let stream = tls::connect(connector, &goal.host, stream).await.map_err(Lost::NoTls)?;
        self.begin(stream).await
    }

    async fn begin<S>(&mut self, stream: S) -> Result<(), Lost>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, driver) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|_| Lost::Broken)?;
        self.driver.abort_all();
        self.driver.spawn(async move {
            // Its errors reach us through the sender.
            let _ = driver.with_upgrades().await;
        });
        self.sender = Some(sender);
        Ok(())
    }
}

/// Why nothing came back.
enum Lost {
    Unreachable,
    Broken,
    NoTls(NoTls),
}

impl Lost {
    /// As an answer: code and sentence.
    fn answer(self, host: &str) -> (&'static str, String) {
        match self {
            Lost::Unreachable => ("unreachable", format!("{host} can't be reached")),
            Lost::Broken => ("unreachable", format!("{host} broke the connection off")),
            Lost::NoTls(NoTls::Failed) => {
                ("unreachable", format!("{host} and this host can't agree on TLS"))
            }
            Lost::NoTls(NoTls::Untrusted(why)) => (
                "untrusted_certificate",
                format!("{host} shows a certificate that this host does not trust: {why}"),
            ),
        }
    }
}

/// Answers one request of a machine.
pub(super) async fn serve(
    machine: Arc<Machine>,
    line: Arc<Line>,
    request: Request<Incoming>,
) -> Response<Body> {
    match pass_on(&machine, &line, request).await {
        Ok(response) => response,
        Err(Failure::Refused(refusal)) => {
            machine.note(noun(&line.knock), &refusal, None).await;
            answer::refused(&refusal)
        }
        Err(Failure::Answer(response)) => *response,
    }
}

fn noun(knock: &Knock) -> &'static str {
    match knock {
        Knock::Llm => "llm",
        Knock::Service { .. } => "host_service",
        Knock::Http { .. } => "http",
        Knock::Https { .. } => "https",
    }
}

enum Failure {
    Refused(Refusal),
    Answer(Box<Response<Body>>),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::Refused(refusal)
    }
}

impl From<app::Error> for Failure {
    fn from(error: app::Error) -> Failure {
        match error {
            app::Error::Refused(refusal) => Failure::Refused(refusal),
            ours => {
                tracing::error!(error = %ours, "the hatch failed");
                say(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "internal",
                    "the host failed at this request",
                )
            }
        }
    }
}

fn say(status: StatusCode, code: &str, error: impl Into<String>) -> Failure {
    Failure::Answer(Box::new(answer::problem(status, code, error)))
}

async fn pass_on(
    machine: &Machine,
    line: &Line,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    // A server that answers TRACE says headers back: with secrets in the place of placeholders.
    let barred = [Method::CONNECT, Method::TRACE];
    if barred.contains(request.method()) || request.method().as_str().eq_ignore_ascii_case("track")
    {
        let words = "neither tunnels nor traces here";
        return Err(say(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", words));
    }
    let goal = goal(machine, &line.knock, &request)?;
    let upgrade = is_upgrade(request.headers());
    let inside = upgrade.then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    strip(&mut head.headers, upgrade);
    put_secrets(machine, &mut head.headers, &goal.host)?;
    let host = HeaderValue::from_str(&goal.sent_host)
        .map_err(|_| Refusal::field("Host", "a host name"))?;
    head.headers.insert(HOST, host);
    // Only the path goes on: whom it is for was said by the knock.
    let path = head.uri.path_and_query().map_or("/", |p| p.as_str());
    head.uri = path.parse::<Uri>().map_err(|_| Refusal::field("path", "a path"))?;

    let sent = line.send(&machine.hatch, &goal, Request::from_parts(head, body)).await;
    let mut response = sent.map_err(|lost| {
        let (code, message) = lost.answer(&goal.host);
        say(StatusCode::BAD_GATEWAY, code, message)
    })?;
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    if let (true, Some(inside)) = (switched, inside) {
        let outside = hyper::upgrade::on(&mut response);
        *line.tunnel.lock().unwrap_or_else(PoisonError::into_inner) = Some((inside, outside));
    }
    let (mut head, body) = response.into_parts();
    strip(&mut head.headers, switched);
    if goal.tls {
        // What it offers elsewhere, no placeholder would work with.
        head.headers.remove(ALT_SVC);
    }
    Ok(Response::from_parts(head, body.map_err(Into::into).boxed_unsync()))
}

/// Where a request goes, if its machine may go there now.
fn goal(machine: &Machine, knock: &Knock, request: &Request<Incoming>) -> Result<Goal, Failure> {
    let ctx = &machine.app().ctx;
    match knock {
        Knock::Service { name } => {
            let asker = machine.asker()?;
            let reach = ctx
                .ledger
                .read(|f| ctx.reach(f, &asker.family, &machine.id))
                .map_err(app::Error::from)?;
            let given = reach.services.iter().find(|s| s.as_str() == name);
            let found = given.and_then(|name| ctx.config.host_services.get(name));
            let Some(to) = found else {
                let listed: Vec<&str> = reach.services.iter().map(|s| s.as_str()).collect();
                let allowed = if listed.is_empty() { "none".to_owned() } else { listed.join(", ") };
                let message = "this machine may not use that service of its host";
                let name: String = name.chars().take(64).collect();
                let refusal = Refusal::denied("host_services", message).amounts(name, allowed);
                return Err(refusal.into());
            };
            let host = format!("{name}.host.aegis");
            Ok(Goal { to: *to, host, sent_host: to.to_string(), tls: false })
        }
        Knock::Http { to, host } | Knock::Https { to, host } => {
            // The gateway judged it. That no worker leads the daemon into its own host is judged here.
            if let Some(why) = never(to.ip(), &[]) {
                let refusal = Refusal::denied("never_reachable", format!("{to} is {why}"));
                return Err(refusal.into());
            }
            let host: HostName = host.parse().map_err(|_| Refusal::field("host", "a host name"))?;
            let said = request.headers().get(HOST).and_then(|v| v.to_str().ok()).unwrap_or("");
            let name = said.rsplit_once(':').map_or(said, |(name, _)| name);
            if name.parse::<HostName>().ok().as_ref() != Some(&host) {
                let refusal = Refusal::new(
                    Code::CapabilityDenied,
                    "the Host of the request is not the name that was looked up",
                );
                let said: String = said.chars().take(64).collect();
                return Err(refusal.rule("http_host").amounts(said, host.as_str()).into());
            }
            let tls = matches!(knock, Knock::Https { .. });
            Ok(Goal { to: *to, sent_host: said.to_owned(), host: host.to_string(), tls })
        }
        Knock::Llm => Err(say(StatusCode::NOT_FOUND, "not_found", "nothing is here")),
    }
}

fn put_secrets(machine: &Machine, headers: &mut HeaderMap, host: &str) -> Result<(), Failure> {
    let ctx = &machine.app().ctx;
    let instance = machine.asker()?.instance;
    let own: Vec<Placeholder> = ctx
        .ledger
        .read(|f| ctx.placeholders(f, &instance))
        .map_err(app::Error::from)?
        .into_iter()
        .map(|(name, text, hosts)| Placeholder { name, text, hosts })
        .collect();
    let open = |name: &aegis_wire::words::SecretName| {
        let secret = ctx.secret(name).inspect_err(|error| tracing::error!(%error, "no secret"));
        secret.ok().flatten().map(|s| s.value)
    };
    Ok(placeholder::replace(headers, host, &own, open)?)
}
