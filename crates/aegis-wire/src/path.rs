//! Paths and queries of requests, as clients make them.

/// One part of a path or query, safe whatever a user or an agent says.
pub fn escape(part: impl AsRef<[u8]>) -> String {
    let part = part.as_ref();
    let mut escaped = String::with_capacity(part.len());
    for &byte in part {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(byte.into());
            }
            _ => escaped += &format!("%{byte:02X}"),
        }
    }
    // `.` and `..` would walk up the path.
    if matches!(escaped.as_str(), "." | "..") {
        escaped = escaped.replace('.', "%2E");
    }
    escaped
}

/// Takes `%XX` and `+` of a query for what they stand for; `None` where a `%` stands for nothing.
pub fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut plain = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |b: u8| char::from(b).to_digit(16);
                let (high, low) = (digit(bytes.next()?)?, digit(bytes.next()?)?);
                u8::try_from(16 * high + low).ok()?
            }
            other => other,
        });
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_place_in_the_path() {
        assert_eq!(escape("web-1.x"), "web-1.x");
        assert_eq!(escape("work-1"), "work-1");
        assert_eq!(escape("../status?x=1"), "..%2Fstatus%3Fx%3D1");
        assert_eq!(escape("../self?x"), "..%2Fself%3Fx");
        assert_eq!(escape(".."), "%2E%2E");
        assert_eq!(escape("ä"), "%C3%A4");
    }

    #[test]
    fn what_is_escaped_comes_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(unescape(&escape(&bytes)).unwrap(), bytes);
        assert_eq!(unescape("a+b%2b").unwrap(), b"a b+");
        assert_eq!((unescape("%"), unescape("%zz")), (None, None));
    }
}
