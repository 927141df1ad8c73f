//! Paths, names, links and modes inside a machine: bytes with a rule, which hold whoever sent them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::bounds::{FILE_NAME_MAX, FILE_PATH_MAX};

/// Bytes that are no path, name or mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be {0}")]
pub struct BadFile(pub &'static str);

/// A type of bytes with a rule, on the wire as base64.
macro_rules! bytes {
    ($(#[$doc:meta])* $name:ident, $rule:expr, $expected:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Vec<u8>);

        impl $name {
            /// The bytes.
            pub fn as_bytes(&self) -> &[u8] {
                &self.0
            }

            /// As text, for people.
            pub fn lossy(&self) -> String {
                String::from_utf8_lossy(&self.0).into_owned()
            }
        }

        impl TryFrom<Vec<u8>> for $name {
            type Error = BadFile;

            fn try_from(bytes: Vec<u8>) -> Result<$name, BadFile> {
                let rule: fn(&[u8]) -> bool = $rule;
                if rule(&bytes) { Ok($name(bytes)) } else { Err(BadFile($expected)) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadFile;

            fn try_from(text: String) -> Result<$name, BadFile> {
                STANDARD.decode(text).map_err(|_| BadFile($expected))?.try_into()
            }
        }

        impl From<$name> for String {
            fn from(this: $name) -> String {
                STANDARD.encode(this.0)
            }
        }
    };
}

bytes!(
    /// An absolute path, at most [`FILE_PATH_MAX`] bytes, without a zero byte.
    FilePath,
    |b| b.first() == Some(&b'/') && b.len() <= FILE_PATH_MAX && !b.contains(&0),
    "an absolute path of at most 4096 bytes, without a zero byte"
);
bytes!(
    /// One entry of a directory: never a path, never the directory itself or the one above.
    FileName,
    |b| {
        (1..=FILE_NAME_MAX).contains(&b.len())
            && !b.contains(&0)
            && !b.contains(&b'/')
            && b != b"."
            && b != b".."
    },
    "the name of a directory's entry"
);
bytes!(
    /// Where a symbolic link points: any text, followed by nobody here.
    LinkTarget,
    |b| (1..=FILE_PATH_MAX).contains(&b.len()) && !b.contains(&0),
    "the target of a link: 1 to 4096 bytes, without a zero byte"
);

impl FilePath {
    /// The path of an entry of this directory; `None` where it is too long.
    pub fn join(&self, name: &FileName) -> Option<FilePath> {
        let mut path = self.0.clone();
        if path.last() != Some(&b'/') {
            path.push(b'/');
        }
        path.extend_from_slice(name.as_bytes());
        path.try_into().ok()
    }

    /// Its last part; `None` of the root, and where it ends with `.` or `..`.
    pub fn name(&self) -> Option<FileName> {
        let end = self.0.iter().rposition(|b| *b != b'/').map_or(0, |at| at + 1);
        let path = &self.0[..end];
        let at = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
        path[at..].to_vec().try_into().ok()
    }
}

/// Permission bits, at most 0o7777.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mode(u32);

impl Mode {
    /// The bits.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// From octal digits, as in `0644`.
    pub fn parse(text: &str) -> Result<Mode, BadFile> {
        let digits = (1..=5).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        let bits = u32::from_str_radix(text, 8).ok().filter(|_| digits);
        bits.map_or(Err(BAD_MODE), Mode::try_from)
    }
}

const BAD_MODE: BadFile = BadFile("octal digits up to 7777, as in 0644");

impl TryFrom<u32> for Mode {
    type Error = BadFile;

    fn try_from(bits: u32) -> Result<Mode, BadFile> {
        if bits <= 0o7777 { Ok(Mode(bits)) } else { Err(BAD_MODE) }
    }
}

impl From<Mode> for u32 {
    fn from(mode: Mode) -> u32 {
        mode.0
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_names_lead_nowhere() {
        for good in [&b"/"[..], b"/a", b"/a/../b", b"/a b\n\xff"] {
            let path = FilePath::try_from(good.to_vec()).unwrap();
            let json = serde_json::to_string(&path).unwrap();
            assert_eq!(serde_json::from_str::<FilePath>(&json).unwrap(), path);
        }
        let long = [&b"/"[..], &[b'a'; FILE_PATH_MAX]].concat();
        for bad in [&b""[..], b"a", b"./a", b"/a\0b", &long] {
            assert!(FilePath::try_from(bad.to_vec()).is_err(), "{bad:?}");
        }
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"../x", b"a\0", &[b'a'; 256]] {
            assert!(FileName::try_from(bad.to_vec()).is_err(), "{bad:?}");
        }
        let json = |name: &[u8]| serde_json::json!({"name": STANDARD.encode(name)});
        #[derive(Deserialize)]
        struct Named {
            #[allow(dead_code, reason = "only whether it parses")]
            name: FileName,
        }
        assert!(serde_json::from_value::<Named>(json(b"x\xff")).is_ok());
        assert!(serde_json::from_value::<Named>(json(b"../x")).is_err());
    }

    #[test]
    fn a_path_has_a_last_part() {
        let name = |path: &[u8]| FilePath::try_from(path.to_vec()).unwrap().name();
        assert_eq!(name(b"/a/b/").unwrap().as_bytes(), b"b");
        assert_eq!(name(b"/a").unwrap().as_bytes(), b"a");
        for none in [&b"/"[..], b"//", b"/a/..", b"/."] {
            assert_eq!(name(none), None);
        }
        let root = FilePath::try_from(b"/".to_vec()).unwrap();
        let joined = root.join(&FileName::try_from(b"x".to_vec()).unwrap()).unwrap();
        assert_eq!(joined.as_bytes(), b"/x");
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(Mode::parse("0644").unwrap().bits(), 0o644);
        assert_eq!(Mode::parse("4755").unwrap().to_string(), "4755");
        for bad in ["", "8", "0x1", "-1", "+644", "10000", "777777"] {
            assert!(Mode::parse(bad).is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Mode>("4096").is_err());
    }
}
