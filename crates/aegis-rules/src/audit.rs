//! The audit trail: what is noted of a change, and the hash that chains one note to the next.

use sha2::{Digest as _, Sha256};

use crate::words::{GuestId, InstanceId, InviteId, SecretName, Time, Tree};

/// A SHA-256.
pub type Hash = [u8; 32];

/// Hash before the first row of a tree's chain.
pub const GENESIS: Hash = [0; 32];

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// An invite.
    Invite(InviteId),
    /// A guest.
    Guest(GuestId),
    /// An instance.
    Instance(InstanceId),
    /// A secret of the host.
    Secret(SecretName),
}

impl Subject {
    /// The id as text.
    pub fn id(&self) -> &str {
        match self {
            Subject::Invite(id) => id.as_str(),
            Subject::Guest(id) => id.as_str(),
            Subject::Instance(id) => id.as_str(),
            Subject::Secret(name) => name.as_str(),
        }
    }
}

/// What is noted of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The event's stable name (contracts/couch.md 8).
    pub kind: &'static str,
    /// What it is about.
    pub subject: Subject,
    /// Names and values, in a fixed order.
    pub data: Vec<(&'static str, String)>,
}

/// A row of the trail, as it is hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// Whose chain.
    pub tree: &'a Tree,
    /// Position in that chain, from 1.
    pub position: u64,
    /// When.
    pub at: Time,
    /// Who did it (`host`, `public`, `guest:…`, `aegisd`).
    pub actor: &'a str,
    /// The event's name.
    pub kind: &'a str,
    /// Id of what it is about.
    pub subject: &'a str,
    /// The data, in the text form in which it is stored.
    pub data: &'a str,
}

/// `SHA-256(previous hash ‖ row)` (contracts/couch.md 8). Each field is preceded by its length, so
/// that no two different rows have the same bytes.
pub fn link(previous: &Hash, row: &Row<'_>) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update(previous);
    let (tree, position, at) =
        (row.tree.to_string(), row.position.to_string(), row.at.0.to_string());
    for field in [&tree, &position, &at, row.actor, row.kind, row.subject, row.data] {
        hasher.update((field.len() as u64).to_be_bytes());
        hasher.update(field.as_bytes());
    }
    hasher.finalize().into()
}

/// Bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, b| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{b:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_counts() {
        let tree = Tree::Instance("inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap());
        let row = Row {
            tree: &tree,
            position: 1,
            at: Time(5),
            actor: "host",
            kind: "instance.started",
            subject: "x",
            data: "{}",
        };
        let base = link(&GENESIS, &row);
        let variants = [
            link(&base, &row),
            link(&GENESIS, &Row { position: 2, ..row.clone() }),
            link(&GENESIS, &Row { at: Time(6), ..row.clone() }),
            link(&GENESIS, &Row { actor: "hosti", kind: "nstance.started", ..row.clone() }),
            link(&GENESIS, &Row { subject: "y", ..row.clone() }),
            link(&GENESIS, &Row { data: "{ }", ..row.clone() }),
        ];
        for other in variants {
            assert_ne!(base, other);
        }
        assert_eq!(base, link(&GENESIS, &row));
    }
}
