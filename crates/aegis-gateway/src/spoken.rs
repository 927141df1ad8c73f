//! The first bytes of a connection: the name that is said in a TLS hello or an HTTP request.
//!
//! Who was let through by a name must not ask for another one where it was let to. What is not
//! understood but looks like one of the two is refused; what looks like neither is let through, as
//! its protocol says no name.
//!
//! What this can't see: names inside TLS, so that who shares an address and a certificate with an
//! allowed name is reached by its hello; and later requests on a connection of plain HTTP.

use aegis_wire::egress::{HostName, rule};
use tls_parser::{TlsExtension, TlsMessage, TlsMessageHandshake};

/// A hello or the head of a request is at most so long, bytes.
pub(crate) const FIRST_MAX: usize = 16 * 1024;
const HEADERS_MAX: usize = 128;
const METHOD_MAX: usize = 32;

/// What the first bytes say.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Not enough yet.
    More,
    /// Another protocol.
    Other,
    /// A TLS hello, or an HTTP request, that says these names, at least one.
    Names(&'static str, Vec<HostName>),
    /// One of the two that says none, or that nobody understands.
    Unclear(&'static str),
}

/// Listens to the first bytes, at most so many; with `whole` no more will come.
pub(crate) fn listen(bytes: &[u8], most: usize, whole: bool) -> Heard {
    let heard = match bytes {
        [] => Heard::More,
        // A record of a handshake, of any version of TLS that there was.
        [0x16] => Heard::More,
        [0x16, 3, ..] => hello(bytes),
        _ => request(bytes),
    };
    match heard {
        // A line that never ended asks nobody for anything.
        Heard::More if whole && bytes.first() != Some(&0x16) && !bytes.contains(&b'\n') => {
            Heard::Other
        }
        Heard::More if whole || bytes.len() >= most => {
            Heard::Unclear(if bytes[0] == 0x16 { rule::SNI } else { rule::HOST })
        }
        heard => heard,
    }
}

fn hello(bytes: &[u8]) -> Heard {
    // A hello may be cut in any number of records.
    let mut message = Vec::new();
    let mut rest = bytes;
    while let [kind, major, _, high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if (*kind, *major) != (0x16, 3) || length == 0 {
            return Heard::Unclear(rule::SNI);
        }
        let part = &after[..length.min(after.len())];
        message.extend_from_slice(part);
        rest = &after[part.len()..];
        if let [1, a, b, c, body @ ..] = &message[..] {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if body.len() >= length {
                return names_in_hello(&message[..4 + length]);
            }
        } else if message.first().is_some_and(|kind| *kind != 1) {
            return Heard::Unclear(rule::SNI);
        }
    }
    Heard::More
}

fn names_in_hello(message: &[u8]) -> Heard {
    let unclear = Heard::Unclear(rule::SNI);
    let Ok((_, TlsMessage::Handshake(TlsMessageHandshake::ClientHello(hello)))) =
        tls_parser::parse_tls_message_handshake(message)
    else {
        return unclear;
    };
    // What the parser leaves over could hide a second name.
    let Ok(([], extensions)) =
        tls_parser::parse_tls_client_hello_extensions(hello.ext.unwrap_or_default())
    else {
        return unclear;
    };
    let mut names = Vec::new();
    for extension in &extensions {
        if let TlsExtension::SNI(said) = extension {
            for (_, name) in said {
                match std::str::from_utf8(name).ok().and_then(|name| name.parse().ok()) {
                    Some(name) => names.push(name),
                    None => return unclear,
                }
            }
        }
    }
    if names.is_empty() { unclear } else { Heard::Names(rule::SNI, names) }
}

fn request(bytes: &[u8]) -> Heard {
    // Servers skip empty lines before a request.
    let Some(start) = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n')) else {
        return Heard::More;
    };
    let bytes = &bytes[start..];
    match bytes.iter().position(|b| !is_token(*b)) {
        None if bytes.len() <= METHOD_MAX => return Heard::More,
        Some(at) if (1..=METHOD_MAX).contains(&at) && matches!(bytes[at], b' ' | b'\t') => {}
        _ => return Heard::Other,
    }
    let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    if line.iter().any(|b| b.is_ascii_control() && !matches!(b, b'\r' | b'\t')) {
        return Heard::Other;
    }
    if line.len() == bytes.len() {
        return Heard::More;
    }
    // Of the servers that overlook case and blanks, none must be fooled.
    let line = line.trim_ascii().to_ascii_lowercase();
    let is_http = line
        .rsplit(|b| b.is_ascii_whitespace())
        .next()
        .is_some_and(|version| version.starts_with(b"http/"));
    if is_http { names_in_request(bytes) } else { Heard::Other }
}

fn names_in_request(bytes: &[u8]) -> Heard {
    let unclear = Heard::Unclear(rule::HOST);
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Heard::More,
        Err(_) => return unclear,
    }
    let mut said: Vec<&str> = Vec::new();
    // A target with an authority outranks the header (RFC 9112, 3.2.2).
    let path = request.path.unwrap_or_default();
    if request.method == Some("CONNECT") {
        said.push(path);
    } else if let Some((_, rest)) = path.split_once("://").filter(|_| !path.starts_with('/')) {
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        said.push(authority.rsplit('@').next().unwrap_or_default());
    }
    let mut hosts = 0;
    for header in request.headers.iter().filter(|h| h.name.eq_ignore_ascii_case("host")) {
        hosts += 1;
        match std::str::from_utf8(header.value) {
            Ok(value) => said.push(value.trim()),
            Err(_) => return unclear,
        }
    }
    if hosts != 1 {
        return unclear;
    }
    let names: Option<Vec<HostName>> = said.into_iter().map(without_port).collect();
    names.map_or(unclear, |names| Heard::Names(rule::HOST, names))
}

fn without_port(authority: &str) -> Option<HostName> {
    let name = match authority.split_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        Some(_) => return None,
        None => authority,
    };
    name.parse().ok()
}

/// What methods are made of (RFC 9110, 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn listen(bytes: &[u8], whole: bool) -> Heard {
        super::listen(bytes, FIRST_MAX, whole)
    }

    fn names(rule: &'static str, names: &[&str]) -> Heard {
        Heard::Names(rule, names.iter().map(|name| name.parse().unwrap()).collect())
    }

    /// A hello with these names, in records of at most `record` bytes.
    pub fn client_hello(sni: &[&str], record: usize) -> Vec<u8> {
        let mut extensions = vec![0, 23, 0, 0];
        for name in sni {
            let length = name.len() as u16;
            extensions.extend([0, 0]);
            extensions.extend((length + 5).to_be_bytes());
            extensions.extend((length + 3).to_be_bytes());
            extensions.push(0);
            extensions.extend(length.to_be_bytes());
            extensions.extend(name.as_bytes());
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut message = vec![1, 0];
        message.extend((body.len() as u16).to_be_bytes());
        message.extend(body);
        let mut out = Vec::new();
        for part in message.chunks(record) {
            out.extend([0x16, 3, 1]);
            out.extend((part.len() as u16).to_be_bytes());
            out.extend(part);
        }
        out
    }

    #[test]
    fn names_are_heard_in_hellos() {
        for record in [1, 7, 4096] {
            let hello = client_hello(&["Git.Example.com"], record);
            assert_eq!(listen(&hello, false), names(rule::SNI, &["git.example.com"]));
            for cut in 0..hello.len() {
                assert_eq!(listen(&hello[..cut], false), Heard::More, "{cut}");
            }
            assert_eq!(listen(&hello[..9], true), Heard::Unclear(rule::SNI));
        }
        let two = client_hello(&["a.example", "b.example"], 4096);
        assert_eq!(listen(&two, false), names(rule::SNI, &["a.example", "b.example"]));
    }

    #[test]
    fn hellos_without_a_clear_name_are_unclear() {
        for sni in [&[][..], &["127.0.0.1"], &["0x7f.1"], &["a b"], &[""]] {
            assert_eq!(
                listen(&client_hello(sni, 4096), false),
                Heard::Unclear(rule::SNI),
                "{sni:?}"
            );
        }
        // An extension that is cut short in front of a name.
        let mut broken = client_hello(&["a.example"], 4096);
        let at = broken.windows(4).position(|w| w == [0, 23, 0, 0]).unwrap();
        broken[at + 3] = 200;
        assert_eq!(listen(&broken, false), Heard::Unclear(rule::SNI));
        // Another message first, another record in between, one that never ends.
        assert_eq!(listen(&[0x16, 3, 1, 0, 4, 2, 0, 0, 0], false), Heard::Unclear(rule::SNI));
        let mut cut = client_hello(&["a.example"], 7);
        cut[12] = 0x17;
        assert_eq!(listen(&cut, false), Heard::Unclear(rule::SNI));
        let mut long = vec![0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff];
        long.resize(FIRST_MAX, 0);
        assert_eq!(listen(&long, false), Heard::Unclear(rule::SNI));
    }

    #[test]
    fn names_are_heard_in_requests() {
        for (request, expected) in [
            ("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", &["a.example"][..]),
            ("POST /x HTTP/1.1\r\nhost:A.example:8080\r\nX: y\r\n\r\nbody", &["a.example"]),
            ("\r\n\nGET / HTTP/1.0\nHost: a.example\n\n", &["a.example"]),
            (
                "GET http://b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
                &["b.example", "a.example"],
            ),
            (
                "GET http://x@b.example:1/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
                &["b.example", "a.example"],
            ),
            (
                "CONNECT b.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n",
                &["b.example", "a.example"],
            ),
            ("GET /?u=http://b.example HTTP/1.1\r\nHost: a.example\r\n\r\n", &["a.example"]),
        ] {
            assert_eq!(listen(request.as_bytes(), false), names(rule::HOST, expected), "{request}");
            let head = request.trim_end_matches("body").len();
            for cut in 0..head {
                assert_eq!(
                    listen(&request.as_bytes()[..cut], false),
                    Heard::More,
                    "{request} {cut}"
                );
            }
        }
    }

    #[test]
    fn requests_without_a_clear_name_are_unclear() {
        for request in [
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.0\r\nAccept: */*\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: 203.0.113.7\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: [2001:db8::1]\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a.example@b.example\r\n\r\n",
            "GET / HTTP/1.1\r\nHost : a.example\r\n\r\n",
            "GET / HTTP/1.1\r\nA: b\r\n Host: c.example\r\n\r\n",
            "GET / http/1.1\r\nHost: a.example\r\n\r\n",
            "GET  /  HTTP/1.1 \r\nHost: a.example\r\n\r\n",
            "GET\t/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ] {
            assert_eq!(listen(request.as_bytes(), false), Heard::Unclear(rule::HOST), "{request}");
        }
        let long = format!("GET / HTTP/1.1\r\nHost: a.example\r\nX: {}", "y".repeat(FIRST_MAX));
        assert_eq!(listen(long.as_bytes(), false), Heard::Unclear(rule::HOST));
        let cut = b"GET / HTTP/1.1\r\nHost: a.exam";
        assert_eq!(listen(cut, true), Heard::Unclear(rule::HOST));
        let line = format!("GET /{}", "y".repeat(FIRST_MAX));
        assert_eq!(listen(line.as_bytes(), false), Heard::Unclear(rule::HOST));
    }

    #[test]
    fn other_protocols_say_no_name() {
        for first in [
            &b"SSH-2.0-OpenSSH_9.6\r\n"[..],
            b"EHLO mail.example\r\n",
            b"0032git-upload-pack /project.git\0host=example.com\0",
            b"*1\r\n$4\r\nPING\r\n",
            b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
            b"\x16\x00",
            b"NICK somebody\r\n",
            "ü".as_bytes(),
        ] {
            assert_eq!(listen(first, false), Heard::Other, "{first:?}");
        }
        assert_eq!(listen(b"", false), Heard::More);
        assert_eq!(listen(b"", true), Heard::Other);
        assert_eq!(listen(b"two words", false), Heard::More);
        assert_eq!(listen(b"two words", true), Heard::Other);
    }

    proptest! {
        #[test]
        fn any_bytes_are_heard(bytes in prop::collection::vec(any::<u8>(), 0..300), tls: bool, whole: bool) {
            let mut bytes = bytes;
            if tls {
                bytes.splice(0..0, [0x16, 3, 1, 0, 200, 1, 0, 0, 196]);
            }
            let heard = listen(&bytes, whole);
            prop_assert!(!whole || heard != Heard::More);
        }
    }
}
