//! Log entries: NDJSON of contracts/aegis.md 1, in the machine's log files and on every stream.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::words::{InstanceId, Time};

/// Which output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error; also the system's own lines.
    Stderr,
}

/// Who wrote a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The primary process.
    Server,
    /// A command run by exec.
    Exec,
    /// Aegis itself.
    System,
}

/// One line of output, or a part of one.
///
/// The bytes that were written are [`Entry::bytes`]: exactly those of the process, whatever they
/// were.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When the host read it.
    pub ts: Time,
    /// Which output.
    pub stream: Stream,
    /// Who wrote it.
    pub source: Source,
    /// The text without its newline; lossy where it is not UTF-8.
    pub line: String,
    /// The exact bytes (base64) where `line` is not exact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_b64: Option<String>,
    /// No newline followed: a very long line's part, or output that ends without one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
    /// The machine.
    pub instance_id: InstanceId,
    /// The exec, where one wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<String>,
}

impl Entry {
    /// An entry for `bytes`, which hold no newline; `partial` says that none followed.
    pub fn new(
        ts: Time,
        stream: Stream,
        source: Source,
        bytes: &[u8],
        partial: bool,
        instance_id: InstanceId,
        exec_id: Option<String>,
    ) -> Entry {
        let (line, data_b64) = match std::str::from_utf8(bytes) {
            Ok(text) => (text.to_owned(), None),
            Err(_) => (String::from_utf8_lossy(bytes).into_owned(), Some(STANDARD.encode(bytes))),
        };
        Entry { ts, stream, source, line, data_b64, partial, instance_id, exec_id }
    }

    /// The exact bytes, newline included where there was one.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = match &self.data_b64 {
            Some(data) => STANDARD.decode(data).unwrap_or_else(|_| self.line.clone().into_bytes()),
            None => self.line.clone().into_bytes(),
        };
        if !self.partial {
            bytes.push(b'\n');
        }
        bytes
    }
}

/// First line of an exec's NDJSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecStarted {
    /// Names the exec in logs.
    pub exec_id: String,
    /// When.
    pub started_at: Time,
}

/// Last line of an exec's NDJSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecDone {
    /// Names the exec in logs.
    pub exec_id: String,
    /// The real one; 128 + signal when a signal ended it. Absent when it could not be started or
    /// its machine ended first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Always true.
    pub done: bool,
    /// Why there is no exit code, or that the deadline ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_survive() {
        let id: InstanceId = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        for (bytes, partial) in [(&b"plain"[..], false), (b"\xff\x00\xfe", true), (b"", false)] {
            let entry =
                Entry::new(Time(0), Stream::Stdout, Source::Exec, bytes, partial, id.clone(), None);
            let text = serde_json::to_string(&entry).unwrap();
            let back: Entry = serde_json::from_str(&text).unwrap();
            let mut expected = bytes.to_vec();
            if !partial {
                expected.push(b'\n');
            }
            assert_eq!(back.bytes(), expected);
        }
    }
}
