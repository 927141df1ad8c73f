//! From a wish to run something to a process: environment, program, pipes.

use std::collections::BTreeMap;
use std::ffi::{CString, NulError};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aegis_wire::bounds::{COMMAND_BYTES_MAX, COMMAND_WORDS_MAX};
use aegis_wire::channel::rpc::{CODE_INTERNAL, CODE_NOT_FOUND, CODE_PARAMS, RpcError};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use tokio::net::unix::pipe;

use crate::cage::Cage;
use crate::reaper::{Child, Reaper};
use crate::sys::{Birth, Stage, Stillborn};

/// Working directory when none is asked for.
pub const HOME: &str = "/root";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Environment of every process inside, below what was asked for.
pub fn environment() -> BTreeMap<String, String> {
    [
        ("PATH", DEFAULT_PATH),
        ("HOME", HOME),
        ("LANG", "C.UTF-8"),
        ("TERM", "xterm"),
        ("AEGIS_GUEST_API", "http://127.0.0.1:7777"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// What shall run.
pub struct Wish {
    /// Program and arguments.
    pub command: Vec<String>,
    /// All of its environment.
    pub environment: BTreeMap<String, String>,
    /// Working directory.
    pub directory: String,
}

/// Why nothing runs.
#[derive(Debug, thiserror::Error)]
pub enum Unable {
    /// No command.
    #[error("a command has at least one word")]
    Empty,
    /// More than any command needs.
    #[error(
        "command and environment have more than {COMMAND_WORDS_MAX} words or {COMMAND_BYTES_MAX} bytes"
    )]
    TooLong,
    /// Nothing that a process could be given.
    #[error("command and environment can't contain a zero byte")]
    Zero(#[from] NulError),
    /// Not the name of a variable.
    #[error("{0:?} is no name of a variable")]
    Name(String),
    /// No pipes.
    #[error("no pipes for its output: {0}")]
    Pipes(#[source] io::Error),
    /// The kernel said no.
    #[error("{}", stillborn(.0, .1, .2))]
    Stillborn(Stillborn, String, String),
}

fn stillborn(why: &Stillborn, program: &str, directory: &str) -> String {
    let errno = why.errno;
    match why.stage {
        Stage::Fork => format!("no new process: {errno}"),
        Stage::Prepare => format!("can't prepare a process: {errno}"),
        Stage::Directory => format!("can't enter {directory}: {errno}"),
        Stage::Program => format!("can't run {program}: {errno}"),
    }
}

impl Unable {
    /// As an answer.
    pub fn answer(&self) -> RpcError {
        let code = match self {
            Unable::Empty | Unable::TooLong | Unable::Zero(_) | Unable::Name(_) => CODE_PARAMS,
            Unable::Stillborn(Stillborn { stage: Stage::Directory, .. }, ..) => CODE_PARAMS,
            Unable::Stillborn(Stillborn { stage: Stage::Program, errno }, ..) => match *errno {
                Errno::NOENT | Errno::NOTDIR => CODE_NOT_FOUND,
                _ => CODE_PARAMS,
            },
            Unable::Pipes(_) | Unable::Stillborn(..) => CODE_INTERNAL,
        };
        RpcError::new(code, self.to_string())
    }
}

/// A wish in the form that the kernel takes.
struct Strings {
    programs: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    directory: CString,
}

impl Wish {
    fn strings(&self) -> Result<Strings, Unable> {
        let program = self.command.first().filter(|word| !word.is_empty()).ok_or(Unable::Empty)?;
        let bytes: usize = self.command.iter().map(String::len).sum::<usize>()
            + self.environment.iter().map(|(n, v)| n.len() + v.len() + 2).sum::<usize>();
        if self.command.len() > COMMAND_WORDS_MAX
            || self.environment.len() > COMMAND_WORDS_MAX
            || bytes > COMMAND_BYTES_MAX
        {
            return Err(Unable::TooLong);
        }
        if let Some(bad) = self.environment.keys().find(|n| n.is_empty() || n.contains('=')) {
            return Err(Unable::Name(bad.clone()));
        }
        let path = self.environment.get("PATH").map_or(DEFAULT_PATH, String::as_str);
        let own = |words: &mut dyn Iterator<Item = String>| {
            words.map(CString::new).collect::<Result<Vec<_>, _>>()
        };
        Ok(Strings {
            programs: own(&mut candidates(program, path))?,
            arguments: own(&mut self.command.iter().cloned())?,
            environment: own(&mut self.environment.iter().map(|(n, v)| format!("{n}={v}")))?,
            directory: CString::new(self.directory.as_str())?,
        })
    }
}

/// Where a program may be, in order.
fn candidates(program: &str, path: &str) -> impl Iterator<Item = String> {
    let direct = program.contains('/').then(|| program.to_owned());
    let in_path = path.split(':').map(move |directory| {
        let directory = if directory.is_empty() { "." } else { directory };
        format!("{}/{program}", directory.trim_end_matches('/'))
    });
    let search = direct.is_none();
    direct.into_iter().chain(in_path.filter(move |_| search).collect::<Vec<_>>())
}

/// Standard input, output and error of a process, from outside.
pub struct Pipes {
    /// What it reads; absent when it reads nothing.
    pub input: Option<pipe::Sender>,
    /// What it writes.
    pub output: pipe::Receiver,
    /// What it complains.
    pub errors: pipe::Receiver,
}

/// Starts processes.
pub struct Starter {
    /// Where they end.
    pub reaper: Reaper,
    /// Where they live.
    pub cage: Option<Cage>,
    nothing: OwnedFd,
}

impl Starter {
    /// With the `/dev/null` of now: the one inside is the user's to break.
    pub fn new(cage: Option<Cage>) -> io::Result<Starter> {
        let nothing = File::options().read(true).write(true).open("/dev/null")?.into();
        Ok(Starter { reaper: Reaper::new(), cage, nothing })
    }

    /// Starts a process; with `input`, its standard input is a pipe.
    pub fn start(&self, wish: &Wish, input: bool) -> Result<(Child, Pipes), Unable> {
        let strings = wish.strings()?;
        let make = || -> io::Result<_> {
            let (output, its_output) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            let (errors, its_errors) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            let (its_input, to_it) = match input {
                true => {
                    let (its, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                    (Some(its), Some(pipe::Sender::from_owned_fd(ours)?))
                }
                false => (None, None),
            };
            let pipes = Pipes {
                input: to_it,
                output: pipe::Receiver::from_owned_fd(output)?,
                errors: pipe::Receiver::from_owned_fd(errors)?,
            };
            Ok((pipes, its_input, its_output, its_errors))
        };
        let (pipes, its_input, its_output, its_errors) = make().map_err(Unable::Pipes)?;
        let its_input = its_input.as_ref().unwrap_or(&self.nothing);
        let standard = [its_input.as_fd(), its_output.as_fd(), its_errors.as_fd()];
        let child = self.bear(wish, &strings, standard, None)?;
        Ok((child, pipes))
    }

    /// Starts a process below another root, which reads and writes nothing.
    pub fn start_quiet(&self, wish: &Wish, root: &Path) -> Result<Child, Unable> {
        let strings = wish.strings()?;
        let root = CString::new(root.as_os_str().as_encoded_bytes())?;
        self.bear(wish, &strings, [self.nothing.as_fd(); 3], Some(&root))
    }

    fn bear(
        &self,
        wish: &Wish,
        strings: &Strings,
        standard: [std::os::fd::BorrowedFd<'_>; 3],
        root: Option<&std::ffi::CStr>,
    ) -> Result<Child, Unable> {
        let birth = Birth {
            programs: &strings.programs,
            arguments: &strings.arguments,
            environment: &strings.environment,
            directory: &strings.directory,
            root,
            standard,
            cgroup: self.cage.as_ref().map(Cage::door),
        };
        self.reaper.spawn(&birth).map_err(|why| {
            let program = wish.command.first().cloned().unwrap_or_default();
            Unable::Stillborn(why, program, wish.directory.clone())
        })
    }
}

#[cfg(test)]
mod tests;
