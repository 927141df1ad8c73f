//! One call: the token, the parameters, the verb, and how its end is said.

use std::sync::Arc;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::channel::files::FileAsk;
use aegis_wire::channel::guest::{self, Streamed, StreamedFile, method};
use aegis_wire::channel::rpc::{CODE_INTERNAL, CODE_METHOD, CODE_RATE, CODE_UNAVAILABLE, RpcError};
use aegis_wire::error::{ErrorBody, of_fault, rpc_code};
use aegis_wire::host::{AccessBody, CreateBody, ExecBody, ExposeBody, StatusWord, body};
use aegis_wire::words::Time;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::bulk::{Bulk, Source};
use super::line::{Machine, Outcome};
use super::rates::Rate;
use crate::app::tree::{self, Caller};
use crate::app::{self, App, logs};
use crate::keys;
use crate::lifecycle;
use crate::tokens::Flaw;

/// What a call costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// It reads.
    Look,
    /// It writes.
    Act,
}

/// Why a call brought nothing.
enum Failure {
    /// A verb said no, or failed.
    App(app::Error),
    /// The token is worth nothing.
    Token(Flaw),
    /// Too much was asked: of what, and how much is allowed.
    Rate(&'static str, Rate),
    /// All of the machine's streams are in use.
    Streams,
}

impl<E: Into<app::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::App(error.into())
    }
}

/// What a verb brought.
enum Done {
    Value(Value),
    Lines(Source, Option<StreamedFile>, OwnedSemaphorePermit),
}

fn weight(called: &str) -> Option<Weight> {
    Some(match called {
        method::LIST_CHILDREN
        | method::GET_CHILD
        | method::CHILD_LOGS
        | method::LOOK_AT_CHILD_FILES
        | method::READ_CHILD_FILES
        | method::SELF_INFO
        | method::LIST_REQUESTS => Weight::Look,
        method::SPAWN
        | method::START_CHILD
        | method::STOP_CHILD
        | method::DELETE_CHILD
        | method::EXEC_CHILD
        | method::CHANGE_CHILD_FILES
        | method::WRITE_CHILD_FILE
        | method::KEEPALIVE
        | method::RELEASE_KEEPALIVE
        | method::EXPOSE
        | method::UNEXPOSE
        | method::REQUEST_ACCESS => Weight::Act,
        _ => return None,
    })
}

/// A method by our own word for it: what a machine makes up is not for the log.
pub(super) fn name(called: &str) -> &'static str {
    method::ALL.into_iter().find(|known| *known == called).unwrap_or("unknown")
}

/// Answers one call.
pub(super) async fn answer(
    app: &App,
    machine: &Arc<Machine>,
    called: &str,
    params: Value,
) -> Outcome {
    let Some(weight) = weight(called) else {
        let error = RpcError::new(CODE_METHOD, "no such method");
        return Outcome { answer: Err(error), bulk: None };
    };
    let target = params.get("child_id").and_then(Value::as_str).map(str::to_owned);
    let done = async {
        machine.rates.call(weight).map_err(|rate| Failure::Rate("calls", rate))?;
        let token = params.get("token").and_then(Value::as_str).unwrap_or_default();
        let claims = app.ctx.keys.capabilities.verify(token, app.ctx.now());
        // A machine that talks to its host is no idle one.
        app.ctx.meters.touch(&machine.id, app.ctx.now());
        let caller = Caller::verified(machine.id.clone(), claims.map_err(Failure::Token)?);
        match verb(app, machine, &caller, called, params).await? {
            Done::Value(value) => Ok((value, None)),
            Done::Lines(lines, file, slot) => {
                let ticket = keys::uuid()?;
                let to = lifecycle::open_bulk(&app.ctx, &machine.id, ticket.clone()).await?;
                let value = value(&Streamed { ticket, file })?;
                Ok((value, Some(Bulk::new(to, lines, slot))))
            }
        }
    };
    match done.await {
        Ok((value, bulk)) => Outcome { answer: Ok(value), bulk },
        Err(failure) => {
            Outcome { answer: Err(refuse(app, machine, called, target, failure).await), bulk: None }
        }
    }
}

/// From the method to the verb.
async fn verb(
    app: &App,
    machine: &Machine,
    caller: &Caller,
    called: &str,
    params: Value,
) -> Result<Done, Failure> {
    let slot = || Arc::clone(&machine.bulks).try_acquire_owned().map_err(|_| Failure::Streams);
    let value = match called {
        method::SPAWN => {
            let ask: guest::Spawn = parse(params)?;
            let ask = body::<CreateBody>(ask.request)?.parse()?;
            value(&tree::spawn(caller, app, ask).await?)?
        }
        method::LIST_CHILDREN => value(&tree::children(caller, app)?)?,
        method::GET_CHILD => {
            let ask: guest::Child = parse(params)?;
            value(&tree::child(caller, app, &ask.child_id)?)?
        }
        method::START_CHILD => {
            let ask: guest::Child = parse(params)?;
            value(&tree::start(caller, app, &ask.child_id).await?)?
        }
        method::STOP_CHILD => {
            let ask: guest::Child = parse(params)?;
            value(&tree::stop(caller, app, &ask.child_id).await?)?
        }
        method::DELETE_CHILD => {
            let ask: guest::Child = parse(params)?;
            value(&tree::delete(caller, app, &ask.child_id).await?)?
        }
        method::EXEC_CHILD => {
            let ask: guest::ExecChild = parse(params)?;
            let exec = ExecBody {
                command: ask.command,
                env: ask.env,
                cwd: ask.cwd,
                tty: false,
                timeout_secs: ask.timeout_secs,
                stdin: ask.stdin,
                stdin_b64: ask.stdin_b64,
            }
            .parse()?;
            let slot = slot()?;
            let running = tree::exec(caller, app, &ask.child_id, exec).await?;
            return Ok(Done::Lines(Source::Exec(Box::new(running)), None, slot));
        }
        method::CHILD_LOGS => {
            let ask: guest::ChildLogs = parse(params)?;
            let since = ask
                .since
                .map(|text| text.parse::<Time>())
                .transpose()
                .map_err(|_| Refusal::field("since", "an RFC 3339 time"))?;
            let which = logs::Ask {
                since,
                tail: ask.tail.map(|n| n.min(logs::TAIL_MAX)),
                exec_id: ask.exec_id,
                follow: ask.follow,
            };
            let slot = slot()?;
            let lines = tree::logs(caller, app, &ask.child_id, which)?;
            return Ok(Done::Lines(Source::Logs(lines), None, slot));
        }
        method::LOOK_AT_CHILD_FILES
        | method::READ_CHILD_FILES
        | method::CHANGE_CHILD_FILES
        | method::WRITE_CHILD_FILE => {
            let ask: guest::ChildFiles = parse(params)?;
            return files(app, machine, caller, called, ask).await;
        }
        method::SELF_INFO => value(&tree::own(caller, app)?)?,
        method::KEEPALIVE => {
            let ask: guest::Keepalive = parse(params)?;
            value(&tree::hold(caller, app, ask.ttl_ms, ask.reason).await?)?
        }
        method::RELEASE_KEEPALIVE => value(&tree::release(caller, app).await?)?,
        method::EXPOSE => {
            let ask: guest::Expose = parse(params)?;
            let ask = ExposeBody {
                guest_port: Some(ask.guest_port),
                public_port: None,
                protocol: ask.protocol,
            };
            value(&tree::expose(caller, app, ask.parse()?).await?)?
        }
        method::UNEXPOSE => {
            let ask: guest::Unexpose = parse(params)?;
            let ask = ExposeBody { guest_port: Some(ask.guest_port), ..ExposeBody::default() };
            value(&tree::unexpose(caller, app, ask.parse()?.guest_port).await?)?
        }
        method::REQUEST_ACCESS => {
            let ask: guest::Access = parse(params)?;
            let (wish, reason) = body::<AccessBody>(ask.request)?.parse()?;
            value(&tree::request_access(caller, app, wish, reason).await?)?
        }
        method::LIST_REQUESTS => value(&tree::requests(caller, app)?)?,
        // weight() knows no other.
        _ => return Err(Refusal::new(Code::MalformedRequest, "no such method").into()),
    };
    Ok(Done::Value(value))
}

/// Something with a child's files: an answer, or a stream.
async fn files(
    app: &App,
    machine: &Machine,
    caller: &Caller,
    called: &str,
    asked: guest::ChildFiles,
) -> Result<Done, Failure> {
    let guest::ChildFiles { child_id, ask, .. } = asked;
    let fits = match called {
        method::WRITE_CHILD_FILE => matches!(ask, FileAsk::Write { .. }),
        method::CHANGE_CHILD_FILES => ask.changes() && !ask.goes_on(),
        method::READ_CHILD_FILES => ask.goes_on() && !ask.changes(),
        _ => !ask.changes() && !ask.goes_on(),
    };
    if !fits {
        return Err(Refusal::new(Code::MalformedRequest, "the method is for something else").into());
    }
    if !ask.goes_on() {
        let open = tree::files(caller, app, &child_id, ask).await?;
        return Ok(Done::Value(match open.leaves_something() {
            true => value(&open.shape()?)?,
            false => value(&StatusWord { status: "removed".to_owned() })?,
        }));
    }
    let slot = Arc::clone(&machine.bulks).try_acquire_owned().map_err(|_| Failure::Streams)?;
    let open = tree::files(caller, app, &child_id, ask).await?;
    if called == method::WRITE_CHILD_FILE {
        return Ok(Done::Lines(Source::Write(Box::new(open)), None, slot));
    }
    let sends = open.sends()?;
    let file = open.meta.clone().zip(sends);
    let file = file.map(|(meta, sends)| StreamedFile { meta, length: sends.length });
    Ok(Done::Lines(Source::File(Box::new(open.body()?)), file, slot))
}

fn parse<T: DeserializeOwned>(params: Value) -> Result<T, Refusal> {
    // Of the message only what serde says: a value in it could be the token.
    serde_json::from_value(params).map_err(|e| {
        let what =
            if e.is_data() { "a field is missing or of the wrong type" } else { "malformed" };
        Refusal::new(Code::MalformedRequest, format!("the call's parameters: {what}"))
    })
}

fn value<T: Serialize>(of: &T) -> Result<Value, Failure> {
    serde_json::to_value(of).map_err(|e| app::Error::Io(std::io::Error::other(e)).into())
}

/// How a failure is said, and what of it is kept.
async fn refuse(
    app: &App,
    machine: &Machine,
    called: &str,
    target: Option<String>,
    failure: Failure,
) -> RpcError {
    let refusal = match failure {
        Failure::App(app::Error::Refused(refusal)) => refusal,
        Failure::Token(flaw) => {
            let message = format!("the capability token is not valid: {flaw}");
            let mut refusal = Refusal::new(Code::CapabilityDenied, message)
                .amounts(flaw.to_string(), "the token that the machine was given at its boot")
                .hint("only the machine's own harness can call; it attaches the token itself");
            refusal.rule = Some("token");
            refusal
        }
        Failure::Rate(what, rate) => return too_many(what, rate),
        Failure::Streams => {
            let body = ErrorBody::new("rate_limited", "too many streams are open in this machine");
            return said(CODE_RATE, body);
        }
        Failure::App(app::Error::Machine(message)) => {
            return said(CODE_UNAVAILABLE, ErrorBody::new("machine_failed", message));
        }
        Failure::App(app::Error::File { fault, path }) => {
            return said(of_fault(fault).1, ErrorBody::of_file(fault, &path));
        }
        Failure::App(ours) => {
            let id = keys::uuid().unwrap_or_default();
            let chain = anyhow::Error::from(ours);
            tracing::error!(error_id = %id, error = format!("{chain:#}"), "a machine's call failed");
            let mut body = ErrorBody::new("internal", "the host failed at this call");
            body.error_id = Some(id);
            return said(CODE_INTERNAL, body);
        }
    };
    if matches!(refusal.code, Code::CapabilityDenied | Code::EnvelopeExhausted) {
        if let Err(rate) = machine.rates.denial() {
            return too_many("refused calls", rate);
        }
        let noted = tree::note_denial(app, &machine.id, called, &refusal, target.as_deref()).await;
        if let Err(error) = noted {
            tracing::error!(%error, "a denial was not noted");
        }
    }
    said(rpc_code(refusal.code), (&refusal).into())
}

fn too_many(what: &str, rate: Rate) -> RpcError {
    let Rate { count, per, burst } = rate;
    let allowed = format!("{count} {what} per {per} and machine, {burst} at once");
    let mut body = ErrorBody::new("rate_limited", format!("too many {what}: {allowed}"));
    body.allowed = Some(allowed);
    body.hint = Some("wait a few seconds and ask again".to_owned());
    said(CODE_RATE, body)
}

fn said(code: i32, body: ErrorBody) -> RpcError {
    let message = body.error.clone();
    RpcError { code, message, data: serde_json::to_value(body).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_the_wire_is_known_and_no_other() {
        assert!(method::ALL.iter().all(|m| weight(m).is_some()));
        for other in ["", "guest.", "guest.SPAWN", "guest.spawn ", "run", "identify"] {
            assert_eq!((weight(other), name(other)), (None, "unknown"), "{other}");
        }
    }

    #[test]
    fn a_refusal_never_repeats_what_was_sent() {
        let params =
            serde_json::json!({"token": 5, "child_id": "eyJsecret", "command": "eyJsecret"});
        let refusal = parse::<guest::ExecChild>(params).unwrap_err();
        assert!(!format!("{refusal:?}").contains("eyJ"), "{refusal:?}");
    }
}
