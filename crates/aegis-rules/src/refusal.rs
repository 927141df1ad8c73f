//! Every way in which a law says no. How a refusal looks on HTTP or RPC is the wire's business.

use std::fmt;

/// A stable word for the kind of a refusal; clients may match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// A value is missing, malformed or out of range.
    InvalidField,
    /// The request is not what this route takes at all (malformed JSON, wrong type).
    MalformedRequest,
    /// No such invite code, or one that can't be redeemed any more.
    UnknownCode,
    /// The invite was redeemed before.
    AlreadyRedeemed,
    /// No such invite.
    InviteNotFound,
    /// No such guest.
    GuestNotFound,
    /// A guest token that is unknown, or whose guest has ended.
    InvalidToken,
    /// No such instance.
    InstanceNotFound,
    /// No such secret.
    SecretNotFound,
    /// This host has no such image.
    ImageNotFound,
    /// Instances have the image.
    ImageInUse,
    /// This host has no such commit.
    CommitNotFound,
    /// Instances started from the commit.
    CommitInUse,
    /// This host has no such workspace.
    WorkspaceNotFound,
    /// Instances have the workspace.
    WorkspaceInUse,
    /// The invite is not in a state for that.
    InviteState,
    /// The guest is not in a state for that.
    GuestState,
    /// The instance is not in a state for that.
    InstanceState,
    /// A live instance has this handle.
    HandleTaken,
    /// The host has no room for another machine now.
    NoCapacity,
    /// The envelope has nothing left of what was asked for.
    EnvelopeExhausted,
    /// This backend can't enforce what was asked for.
    NotEnforceable,
    /// The guest made no such request.
    RequestNotFound,
    /// The asker's capabilities do not allow it; `rule` says which one.
    CapabilityDenied,
}

impl Code {
    /// The stable word.
    pub fn word(self) -> &'static str {
        match self {
            Code::InvalidField => "invalid_field",
            Code::MalformedRequest => "malformed_request",
            Code::UnknownCode => "unknown_code",
            Code::AlreadyRedeemed => "already_redeemed",
            Code::InviteNotFound => "invite_not_found",
            Code::GuestNotFound => "guest_not_found",
            Code::InvalidToken => "invalid_token",
            Code::InstanceNotFound => "instance_not_found",
            Code::SecretNotFound => "secret_not_found",
            Code::ImageNotFound => "image_not_found",
            Code::ImageInUse => "image_in_use",
            Code::CommitNotFound => "commit_not_found",
            Code::CommitInUse => "commit_in_use",
            Code::WorkspaceNotFound => "workspace_not_found",
            Code::WorkspaceInUse => "workspace_in_use",
            Code::InviteState => "invite_state",
            Code::GuestState => "guest_state",
            Code::InstanceState => "instance_state",
            Code::HandleTaken => "handle_taken",
            Code::NoCapacity => "no_capacity",
            Code::EnvelopeExhausted => "envelope_exhausted",
            Code::NotEnforceable => "not_enforceable",
            Code::RequestNotFound => "request_not_found",
            Code::CapabilityDenied => "capability_denied",
        }
    }
}

/// A law's no: what was wrong, which limit, what would pass.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Refusal {
    /// The kind.
    pub code: Code,
    /// One sentence for people.
    pub message: String,
    /// The field of the request that was refused, if it was one.
    pub field: Option<String>,
    /// The claim or limit that said no, if it was one (contracts/aegis.md 3).
    pub rule: Option<&'static str>,
    /// What was asked for.
    pub requested: Option<String>,
    /// What would pass.
    pub allowed: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Refusal {
    /// A refusal with a sentence and nothing more.
    pub fn new(code: Code, message: impl Into<String>) -> Refusal {
        Refusal {
            code,
            message: message.into(),
            field: None,
            rule: None,
            requested: None,
            allowed: None,
            hint: None,
        }
    }

    /// A field is missing or malformed; `allowed` says what would pass.
    pub fn field(field: impl Into<String>, allowed: impl Into<String>) -> Refusal {
        let (field, allowed) = (field.into(), allowed.into());
        let mut refusal = Refusal::new(Code::InvalidField, format!("{field} must be {allowed}"));
        refusal.field = Some(field);
        refusal.allowed = Some(allowed);
        refusal
    }

    /// A capability says no.
    pub fn denied(rule: &'static str, message: impl Into<String>) -> Refusal {
        Refusal::new(Code::CapabilityDenied, message).rule(rule)
    }

    /// A field's value is outside of what is allowed.
    pub fn out_of_range(field: String, requested: String, allowed: String) -> Refusal {
        let mut refusal = Refusal::field(field, allowed);
        refusal.requested = Some(requested);
        refusal
    }

    /// The same refusal, with the claim or limit that it comes from.
    pub fn rule(mut self, rule: &'static str) -> Refusal {
        self.rule = Some(rule);
        self
    }

    /// The same refusal, with advice.
    pub fn hint(mut self, hint: impl Into<String>) -> Refusal {
        self.hint = Some(hint.into());
        self
    }

    /// The same refusal, with what was asked for and what would pass.
    pub fn amounts(mut self, requested: impl Into<String>, allowed: impl Into<String>) -> Refusal {
        self.requested = Some(requested.into());
        self.allowed = Some(allowed.into());
        self
    }
}
