//! Paths and queries of requests, as clients make them.

/// One part of a path or query, safe whatever a user or an agent says.
pub fn escape(part: &str) -> String {
    let mut escaped = String::with_capacity(part.len());
    for byte in part.bytes() {
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
}
