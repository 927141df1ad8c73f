//! Ids and names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text that is not the word it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be {expected}")]
pub struct BadWord {
    /// What was being parsed, for example `handle`.
    pub what: &'static str,
    /// What would pass.
    pub expected: &'static str,
}

impl BadWord {
    /// A refusal to parse `what`, which must be `expected`.
    pub fn new(what: &'static str, expected: &'static str) -> BadWord {
        BadWord { what, expected }
    }
}

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $what:literal, $expected:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text form.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadWord;
            fn from_str(s: &str) -> Result<Self, BadWord> {
                Self::try_from(s.to_owned())
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadWord;
            fn try_from(s: String) -> Result<Self, BadWord> {
                let valid: fn(&str) -> bool = $valid;
                if valid(&s) { Ok($name(s)) } else { Err(BadWord::new($what, $expected)) }
            }
        }

        impl From<$name> for String {
            fn from(word: $name) -> String {
                word.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

fn is_ulid(s: &str) -> bool {
    const CROCKFORD: &[u8] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    s.len() == 26 && s.as_bytes()[0] <= b'7' && s.bytes().all(|b| CROCKFORD.contains(&b))
}

fn is_handle(s: &str) -> bool {
    s.len() <= 63
        && s.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

word! {
    /// Id of an invite: a ULID.
    InviteId, "invite id", "a ULID", is_ulid
}
word! {
    /// Id of a guest, the person or agent that redeemed an invite: a ULID.
    GuestId, "guest id", "a ULID", is_ulid
}
word! {
    /// Id of an instance: `inst-` and a ULID.
    InstanceId, "instance id", "inst- and a ULID",
    |s| s.strip_prefix("inst-").is_some_and(is_ulid)
}
word! {
    /// Id of a commit: `commit-` and a ULID.
    CommitId, "commit id", "commit- and a ULID",
    |s| s.strip_prefix("commit-").is_some_and(is_ulid)
}
word! {
    /// A name that a host gives an instance (contracts/aegis.md 1).
    Handle, "handle", "1 to 63 of a-z A-Z 0-9 . _ - and begin with a letter or digit", is_handle
}
word! {
    /// A reference to an image, as the user gave it: `base`, `node:22`, `ghcr.io/acme/bot@sha256:…`.
    ImageRef, "image reference", "1 to 255 of a-z A-Z 0-9 . _ - / : @ and begin with a letter or digit",
    |s| !s.is_empty()
        && s.len() <= 255
        && s.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && !s.contains("..")
        && s.bytes().all(|b| b.is_ascii_alphanumeric()
            || matches!(b, b'.' | b'_' | b'-' | b'/' | b':' | b'@'))
}
word! {
    /// The single-use code of an invite: `inv_` and base64url of 24 random bytes. A secret.
    InviteCode, "code", "inv_ and 32 of a-z A-Z 0-9 _ -",
    |s| s.strip_prefix("inv_").is_some_and(|r| r.len() == 32
        && r.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')))
}
word! {
    /// A trimmed, non-blank line that people read: who created an invite, a guest's name, a label.
    Label, "text", "1 to 200 characters without control characters",
    |s| s.trim() == s && !s.is_empty() && s.chars().count() <= 200 && !s.chars().any(char::is_control)
}

word! {
    /// Name of a secret of the host, which is the name of the variable that holds it inside.
    SecretName, "secret name", "1 to 64 of A-Z 0-9 _ and begin with a letter or _",
    |s| s.len() <= 64
        && s.bytes().next().is_some_and(|b| b.is_ascii_uppercase() || b == b'_')
        && s.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}

word! {
    /// A UUID in its one form, lower case: how the vers cloud names its machines and commits.
    Uuid, "id", "a UUID in lower case",
    |s| s.len() == 36
        && s.bytes().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_digit() || (b'a'..=b'f').contains(&b),
        })
}

impl Uuid {
    /// The UUID of these bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Uuid {
        let hex = crate::audit::hex(&bytes);
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        Uuid(parts.join("-"))
    }

    /// Its bytes.
    pub fn to_bytes(&self) -> [u8; 16] {
        let digits: Vec<u8> = self.0.bytes().filter(|b| *b != b'-').collect();
        let value = |b: u8| if b.is_ascii_digit() { b - b'0' } else { b - b'a' + 10 };
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = pair.iter().fold(0, |high, digit| high << 4 | value(*digit));
        }
        bytes
    }
}

impl CommitId {
    /// The commit id that carries this ULID.
    pub fn from_ulid_text(ulid: &str) -> Result<CommitId, BadWord> {
        format!("commit-{ulid}").parse()
    }
}

impl ImageRef {
    /// The commit that is meant, where a golden is named by its id (contracts/couch.md 3).
    pub fn commit(&self) -> Option<CommitId> {
        self.as_str().parse().ok()
    }
}

impl InstanceId {
    /// The instance id that carries this ULID.
    pub fn from_ulid_text(ulid: &str) -> Result<InstanceId, BadWord> {
        format!("inst-{ulid}").parse()
    }
}

/// An OpenSSH public key line, parsed and written again in its one form (contracts/couch.md 3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(String);

impl PublicKey {
    /// The key as one line of `authorized_keys`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PublicKey {
    type Error = BadWord;
    fn try_from(s: String) -> Result<PublicKey, BadWord> {
        let bad = || BadWord::new("publicKey", "an OpenSSH public key line");
        let line = s.trim();
        if line.contains(['\n', '\r']) {
            return Err(bad());
        }
        let key = ssh_key::PublicKey::from_openssh(line).map_err(|_| bad())?;
        Ok(PublicKey(key.to_openssh().map_err(|_| bad())?))
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.0
    }
}

/// A TCP port that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Port(u16);

impl Port {
    /// The number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u64> for Port {
    type Error = BadWord;
    fn try_from(n: u64) -> Result<Port, BadWord> {
        match u16::try_from(n) {
            Ok(n) if n > 0 => Ok(Port(n)),
            _ => Err(BadWord::new("port", "from 1 to 65535")),
        }
    }
}

impl From<Port> for u64 {
    fn from(port: Port) -> u64 {
        u64::from(port.0)
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose audit chain an event belongs to: everything that comes from one invite, or from one
/// instance that a host started without an invite (contracts/couch.md 8).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tree {
    /// An invite, its guest and all of the guest's machines.
    Invite(InviteId),
    /// A host's own instance and its descendants.
    Instance(InstanceId),
    /// The host itself: what belongs to no machine.
    Host,
}

/// The text form of [`Tree::Host`].
const HOST_TREE: &str = "host";

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tree::Invite(id) => id.fmt(f),
            Tree::Instance(id) => id.fmt(f),
            Tree::Host => f.write_str(HOST_TREE),
        }
    }
}

impl FromStr for Tree {
    type Err = BadWord;
    fn from_str(s: &str) -> Result<Tree, BadWord> {
        match s.parse() {
            _ if s == HOST_TREE => Ok(Tree::Host),
            Ok(id) => Ok(Tree::Instance(id)),
            Err(_) => s.parse().map(Tree::Invite),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_and_ids_are_strict() {
        assert!("my-bot.2_x".parse::<Handle>().is_ok());
        for bad in ["", "-x", ".x", "a b", "a/b", &"x".repeat(64), "ä"] {
            assert!(bad.parse::<Handle>().is_err(), "{bad}");
        }
        assert!("inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse::<InstanceId>().is_ok());
        for bad in ["inst-", "01ARZ3NDEKTSV4RRFFQ69G5FAV", "inst-01arz3ndektsv4rrffq69g5fav"] {
            assert!(bad.parse::<InstanceId>().is_err(), "{bad}");
        }
        assert!("0b9cf0ad-8d4e-4a4b-9c4b-3f3d1f0a6a01".parse::<Uuid>().is_ok());
        let uuid = Uuid::from_bytes([0xa5; 16]);
        assert_eq!(uuid.as_str(), "a5a5a5a5-a5a5-a5a5-a5a5-a5a5a5a5a5a5");
        assert_eq!(uuid.to_bytes(), [0xa5; 16]);
        assert_eq!(uuid.as_str().parse::<Uuid>().unwrap(), uuid);
        for bad in ["", "0b9cf0ad", "0B9CF0AD-8D4E-4A4B-9C4B-3F3D1F0A6A01"] {
            assert!(bad.parse::<Uuid>().is_err(), "{bad}");
        }
        assert!("../x".parse::<ImageRef>().is_err());
        assert!("a/../x".parse::<ImageRef>().is_err());
        assert!("ghcr.io/acme/bot:1@sha256:00".parse::<ImageRef>().is_ok());
    }

    #[test]
    fn public_keys_are_parsed() {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ me@host";
        assert_eq!(PublicKey::try_from(format!(" {key}\n")).unwrap().as_str(), key);
        assert!(PublicKey::try_from("ssh-ed25519 AAAA".to_owned()).is_err());
        assert!(PublicKey::try_from(format!("{key}\n{key}")).is_err());
    }
}
