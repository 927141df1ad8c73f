//! How the guest API says no, in the shape that all answers of this kind have.

use aegis_wire::bounds::{BROKER_WAIT, GUEST_BODY_MAX, GUEST_READ_DEADLINE, RPC_IN_FLIGHT_MAX};
use aegis_wire::channel::files::{Fault, FilePath};
use aegis_wire::channel::guest;
use aegis_wire::channel::rpc::{
    CODE_CONFLICT, CODE_DENIED, CODE_EXHAUSTED, CODE_INTERNAL, CODE_INVALID, CODE_NOT_FOUND,
    CODE_PARAMS, CODE_RATE, CODE_UNAVAILABLE, RpcError,
};
use aegis_wire::error::{ErrorBody, of_fault};
use serde::Serialize;
use serde_json::Value;

/// An answer that is not a success.
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// Its body.
    pub body: Value,
    /// Methods that the path has, where the asked one is none of them.
    pub allow: Option<String>,
    /// The connection has nothing more to say.
    pub last: bool,
}

impl Refusal {
    /// With a sentence, and what to do about it.
    fn new(status: u16, code: &str, error: impl Into<String>, hint: &str) -> Refusal {
        let hint = (!hint.is_empty()).then(|| hint.to_owned());
        let body = ErrorBody { hint, ..ErrorBody::new(code, error) };
        let body = serde_json::to_value(&body).unwrap_or_default();
        Refusal { status, body, allow: None, last: false }
    }

    /// As the host said it: its words are the better ones.
    pub fn by_host(error: RpcError) -> Refusal {
        let status = guest::status(error.code);
        match error.data {
            body @ Value::Object(_) => Refusal { status, body, allow: None, last: false },
            _ => Refusal::new(status, word(error.code), error.message, ""),
        }
    }

    /// Not a path of this API.
    pub fn no_route() -> Refusal {
        let hint = "paths are /v1/self, /v1/self/keepalive, /v1/self/expose, /v1/instances, \
                    /v1/instances/{id} and its start, stop, exec, logs and files";
        Refusal::new(404, "not_found", "there is no such path", hint)
    }

    /// A path of this API, but not with this method.
    pub fn no_method(allow: String) -> Refusal {
        let error = "this path has no such method";
        let refusal = Refusal::new(405, "method_not_allowed", error, &format!("use {allow}"));
        Refusal { allow: Some(allow), ..refusal }
    }

    /// Comes from a page in a browser.
    pub fn foreign(header: &str) -> Refusal {
        let error = format!("requests of web pages are refused: see the {header} header");
        let hint = "send no Origin header, and 127.0.0.1:7777 or localhost:7777 as Host";
        Refusal::new(403, "foreign_origin", error, hint)
    }

    /// The request could not be read as what it shall be.
    pub fn malformed(error: impl Into<String>) -> Refusal {
        Refusal::new(400, "malformed_request", error, "")
    }

    /// One value is not of its kind.
    pub fn field(field: &str, allowed: &str) -> Refusal {
        let body = ErrorBody {
            field: Some(field.to_owned()),
            allowed: Some(allowed.to_owned()),
            ..ErrorBody::new("invalid_field", format!("{field} must be {allowed}"))
        };
        let body = serde_json::to_value(&body).unwrap_or_default();
        Refusal { status: 400, body, allow: None, last: false }
    }

    /// A file of a child, as the child said it.
    pub fn of_file(fault: Fault, path: &FilePath) -> Refusal {
        let body = serde_json::to_value(ErrorBody::of_file(fault, path)).unwrap_or_default();
        Refusal { status: of_fault(fault).0, body, allow: None, last: true }
    }

    /// More than passes.
    pub fn too_large() -> Refusal {
        let error = format!("a request body has at most {GUEST_BODY_MAX} bytes");
        let refusal = Refusal::new(413, "body_too_large", error, "");
        Refusal { last: true, ..refusal }
    }

    /// The body did not come.
    pub fn too_slow() -> Refusal {
        let seconds = GUEST_READ_DEADLINE.as_secs();
        let error = format!("the request body did not arrive within {seconds}s");
        Refusal { last: true, ..Refusal::new(408, "timeout", error, "") }
    }

    /// Too many large bodies at a time.
    pub fn no_room() -> Refusal {
        let error = "too many large requests are being read";
        let hint = "wait for their answers, then try again";
        Refusal { last: true, ..Refusal::new(503, "unavailable", error, hint) }
    }

    /// Too many calls at a time.
    pub fn crowded() -> Refusal {
        let error = format!("{RPC_IN_FLIGHT_MAX} requests of this machine are in flight");
        Refusal::new(429, "rate_limited", error, "wait for an answer, then try again")
    }

    /// The machine has no token yet.
    pub fn not_ready() -> Refusal {
        let error = "this machine has no capability token: it can ask its host for nothing";
        Refusal::new(503, "not_ready", error, "try again once its command has started")
    }

    /// Nobody to ask.
    pub fn no_session() -> Refusal {
        let seconds = BROKER_WAIT.as_secs();
        let error = format!("the host could not be asked within {seconds}s; nothing was done");
        Refusal::new(503, "unavailable", error, "try again")
    }

    /// Asked, but no answer came.
    pub fn lost() -> Refusal {
        let error = "the answer of the host was lost: what was asked for may have been done";
        Refusal::new(503, "unavailable", error, "look before you try again")
    }

    /// The host answered what nobody here understands.
    pub fn misunderstood() -> Refusal {
        Refusal::new(500, "internal", "the host's answer was not understood", "")
    }
}

/// The stable word of an error that came without a body.
fn word(code: i32) -> &'static str {
    match code {
        CODE_DENIED => "capability_denied",
        CODE_EXHAUSTED => "envelope_exhausted",
        CODE_NOT_FOUND => "instance_not_found",
        CODE_CONFLICT => "instance_state",
        CODE_PARAMS | CODE_INVALID => "invalid_request",
        CODE_RATE => "rate_limited",
        CODE_UNAVAILABLE => "unavailable",
        CODE_INTERNAL => "internal",
        _ => "failed",
    }
}

/// Bytes of a value as JSON, without writing them anywhere.
pub fn json_length(value: &impl Serialize) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    match serde_json::to_writer(&mut count, value) {
        Ok(()) => count.0,
        // What can't be written is too long for every bound.
        Err(_) => usize::MAX,
    }
}
