//! Names of hosts and services.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::words::BadWord;

const NAME_MAX: usize = 253;
const LABEL_MAX: usize = 63;

/// A DNS name: lower-case ASCII without a trailing dot, and surely no address in disguise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostName(String);

impl HostName {
    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this name is somewhere below `apex`, and not `apex` itself.
    pub fn is_below(&self, apex: &str) -> bool {
        self.0.strip_suffix(apex).is_some_and(|rest| rest.ends_with('.'))
    }
}

impl FromStr for HostName {
    type Err = BadWord;

    /// Takes any case and one trailing dot.
    fn from_str(text: &str) -> Result<HostName, BadWord> {
        let bad = || BadWord::new("host name", "a DNS name in ASCII, and not an IP address");
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() || text.len() > NAME_MAX {
            return Err(bad());
        }
        let text = text.to_ascii_lowercase();
        let mut last = "";
        for label in text.split('.') {
            let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
            if label.is_empty() || label.len() > LABEL_MAX || !label.bytes().all(fine) {
                return Err(bad());
            }
            last = label;
        }
        // What ends in a number is an IPv4 address to inet_aton and to browsers, in decimal, octal
        // or hex, with one to four parts; there is no such top-level domain.
        let digits = last.bytes().all(|b| b.is_ascii_digit());
        let hex = last.strip_prefix("0x").is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit()));
        if digits || hex { Err(bad()) } else { Ok(HostName(text)) }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Name of a host service: one lower-case DNS label, `NAME` in `NAME.host.aegis`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

impl ServiceName {
    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ServiceName {
    type Error = BadWord;

    fn try_from(text: String) -> Result<ServiceName, BadWord> {
        let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let edges = text.starts_with('-') || text.ends_with('-');
        if text.is_empty() || text.len() > LABEL_MAX || edges || !text.bytes().all(fine) {
            return Err(BadWord::new(
                "service name",
                "1 to 63 lower-case letters, digits and hyphens, no hyphen at the ends",
            ));
        }
        Ok(ServiceName(text))
    }
}

impl FromStr for ServiceName {
    type Err = BadWord;

    fn from_str(text: &str) -> Result<ServiceName, BadWord> {
        ServiceName::try_from(text.to_owned())
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> String {
        name.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
