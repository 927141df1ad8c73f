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

mod names;

use serde::{Deserialize, Serialize};

pub use names::{BadFile, FileName, FilePath, LinkTarget, Mode};

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
