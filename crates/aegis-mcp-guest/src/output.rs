//! Output of commands and logs, bounded: an agent's context is small, a program's output need not be.

use std::collections::VecDeque;

use aegis_wire::logs::{Entry, ExecDone, Stream};
use serde_json::{Value, json};

use crate::api::{ApiError, Lines};

/// Bytes of one stream that an agent gets: half from its beginning, half from its end.
pub const STREAM_MAX: usize = 64 * 1024;

/// One stream's output: its beginning, its end, and how much there was.
#[derive(Default)]
struct Kept {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    total: u64,
}

impl Kept {
    fn add(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let (head, rest) = bytes.split_at(bytes.len().min(STREAM_MAX / 2 - self.head.len()));
        self.head.extend_from_slice(head);
        // Only the end of a long piece can stay.
        let rest = &rest[rest.len().saturating_sub(STREAM_MAX / 2)..];
        self.tail.extend(rest);
        let over = self.tail.len().saturating_sub(STREAM_MAX / 2);
        self.tail.drain(..over);
    }

    fn left_out(&self) -> u64 {
        self.total - (self.head.len() + self.tail.len()) as u64
    }

    fn text(mut self) -> String {
        let left_out = self.left_out();
        if left_out == 0 {
            self.head.extend(self.tail);
            return String::from_utf8_lossy(&self.head).into_owned();
        }
        let tail: Vec<u8> = self.tail.into();
        format!(
            "{}\n[… {left_out} bytes left out; redirect to a file and read parts of it …]\n{}",
            String::from_utf8_lossy(&self.head),
            String::from_utf8_lossy(&tail)
        )
    }
}

/// Reads an exec's stream to its end. A command that ended, however it ended, is a result; one
/// whose end is not known is an error.
pub async fn exec(mut lines: Lines) -> Result<Value, ApiError> {
    let (mut out, mut err) = (Kept::default(), Kept::default());
    let mut done = None;
    let mut broke = None;
    loop {
        match lines.next().await {
            Ok(Some(line)) => match read(&line)? {
                Line::Output(entry) => match entry.stream {
                    Stream::Stdout => out.add(&entry.bytes()),
                    Stream::Stderr => err.add(&entry.bytes()),
                },
                Line::Done(end) => {
                    done = Some(end);
                    break;
                }
                Line::Other => {}
            },
            Ok(None) => break,
            Err(e) => {
                broke = Some(e.to_string());
                break;
            }
        }
    }
    let truncated = out.left_out() + err.left_out() > 0;
    let mut result = json!({ "stdout": out.text(), "stderr": err.text() });
    if truncated {
        result["truncated"] = true.into();
    }
    match done {
        Some(ExecDone { exit_code: Some(code), error, .. }) => {
            result["exit_code"] = code.into();
            if let Some(note) = error {
                result["note"] = note.into();
            }
            Ok(result)
        }
        end => {
            let why = end.and_then(|end| end.error).or(broke).unwrap_or_else(|| {
                "the stream ended before the command did; it may still run".to_owned()
            });
            result["error"] = why.into();
            result["code"] = "exec_lost".into();
            result["hint"] = "look at the child with instance_info and instance_logs".into();
            Err(ApiError::Refused(result))
        }
    }
}

/// Reads log lines to their end; the last ones stay.
pub async fn logs(mut lines: Lines) -> Result<Value, ApiError> {
    let mut kept: VecDeque<String> = VecDeque::new();
    let (mut bytes, mut left_out) = (0, 0_u64);
    while let Some(line) = lines.next().await? {
        let Line::Output(entry) = read(&line)? else { continue };
        let said = serde_json::to_value((entry.stream, entry.source)).unwrap_or_default();
        let word = |i: usize| said.get(i).and_then(Value::as_str).unwrap_or_default().to_owned();
        let line = format!("{} {}/{} {}", entry.ts, word(1), word(0), entry.line);
        bytes += line.len();
        kept.push_back(line);
        while bytes > STREAM_MAX && kept.len() > 1 {
            bytes -= kept.pop_front().map_or(0, |line| line.len());
            left_out += 1;
        }
    }
    let mut result = json!({ "lines": kept });
    if left_out > 0 {
        result["truncated"] = true.into();
        result["note"] = format!("{left_out} earlier lines left out; ask with since").into();
    }
    Ok(result)
}

enum Line {
    Output(Entry),
    Done(ExecDone),
    Other,
}

fn read(line: &[u8]) -> Result<Line, ApiError> {
    let odd = |e| ApiError::Odd(format!("the guest API sent a line that is none of its own: {e}"));
    let value: Value = serde_json::from_slice(line).map_err(odd)?;
    if value.get("done").and_then(Value::as_bool) == Some(true) {
        return serde_json::from_value(value).map(Line::Done).map_err(odd);
    }
    if value.get("line").is_some() {
        return serde_json::from_value(value).map(Line::Output).map_err(odd);
    }
    // The start of an exec, or something that a later host adds.
    Ok(Line::Other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginning_and_end_stay_of_long_output() {
        let mut kept = Kept::default();
        kept.add(b"first\n");
        for _ in 0..1000 {
            kept.add(&[b'x'; 1000]);
        }
        kept.add(b"\nlast");
        assert_eq!(kept.left_out(), 6 + 1_000_000 + 5 - STREAM_MAX as u64);
        let text = kept.text();
        assert!(text.starts_with("first\n") && text.ends_with("\nlast"));
        assert!(text.contains("bytes left out") && text.len() < STREAM_MAX + 200);
    }

    #[test]
    fn short_output_stays_whole() {
        let mut kept = Kept::default();
        let all: Vec<u8> = (0..STREAM_MAX).map(|i| b'a' + (i % 26) as u8).collect();
        for piece in all.chunks(777) {
            kept.add(piece);
        }
        assert_eq!(kept.left_out(), 0);
        assert_eq!(kept.text().into_bytes(), all);
    }
}
