//! Files of machines, as the host API and the guest API have them: the same paths, queries and
//! shapes (README, "Files of machines").
//!
//! ```text
//! GET    …/files?path=/abs            bytes; Range; HEAD and ?stat=true for what it is
//! GET    …/files?path=/abs&list=true  {"path":…,"entries":[…]}
//! GET    …/files/watch?path=/abs      NDJSON of events; ?recursive=true
//! PUT    …/files?path=/abs            bytes; ?mode=0644&uid=&gid=&create_dirs=true
//! POST   …/files?path=/abs&op=mkdir   or op=rename&to=/abs, op=symlink&target=…
//! DELETE …/files?path=/abs            ?recursive=true
//! ```
//! In a query a name is its bytes, each escaped where needed. In JSON it is text, lossy where the
//! bytes are none, and then the bytes are beside it as base64.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::channel::files::{
    BadFile, Entry, Event, FileAsk, FileKind, FilePath, Happened, LinkTarget, Make, Meta, Mode,
};
use crate::path::unescape;
use crate::words::Time;

/// Header of an answer with a file's bytes: its permissions.
pub const MODE_HEADER: &str = "x-aegis-mode";
/// Header of an answer about a file: what it is.
pub const KIND_HEADER: &str = "x-aegis-kind";

/// A parameter that can't be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadQuery {
    /// Which.
    pub field: &'static str,
    /// What would pass.
    pub allowed: &'static str,
}

fn bad(field: &'static str, allowed: &'static str) -> BadQuery {
    BadQuery { field, allowed }
}

/// Bytes of a range that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// From this byte on.
    pub from: u64,
    /// To this one, and with it; to the end when absent.
    pub last: Option<u64>,
}

impl Range {
    /// From a `Range` header. One that is not of the form `bytes=FROM-` or `bytes=FROM-LAST` is
    /// ignored, as any server may.
    pub fn parse(header: &str) -> Option<Range> {
        let (from, last) = header.strip_prefix("bytes=")?.split_once('-')?;
        let from = from.parse().ok()?;
        let last = match last {
            "" => None,
            last => Some(last.parse().ok().filter(|last| *last >= from)?),
        };
        Some(Range { from, last })
    }
}

/// A request for a file, as its head says it.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// GET, HEAD, PUT, POST or DELETE.
    pub verb: &'a str,
    /// It is `…/files/watch`.
    pub watch: bool,
    /// Behind the `?`.
    pub query: &'a str,
    /// The `Range` header.
    pub range: Option<&'a str>,
    /// The `Content-Length` header.
    pub length: Option<u64>,
}

/// Methods of `…/files`, and of `…/files/watch`.
pub const VERBS: [&str; 5] = ["GET", "HEAD", "PUT", "POST", "DELETE"];

/// What a request asks for. Parameters that it does not know are refused: a misspelt `recursive`
/// must not pass as none.
pub fn parse(head: &Head<'_>) -> Result<FileAsk, BadQuery> {
    let mut query = Query::read(head.query)?;
    let path = query.path("path")?.ok_or(bad("path", "an absolute path"))?;
    let ask = match (head.verb, head.watch) {
        ("GET", true) => FileAsk::Watch { path, recursive: query.flag("recursive")? },
        ("HEAD", false) => FileAsk::Stat { path },
        ("GET", false) => {
            let (stat, list) = (query.flag("stat")?, query.flag("list")?);
            match (stat, list) {
                (true, true) => return Err(bad("list", "left out beside stat")),
                (true, false) => FileAsk::Stat { path },
                (false, true) => FileAsk::List { path },
                (false, false) => {
                    let range = head.range.and_then(Range::parse);
                    let length = range.and_then(|r| Some((r.last? - r.from).saturating_add(1)));
                    FileAsk::Read { path, from: range.map_or(0, |r| r.from), length }
                }
            }
        }
        ("PUT", false) => FileAsk::Write { path, size: head.length, make: query.make()? },
        ("DELETE", false) => FileAsk::Remove { path, recursive: query.flag("recursive")? },
        ("POST", false) => match query.text("op")?.as_deref() {
            Some("mkdir") => FileAsk::Mkdir { path, make: query.make()? },
            Some("rename") => FileAsk::Rename {
                path,
                to: query.path("to")?.ok_or(bad("to", "an absolute path"))?,
            },
            Some("symlink") => {
                let target = query.take("target").ok_or(bad("target", "where the link points"))?;
                let target = LinkTarget::try_from(target).map_err(|e| bad("target", e.0))?;
                FileAsk::Symlink { path, target, make: query.make()? }
            }
            _ => return Err(bad("op", "mkdir, rename or symlink")),
        },
        _ => return Err(bad("method", "GET, HEAD, PUT, POST or DELETE")),
    };
    query.nothing_left()?;
    Ok(ask)
}

/// Parameters that were not taken yet.
struct Query(Vec<(String, Vec<u8>)>);

impl Query {
    fn read(query: &str) -> Result<Query, BadQuery> {
        let whole = || bad("the query", "name=value pairs, each name once");
        let mut pairs: Vec<(String, Vec<u8>)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = unescape(name).and_then(|n| String::from_utf8(n).ok()).ok_or_else(whole)?;
            let value = unescape(value).ok_or_else(whole)?;
            if pairs.iter().any(|(there, _)| *there == name) {
                return Err(whole());
            }
            pairs.push((name, value));
        }
        Ok(Query(pairs))
    }

    fn take(&mut self, name: &str) -> Option<Vec<u8>> {
        let at = self.0.iter().position(|(its, _)| its == name)?;
        Some(self.0.swap_remove(at).1)
    }

    fn text(&mut self, name: &'static str) -> Result<Option<String>, BadQuery> {
        self.take(name).map(String::from_utf8).transpose().map_err(|_| bad(name, "text"))
    }

    fn path(&mut self, name: &'static str) -> Result<Option<FilePath>, BadQuery> {
        self.take(name).map(FilePath::try_from).transpose().map_err(|e| bad(name, e.0))
    }

    fn flag(&mut self, name: &'static str) -> Result<bool, BadQuery> {
        match self.text(name)?.as_deref() {
            None | Some("0" | "false") => Ok(false),
            // As in `?list`.
            Some("" | "1" | "true") => Ok(true),
            Some(_) => Err(bad(name, "true or false")),
        }
    }

    fn number(&mut self, name: &'static str) -> Result<Option<u32>, BadQuery> {
        // The last number means "none" to the kernel.
        let number = |text: String| text.parse().ok().filter(|n| *n != u32::MAX);
        let expected = bad(name, "a number below 4294967295");
        self.text(name)?.map(|text| number(text).ok_or(expected)).transpose()
    }

    fn make(&mut self) -> Result<Make, BadQuery> {
        let mode = self.text("mode")?.map(|text| Mode::parse(&text)).transpose();
        Ok(Make {
            mode: mode.map_err(|BadFile(allowed)| bad("mode", allowed))?,
            uid: self.number("uid")?,
            gid: self.number("gid")?,
            create_dirs: self.flag("create_dirs")?,
        })
    }

    fn nothing_left(&self) -> Result<(), BadQuery> {
        if self.0.is_empty() {
            return Ok(());
        }
        let known = "path; stat, list, recursive; mode, uid, gid, create_dirs; op, to, target, \
                     each where it has a meaning";
        Err(bad("the query", known))
    }
}

/// The head of an answer with a file's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sends {
    /// 200, or 206 for a part, or 416 where the file has no such part.
    pub status: u16,
    /// Its bytes, where they are known.
    pub length: Option<u64>,
    /// The `Content-Range` header.
    pub range: Option<String>,
}

impl Sends {
    /// Of a file with `size` bytes, of which `from` on were asked for, at most `length`. Files of a
    /// kernel's own say that they are empty: how much comes is unknown then.
    pub fn of(size: u64, from: u64, length: Option<u64>) -> Sends {
        if from == 0 && length.is_none() {
            return Sends { status: 200, length: Some(size).filter(|n| *n > 0), range: None };
        }
        let length = size.saturating_sub(from).min(length.unwrap_or(u64::MAX));
        if length == 0 {
            return Sends { status: 416, length: None, range: Some(format!("bytes */{size}")) };
        }
        let range = format!("bytes {from}-{}/{size}", from + length - 1);
        Sends { status: 206, length: Some(length), range: Some(range) }
    }
}

/// Bytes in JSON: text, and the bytes where that is not exact.
fn shown(bytes: &[u8]) -> (String, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (text.to_owned(), None),
        Err(_) => (String::from_utf8_lossy(bytes).into_owned(), Some(STANDARD.encode(bytes))),
    }
}

/// The exact bytes of a pair as [`shown`] makes it.
pub fn exact(text: &str, b64: Option<&str>) -> Option<Vec<u8>> {
    match b64 {
        None => Some(text.as_bytes().to_vec()),
        Some(b64) => STANDARD.decode(b64).ok(),
    }
}

/// What is there, as an answer to `?stat` and as an entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileShape {
    /// In a listing: its name there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The name's bytes (base64), where they are no text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_b64: Option<String>,
    /// `file`, `dir`, `link` or `other`.
    pub kind: FileKind,
    /// Its bytes.
    pub size: u64,
    /// Its permissions, octal.
    pub mode: String,
    /// Whose it is.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When its content changed.
    pub mtime: Time,
    /// Of a link: where it points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The target's bytes (base64), where they are no text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_b64: Option<String>,
}

impl From<&Meta> for FileShape {
    fn from(meta: &Meta) -> FileShape {
        let target = meta.target.as_ref().map(|t| shown(t.as_bytes()));
        let (target, target_b64) = target.map_or((None, None), |(text, b64)| (Some(text), b64));
        FileShape {
            name: None,
            name_b64: None,
            kind: meta.kind,
            size: meta.size,
            mode: meta.mode.to_string(),
            uid: meta.uid,
            gid: meta.gid,
            mtime: Time(meta.mtime_ms),
            target,
            target_b64,
        }
    }
}

impl From<&Entry> for FileShape {
    fn from(entry: &Entry) -> FileShape {
        let (name, name_b64) = shown(entry.name.as_bytes());
        FileShape { name: Some(name), name_b64, ..FileShape::from(&entry.meta) }
    }
}

/// One line of a watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventShape {
    /// `created`, `modified`, `changed`, `removed`, `gone` or `overflow`.
    pub event: Happened,
    /// Where.
    pub path: String,
    /// The path's bytes (base64), where they are no text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_b64: Option<String>,
    /// It is a directory.
    #[serde(default)]
    pub dir: bool,
}

impl From<&Event> for EventShape {
    fn from(event: &Event) -> EventShape {
        let (path, path_b64) = shown(event.path.as_bytes());
        EventShape { event: event.event, path, path_b64, dir: event.dir }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(verb: &str, query: &str) -> Result<FileAsk, BadQuery> {
        parse(&Head { verb, watch: false, query, range: None, length: Some(5) })
    }

    fn path(path: &str) -> FilePath {
        path.as_bytes().to_vec().try_into().unwrap()
    }

    #[test]
    fn every_request_has_its_meaning() {
        let all = [
            ("HEAD", "path=/a", FileAsk::Stat { path: path("/a") }),
            ("GET", "path=%2Fa&stat", FileAsk::Stat { path: path("/a") }),
            ("GET", "path=/a&list=true", FileAsk::List { path: path("/a") }),
            ("GET", "path=/a+b", FileAsk::Read { path: path("/a b"), from: 0, length: None }),
            ("DELETE", "path=/a", FileAsk::Remove { path: path("/a"), recursive: false }),
            (
                "PUT",
                "path=/a&mode=0600&uid=7&create_dirs=1",
                FileAsk::Write {
                    path: path("/a"),
                    size: Some(5),
                    make: Make {
                        mode: Some(Mode::parse("600").unwrap()),
                        uid: Some(7),
                        gid: None,
                        create_dirs: true,
                    },
                },
            ),
            (
                "POST",
                "path=/a&op=rename&to=/b",
                FileAsk::Rename { path: path("/a"), to: path("/b") },
            ),
            (
                "POST",
                "path=/a&op=symlink&target=..%2Fx",
                FileAsk::Symlink {
                    path: path("/a"),
                    target: b"../x".to_vec().try_into().unwrap(),
                    make: Make::default(),
                },
            ),
        ];
        for (verb, query, ask) in all {
            assert_eq!(asked(verb, query), Ok(ask), "{verb} {query}");
        }
        let FileAsk::Read { path, .. } = asked("GET", "path=/%ff%0a").unwrap() else { panic!() };
        assert_eq!(path.as_bytes(), b"/\xff\n");
    }

    #[test]
    fn what_is_misspelt_is_refused_by_name() {
        for (verb, query, field) in [
            ("GET", "", "path"),
            ("GET", "path=a", "path"),
            ("GET", "path=/a%00", "path"),
            ("GET", "path=/a%zz", "the query"),
            ("GET", "path=/a&path=/b", "the query"),
            ("GET", "path=/a&list=maybe", "list"),
            ("GET", "path=/a&list&stat", "list"),
            ("DELETE", "path=/a&recursiv=true", "the query"),
            ("DELETE", "path=/a&list=true", "the query"),
            ("PUT", "path=/a&mode=rwx", "mode"),
            ("PUT", "path=/a&uid=-1", "uid"),
            ("PUT", "path=/a&gid=4294967295", "gid"),
            ("POST", "path=/a", "op"),
            ("POST", "path=/a&op=rename", "to"),
            ("POST", "path=/a&op=symlink&target=", "target"),
            ("PATCH", "path=/a", "method"),
        ] {
            assert_eq!(asked(verb, query).unwrap_err().field, field, "{verb} {query}");
        }
    }

    #[test]
    fn ranges_are_taken_or_ignored() {
        let range = |from, last| Some(Range { from, last });
        assert_eq!(Range::parse("bytes=5-"), range(5, None));
        assert_eq!(Range::parse("bytes=0-0"), range(0, Some(0)));
        for none in ["bytes=-5", "bytes=9-5", "bytes=0-1,3-4", "lines=0-1", "bytes=", ""] {
            assert_eq!(Range::parse(none), None, "{none}");
        }
        let sends = |status, length, range: &str| Sends {
            status,
            length,
            range: Some(range.to_owned()).filter(|r| !r.is_empty()),
        };
        assert_eq!(Sends::of(10, 0, None), sends(200, Some(10), ""));
        assert_eq!(Sends::of(0, 0, None), sends(200, None, ""));
        assert_eq!(Sends::of(10, 4, Some(u64::MAX)), sends(206, Some(6), "bytes 4-9/10"));
        assert_eq!(Sends::of(10, 0, Some(1)), sends(206, Some(1), "bytes 0-0/10"));
        assert_eq!(Sends::of(10, 10, None), sends(416, None, "bytes */10"));
        let head = Head {
            verb: "GET",
            watch: false,
            query: "path=/a",
            range: Some("bytes=0-18446744073709551615"),
            length: None,
        };
        let Ok(FileAsk::Read { length, .. }) = parse(&head) else { panic!() };
        assert_eq!(length, Some(u64::MAX));
    }

    #[test]
    fn names_that_are_no_text_survive() {
        let meta = Meta {
            kind: FileKind::Link,
            size: 1,
            mode: Mode::parse("777").unwrap(),
            uid: 0,
            gid: 0,
            mtime_ms: i64::MAX,
            target: Some(b"\xfe".to_vec().try_into().unwrap()),
        };
        let entry = Entry { name: b"a\xffb".to_vec().try_into().unwrap(), meta };
        let shape = FileShape::from(&entry);
        let name = exact(shape.name.as_deref().unwrap(), shape.name_b64.as_deref());
        assert_eq!(name.unwrap(), b"a\xffb");
        let json = serde_json::to_value(&shape).unwrap();
        assert_eq!(json["mode"], "0777");
        assert!(serde_json::from_value::<FileShape>(json).is_ok());
    }
}
