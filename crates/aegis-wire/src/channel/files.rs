//! Files inside a machine: what is asked on a stream of its own ([`super::StreamHead::Files`]), and
//! what the harness answers.
//!
//! ```text
//! stat, make, link, remove, rename   ◀── Answer
//! read                               ◀── Answer, Data…, DataEnd
//! list, watch                        ◀── Answer, Data (JSON of one Entry, one Event)…, DataEnd
//! write                              ◀── Answer ── Data…, DataEnd ──▶ ◀── Answer
//! ```
//! As [`super::output`] frames. Names are bytes, as base64, because a name need not be text. A body
//! without its end counts for nothing. What a machine says is parsed into these types, whose
//! bounds hold whatever it says; its sentences are the host's own, made of [`Fault`].

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

/// How something new is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Make {
    /// Its permissions; those of what it replaces, else 0644 of a file and 0755 of a directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Whose it is; whose what it replaces is, else root's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Its group, in the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Directories above it that are not there are made, 0755.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub create_dirs: bool,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum FileAsk {
    /// What is there; a link itself, not what it points to.
    Stat {
        /// Where.
        path: FilePath,
    },
    /// The bytes of a file.
    Read {
        /// Which.
        path: FilePath,
        /// From this byte on.
        #[serde(default)]
        from: u64,
        /// At most so many; all when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        length: Option<u64>,
    },
    /// The entries of a directory, in any order.
    List {
        /// Which.
        path: FilePath,
    },
    /// What happens to a file, or in a directory, from now on.
    Watch {
        /// Where.
        path: FilePath,
        /// In all directories below too.
        #[serde(default)]
        recursive: bool,
    },
    /// A file, all at once: it is seen whole or not at all.
    Write {
        /// Where; a link there is replaced, not followed.
        path: FilePath,
        /// How many bytes will come, where that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        /// How it is made.
        make: Make,
    },
    /// A directory; one that is there already may stay when `create_dirs`.
    Mkdir {
        /// Where.
        path: FilePath,
        /// How it is made.
        make: Make,
    },
    /// A symbolic link; one that is there is replaced.
    Symlink {
        /// Where.
        path: FilePath,
        /// Where it points.
        target: LinkTarget,
        /// How it is made; it has no mode.
        make: Make,
    },
    /// Takes it away; a link itself, not what it points to.
    Remove {
        /// What.
        path: FilePath,
        /// With everything in it.
        #[serde(default)]
        recursive: bool,
    },
    /// Gives it another place, over what is there.
    Rename {
        /// What.
        path: FilePath,
        /// Where to.
        to: FilePath,
    },
}

impl FileAsk {
    /// The path that it is about.
    pub fn path(&self) -> &FilePath {
        use FileAsk::{List, Mkdir, Read, Remove, Rename, Stat, Symlink, Watch, Write};
        match self {
            Stat { path }
            | Read { path, .. }
            | List { path }
            | Watch { path, .. }
            | Write { path, .. }
            | Mkdir { path, .. }
            | Symlink { path, .. }
            | Remove { path, .. }
            | Rename { path, .. } => path,
        }
    }

    /// What it does, as one word.
    pub fn word(&self) -> &'static str {
        match self {
            FileAsk::Stat { .. } => "stat",
            FileAsk::Read { .. } => "read",
            FileAsk::List { .. } => "list",
            FileAsk::Watch { .. } => "watch",
            FileAsk::Write { .. } => "write",
            FileAsk::Mkdir { .. } => "mkdir",
            FileAsk::Symlink { .. } => "symlink",
            FileAsk::Remove { .. } => "remove",
            FileAsk::Rename { .. } => "rename",
        }
    }

    /// Whether the machine is another one afterwards.
    pub fn changes(&self) -> bool {
        !matches!(
            self,
            FileAsk::Stat { .. }
                | FileAsk::Read { .. }
                | FileAsk::List { .. }
                | FileAsk::Watch { .. }
        )
    }

    /// Whether more comes, or is awaited, behind the first answer.
    pub fn goes_on(&self) -> bool {
        matches!(
            self,
            FileAsk::Read { .. }
                | FileAsk::List { .. }
                | FileAsk::Watch { .. }
                | FileAsk::Write { .. }
        )
    }
}

/// What something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A pipe, a socket, a device.
    Other,
}

/// What is known of something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// What it is.
    pub kind: FileKind,
    /// Its bytes.
    pub size: u64,
    /// Its permissions.
    pub mode: Mode,
    /// Whose it is.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When its content changed, milliseconds since 1970.
    pub mtime_ms: i64,
    /// Of a link: where it points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<LinkTarget>,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name.
    pub name: FileName,
    /// What it is.
    pub meta: Meta,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happened {
    /// It is new, or was moved here.
    Created,
    /// Its content changed.
    Modified,
    /// Its permissions or its owner did.
    Changed,
    /// It is gone, or was moved away.
    Removed,
    /// What was watched is gone itself; nothing more comes.
    Gone,
    /// More happened than was told: look for yourself.
    Overflow,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What.
    pub event: Happened,
    /// Where.
    pub path: FilePath,
    /// It is a directory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dir: bool,
}

/// Why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Nothing is there.
    NotFound,
    /// Something above it, or it itself, is no directory.
    NotADirectory,
    /// It is a directory.
    IsADirectory,
    /// It is a pipe, a socket or a device.
    NotAFile,
    /// Something is there already.
    Exists,
    /// A directory with something in it.
    NotEmpty,
    /// The file system forbids it.
    Denied,
    /// It may only be read there.
    ReadOnly,
    /// The disk is full.
    NoSpace,
    /// A name is longer than the file system takes, or links lead in a circle.
    BadName,
    /// More directories than can be watched.
    TooManyWatches,
    /// The two places lie on different file systems.
    OtherFileSystem,
    /// It is in use.
    Busy,
    /// The machine starts or ends.
    NotReady,
    /// Something else failed inside.
    Failed,
}

impl Fault {
    /// The stable word.
    pub fn word(self) -> &'static str {
        match self {
            Fault::NotFound => "file_not_found",
            Fault::NotADirectory => "not_a_directory",
            Fault::IsADirectory => "is_a_directory",
            Fault::NotAFile => "not_a_file",
            Fault::Exists => "file_exists",
            Fault::NotEmpty => "directory_not_empty",
            Fault::Denied => "file_denied",
            Fault::ReadOnly => "read_only",
            Fault::NoSpace => "no_space",
            Fault::BadName => "bad_file_name",
            Fault::TooManyWatches => "too_many_watches",
            Fault::OtherFileSystem => "other_file_system",
            Fault::Busy => "file_busy",
            Fault::NotReady => "instance_state",
            Fault::Failed => "file_failed",
        }
    }

    /// One sentence about `path`.
    pub fn sentence(self, path: &FilePath) -> String {
        let path = path.lossy();
        match self {
            Fault::NotFound => format!("{path} is not there"),
            Fault::NotADirectory => format!("{path}, or something above it, is no directory"),
            Fault::IsADirectory => format!("{path} is a directory"),
            Fault::NotAFile => format!("{path} is no regular file"),
            Fault::Exists => format!("{path} is there already"),
            Fault::NotEmpty => format!("{path} is a directory with something in it"),
            Fault::Denied => format!("the machine's file system does not permit this at {path}"),
            Fault::ReadOnly => format!("{path} lies on a file system that can only be read"),
            Fault::NoSpace => format!("the machine's disk has no room for {path}"),
            Fault::BadName => format!("{path} has a name that the file system does not take"),
            Fault::TooManyWatches => format!("too many directories below {path} to watch them"),
            Fault::OtherFileSystem => format!("{path} can't be renamed to another file system"),
            Fault::Busy => format!("{path} is in use inside"),
            Fault::NotReady => "the machine is starting or ending".to_owned(),
            Fault::Failed => format!("the machine failed at {path}"),
        }
    }

    /// What to do about it; nothing where that is plain.
    pub fn hint(self) -> Option<&'static str> {
        match self {
            Fault::NotFound => {
                Some("create_dirs=true makes missing directories of what is written")
            }
            Fault::IsADirectory => {
                Some("list=true lists it; recursive=true removes it with all that is in it")
            }
            Fault::NotEmpty => Some("recursive=true removes it with all that is in it"),
            Fault::NoSpace => Some("remove something in the machine, or give it a larger disk"),
            _ => None,
        }
    }
}

/// An answer of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum FileAnswer {
    /// Yes.
    Done {
        /// Of what was asked about, or of what is there now.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        meta: Option<Meta>,
    },
    /// No.
    Refused {
        /// Why.
        fault: Fault,
    },
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
