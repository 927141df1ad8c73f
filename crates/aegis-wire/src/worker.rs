//! Between aegisd and aegis-worker: one unix socket per machine, and two one-shot programs.
//!
//! ```text
//! aegisd                                     aegis-worker machine RUN_DIR
//!   makes RUN_DIR (0700), RUN_DIR/lock, binds RUN_DIR/worker.sock,
//!   starts the worker with the listening socket as fd 0        takes an exclusive flock on RUN_DIR/lock
//!   connects, says {"op":"launch",…}            ──▶            boots; answers Event lines until the end
//!   other connections: watch, freeze, thaw, stop, exec, attach, port
//! ```
//! Each connection begins with one JSON line, a [`Request`] of at most
//! [`crate::bounds::WORKER_LINE_MAX`] bytes. A worker holds its lock as long as it lives, outlives
//! aegisd, and ends with its machine, after it wrote [`Ended`] to `RUN_DIR/ended.json`.
//!
//! `aegis-worker reap` ([`Reap`] on stdin → [`Reaped`] on stdout) removes and *proves gone* all that
//! a machine had, whatever state it or its worker is in. `aegis-worker probe` prints [`Probe`].
//! `aegis-worker golden` ([`Golden`] on stdin → [`GoldenReady`]) makes sure that a golden snapshot
//! exists. No secret is in argv, in a file, or in the environment.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::channel::files::FileAsk;
use crate::channel::{ExecStart, ProcessExit, Run, rpc::RpcError};
use crate::egress::Policy;
use crate::words::{CpuMillis, DiskBytes, EgressBytes, InstanceId, MemoryMb, Time};

/// File names in a machine's run directory.
pub mod run_dir {
    /// flock'ed by the worker while it lives.
    pub const LOCK: &str = "lock";
    /// The worker's listening socket, bound by aegisd.
    pub const SOCKET: &str = "worker.sock";
    /// What the worker is about to make, written before it makes it.
    pub const MACHINE: &str = "machine.json";
    /// The disk of a spare machine, until it is launched.
    pub const SPARE_DISK: &str = "disk.raw";
    /// Why and when the machine ended: [`super::Ended`].
    pub const ENDED: &str = "ended.json";
    /// Where the machine's connections to its host's doors arrive, bound by aegisd.
    pub const DOOR: &str = "door.sock";
    /// Bytes that the machine has sent outside in this boot: a number of eight bytes, low end
    /// first, raised before they leave.
    pub const EGRESS: &str = "egress";
    /// The worker's own log.
    pub const LOG: &str = "worker.log";
}

/// First line of a connection to a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Boots the machine; only once per worker. Answer: [`Event`] lines, as for `watch`.
    Launch(Box<Launch>),
    /// Boots a spare machine: a twin that waits for its launch. Answer: [`Event`] lines; once they
    /// say `spare`, the launch may be said as a second line of this connection, after the run
    /// directory was renamed to the launched instance's. A spare ends with its connection.
    Prepare(Box<Spare>),
    /// Answer: [`Event`] lines, the present state first, until the machine ended.
    Watch,
    /// Stops the machine's clock (QMP stop). Answer: one [`Reply`]. Repeats are fine.
    Freeze {
        /// Cuts it off from everything outside before, for good: it is to end.
        #[serde(default)]
        cut: bool,
    },
    /// Lets it go on, with the clock set. Answer: one [`Reply`].
    Thaw,
    /// Saves the memory of a machine that stands still to disk, and frees it; a thaw brings it
    /// back as it was. Answer: one [`Reply`]; refused while someone is connected. Repeats are fine.
    Suspend,
    /// Makes a commit of the machine, which runs or stands still: its disk, and its memory where that
    /// is asked for. It stops for an instant and goes on. Answer: one [`Reply`], then one
    /// [`Committed`]. It is made also when nobody waits for it any more.
    Commit {
        /// An empty directory.
        dir: PathBuf,
        /// With its memory, and so with its processes.
        memory: bool,
        /// It is to survive a power cut once it is answered; else it does when the host's kernel has
        /// got round to it, as what machines write to their disks.
        #[serde(default)]
        durable: bool,
    },
    /// Ends the machine in order (processes, disk synced), else after the deadline by force.
    /// Answer: one [`Reply`] when it has ended.
    Stop {
        /// Milliseconds between SIGTERM and SIGKILL inside.
        grace_ms: u64,
    },
    /// Runs a command. Answer: NDJSON of [`crate::logs::ExecStarted`], [`crate::logs::Entry`] lines,
    /// [`crate::logs::ExecDone`]; or one [`Reply`] with an error. The command goes on, and is logged,
    /// when the asker leaves.
    Exec {
        /// Chosen by aegisd.
        exec_id: String,
        /// What to run.
        start: ExecStart,
        /// All that it reads, base64; at most [`crate::bounds::STDIN_GIVEN_MAX`] bytes.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        stdin: String,
    },
    /// Runs a command at a terminal ([`ExecStart::tty`]), or attached ([`ExecStart::attached`]).
    /// Answer: one [`Reply`], then [`crate::channel::output`] frames both ways, as the machine's exec
    /// stream has them. The command is hung up when the asker leaves. Of one that is attached,
    /// output is logged up to [`crate::bounds::ATTACHED_LOG_MAX`]; of a terminal nothing.
    Attach {
        /// Chosen by aegisd.
        exec_id: String,
        /// What to run.
        start: ExecStart,
    },
    /// Does something with the machine's files. Answer: one [`Reply`], then the frames of
    /// [`crate::channel::files`], both ways as the machine's stream has them. It ends when the
    /// asker leaves.
    Files {
        /// What.
        ask: FileAsk,
    },
    /// Bytes to and from a TCP port inside. Answer: one [`Reply`], then the bytes.
    Port {
        /// The port on the machine's loopback.
        port: u16,
    },
    /// Serves the machine's own calls ([`crate::channel::guest`]). Answer: one [`Reply`], then
    /// [`Brokered`] lines from the worker and [`BrokerAnswer`] lines to it, in any order, until one
    /// side leaves. A later broker takes the place of an earlier one. Without one, calls wait a
    /// moment for it and are then refused with [`crate::channel::rpc::CODE_UNAVAILABLE`].
    Broker,
    /// Opens the stream of a [`crate::channel::guest::Streamed`] answer. Answer: one [`Reply`], then
    /// bytes both ways, until either side leaves.
    GuestStream {
        /// Names the stream to the machine.
        ticket: String,
    },
    /// Says anew what the machine may reach, and how much it may send. Answer: one [`Reply`].
    Egress(Box<Egress>),
    /// Takes back what the machine may send and has not sent. Answer: one [`Reply`], then one
    /// [`Trimmed`].
    TrimEgress {
        /// As in [`Egress::version`].
        version: u64,
    },
    /// Says anew how much CPU the machine gets. Answer: one [`Reply`].
    Quota {
        /// The quota.
        cpu: CpuMillis,
    },
    /// Hands the machine another capability token. Answer: one [`Reply`].
    RenewToken {
        /// The token.
        token: String,
    },
}

/// A machine's call, passed on as it came: nothing of it was believed, only its size is bounded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Brokered {
    /// Chosen by the worker; at most [`crate::bounds::RPC_IN_FLIGHT_MAX`] are open.
    pub id: u64,
    /// One of [`crate::channel::guest::method::ALL`].
    pub method: String,
    /// As it came.
    pub params: serde_json::Value,
}

/// The answer to a [`Brokered`] call: result or error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BrokerAnswer {
    /// Of the call.
    pub id: u64,
    /// The body that the process gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
}

/// What a machine may reach, and how much it may send.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Egress {
    /// What it may reach.
    pub policy: Policy,
    /// Bytes that may have been sent in this boot.
    pub ceiling: EgressBytes,
    /// No more will come.
    pub last: bool,
    /// Of two words about what may be sent the one with the higher number counts.
    pub version: u64,
    /// Hosts whose plain HTTP goes through the door, so that secrets can be put in.
    #[serde(default)]
    pub via_door: Vec<String>,
    /// Their TLS does too, as far as the machine was given its authority for them
    /// ([`crate::channel::Own::ca_certificate`]) when it was launched.
    #[serde(default)]
    pub via_door_tls: bool,
    /// Who is asked for names.
    pub resolvers: Vec<SocketAddr>,
}

/// Answer to [`Request::TrimEgress`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Trimmed {
    /// Bytes that were sent in this boot; no more are, until more is allowed.
    pub ceiling: EgressBytes,
}

/// What a commit's directory consists of.
pub mod commit {
    /// The disk: a sparse raw file.
    pub const DISK: &str = "disk.img";
    /// The rest of what a start needs: [`super::Kept`].
    pub const KEPT: &str = "kept.json";
    /// The memory: without the first of these there is none. After those comes where who holds it
    /// answers, and its end; and what that leaves, if it has not stored it yet.
    pub const MEMORY: [&str; 6] =
        ["snapshot.json", "mem", "state", "keeper.sock", "mem.new", "state.new"];
}

/// Answer to [`Request::Commit`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// Bytes that the commit takes on the host.
    pub bytes: u64,
    /// For how long the machine stood still, microseconds.
    pub stopped_us: u64,
}

/// What a worker notes of a commit, for the worker that starts from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Names what saved memory depends on; absent where there is none.
    pub fits: Option<String>,
    /// Size of the disk, bytes.
    pub disk_bytes: u64,
}

/// What a machine starts from besides its image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct From {
    /// The commit's directory. The machine's disk lies over the commit's, always.
    pub dir: PathBuf,
    /// Go on from the commit's memory, at the first start.
    pub memory: bool,
}

/// What a machine's gateway has to say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EgressNews {
    /// It may send little more: it needs another allowance.
    Low,
    /// It wants to send, and may send no more.
    Spent,
    /// It was refused something.
    Denied {
        /// One of [`crate::egress::rule`].
        rule: String,
        /// What it wanted.
        requested: String,
        /// What would pass.
        allowed: String,
        /// How often, lately.
        count: u64,
    },
}

/// All that a machine is made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// [`crate::bounds::WORKER_GENERATION`] of the sender.
    pub generation: u32,
    /// Its id.
    pub instance_id: InstanceId,
    /// What its golden snapshot is made of.
    pub golden: Golden,
    /// CPU quota, in force before user code runs.
    pub cpu: CpuMillis,
    /// Its writable disk.
    pub disk: Disk,
    /// The commit that it starts from.
    #[serde(default)]
    pub from: Option<From>,
    /// cgroup below each controller's root, for example `aegis/3fa9c1d2/inst-…`.
    pub cgroup: String,
    /// Refuse to boot where a limit can't be enforced (no usable cgroups).
    pub require_limits: bool,
    /// Host name inside.
    pub hostname: String,
    /// UUID that the machine shows as its boot id.
    pub boot_id: String,
    /// What it may reach, in force before its first packet.
    pub egress: Egress,
    /// The primary process.
    pub run: Run,
    /// Say `running` only once this port inside accepts.
    pub await_port: Option<u16>,
    /// Directory of `log.ndjson` and its rotated predecessor `log.1.ndjson`.
    pub log_dir: PathBuf,
    /// A folder of the host that it gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Lend>,
}

/// A folder of the host that a machine gets as its workspace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lend {
    /// Where it is, without any link on the way.
    pub path: PathBuf,
    /// Nothing can be changed in it.
    #[serde(default)]
    pub read_only: bool,
}

/// Where it is kept, beside a machine's disk, by how many bytes the machine's workspace grew: a
/// number of eight bytes, low end first.
pub fn workspace_book(disk: &Path) -> PathBuf {
    disk.with_file_name("workspace")
}

/// What a machine needs before anybody knows whose it will be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spare {
    /// [`crate::bounds::WORKER_GENERATION`] of the sender.
    pub generation: u32,
    /// Its id until it is launched; no record bears it.
    pub id: InstanceId,
    /// What its golden snapshot is made of; a launch must ask for the same.
    pub golden: Golden,
    /// Size of its disk; a launch must ask for the same.
    pub disk_bytes: DiskBytes,
    /// As in [`Launch::cgroup`]; kept when it is launched.
    pub cgroup: String,
    /// As in [`Launch::require_limits`].
    pub require_limits: bool,
}

/// The writable disk: a sparse raw file, made (with ext4) when it does not exist.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// Its exact size.
    pub bytes: DiskBytes,
}

/// What a golden snapshot is made of; any changed input makes another snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Golden {
    /// Directory of all golden snapshots, `AEGIS_HOME/golden`.
    pub dir: PathBuf,
    /// `qemu-system-x86_64`
    pub qemu: PathBuf,
    /// Kernel as ELF (`vmlinux`) or bzImage.
    pub kernel: PathBuf,
    /// Kernel modules (`*.ko`, flat); absent when the kernel has all it needs built in.
    pub modules: Option<PathBuf>,
    /// The static harness.
    pub harness: PathBuf,
    /// The static MCP server, which every machine has as [`crate::channel::guest::MCP_PATH`].
    pub mcp: PathBuf,
    /// Read-only root file system (erofs).
    pub base: PathBuf,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Machine memory.
    pub memory: MemoryMb,
    /// Hardware or software.
    pub accel: Accel,
}

/// Which accelerator runs machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where it is usable, else software emulation.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// Answer of `aegis-worker golden`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GoldenReady {
    /// Names the snapshot: a hash of all inputs.
    pub key: String,
    /// It was there already.
    pub cached: bool,
    /// How long it took, milliseconds.
    pub elapsed_ms: u64,
}

/// One line of a watch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The machine is in this state now.
    State(MachineState),
    /// What it used so far in this boot.
    Usage(Sample),
    /// Its gateway needs something.
    Egress(EgressNews),
}

/// Stage of a boot that is over but for a port that its user wants to be answered first.
pub const STAGE_PORT: &str = "port";

/// State of a machine, as its worker sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MachineState {
    /// No launch was said yet.
    Waiting,
    /// On its way: a word for people (`golden`, `clone`, `warm`, `identify`, `run`, `port`).
    Booting {
        /// Where it is.
        stage: String,
    },
    /// A spare that may be launched.
    Spare,
    /// Harness up, primary process started, awaited port accepting.
    Running {
        /// What processes inside see as boot id.
        boot_id: String,
    },
    /// Its clock stands still.
    Frozen {
        /// As for `running`.
        boot_id: String,
        /// Its memory is on disk.
        #[serde(default)]
        suspended: bool,
    },
    /// Gone; the last line.
    Ended(Ended),
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// The kind of end.
    pub reason: EndReason,
    /// How the primary process ended, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ProcessExit>,
    /// One sentence for people; for a failed boot its cause.
    pub message: String,
    /// When.
    pub at: Time,
    /// The whole boot's usage.
    pub usage: Sample,
}

/// Kind of a machine's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The primary process exited.
    Exited,
    /// The host stopped it.
    Stopped,
    /// It never came up.
    BootFailed,
    /// The VMM died, or nothing inside answers any more.
    Crashed,
}

/// Usage of one boot, measured on the host. Each number only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// CPU time of the machine, nanoseconds (cgroup).
    pub cpu_ns: u64,
    /// Highest memory of the machine seen, bytes, without the VMM's own.
    pub memory_peak_bytes: u64,
    /// Bytes allocated for the disk file.
    pub disk_bytes: u64,
    /// Bytes that it sent outside; unknown where nobody could look any more.
    #[serde(default)]
    pub egress_bytes: Option<EgressBytes>,
    /// Bytes that came in from outside.
    #[serde(default)]
    pub ingress_bytes: u64,
    /// Since the clone started, without frozen time, milliseconds.
    pub uptime_ms: u64,
}

/// One-line answer: `{"ok":true}` or `{"error":{…}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// Done.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ok: bool,
    /// Not done, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
}

impl Reply {
    /// Done.
    pub fn ok() -> Reply {
        Reply { ok: true, error: None }
    }

    /// Not done.
    pub fn error(error: RpcError) -> Reply {
        Reply { ok: false, error: Some(error) }
    }
}

/// Asks `aegis-worker reap` to end and remove whatever a machine had.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reap {
    /// Removed whole.
    pub run_dir: PathBuf,
    /// As in [`Launch::cgroup`].
    pub cgroup: String,
    /// Removed when given; kept for a later start when not.
    pub disk: Option<PathBuf>,
    /// Give up (and say so) after this long, milliseconds.
    pub deadline_ms: u64,
}

/// What `aegis-worker reap` proved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reaped {
    /// Of `process`, `cgroup`, `network`, `disk`: what was looked for and is not there any more.
    pub verified: Vec<String>,
    /// What is still there, a sentence each; empty when all is gone.
    pub remaining: Vec<String>,
    /// The boot's last usage, read before the cgroup went, if there was one.
    pub usage: Option<Sample>,
}

/// What this host can do for machines.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Probe {
    /// Of [`crate::bounds::WORKER_GENERATION`].
    pub generation: u32,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// Why KVM is not used, when it is not.
    pub accel_reason: Option<String>,
    /// `v1`, `v2` or `none`.
    pub cgroups: String,
    /// Which limits can be enforced: of `cpu`, `memory`, `pids`.
    pub limits: Vec<String>,
    /// What to do about missing ones.
    pub limits_reason: Option<String>,
    /// Each machine's VMM runs as a user of its own.
    pub own_uid: bool,
}
