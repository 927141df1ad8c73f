//! The one error body, and the one table from a refusal to HTTP status, RPC code and exit code.

use serde::{Deserialize, Serialize};

use crate::refusal::{Code, Refusal};

/// `{"error": sentence, "code": stable_word, …}`: the body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One sentence for people.
    pub error: String,
    /// A stable word for programs.
    pub code: String,
    /// The field that was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested: Option<String>,
    /// What would pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Under this id the log has the whole chain (own faults only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_id: Option<String>,
}

impl ErrorBody {
    /// A body with a sentence and a word.
    pub fn new(code: &str, error: impl Into<String>) -> ErrorBody {
        ErrorBody {
            error: error.into(),
            code: code.to_owned(),
            field: None,
            requested: None,
            allowed: None,
            hint: None,
            error_id: None,
        }
    }
}

impl From<&Refusal> for ErrorBody {
    fn from(refusal: &Refusal) -> ErrorBody {
        ErrorBody {
            error: refusal.message.clone(),
            code: word(refusal.code).to_owned(),
            field: refusal.field.clone(),
            requested: refusal.requested.clone(),
            allowed: refusal.allowed.clone(),
            hint: refusal.hint.clone(),
            error_id: None,
        }
    }
}

/// The stable word of a refusal.
pub fn word(code: Code) -> &'static str {
    table(code).0
}

/// The HTTP status of a refusal.
pub fn status(code: Code) -> u16 {
    table(code).1
}

fn table(code: Code) -> (&'static str, u16) {
    match code {
        Code::InvalidField => ("invalid_field", 400),
        Code::MalformedRequest => ("malformed_request", 400),
        Code::UnknownCode => ("unknown_code", 404),
        Code::AlreadyRedeemed => ("already_redeemed", 409),
        Code::InviteNotFound => ("invite_not_found", 404),
        Code::GuestNotFound => ("guest_not_found", 404),
        Code::InvalidToken => ("invalid_token", 404),
        Code::InstanceNotFound => ("instance_not_found", 404),
        // The couch contract says 400 for these two; instances answer 409.
        Code::InviteState => ("invite_state", 400),
        Code::GuestState => ("guest_state", 400),
        Code::InstanceState => ("instance_state", 409),
        Code::HandleTaken => ("handle_taken", 409),
        Code::NoCapacity => ("no_capacity", 503),
        Code::EnvelopeExhausted => ("envelope_exhausted", 409),
        Code::NotEnforceable => ("not_enforceable", 503),
    }
}
