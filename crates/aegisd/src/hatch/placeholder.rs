//! Placeholders in headers: each stands for its secret at the hosts that were named for it, and
//! nowhere else.

use aegis_rules::refusal::Refusal;
use aegis_wire::bounds::DOOR_HEAD_MAX;
use aegis_wire::egress::HostName;
use aegis_wire::words::SecretName;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::HeaderMap;
use hyper::header::HeaderValue;
use zeroize::Zeroizing;

/// A placeholder of one machine.
pub(super) struct Placeholder {
    /// Whose secret it stands for.
    pub(super) name: SecretName,
    /// The text.
    pub(super) text: String,
    /// Where.
    pub(super) hosts: Vec<HostName>,
}

/// Puts secrets in the places of their placeholders, in all values of all headers. `open` looks a
/// secret up; it is asked only for those that are to be sent.
///
/// # Errors
/// A placeholder is used at a host that was not named for it, or its secret is no header's.
pub(super) fn replace(
    headers: &mut HeaderMap,
    host: &str,
    own: &[Placeholder],
    open: impl Fn(&SecretName) -> Option<Zeroizing<String>>,
) -> Result<(), Refusal> {
    if own.is_empty() {
        return Ok(());
    }
    for value in headers.values_mut() {
        if let Some(replaced) = replaced(value, host, own, &open)? {
            let mut with = HeaderValue::from_bytes(replaced.as_bytes()).map_err(|_| {
                Refusal::denied("secret_hosts", "the secret can't stand in a header")
            })?;
            with.set_sensitive(true);
            *value = with;
        }
    }
    Ok(())
}

fn replaced(
    value: &HeaderValue,
    host: &str,
    own: &[Placeholder],
    open: &impl Fn(&SecretName) -> Option<Zeroizing<String>>,
) -> Result<Option<Zeroizing<String>>, Refusal> {
    let Ok(text) = std::str::from_utf8(value.as_bytes()) else { return Ok(None) };
    if let Some(basic) = basic(text) {
        // `user:password`, as git and curl send it.
        let inside = in_text(&basic, host, own, open)?;
        return Ok(inside.map(|inside| {
            let encoded = Zeroizing::new(STANDARD.encode(inside.as_bytes()));
            Zeroizing::new(format!("Basic {}", *encoded))
        }));
    }
    in_text(text, host, own, open)
}

/// What Basic authentication encodes, where it is that.
fn basic(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once(' ')?;
    let bytes = STANDARD.decode(rest.trim()).ok()?;
    scheme.eq_ignore_ascii_case("basic").then(|| String::from_utf8(bytes).ok()).flatten()
}

fn in_text(
    text: &str,
    host: &str,
    own: &[Placeholder],
    open: &impl Fn(&SecretName) -> Option<Zeroizing<String>>,
) -> Result<Option<Zeroizing<String>>, Refusal> {
    let mut found = own.iter().filter(|p| text.contains(&p.text)).peekable();
    if found.peek().is_none() {
        return Ok(None);
    }
    let mut out = Zeroizing::new(text.to_owned());
    for place in found {
        if !place.hosts.iter().any(|h| h.as_str() == host) {
            let allowed: Vec<&str> = place.hosts.iter().map(HostName::as_str).collect();
            let message = format!("the secret {} may not be sent to {host}", place.name);
            return Err(Refusal::denied("secret_hosts", message)
                .amounts(host, allowed.join(", "))
                .hint(
                    "the host names where a secret may go: aegis secret set NAME --proxy --host …",
                ));
        }
        let Some(secret) = open(&place.name) else {
            let message = format!("this host keeps no secret {}", place.name);
            return Err(Refusal::denied("secret_hosts", message));
        };
        // One that is there again and again would make much of little.
        let grown = out.matches(&place.text).count().saturating_mul(secret.len());
        if grown.saturating_add(out.len()) > DOOR_HEAD_MAX {
            let allowed = format!("at most {DOOR_HEAD_MAX} bytes with its secrets");
            return Err(Refusal::field("the header", allowed));
        }
        out = Zeroizing::new(out.replace(&place.text, &secret));
    }
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Vec<Placeholder> {
        let place = |name: &str, host: &str| Placeholder {
            name: name.parse().unwrap(),
            text: format!("aegis-secret-{name}-0123456789abcdef"),
            hosts: vec![host.parse().unwrap()],
        };
        vec![place("A", "a.example"), place("B", "web.host.aegis")]
    }

    fn sent(host: &str, value: &str) -> Result<String, Refusal> {
        let mut headers = HeaderMap::new();
        headers.insert("x-other", HeaderValue::from_static("stays"));
        headers.insert("x-key", HeaderValue::from_str(value).unwrap());
        let open = |name: &SecretName| Some(Zeroizing::new(format!("secret of {name}")));
        replace(&mut headers, host, &own(), open)?;
        assert_eq!(headers["x-other"], "stays");
        Ok(headers["x-key"].to_str().unwrap().to_owned())
    }

    const A: &str = "aegis-secret-A-0123456789abcdef";
    const B: &str = "aegis-secret-B-0123456789abcdef";

    #[test]
    fn a_placeholder_is_replaced_at_its_host_only() {
        assert_eq!(sent("a.example", &format!("Bearer {A}")).unwrap(), "Bearer secret of A");
        assert_eq!(sent("a.example", &format!("{A},{A}")).unwrap(), "secret of A,secret of A");
        for (host, value) in [
            ("b.example", A.to_owned()),
            ("a.example", format!("{A} {B}")),
            ("x.a.example", A.into()),
        ] {
            let refusal = sent(host, &value).unwrap_err();
            assert_eq!(refusal.rule, Some("secret_hosts"));
            assert!(!format!("{refusal:?}").contains("secret of"), "{refusal:?}");
        }
        // Another machine's, or a made-up one, is a text like any other.
        let other = "aegis-secret-A-fedcba9876543210";
        assert_eq!(sent("b.example", other).unwrap(), other);
    }

    #[test]
    fn basic_authentication_is_looked_into() {
        let encoded = format!("Basic {}", STANDARD.encode(format!("ty:{A}")));
        let expected = format!("Basic {}", STANDARD.encode("ty:secret of A"));
        assert_eq!(sent("a.example", &encoded).unwrap(), expected);
        assert!(sent("b.example", &encoded).is_err());
        let plain = format!("Basic {}", STANDARD.encode("ty:word"));
        assert_eq!(sent("b.example", &plain).unwrap(), plain);
    }
}
