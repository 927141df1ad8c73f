//! JSON lines as they come over HTTP: taken apart at newlines, whatever the pieces.

use bytes::{Buf as _, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use crate::failure::{Failure, Result};

/// Longest line that is taken, bytes. The daemon cuts output far below this.
const LINE_MAX: usize = 4 << 20;

/// The lines of an answer that goes on.
pub struct Lines {
    body: Incoming,
    split: Split,
    ended: bool,
}

impl Lines {
    /// Of an answer's body.
    pub fn new(body: Incoming) -> Lines {
        Lines { body, split: Split::default(), ended: false }
    }

    /// The next line without its newline; nothing at the end. May be dropped while it waits.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(line) = self.split.next()? {
                return Ok(Some(line));
            }
            if self.ended {
                return Ok(self.split.rest());
            }
            match self.body.frame().await {
                None => self.ended = true,
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.split.push(data);
                    }
                }
                Some(Err(e)) => {
                    return Err(Failure::because("the daemon's stream broke off", e));
                }
            }
        }
    }
}

/// Cuts bytes at newlines.
#[derive(Default)]
struct Split {
    buffer: BytesMut,
    searched: usize,
}

impl Split {
    fn push(&mut self, data: &[u8]) {
        self.buffer.extend_from_slice(data);
    }

    fn next(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let Some(found) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') else {
                self.searched = self.buffer.len();
                if self.searched > LINE_MAX {
                    return Err(Failure::here("the daemon sent a line that is far too long"));
                }
                return Ok(None);
            };
            let line = self.buffer.split_to(self.searched + found);
            self.buffer.advance(1);
            self.searched = 0;
            if !line.is_empty() {
                return Ok(Some(line.to_vec()));
            }
        }
    }

    fn rest(&mut self) -> Option<Vec<u8>> {
        self.searched = 0;
        let rest = self.buffer.split();
        (!rest.is_empty()).then(|| rest.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn lines_do_not_depend_on_the_pieces(
            lines in proptest::collection::vec("[a-z{}\u{e4}]{1,12}", 0..12),
            cut in 1usize..9,
        ) {
            let text = lines.join("\n");
            let mut split = Split::default();
            let mut got = Vec::new();
            for piece in text.as_bytes().chunks(cut) {
                split.push(piece);
                while let Some(line) = split.next().unwrap() {
                    got.push(line);
                }
            }
            got.extend(split.rest());
            let got: Vec<_> = got.into_iter().map(|l| String::from_utf8(l).unwrap()).collect();
            proptest::prop_assert_eq!(got, lines);
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut split = Split::default();
        split.push(&vec![b'x'; LINE_MAX + 1]);
        assert!(split.next().is_err());
    }
}
