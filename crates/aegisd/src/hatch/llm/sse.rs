//! Server-sent events, cut out of a stream without changing a byte of them.

use bytes::{Bytes, BytesMut};

/// One event as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// Its bytes, with the blank line at its end.
    pub(super) raw: Bytes,
    /// Its data, lines joined.
    pub(super) data: String,
}

/// Bytes in, events out.
#[derive(Debug, Default)]
pub(super) struct Events {
    held: BytesMut,
    /// Up to here is no end of an event.
    looked: usize,
}

impl Events {
    /// Takes bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// How many bytes are held that are no whole event yet.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// What is left when nothing more comes.
    pub(super) fn rest(&mut self) -> Bytes {
        self.looked = 0;
        self.held.split().freeze()
    }

    /// The next whole event.
    pub(super) fn next(&mut self) -> Option<Event> {
        let end = self.end()?;
        self.looked = 0;
        let raw = self.held.split_to(end).freeze();
        let text = String::from_utf8_lossy(&raw);
        let lines = text.lines().filter_map(|line| {
            let data = line.strip_prefix("data:")?;
            Some(data.strip_prefix(' ').unwrap_or(data))
        });
        let data = lines.collect::<Vec<_>>().join("\n");
        Some(Event { raw, data })
    }

    /// Behind the next blank line.
    fn end(&mut self) -> Option<usize> {
        let mut at = self.looked;
        while let Some(found) = self.held[at..].iter().position(|b| *b == b'\n') {
            let line_end = at + found + 1;
            match self.held[line_end..] {
                [b'\n', ..] => return Some(line_end + 1),
                [b'\r', b'\n', ..] => return Some(line_end + 2),
                // The blank line may still be on its way.
                [] | [b'\r'] => {
                    self.looked = line_end - 1;
                    return None;
                }
                _ => at = line_end,
            }
        }
        self.looked = self.held.len();
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str =
        "event: a\ndata: {\"x\":\ndata: 1}\n\n: hush\n\ndata:two\r\n\r\ndata: half";

    #[test]
    fn events_are_the_same_however_the_bytes_come() {
        for size in 1..STREAM.len() {
            let mut events = Events::default();
            let mut found = Vec::new();
            for piece in STREAM.as_bytes().chunks(size) {
                events.push(piece);
                while let Some(event) = events.next() {
                    found.push(event);
                }
            }
            let data: Vec<&str> = found.iter().map(|e| e.data.as_str()).collect();
            assert_eq!(data, ["{\"x\":\n1}", "", "two"], "{size}");
            let mut all: Vec<u8> = found.iter().flat_map(|e| e.raw.to_vec()).collect();
            all.extend_from_slice(&events.rest());
            assert_eq!(all, STREAM.as_bytes(), "{size}");
        }
    }
}
