//! HTTP that is passed on: which of its headers are about one connection only.

use hyper::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, UPGRADE};

/// Headers that are about one connection only.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Whether a request wants to speak something else on its connection.
pub fn is_upgrade(headers: &HeaderMap) -> bool {
    let says = headers.get_all(CONNECTION).iter().filter_map(|v| v.to_str().ok());
    let mut words = says.flat_map(|v| v.split(','));
    headers.contains_key(UPGRADE) && words.any(|w| w.trim().eq_ignore_ascii_case("upgrade"))
}

/// Takes out what is about one connection only; an upgrade is for both.
pub fn strip(headers: &mut HeaderMap, upgrade: bool) {
    let upgraded = headers.get(UPGRADE).filter(|_| upgrade).cloned();
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    if let Some(what) = upgraded {
        headers.insert(UPGRADE, what);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(of: &[(&'static str, &'static str)]) -> HeaderMap {
        of.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn what_is_about_one_connection_stays_there() {
        let all = [
            ("connection", "keep-alive, X-Own"),
            ("x-own", "1"),
            ("keep-alive", "5"),
            ("transfer-encoding", "chunked"),
            ("proxy-authorization", "Basic x"),
            ("accept", "*/*"),
        ];
        let mut got = headers(&all);
        strip(&mut got, false);
        assert_eq!(got, headers(&[("accept", "*/*")]));
    }

    #[test]
    fn an_upgrade_goes_through() {
        let all = [("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
        let mut got = headers(&all);
        assert!(is_upgrade(&got));
        strip(&mut got, true);
        assert_eq!(got, headers(&[("upgrade", "websocket"), ("connection", "upgrade")]));
        assert!(!is_upgrade(&headers(&[("upgrade", "h2c")])));
    }
}
