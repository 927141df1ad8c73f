//! The control channel between worker and harness (contracts/aegis.md 5).
//!
//! Layers, from below: a byte pipe that has no connections and may hold stale bytes → epoch frames
//! ([`frame`]) → yamux streams (crate feature `pipe`) → one [`StreamHead`] per stream → on the
//! control stream JSON-RPC ([`rpc`]), on the others bytes or [`output`] frames.
//!
//! The host opens every stream of this generation; a stream that the machine opens is closed.

pub mod files;
pub mod frame;
pub mod guest;
pub mod output;
pub mod rpc;
mod tty;
mod window;
pub mod workspace;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use tty::{BadTty, Term, Tty, WindowSize};
pub use window::{BadWindow, Window};

/// First message on a stream that the host opens: length-prefixed JSON (`u32` big-endian).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StreamHead {
    /// JSON-RPC, both ways. Exactly one per epoch, opened first.
    Control,
    /// Output of the primary process as [`output`] frames, machine → host. Opened before `run`.
    Logs,
    /// Runs a command; [`output`] frames both ways; ends with an exit frame. At a terminal
    /// ([`ExecStart::tty`]), and attached ([`ExecStart::attached`]), the end of the stream hangs up:
    /// the session gets SIGHUP.
    Exec(ExecStart),
    /// Bytes to and from a TCP port inside. The harness first answers one byte: [`PORT_OPEN`] or
    /// [`PORT_REFUSED`] (then it closes). Each direction closes on its own.
    Port {
        /// The port on the machine's loopback.
        port: u16,
    },
    /// While it lives, messages about the machine's workspace ([`workspace`]) go both ways over their
    /// own port. Opened before `run`.
    Workspace(workspace::Resume),
    /// Something with the machine's files: see [`files`].
    Files(files::FileAsk),
    /// The bulk of a [`guest`] call: of an answer, host → machine, until the host closes it; of a
    /// file that is written, machine → host, as [`files`] has it.
    Guest {
        /// As in [`guest::Streamed`], which is said after this stream was opened.
        ticket: String,
    },
}

/// First byte of a port stream's answer: connected.
pub const PORT_OPEN: u8 = 0;
/// First byte of a port stream's answer: nothing accepted there.
pub const PORT_REFUSED: u8 = 1;

/// A command to run beside the primary process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecStart {
    /// Program and arguments; the program is looked up in the machine's PATH. None, attached or at a
    /// terminal: the primary process, where that waits for this ([`Run::attach`]).
    pub command: Vec<String>,
    /// Added to (and over) the environment of the primary process.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; the primary process's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The whole process group is killed after this long, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_secs: Option<u64>,
    /// Runs it at a terminal of its own instead of at pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<Tty>,
    /// Its standard input is somebody's who stays with it: within a [`Window`], and when they leave
    /// the command is hung up, so that it never takes a part of its input for the whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attached: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessExit {
    /// Exit code; 128 + signal when a signal ended it.
    pub code: i32,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// The deadline of [`ExecStart::timeout_secs`] ended it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
}

/// `identify`: what makes a clone itself, before any user code runs. Answer: [`Identified`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identify {
    /// Host's clock, nanoseconds since 1970.
    pub unix_ns: i64,
    /// 64 bytes of the host's randomness, base64.
    pub entropy: String,
    /// The machine's host name.
    pub hostname: String,
    /// 32 hex digits for /etc/machine-id.
    pub machine_id: String,
    /// A UUID that the machine shows as its boot id.
    pub boot_id: String,
    /// Bytes that the writable disk must show; the harness waits for the resize to arrive.
    pub disk_bytes: u64,
    /// Address of its card, for a machine that is a copy of another one; else it keeps what all have.
    pub mac: [u8; 6],
}

/// `adopt`: makes a machine that went on from a commit itself: it was a copy of another one, and all
/// its processes but the harness stand still since [`method::HOLD`]. They go on with the answer, an
/// [`Identified`]; what they remember of their environment stays as it was.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Adopt {
    /// Clock, randomness, names. The disk came with the commit: its size is not waited for.
    pub identity: Identify,
    /// Environment of commands that start from now on, over that of the primary process.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// In the place of what the other one had: its token is forgotten, its authority trusted no more,
    /// and what was open in its workspace is lost.
    #[serde(flatten)]
    pub own: Own,
}

/// Answer to `identify` and to `adopt`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identified {
    /// The boot id that processes inside see.
    pub boot_id: String,
    /// `uname -r` inside.
    pub kernel: String,
}

/// `warm`: does what every machine does first, so that a spare has its code translated and its files
/// read before it is needed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Warm {
    /// Bytes that the writable disk must show, as in [`Identify`]; it holds an ext4.
    pub disk_bytes: u64,
}

/// `run`: starts the primary process. Answer: [`Started`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its environment, beside the harness's own `AEGIS_*` and PATH, HOME, LANG.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory, default `/root`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `NAME` or number, and perhaps `:GROUP`, as the machine's own files know them; root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// It starts once a client attaches to it ([`ExecStart::command`]), and is that one's; without
    /// one within [`crate::bounds::ATTACH_DEADLINE`] it ends as hung up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attach: bool,
    /// Ports that the outside may reach.
    #[serde(default)]
    pub expose_ports: Vec<u16>,
    /// What is this machine's alone.
    #[serde(flatten)]
    pub own: Own,
}

/// What a machine is given that no other one has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Own {
    /// The capability token (contracts/aegis.md 3): held in the harness's memory, never passed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability_token: Option<String>,
    /// Line for root's `authorized_keys`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authorized_key: Option<String>,
    /// What the machine trusts beside its image's authorities, PEM: the host's authority for the
    /// hosts of its placeholders.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_certificate: Option<String>,
    /// A folder of the host is mounted at [`workspace::MOUNT`] before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<workspace::Mount>,
}

/// Answer to `run`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Started {
    /// Process id inside; 0 while it waits for its client.
    pub pid: i32,
}

/// `await_port`: answers once a TCP port inside accepts, or with [`rpc::CODE_CONFLICT`] after the time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct AwaitPort {
    /// The port on the machine's loopback.
    pub port: u16,
    /// Give up after this long, milliseconds.
    pub timeout_ms: u64,
}

/// `signal`: sends a signal to the primary process's group.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Signal {
    /// The number, as on Linux x86-64.
    pub signal: i32,
}

/// `shutdown`: ends the primary process and everything else inside, syncs and unmounts the disk.
/// The answer `{}` means that the disk is clean; the harness stays until the machine is destroyed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Shutdown {
    /// Milliseconds between SIGTERM and SIGKILL.
    pub grace_ms: u64,
}

/// `set_time`: the host's clock, after a pause in which the machine's stood still.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SetTime {
    /// Nanoseconds since 1970.
    pub unix_ns: i64,
}

/// Answer to `health`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Health {
    /// The boot id that processes inside see; empty before `identify`.
    pub boot_id: String,
    /// Since the harness started, milliseconds of the machine's own clock.
    pub uptime_ms: u64,
    /// Whether the primary process runs.
    pub primary_running: bool,
}

/// Names of the methods that the host calls.
pub mod method {
    /// [`super::Identify`] → [`super::Identified`]
    pub const IDENTIFY: &str = "identify";
    /// [`super::Run`] → [`super::Started`]
    pub const RUN: &str = "run";
    /// [`super::AwaitPort`] → `{}`
    pub const AWAIT_PORT: &str = "await_port";
    /// [`super::Signal`] → `{}`
    pub const SIGNAL: &str = "signal";
    /// [`super::Shutdown`] → `{}`
    pub const SHUTDOWN: &str = "shutdown";
    /// [`super::SetTime`] → `{}`
    pub const SET_TIME: &str = "set_time";
    /// [`super::guest::RenewToken`] → `{}`
    pub const RENEW_TOKEN: &str = "renew_token";
    /// no params → [`super::Health`]
    pub const HEALTH: &str = "health";
    /// Only in a golden machine: warms caches, unmounts what must not be in a snapshot. → `{}`
    pub const QUIESCE: &str = "quiesce";
    /// no params → `{}`: what was written reaches the disk.
    pub const SYNC: &str = "sync";
    /// no params → `{}`; only in a copy that nobody sees: everything but the harness stands still,
    /// until [`ADOPT`].
    pub const HOLD: &str = "hold";
    /// [`super::Adopt`] → [`super::Identified`]; only after [`HOLD`].
    pub const ADOPT: &str = "adopt";
    /// [`super::Warm`] → `{}`; only in a machine without an identity.
    pub const WARM: &str = "warm";
    /// Notification of the machine: [`super::ProcessExit`] of the primary process.
    pub const PROCESS_EXITED: &str = "processExited";
}
