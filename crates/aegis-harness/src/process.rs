//! From a wish to run something to a process: environment, program, pipes.

use std::collections::BTreeMap;
use std::ffi::{CString, NulError};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use aegis_wire::bounds::{COMMAND_BYTES_MAX, COMMAND_WORDS_MAX};
use aegis_wire::channel::WindowSize;
use aegis_wire::channel::guest::{API_ENV, API_URL};
use aegis_wire::channel::rpc::{CODE_INTERNAL, CODE_NOT_FOUND, CODE_PARAMS, RpcError};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use tokio::net::unix::pipe;

use crate::cage::Cage;
use crate::hands::Hands;
use crate::pty;
use crate::reaper::{Child, Reaper};
use crate::sys::{Birth, Stage, Stillborn};
use crate::user::User;

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
        (API_ENV, API_URL),
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
    /// Whom it runs as; root when absent.
    pub user: Option<User>,
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
    /// No pipes, or too many births at once.
    #[error("no new process: {0}")]
    System(#[source] io::Error),
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
            Unable::System(_) | Unable::Stillborn(..) => CODE_INTERNAL,
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
    pub reaper: Arc<Reaper>,
    /// Where they live.
    pub cage: Option<Arc<Cage>>,
    midwife: Hands,
    terminals: Option<pty::Maker>,
    nothing: Arc<OwnedFd>,
}

/// Standard input, output and error of a process, from inside.
struct Standard {
    input: Option<OwnedFd>,
    output: Option<(OwnedFd, OwnedFd)>,
    /// All three are this one.
    terminal: Option<OwnedFd>,
    nothing: Arc<OwnedFd>,
}

impl Standard {
    fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        if let Some(terminal) = &self.terminal {
            return [terminal.as_fd(); 3];
        }
        let nothing = self.nothing.as_fd();
        let input = self.input.as_ref().map_or(nothing, |fd| fd.as_fd());
        let (output, errors) =
            self.output.as_ref().map_or((nothing, nothing), |(o, e)| (o.as_fd(), e.as_fd()));
        [input, output, errors]
    }
}

impl Starter {
    /// With the `/dev/null` of now: the one inside is the user's to break.
    pub fn new(cage: Option<Cage>) -> io::Result<Starter> {
        let nothing: OwnedFd = File::options().read(true).write(true).open("/dev/null")?.into();
        Ok(Starter {
            reaper: Arc::new(Reaper::new()),
            cage: cage.map(Arc::new),
            midwife: Hands::start("midwife")?,
            terminals: pty::Maker::find().ok(),
            nothing: Arc::new(nothing),
        })
    }

    /// Starts a process; with `input`, its standard input is a pipe.
    pub async fn start(&self, wish: &Wish, input: bool) -> Result<(Child, Pipes), Unable> {
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
            let nothing = Arc::clone(&self.nothing);
            Ok((
                pipes,
                Standard {
                    input: its_input,
                    output: Some((its_output, its_errors)),
                    terminal: None,
                    nothing,
                },
            ))
        };
        let (pipes, standard) = make().map_err(Unable::System)?;
        let child = self.bear(wish, strings, standard, None).await?;
        Ok((child, pipes))
    }

    /// Starts a process at a terminal of its own; gives the host's side of it too.
    pub async fn start_at_terminal(
        &self,
        wish: &Wish,
        size: WindowSize,
    ) -> Result<(Child, OwnedFd), Unable> {
        let strings = wish.strings()?;
        let terminals = self.terminals.as_ref();
        let terminals = terminals.ok_or_else(|| Unable::System(Errno::NODEV.into()))?;
        let (master, slave) = terminals.make(size).map_err(Unable::System)?;
        let nothing = Arc::clone(&self.nothing);
        let standard = Standard { input: None, output: None, terminal: Some(slave), nothing };
        let child = self.bear(wish, strings, standard, None).await?;
        Ok((child, master))
    }

    /// Starts a process below another root, which reads and writes nothing.
    pub async fn start_quiet(&self, wish: &Wish, root: &Path) -> Result<Child, Unable> {
        let strings = wish.strings()?;
        let root = CString::new(root.as_os_str().as_encoded_bytes())?;
        let nothing = Arc::clone(&self.nothing);
        let standard = Standard { input: None, output: None, terminal: None, nothing };
        self.bear(wish, strings, standard, Some(root)).await
    }

    async fn bear(
        &self,
        wish: &Wish,
        strings: Strings,
        standard: Standard,
        root: Option<CString>,
    ) -> Result<Child, Unable> {
        let (reaper, cage) = (Arc::clone(&self.reaper), self.cage.clone());
        let user = wish.user.clone();
        let work = move || {
            reaper.spawn(&Birth {
                programs: &strings.programs,
                arguments: &strings.arguments,
                environment: &strings.environment,
                directory: &strings.directory,
                root: root.as_deref(),
                user: user.as_ref(),
                standard: standard.descriptors(),
                terminal: standard.terminal.is_some(),
                cgroup: cage.as_deref().map(Cage::door),
            })
        };
        self.midwife.run(work).await.map_err(Unable::System)?.map_err(|why| {
            let program = wish.command.first().cloned().unwrap_or_default();
            Unable::Stillborn(why, program, wish.directory.clone())
        })
    }
}

#[cfg(test)]
mod tests;
