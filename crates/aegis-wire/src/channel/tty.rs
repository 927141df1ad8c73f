//! A terminal as its two sides speak of it: how large it is, what kind it is.

use serde::{Deserialize, Serialize};

use crate::bounds::{TERM_MAX, TERMINAL_SIDE_MAX};

/// Not a terminal's size or kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTty {
    /// Too large, or nothing.
    #[error("rows and columns of a terminal are from 1 to {TERMINAL_SIDE_MAX}")]
    Size,
    /// Not the name of an entry of terminfo.
    #[error("a kind of terminal is 1 to {TERM_MAX} letters, digits and any of + - . _")]
    Term,
}

/// Rows and columns, each from 1 to [`TERMINAL_SIDE_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawSize", into = "RawSize")]
pub struct WindowSize {
    rows: u16,
    cols: u16,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSize {
    rows: u64,
    cols: u64,
}

impl TryFrom<RawSize> for WindowSize {
    type Error = BadTty;

    fn try_from(raw: RawSize) -> Result<WindowSize, BadTty> {
        WindowSize::new(raw.rows, raw.cols)
    }
}

impl From<WindowSize> for RawSize {
    fn from(size: WindowSize) -> RawSize {
        RawSize { rows: size.rows.into(), cols: size.cols.into() }
    }
}

impl WindowSize {
    /// Of a terminal that says nothing about itself.
    pub const USUAL: WindowSize = WindowSize { rows: 24, cols: 80 };

    /// A size in these bounds.
    pub fn new(rows: u64, cols: u64) -> Result<WindowSize, BadTty> {
        let side = |n: u64| {
            u16::try_from(n)
                .ok()
                .filter(|n| (1..=TERMINAL_SIDE_MAX).contains(n))
                .ok_or(BadTty::Size)
        };
        Ok(WindowSize { rows: side(rows)?, cols: side(cols)? })
    }

    /// Rows.
    pub fn rows(self) -> u16 {
        self.rows
    }

    /// Columns.
    pub fn cols(self) -> u16 {
        self.cols
    }

    /// Payload of a [`super::output::Kind::Resize`] frame: rows, columns, each `u16` big-endian.
    pub fn bytes(self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.rows.to_be_bytes(), self.cols.to_be_bytes());
        [a, b, c, d]
    }

    /// From such a payload.
    pub fn parse(bytes: &[u8]) -> Result<WindowSize, BadTty> {
        let [a, b, c, d] = bytes.try_into().map_err(|_| BadTty::Size)?;
        WindowSize::new(u16::from_be_bytes([a, b]).into(), u16::from_be_bytes([c, d]).into())
    }
}

/// The kind of a terminal: TERM, as terminfo names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Term(String);

impl Term {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Term {
    type Error = BadTty;

    fn try_from(name: String) -> Result<Term, BadTty> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"+-._".contains(&b);
        // Programs make a path of it.
        let good = (1..=TERM_MAX).contains(&name.len())
            && name.bytes().all(plain)
            && !name.starts_with('.');
        if good { Ok(Term(name)) } else { Err(BadTty::Term) }
    }
}

impl From<Term> for String {
    fn from(term: Term) -> String {
        term.0
    }
}

/// A terminal to run at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tty {
    /// How large it is at first.
    pub size: WindowSize,
    /// What kind it is; the machine's own default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<Term>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_sizes_that_a_screen_has() {
        for (rows, cols) in [(0, 80), (24, 0), (4097, 80), (24, 65_536 + 80), (u64::MAX, 1)] {
            assert_eq!(WindowSize::new(rows, cols), Err(BadTty::Size), "{rows} {cols}");
        }
        for bad in [&b""[..], b"abc", b"\0\0\0\x50", b"\xff\xff\0\x50", b"12345"] {
            assert_eq!(WindowSize::parse(bad), Err(BadTty::Size), "{bad:?}");
        }
        for bad in [r#"{"rows":-1,"cols":80}"#, r#"{"rows":1e9,"cols":1}"#, r#"{"rows":24}"#] {
            assert!(serde_json::from_str::<WindowSize>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_kind_is_no_path() {
        for good in ["xterm-256color", "screen.xterm+x", "vt100"] {
            assert_eq!(Term::try_from(good.to_owned()).unwrap().as_str(), good);
        }
        for bad in ["", "../../etc/passwd", "..", "a b", "a=b", "a\0", "\u{e4}", &"x".repeat(65)] {
            assert_eq!(Term::try_from(bad.to_owned()), Err(BadTty::Term), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn sizes_survive_both_ways(rows in 1..=TERMINAL_SIDE_MAX, cols in 1..=TERMINAL_SIDE_MAX) {
            let size = WindowSize::new(rows.into(), cols.into()).unwrap();
            prop_assert_eq!(WindowSize::parse(&size.bytes()), Ok(size));
            let json = serde_json::to_value(size).unwrap();
            prop_assert_eq!(serde_json::from_value::<WindowSize>(json).unwrap(), size);
        }
    }
}
