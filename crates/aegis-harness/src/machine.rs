//! What the parts of the harness share, and the phases of its life.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use aegis_wire::bounds::STREAMS_MAX;
use aegis_wire::channel::rpc::{CODE_CONFLICT, CODE_INTERNAL, RpcError};
use aegis_wire::channel::workspace::Mount;
use aegis_wire::channel::{Adopt, ExecStart, Identified, Own, ProcessExit, Run};
use aegis_wire::pipe::mux::Stream;
use rustix::process::Pid;
use tokio::sync::{mpsc, watch};

use crate::boot::Marks;
use crate::cage::Cage;
use crate::disks::Disks;
use crate::guest::Guest;
use crate::hands::Hands;
use crate::names::Opened;
use crate::note::note;
use crate::primary::Seat;
use crate::process::{HOME, Starter, Wish, environment};
use crate::pump::Pump;
use crate::uevents::Uevents;
use crate::user::{self, User};
use crate::workspace::Workspace;
use crate::{identity, primary, trust};

/// The machine as its harness sees it.
pub struct Machine {
    /// Since when the harness runs.
    pub started: Instant,
    /// Starts processes.
    pub starter: Starter,
    /// News of devices.
    pub uevents: Uevents,
    /// Does what blocks.
    pub hands: Hands,
    /// Does what blocks on files of the user's, whose file systems may never answer.
    pub clerks: Hands,
    /// What it writes its identity to.
    pub marks: Marks,
    /// Whether the primary process runs.
    pub primary_alive: watch::Sender<bool>,
    /// How it ended; set once all its output was sent.
    pub primary_exit: watch::Sender<Option<ProcessExit>>,
    /// What processes inside ask of the host.
    pub guest: Arc<Guest>,
    /// Logs streams for the primary process's output.
    pub logs: mpsc::Sender<Stream>,
    /// The folder of the host, if it has one.
    pub workspace: Workspace,
    life: Mutex<Life>,
}

/// Forward only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// As in a golden machine.
    Twin,
    /// `identify` is at work, or failed halfway: there is no way back.
    Identifying,
    /// Has a root of its own.
    Itself,
    /// The primary process was started.
    Running,
    /// A copy of a machine that runs: nothing goes on before it is itself.
    Held,
    /// `shutdown` was asked for; nothing starts any more.
    Ending,
}

struct Life {
    phase: Phase,
    based: Option<Disks>,
    boot_id: String,
    own: Option<Arc<OwnedFd>>,
    // A certificate may lie on its disk.
    trusting: bool,
    // Of a machine that is held.
    names: Opened,
    primary: Option<Primary>,
    streams: Option<mpsc::Receiver<Stream>>,
    // What the primary process is to run, while it waits for its client.
    waiting: Option<(Vec<String>, Seat)>,
}

/// What execs take over from the primary process.
struct Primary {
    // None while it waits for its client.
    pid: Option<Pid>,
    environment: BTreeMap<String, String>,
    directory: String,
    user: Option<User>,
}

impl Machine {
    /// Before anything was asked.
    pub fn new(
        starter: Starter,
        uevents: Uevents,
        hands: Hands,
        clerks: Hands,
        marks: Marks,
        pump: Arc<Pump>,
    ) -> Machine {
        let (logs, streams) = mpsc::channel(STREAMS_MAX);
        let life = Life {
            phase: Phase::Twin,
            based: None,
            boot_id: String::new(),
            own: None,
            trusting: true,
            names: Opened::default(),
            primary: None,
            streams: Some(streams),
            waiting: None,
        };
        Machine {
            started: Instant::now(),
            starter,
            uevents,
            hands,
            clerks,
            marks,
            primary_alive: watch::Sender::new(false),
            primary_exit: watch::Sender::new(None),
            guest: Arc::new(Guest::new()),
            logs,
            workspace: Workspace::new(pump),
            life: Mutex::new(life),
        }
    }

    /// The boot id that processes see; empty before there is one.
    pub fn shown_boot_id(&self) -> String {
        self.lock().boot_id.clone()
    }

    /// Begins `identify`; gives the disks when they were found and the base was mounted already.
    pub fn begin_identify(&self) -> Result<Option<Disks>, RpcError> {
        let mut life = self.lock();
        life.step(Phase::Twin, Phase::Identifying)?;
        Ok(life.based.clone())
    }

    /// Ends `identify`.
    pub fn finish_identify(&self, boot_id: String, own: OwnedFd) -> Result<(), RpcError> {
        let mut life = self.lock();
        (life.boot_id, life.own) = (boot_id, Some(Arc::new(own)));
        life.step(Phase::Identifying, Phase::Itself)
    }

    /// Only a twin can be made ready for a snapshot; gives the disks when the base is mounted
    /// already.
    pub fn begin_quiesce(&self) -> Result<Option<Disks>, RpcError> {
        let mut life = self.lock();
        life.step(Phase::Twin, Phase::Twin)?;
        Ok(life.based.clone())
    }

    /// The base is mounted, here and in all clones.
    pub fn base_is_mounted(&self, disks: Disks) {
        self.lock().based = Some(disks);
    }

    /// Starts the primary process, once, or has it wait for its client: then it has no id yet.
    pub async fn run(self: &Arc<Machine>, run: Run) -> Result<Option<Pid>, RpcError> {
        // Who takes the streams is the one who may try.
        let streams = {
            let mut life = self.lock();
            life.step(Phase::Itself, Phase::Itself)?;
            life.streams.take().ok_or_else(|| conflict(Phase::Running))?
        };
        let user = match run.user.as_deref().map(user::find).transpose() {
            Ok(user) => user.flatten(),
            Err(error) => {
                self.lock().streams = Some(streams);
                return Err(error);
            }
        };
        // Before its first instruction: it may ask at once.
        let given = match self.give(run.own, user.as_ref()).await {
            Ok(given) => given,
            Err(error) => {
                self.lock().streams = Some(streams);
                return Err(error);
            }
        };
        let mut all = environment();
        all.extend(given);
        if let Some(user) = &user {
            all.insert("HOME".to_owned(), user.home.clone());
        }
        all.extend(run.env);
        let directory = run.cwd.unwrap_or_else(|| HOME.to_owned());
        let wish = Wish { command: run.command, environment: all, directory, user };
        let started = match run.attach {
            true => {
                primary::wait(self);
                Ok((None, Some(Seat::own(streams))))
            }
            false => primary::start(self, &wish, streams).await.map(|pid| (Some(pid), None)),
        };
        let mut life = self.lock();
        let (pid, seat) = started.map_err(|(error, streams)| {
            self.guest.hold(None);
            life.streams = Some(streams);
            error
        })?;
        // A shutdown meanwhile stays one.
        if life.phase == Phase::Itself {
            life.phase = Phase::Running;
        }
        let Wish { command, environment, directory, user } = wish;
        life.waiting = seat.map(|seat| (command, seat));
        life.primary = Some(Primary { pid, environment, directory, user });
        Ok(pid)
    }

    /// Has everything but the harness stand still, until [`Machine::adopt`].
    pub async fn hold(&self) -> Result<(), RpcError> {
        self.lock().step(Phase::Running, Phase::Held)?;
        // Nobody answers a copy: who waits for a file of the host would never stand still.
        self.workspace.give_up(&self.hands).await;
        let hold = |cage: Arc<Cage>| {
            move || {
                cage.hold()?;
                Ok(Opened::of(&rustix::system::uname().nodename().to_string_lossy()))
            }
        };
        let held = match self.starter.cage.clone() {
            Some(cage) => self.hands.run(hold(cage)).await.and_then(|held| held),
            None => Err(io::Error::other("there is no cgroup of its processes")),
        };
        let names = held.map_err(|e| {
            // Nobody else leads out of this phase but the end.
            let _ = self.lock().step(Phase::Held, Phase::Running);
            RpcError::new(CODE_INTERNAL, format!("its processes can't be held: {e}"))
        })?;
        self.lock().names = names;
        Ok(())
    }

    /// Makes a copy that was held itself; its processes go on.
    pub async fn adopt(self: &Arc<Machine>, adopt: Adopt) -> Result<Identified, RpcError> {
        let names = {
            let mut life = self.lock();
            life.step(Phase::Held, Phase::Held)?;
            std::mem::take(&mut life.names)
        };
        let identified = identity::change(self, adopt.identity, names).await;
        let identified = identified.map_err(|e| e.answer())?;
        let user = self.lock().primary.as_ref().and_then(|primary| primary.user.clone());
        let mut env = self.give(adopt.own, user.as_ref()).await?;
        env.extend(adopt.env);
        {
            let mut life = self.lock();
            life.boot_id.clone_from(&identified.boot_id);
            if let Some(primary) = &mut life.primary {
                primary.environment.extend(env);
            }
            life.step(Phase::Held, Phase::Running)?;
        }
        let released = self.starter.cage.as_ref().map_or(Ok(()), |cage| cage.release());
        released.map_err(|e| RpcError::new(CODE_INTERNAL, format!("it does not go on: {e}")))?;
        Ok(identified)
    }

    /// Takes what is this machine's alone, in the place of what was before; what of it is said to
    /// processes.
    async fn give(
        &self,
        own: Own,
        user: Option<&User>,
    ) -> Result<BTreeMap<String, String>, RpcError> {
        self.mount_workspace(own.workspace, user).await?;
        let said = self.trust(own.ca_certificate).await;
        if let Some(key) = &own.authorized_key {
            authorize(key);
        }
        self.guest.hold(own.capability_token);
        Ok(said)
    }

    /// What was written reaches the disk.
    pub async fn sync(&self) -> Result<(), RpcError> {
        let own = self.lock().own.clone();
        let Some(own) = own else { return Ok(()) };
        let done = self.hands.run(move || rustix::fs::syncfs(own)).await;
        done.and_then(|synced| Ok(synced?))
            .map_err(|e| RpcError::new(CODE_INTERNAL, format!("its disk can't be synced: {e}")))
    }

    /// Mounts the folder of the host in the place of one that was mounted before.
    async fn mount_workspace(
        &self,
        ask: Option<Mount>,
        user: Option<&User>,
    ) -> Result<(), RpcError> {
        let mounted = self.workspace.mount(&self.hands, ask, user).await;
        mounted.map_err(|e| RpcError::new(CODE_INTERNAL, format!("workspace: {e}")))
    }

    /// Makes this machine trust a certificate, or none any more; what of it is said to processes.
    async fn trust(&self, certificate: Option<String>) -> BTreeMap<String, String> {
        let trusting = std::mem::replace(&mut self.lock().trusting, certificate.is_some());
        if !trusting && certificate.is_none() {
            return BTreeMap::new();
        }
        let work =
            move || File::open("/").map(|root| trust::set(&root.into(), certificate.as_deref()));
        let done = self.hands.run(work).await.and_then(|set| set);
        done.unwrap_or_else(|e| {
            note(&format!("certificates: {e}"));
            BTreeMap::new()
        })
    }

    /// Another token from now on.
    pub fn renew(&self, token: String) -> Result<(), RpcError> {
        match self.lock().phase {
            Phase::Itself | Phase::Running => self.guest.hold(Some(token)),
            phase => return Err(conflict(phase)),
        }
        Ok(())
    }

    /// An exec as a wish: as the primary process's user, with its environment below its own.
    pub fn wish(&self, start: ExecStart) -> Result<Wish, RpcError> {
        let life = self.lock();
        let (mut all, directory, user) = match (&life.primary, life.phase) {
            (Some(primary), Phase::Running) => {
                let Primary { environment, directory, user, .. } = primary;
                (environment.clone(), directory.clone(), user.clone())
            }
            (None, Phase::Itself) => (environment(), HOME.to_owned(), None),
            (_, phase) => return Err(conflict(phase)),
        };
        all.extend(start.env);
        let directory = start.cwd.unwrap_or(directory);
        Ok(Wish { command: start.command, environment: all, directory, user })
    }

    /// The same of one that is started for a client, which may be the primary process.
    pub fn take_seat(&self, start: ExecStart) -> Result<(Wish, Seat), RpcError> {
        let mut wish = self.wish(start)?;
        if !wish.command.is_empty() {
            return Ok((wish, Seat::beside()));
        }
        let (command, seat) = self.lock().waiting.take().ok_or_else(|| {
            RpcError::new(CODE_CONFLICT, "its own command does not wait for anybody")
        })?;
        wish.command = command;
        Ok((wish, seat))
    }

    /// The place of a primary process that still waits.
    pub fn empty_seat(&self) -> Option<Seat> {
        self.lock().waiting.take().map(|(_, seat)| seat)
    }

    /// Who waited is there.
    pub fn is_primary(&self, pid: Pid) {
        if let Some(primary) = &mut self.lock().primary {
            primary.pid = Some(pid);
        }
    }

    /// Whether it has files of its own: none before its identity, none that are safe at its end.
    pub fn has_files(&self) -> bool {
        matches!(self.lock().phase, Phase::Itself | Phase::Running)
    }

    /// The primary process, while it runs or its end is not yet known.
    pub fn primary(&self) -> Option<Pid> {
        self.lock().primary.as_ref().and_then(|primary| primary.pid)
    }

    /// Forbids every later start; gives the disk that is to be made clean.
    pub fn begin_end(&self) -> Option<Arc<OwnedFd>> {
        let mut life = self.lock();
        let held = life.phase == Phase::Held;
        life.phase = Phase::Ending;
        if held && let Some(cage) = &self.starter.cage {
            // Who stands still can't end in order.
            if let Err(e) = cage.release() {
                note(&format!("a copy's end: {e}"));
            }
        }
        life.own.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Life {
    fn step(&mut self, from: Phase, to: Phase) -> Result<(), RpcError> {
        if self.phase != from {
            return Err(conflict(self.phase));
        }
        self.phase = to;
        Ok(())
    }
}

fn conflict(phase: Phase) -> RpcError {
    let text = match phase {
        Phase::Twin => "it has no identity yet",
        Phase::Identifying => "it is being identified, or that failed",
        Phase::Itself => "it has an identity already",
        Phase::Running => "its primary process was started already",
        Phase::Held => "it is a copy that stands still",
        Phase::Ending => "it is shutting down",
    };
    RpcError::new(CODE_CONFLICT, text)
}

/// Lets the holder of a key in as root, once something inside serves SSH.
fn authorize(key: &str) {
    let write = || -> io::Result<()> {
        let directory = Path::new(HOME).join(".ssh");
        match fs::DirBuilder::new().mode(0o700).create(&directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let mut options = File::options();
        let mut file = options
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(directory.join("authorized_keys"))?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(format!("{}\n", key.trim_end()).as_bytes())
    };
    // What the machine has made of its /root is its own affair.
    if let Err(e) = write() {
        note(&format!("authorized_keys: {e}"));
    }
}
