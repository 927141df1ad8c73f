//! Events as `/couch/events` tells them (contracts/couch.md 8).

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::bounds::EVENT_KIND_MAX;
use crate::refusal::Refusal;
use crate::words::Time;

/// One event: the `data:` of a server-sent event whose `id:` is `seq` and whose `event:` is `kind`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its place among all events of this host, from 1; none is left out.
    pub seq: u64,
    /// When it happened.
    pub at: Time,
    /// Who did it.
    pub actor: String,
    /// What happened, as in `couch.guest.killed`.
    pub kind: String,
    /// Id of what it is about.
    pub subject: String,
    /// Whose chain of the audit trail it is in: an invite's id, or that of a host's own instance.
    pub tree: String,
    /// Names and values, by kind.
    pub data: Map<String, Value>,
}

/// What the kinds of the events that are asked for begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventKind(String);

impl EventKind {
    /// Whether events of this kind are asked for.
    pub fn admits(&self, kind: &str) -> bool {
        kind.starts_with(&self.0)
    }
}

impl FromStr for EventKind {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<EventKind, Refusal> {
        let fits = (1..=EVENT_KIND_MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'.' || b == b'_');
        if fits {
            Ok(EventKind(text.to_owned()))
        } else {
            Err(Refusal::field("kind", "what kinds begin with, as in couch.guest or instance."))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_asked_for_by_their_beginning() {
        let kind: EventKind = "couch.guest".parse().unwrap();
        assert!(kind.admits("couch.guest.killed") && kind.admits("couch.guest"));
        assert!(!kind.admits("couch.invite.created") && !kind.admits("couch"));
        for bad in ["", "couch.*", "Couch", "a b", "%", &"x".repeat(EVENT_KIND_MAX + 1)] {
            assert!(bad.parse::<EventKind>().is_err(), "{bad}");
        }
    }
}
