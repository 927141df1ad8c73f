//! Repositories over HTTP, by git's own server program.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use bytes::Bytes;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use super::web::{Body, full};

/// Below this path are repositories.
pub(super) const PREFIX: &str = "/git/";
/// The repository that is there.
pub(super) const NAME: &str = "repo.git";

/// Makes a bare repository with one commit, which anybody may push to. Returns the commit.
pub(super) fn make(root: &Path) -> String {
    let bare = root.join(NAME);
    let git = |words: &[&str]| {
        let done = Command::new("git")
            .args(words)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .output()
            .expect("git");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "git {}: {said}", words.join(" "));
        String::from_utf8(done.stdout).unwrap().trim().to_owned()
    };
    let work = root.join("work");
    let (bare, work) = (bare.to_str().unwrap(), work.to_str().unwrap());
    git(&["init", "-q", "--bare", "-b", "main", bare]);
    git(&["-C", bare, "config", "http.receivepack", "true"]);
    git(&["init", "-q", "-b", "main", work]);
    std::fs::write(format!("{work}/README"), "from outside\n").unwrap();
    git(&["-C", work, "add", "."]);
    let who = ["-c", "user.name=outside", "-c", "user.email=outside@test"];
    git(&[&["-C", work][..], &who, &["commit", "-q", "-m", "first"]].concat());
    git(&["-C", work, "push", "-q", bare, "main"]);
    git(&["-C", work, "rev-parse", "HEAD"])
}

/// What git's server program says to a request (CGI, RFC 3875). Blocks.
pub(super) fn answer(
    root: &Path,
    method: &str,
    path: &str,
    query: &str,
    headers: &HeaderMap,
    body: &[u8],
) -> io::Result<Response<Body>> {
    let text = |name: HeaderName| {
        headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
    };
    let mut child = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_PROTOCOL", text(HeaderName::from_static("git-protocol")))
        .env("HTTP_CONTENT_ENCODING", text(CONTENT_ENCODING))
        .env("PATH_INFO", path)
        .env("QUERY_STRING", query)
        .env("REQUEST_METHOD", method)
        .env("CONTENT_TYPE", text(CONTENT_TYPE))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("REMOTE_USER", "anybody")
        .env("REMOTE_ADDR", "0.0.0.0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().expect("it was asked for");
    let done = std::thread::scope(|scope| {
        // It may stop reading before the end: then what it says tells more than the broken pipe.
        scope.spawn(move || stdin.write_all(body));
        child.wait_with_output()
    })?;
    let end = done.stdout.windows(4).position(|w| w == b"\r\n\r\n");
    let (head, rest) = match end {
        Some(end) => (&done.stdout[..end], &done.stdout[end + 4..]),
        None => (&[][..], &done.stdout[..]),
    };
    let mut response = Response::new(full(Bytes::copy_from_slice(rest)));
    for line in String::from_utf8_lossy(head).lines() {
        let Some((name, value)) = line.split_once(": ") else { continue };
        if name.eq_ignore_ascii_case("status") {
            let code = value.get(..3).and_then(|c| c.parse().ok());
            *response.status_mut() = code.unwrap_or(StatusCode::BAD_GATEWAY);
        } else if let (Ok(name), Ok(value)) =
            (name.parse::<HeaderName>(), HeaderValue::from_str(value))
        {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}
