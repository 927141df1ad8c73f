//! The one error body, and the one table from a refusal to HTTP status, RPC code and exit code.

use serde::{Deserialize, Serialize};

use crate::channel::files::{Fault, FilePath};
use crate::channel::rpc;
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
    /// The claim or limit that said no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// What was asked for; a plain number is one on the wire too.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "amount")]
    pub requested: Option<String>,
    /// What would pass; a plain number is one on the wire too.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "amount")]
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
            rule: None,
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
            rule: refusal.rule.map(str::to_owned),
            requested: refusal.requested.clone(),
            allowed: refusal.allowed.clone(),
            hint: refusal.hint.clone(),
            error_id: None,
        }
    }
}

impl ErrorBody {
    /// Of a file in a machine.
    pub fn of_file(fault: Fault, path: &FilePath) -> ErrorBody {
        let mut body = ErrorBody::new(fault.word(), fault.sentence(path));
        body.hint = fault.hint().map(str::to_owned);
        body
    }
}

/// `4096` as a number, `"1 to 200 characters"` as text (contracts/aegis.md 3, denials).
mod amount {
    use serde::{Deserialize, Deserializer, Serializer};
    use serde_json::Value;

    #[allow(clippy::ref_option, reason = "serde hands in the field")]
    pub fn serialize<S: Serializer>(text: &Option<String>, to: S) -> Result<S::Ok, S::Error> {
        let text = text.as_deref().unwrap_or_default();
        let number = text.parse::<u64>().ok().filter(|n| n.to_string() == text);
        match number {
            Some(number) => to.serialize_u64(number),
            None => to.serialize_str(text),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
        Ok(Option::<Value>::deserialize(from)?.map(|value| match value {
            Value::String(text) => text,
            other => other.to_string(),
        }))
    }
}

/// The stable word of a refusal.
pub fn word(code: Code) -> &'static str {
    code.word()
}

/// The HTTP status of a refusal.
pub fn status(code: Code) -> u16 {
    match code {
        Code::InvalidField | Code::MalformedRequest => 400,
        // The couch contract says 400 for these two; instances answer 409.
        Code::InviteState | Code::GuestState => 400,
        Code::CapabilityDenied => 403,
        Code::UnknownCode
        | Code::InviteNotFound
        | Code::GuestNotFound
        | Code::InvalidToken
        | Code::RequestNotFound
        | Code::SecretNotFound
        | Code::ImageNotFound
        | Code::CommitNotFound
        | Code::WorkspaceNotFound
        | Code::InstanceNotFound => 404,
        Code::AlreadyRedeemed
        | Code::InstanceState
        | Code::HandleTaken
        | Code::ImageInUse
        | Code::CommitInUse
        | Code::WorkspaceInUse
        | Code::EnvelopeExhausted => 409,
        Code::NoCapacity | Code::NotEnforceable => 503,
    }
}

/// HTTP status and RPC code of a file's fault.
pub fn of_fault(fault: Fault) -> (u16, i32) {
    match fault {
        Fault::NotFound => (404, rpc::CODE_NOT_FOUND),
        Fault::BadName => (400, rpc::CODE_PARAMS),
        Fault::Denied | Fault::ReadOnly => (403, rpc::CODE_DENIED),
        Fault::NotADirectory
        | Fault::IsADirectory
        | Fault::NotAFile
        | Fault::Exists
        | Fault::NotEmpty
        | Fault::TooManyWatches
        | Fault::OtherFileSystem
        | Fault::Busy
        | Fault::NotReady => (409, rpc::CODE_CONFLICT),
        Fault::NoSpace => (507, rpc::CODE_NO_SPACE),
        Fault::Failed => (502, rpc::CODE_UNAVAILABLE),
    }
}

/// The RPC code of a refusal on the control channel (contracts/aegis.md 5); the guest API's status is
/// [`crate::channel::guest::status`] of it.
pub fn rpc_code(code: Code) -> i32 {
    match code {
        Code::CapabilityDenied => rpc::CODE_DENIED,
        Code::EnvelopeExhausted => rpc::CODE_EXHAUSTED,
        Code::InstanceNotFound
        | Code::UnknownCode
        | Code::InviteNotFound
        | Code::GuestNotFound
        | Code::RequestNotFound
        | Code::SecretNotFound
        | Code::ImageNotFound
        | Code::CommitNotFound
        | Code::WorkspaceNotFound
        | Code::InvalidToken => rpc::CODE_NOT_FOUND,
        Code::AlreadyRedeemed
        | Code::InviteState
        | Code::GuestState
        | Code::InstanceState
        | Code::ImageInUse
        | Code::CommitInUse
        | Code::WorkspaceInUse
        | Code::HandleTaken => rpc::CODE_CONFLICT,
        Code::InvalidField | Code::MalformedRequest => rpc::CODE_PARAMS,
        Code::NoCapacity | Code::NotEnforceable => rpc::CODE_UNAVAILABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_numbers_are_numbers() {
        let body = ErrorBody {
            requested: Some("4096".to_owned()),
            allowed: Some("1 to 20".to_owned()),
            ..ErrorBody::new("capability_denied", "no")
        };
        let text = serde_json::to_string(&body).unwrap();
        assert!(text.contains(r#""requested":4096,"allowed":"1 to 20""#), "{text}");
        assert_eq!(serde_json::from_str::<ErrorBody>(&text).unwrap(), body);
        let none = ErrorBody::new("x", "y");
        let text = serde_json::to_string(&none).unwrap();
        assert_eq!(text, r#"{"error":"y","code":"x"}"#);
        assert_eq!(serde_json::from_str::<ErrorBody>(&text).unwrap(), none);
        for word in ["007", "-1", "4.5", ""] {
            let body = ErrorBody { requested: Some(word.to_owned()), ..none.clone() };
            assert!(serde_json::to_value(&body).unwrap()["requested"].is_string(), "{word}");
        }
    }
}
