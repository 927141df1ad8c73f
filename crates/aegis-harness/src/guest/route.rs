//! The guest API's paths (contracts/aegis.md 4), and how a request becomes a call's params.

use aegis_wire::channel::guest::method;
use aegis_wire::path::unescape;
use serde_json::{Map, Value};

use super::answer::Refusal;

/// Longest id or handle that is passed on, bytes.
const NAME_MAX: usize = 128;

/// A request that has a place.
#[derive(Debug, PartialEq, Eq)]
pub struct Route {
    /// The method of the control channel.
    pub call: &'static str,
    /// The child that it is about, by id or handle.
    pub child: Option<String>,
    port: Option<u64>,
}

/// Finds a request's place.
pub fn route(verb: &str, path: &str) -> Result<Route, Refusal> {
    let words: Vec<&str> = path.strip_prefix("/v1/").unwrap_or_default().split('/').collect();
    let (mut child, mut port) = (None, None);
    let verbs: &[(&str, &str)] = match words[..] {
        ["self"] => &[("GET", method::SELF_INFO)],
        ["self", "keepalive"] => {
            &[("POST", method::KEEPALIVE), ("DELETE", method::RELEASE_KEEPALIVE)]
        }
        ["self", "requests"] => &[("POST", method::REQUEST_ACCESS), ("GET", method::LIST_REQUESTS)],
        ["self", "expose"] => &[("POST", method::EXPOSE)],
        ["self", "expose", number] => {
            port = Some(number.parse().map_err(|_| Refusal::no_route())?);
            &[("DELETE", method::UNEXPOSE)]
        }
        ["instances"] => &[("GET", method::LIST_CHILDREN), ("POST", method::SPAWN)],
        ["instances", name, ref rest @ ..] => {
            child = Some(named(name)?);
            match rest {
                [] => &[("GET", method::GET_CHILD), ("DELETE", method::DELETE_CHILD)],
                ["start"] => &[("POST", method::START_CHILD)],
                ["stop"] => &[("POST", method::STOP_CHILD)],
                ["exec"] => &[("POST", method::EXEC_CHILD)],
                ["logs"] => &[("GET", method::CHILD_LOGS)],
                // Which call it is, the query says: see `files`.
                ["files"] => &[
                    ("GET", method::READ_CHILD_FILES),
                    ("HEAD", method::LOOK_AT_CHILD_FILES),
                    ("PUT", method::WRITE_CHILD_FILE),
                    ("POST", method::CHANGE_CHILD_FILES),
                    ("DELETE", method::CHANGE_CHILD_FILES),
                ],
                ["files", "watch"] => &[("GET", method::READ_CHILD_FILES)],
                _ => return Err(Refusal::no_route()),
            }
        }
        _ => return Err(Refusal::no_route()),
    };
    match verbs.iter().find(|(its, _)| *its == verb) {
        Some((_, call)) => Ok(Route { call, child, port }),
        None => {
            let allow: Vec<&str> = verbs.iter().map(|(verb, _)| *verb).collect();
            Err(Refusal::no_method(allow.join(", ")))
        }
    }
}

fn named(name: &str) -> Result<String, Refusal> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    match !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(plain) {
        true => Ok(name.to_owned()),
        false => Err(Refusal::no_route()),
    }
}

impl Route {
    /// Status of a success.
    pub fn status(&self) -> u16 {
        if matches!(self.call, method::SPAWN | method::REQUEST_ACCESS) { 201 } else { 200 }
    }

    /// Whether the answer comes on a stream.
    pub fn streamed(&self) -> bool {
        matches!(self.call, method::EXEC_CHILD | method::CHILD_LOGS)
    }

    /// Whether it is about a child's files.
    pub fn is_of_files(&self) -> bool {
        matches!(
            self.call,
            method::READ_CHILD_FILES
                | method::LOOK_AT_CHILD_FILES
                | method::WRITE_CHILD_FILE
                | method::CHANGE_CHILD_FILES
        )
    }

    /// The params, but for the token, which wins over whatever the body calls so.
    pub fn params(&self, query: Option<&str>, body: &[u8]) -> Result<Map<String, Value>, Refusal> {
        let mut params = match self.call {
            method::SPAWN | method::REQUEST_ACCESS => {
                Map::from_iter([("request".to_owned(), parse(body)?)])
            }
            method::EXEC_CHILD | method::KEEPALIVE => object(body)?,
            method::EXPOSE => {
                let mut params = object(body)?;
                if !params.contains_key("guest_port")
                    && let Some(port) = params.remove("port")
                {
                    params.insert("guest_port".to_owned(), port);
                }
                params
            }
            method::CHILD_LOGS => logs(query.unwrap_or_default())?,
            _ => Map::new(),
        };
        if let Some(child) = &self.child {
            params.insert("child_id".to_owned(), child.as_str().into());
        }
        if let Some(port) = self.port {
            params.insert("guest_port".to_owned(), port.into());
        }
        Ok(params)
    }
}

/// `serde_json` itself bounds the depth.
fn parse(body: &[u8]) -> Result<Value, Refusal> {
    serde_json::from_slice(body)
        .map_err(|error| Refusal::malformed(format!("the request body is not JSON: {error}")))
}

/// An object; nothing at all is an empty one.
fn object(body: &[u8]) -> Result<Map<String, Value>, Refusal> {
    if body.is_empty() {
        return Ok(Map::new());
    }
    match parse(body)? {
        Value::Object(fields) => Ok(fields),
        _ => Err(Refusal::malformed("the request body must be a JSON object")),
    }
}

fn logs(query: &str) -> Result<Map<String, Value>, Refusal> {
    let mut params = Map::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decode(value).ok_or_else(|| Refusal::malformed("the query is not UTF-8"))?;
        let value = match name {
            "follow" => match &*value {
                "1" | "true" => true.into(),
                "" | "0" | "false" => false.into(),
                _ => return Err(Refusal::field("follow", "true or false")),
            },
            "tail" => match value.parse::<u32>() {
                Ok(tail) => tail.into(),
                Err(_) => return Err(Refusal::field("tail", "a whole number")),
            },
            "since" | "exec_id" => value.into(),
            _ => continue,
        };
        params.insert(name.to_owned(), value);
    }
    Ok(params)
}

/// A value of a query; `None` when it is no text.
fn decode(text: &str) -> Option<String> {
    String::from_utf8(unescape(text)?).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(verb: &str, path: &str) -> Route {
        route(verb, path).unwrap_or_else(|refusal| panic!("{verb} {path}: {}", refusal.body))
    }

    fn refused(verb: &str, path: &str) -> (u16, Option<String>) {
        let refusal = route(verb, path).err().unwrap();
        (refusal.status, refusal.allow)
    }

    #[test]
    fn every_path_of_the_contract_has_its_call() {
        let all = [
            ("POST", "/v1/instances", method::SPAWN, 201),
            ("GET", "/v1/instances", method::LIST_CHILDREN, 200),
            ("GET", "/v1/instances/inst-1", method::GET_CHILD, 200),
            ("DELETE", "/v1/instances/inst-1", method::DELETE_CHILD, 200),
            ("POST", "/v1/instances/a.b_c-d/start", method::START_CHILD, 200),
            ("POST", "/v1/instances/inst-1/stop", method::STOP_CHILD, 200),
            ("POST", "/v1/instances/inst-1/exec", method::EXEC_CHILD, 200),
            ("GET", "/v1/instances/inst-1/logs", method::CHILD_LOGS, 200),
            ("GET", "/v1/instances/inst-1/files", method::READ_CHILD_FILES, 200),
            ("HEAD", "/v1/instances/inst-1/files", method::LOOK_AT_CHILD_FILES, 200),
            ("PUT", "/v1/instances/inst-1/files", method::WRITE_CHILD_FILE, 200),
            ("DELETE", "/v1/instances/inst-1/files", method::CHANGE_CHILD_FILES, 200),
            ("GET", "/v1/self", method::SELF_INFO, 200),
            ("POST", "/v1/self/keepalive", method::KEEPALIVE, 200),
            ("DELETE", "/v1/self/keepalive", method::RELEASE_KEEPALIVE, 200),
            ("POST", "/v1/self/requests", method::REQUEST_ACCESS, 201),
            ("GET", "/v1/self/requests", method::LIST_REQUESTS, 200),
            ("POST", "/v1/self/expose", method::EXPOSE, 200),
            ("DELETE", "/v1/self/expose/8080", method::UNEXPOSE, 200),
        ];
        assert_eq!(all.len(), method::ALL.len());
        for (verb, path, call, status) in all {
            let route = found(verb, path);
            assert_eq!((route.call, route.status()), (call, status), "{verb} {path}");
        }
    }

    #[test]
    fn whatever_else_is_asked_has_no_place() {
        let long = format!("/v1/instances/{}", "a".repeat(NAME_MAX + 1));
        let unknown = [
            "",
            "/",
            "/v1",
            "/v1/",
            "/v2/self",
            "/v1/self/",
            "/v1//self",
            "/v1/instances/",
            "/v1/instances/a/../b",
            "/v1/instances/%2e",
            "/v1/instances/a/restart",
            "/v1/instances/a/exec/b",
            "/v1/instances/a/files/etc",
            "/v1/self/expose/x",
            "/v1/self/expose/-1",
            "/v1/secrets",
            &long,
        ];
        for path in unknown {
            assert_eq!(refused("GET", path), (404, None), "{path}");
        }
        assert_eq!(refused("PUT", "/v1/instances"), (405, Some("GET, POST".to_owned())));
        assert_eq!(refused("HEAD", "/v1/self"), (405, Some("GET".to_owned())));
    }

    #[test]
    fn params_are_what_was_sent_and_the_path_wins() {
        let spawn = found("POST", "/v1/instances");
        let params = spawn.params(None, br#"{"token":"x","command":["a"]}"#).ok().unwrap();
        assert_eq!(Value::Object(params), json!({"request": {"token": "x", "command": ["a"]}}));
        let exec = found("POST", "/v1/instances/mine/exec");
        let params = exec.params(None, br#"{"child_id":"yours","command":["a"]}"#).ok().unwrap();
        assert_eq!(Value::Object(params), json!({"child_id": "mine", "command": ["a"]}));
        let expose = found("POST", "/v1/self/expose");
        let params = expose.params(None, br#"{"port":80}"#).ok().unwrap();
        assert_eq!(Value::Object(params), json!({"guest_port": 80}));
        let logs = found("GET", "/v1/instances/mine/logs");
        let query = "follow=1&tail=5&since=2026-01-01T00%3A00%3A00Z&other=1";
        let params = logs.params(Some(query), b"ignored").ok().unwrap();
        let wanted = json!({
            "child_id": "mine", "follow": true, "tail": 5, "since": "2026-01-01T00:00:00Z",
        });
        assert_eq!(Value::Object(params), wanted);
        for query in ["tail=x", "tail=-1", "follow=maybe", "since=%ff", "since=%", "since=%zz"] {
            assert_eq!(logs.params(Some(query), b"").err().unwrap().status, 400, "{query}");
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        let deep = "[".repeat(100_000);
        let bodies: [&[u8]; 5] = [b"", b"{", b"\xff\xfe", b"{\"a\":\"\xff\"}", deep.as_bytes()];
        for body in bodies {
            let refusal = found("POST", "/v1/instances").params(None, body).err().unwrap();
            assert_eq!(refusal.status, 400);
            assert_eq!(refusal.body["code"], "malformed_request");
        }
        let exec = found("POST", "/v1/instances/a/exec");
        assert_eq!(exec.params(None, b"[]").err().unwrap().status, 400);
    }
}
