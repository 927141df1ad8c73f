//! References to images in registries, in full.

use std::fmt;

use super::{BadWord, ImageRef};

/// The registry of names that say none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag of names that say none.
const DEFAULT_TAG: &str = "latest";

/// Where an image is: registry, name, and tag or digest. All names that mean the same make the same
/// one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// `docker.io`, `ghcr.io`, `localhost:5000`.
    pub registry: String,
    /// `library/python`, `acme/bot`.
    pub repository: String,
    /// Absent where there is a digest, beside which it says nothing.
    pub tag: Option<String>,
    /// `sha256:` and 64 hex digits.
    pub digest: Option<String>,
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, tag) => write!(f, ":{}", tag.as_deref().unwrap_or(DEFAULT_TAG)),
        }
    }
}

impl Reference {
    /// What a user's name means.
    ///
    /// # Errors
    /// A name that no registry can have.
    pub fn of(image: &ImageRef) -> Result<Reference, BadWord> {
        let bad = || BadWord::new("image reference", "[REGISTRY/]NAME[:TAG][@sha256:DIGEST]");
        let (name, digest) = match image.as_str().split_once('@') {
            Some((name, digest)) if is_digest(digest) => (name, Some(digest.to_owned())),
            Some(_) => return Err(bad()),
            None => (image.as_str(), None),
        };
        // A colon before the last slash belongs to a port.
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => {
                (first, path)
            }
            _ => (DEFAULT_REGISTRY, name),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        let repository = match registry == DEFAULT_REGISTRY && !path.contains('/') {
            true => format!("library/{path}"),
            false => path.to_owned(),
        };
        let fits =
            repository.split('/').all(is_part) && is_host(registry) && tag.is_none_or(is_tag);
        if !fits {
            return Err(bad());
        }
        let tag = match digest {
            Some(_) => None,
            None => Some(tag.unwrap_or(DEFAULT_TAG).to_owned()),
        };
        Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
    }

    /// Whether the registry is on this host.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.registry)
    }
}

/// Whether `HOST` or `HOST:PORT` is this host: its own packets need no TLS.
pub fn is_loopback(authority: &str) -> bool {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    host == "localhost" || host.parse::<core::net::Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether a text is a digest of an image or layer.
pub fn is_digest(text: &str) -> bool {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.strip_prefix("sha256:").is_some_and(|rest| rest.len() == 64 && rest.bytes().all(hex))
}

fn is_part(part: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    part.bytes().all(|b| plain(b) || matches!(b, b'.' | b'_' | b'-'))
        && part.bytes().next().is_some_and(plain)
        && part.bytes().last().is_some_and(plain)
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=128).contains(&tag.len())
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

fn is_host(host: &str) -> bool {
    let (name, port) = host.split_once(':').map_or((host, None), |(n, p)| (n, Some(p)));
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-');
    !name.is_empty()
        && name.bytes().all(plain)
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn of(text: &str) -> Result<String, BadWord> {
        Ok(Reference::of(&text.parse()?)?.to_string())
    }

    #[test]
    fn all_names_of_an_image_are_one() {
        for (text, full) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("docker.io/alpine", "docker.io/library/alpine:latest"),
            ("index.docker.io/library/alpine:latest", "docker.io/library/alpine:latest"),
            ("python:3.12-alpine", "docker.io/library/python:3.12-alpine"),
            ("acme/bot", "docker.io/acme/bot:latest"),
            ("ghcr.io/acme/a/b:1", "ghcr.io/acme/a/b:1"),
            ("localhost/bot", "localhost/bot:latest"),
            ("127.0.0.1:5000/bot:x", "127.0.0.1:5000/bot:x"),
        ] {
            assert_eq!(of(text).unwrap(), full, "{text}");
            assert_eq!(of(full).unwrap(), full);
        }
        let digest = format!("docker.io/library/a@sha256:{HEX}");
        assert_eq!(of(&format!("a:1@sha256:{HEX}")).unwrap(), digest);
    }

    #[test]
    fn what_no_registry_has_is_refused() {
        for text in [
            "Upper",
            "a/",
            "a//b",
            "a:",
            "a@sha256:12",
            "a@md5:x",
            "a:-x",
            "x.y:0/a",
            "a-/b",
            "a:b@c",
        ] {
            assert!(of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn loopback_is_this_host_and_nothing_else() {
        for yes in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.1.2.3"] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["localhost.evil.test", "127.0.0.1.evil.test:80", "128.0.0.1", "docker.io"] {
            assert!(!is_loopback(no), "{no}");
        }
    }
}
