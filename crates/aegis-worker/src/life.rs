//! What a machine's life is told to, and what may be done to it while it lives: shared between the
//! machine's own task and the connections.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aegis_wire::bounds::RPC_DEADLINE;
use aegis_wire::channel::rpc::{CODE_CONFLICT, CODE_INTERNAL, RpcError};
use aegis_wire::channel::{SetTime, method};
use aegis_wire::words::CpuMillis;
use aegis_wire::worker::{Committed, Ended, MachineState, Sample};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::broker::Broker;
use crate::child::{Child, Death};
use crate::logs::Log;
use crate::meter::Meter;
use crate::net::Net;
use crate::qmp::{Qmp, QmpError};
use crate::relay::{Relay, USER_STREAMS_MAX};
use crate::run_dir::{self, ProcessName, Record, RunDir, monotonic_ms};
use crate::suspend::{self, Bed};
use crate::{commit, machine, snapshot};

/// A machine that goes on hears the time within this, or later by itself: whoever waits for the thaw
/// has other things to do.
const CLOCK_DEADLINE: Duration = Duration::from_secs(3);
/// How long a killed process may take to be gone.
pub const DEATH_DEADLINE: Duration = Duration::from_secs(5);

/// Levels, not messages: who looks late sees what is.
pub struct Shared {
    /// State of the machine.
    pub state: watch::Sender<MachineState>,
    /// What it used.
    pub usage: watch::Sender<Sample>,
    /// Whether it shall stop, and with how much grace, milliseconds.
    pub stop: watch::Sender<Option<u64>>,
    /// The machine, once it runs.
    pub live: watch::Sender<Option<Arc<Live>>>,
    /// Its link's other end.
    pub net: Arc<Net>,
    /// What the machine asks for.
    pub broker: Arc<Broker>,
    /// The primary process was found gone, without the news of its exit.
    pub exit: watch::Sender<bool>,
    /// The machine's process.
    pub child: Mutex<Option<Child>>,
}

impl Shared {
    /// Of a machine that nobody launched yet.
    pub fn new(net: Arc<Net>) -> Shared {
        Shared {
            net,
            state: watch::Sender::new(MachineState::Waiting),
            usage: watch::Sender::new(Sample::default()),
            stop: watch::Sender::new(None),
            live: watch::Sender::new(None),
            broker: Arc::new(Broker::new()),
            exit: watch::Sender::new(false),
            child: Mutex::default(),
        }
    }

    /// Holds the machine's process, whatever comes after.
    pub fn hold(&self, child: Child) {
        *lock(&self.child) = Some(child);
    }

    /// Kills the machine's process; returns its last words.
    pub async fn kill(&self) -> String {
        let Some(mut child) = lock(&self.child).take() else { return String::new() };
        child.kill();
        if tokio::time::timeout(DEATH_DEADLINE, child.wait()).await.is_err() {
            tracing::error!("QEMU does not die");
        }
        child.last_words()
    }

    /// What the machine's process said last.
    pub fn last_words(&self) -> String {
        lock(&self.child).as_ref().map(Child::last_words).unwrap_or_default()
    }

    /// Tells how far the boot is.
    pub fn stage(&self, stage: &str) {
        tracing::info!(stage, "booting");
        self.state.send_replace(MachineState::Booting { stage: stage.to_owned() });
    }
}

/// What was made for the machine, and what it used.
pub struct Books {
    run_dir: Mutex<RunDir>,
    record: Mutex<Record>,
    meter: Mutex<Meter>,
    net: Arc<Net>,
    // Told to the keeper: something of its snapshot is alive.
    lease: Mutex<Option<UnixStream>>,
}

impl Books {
    /// Writes down what is about to be made.
    pub fn open(run_dir: RunDir, record: Record, net: Arc<Net>) -> anyhow::Result<Books> {
        run_dir.write_record(&record)?;
        Ok(Books {
            run_dir: Mutex::new(run_dir),
            record: Mutex::new(record),
            meter: Mutex::default(),
            net,
            lease: Mutex::default(),
        })
    }

    /// What is written down now.
    pub fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    /// Changes what is written down.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> anyhow::Result<()> {
        let mut record = lock(&self.record);
        change(&mut record);
        lock(&self.run_dir).write_record(&record)
    }

    /// Follows the run directory to its new name, beside the old one; returns it.
    pub fn follow(&self, name: &str) -> anyhow::Result<PathBuf> {
        let mut run_dir = lock(&self.run_dir);
        let to = run_dir.path().with_file_name(name);
        run_dir.follow(to.clone())?;
        self.net.follow(&to);
        Ok(to)
    }

    /// Where it is written down.
    pub fn directory(&self) -> PathBuf {
        lock(&self.run_dir).path().to_owned()
    }

    /// Measures from zero: what was used until now is nobody's.
    pub fn restart(&self) {
        *lock(&self.meter) = Meter::default();
    }

    /// Holds the lease on the golden snapshot until the end.
    pub fn hold(&self, lease: UnixStream) {
        *lock(&self.lease) = Some(lease);
    }

    /// Measures.
    pub fn sample(&self) -> Sample {
        let record = self.record();
        let (sent, received) = self.net.carried();
        let sample = lock(&self.meter).sample(&record);
        Sample { egress_bytes: Some(sent), ingress_bytes: received, ..sample }
    }

    /// Writes how it ended.
    pub fn close(&self, ended: &Ended) -> anyhow::Result<()> {
        lock(&self.run_dir).write_ended(ended)
    }
}

/// The process that a machine runs in.
#[derive(Clone)]
pub struct Engine {
    /// Its monitor.
    pub qmp: Arc<Qmp>,
    /// Tells its end.
    pub death: Death,
}

/// A machine that runs or stands still.
pub struct Live {
    // None while its memory is on disk.
    engine: watch::Sender<Option<Engine>>,
    bed: Bed,
    /// Its channel.
    pub relay: Relay,
    /// Its log.
    pub log: Arc<Log>,
    /// What processes inside see as boot id.
    pub boot_id: String,
    frozen: watch::Sender<bool>,
    books: Arc<Books>,
    // One freeze or thaw at a time.
    turn: tokio::sync::Mutex<()>,
    // How many want the turn who wait for no commit.
    urgent: watch::Sender<usize>,
}

/// Somebody who waits for the turn, or has it, and for whom a commit gives way.
struct Urgent<'a>(&'a watch::Sender<usize>);

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

impl Live {
    /// A machine whose primary process was started.
    pub fn new(
        engine: Engine,
        bed: Bed,
        relay: Relay,
        log: Arc<Log>,
        boot_id: String,
        frozen: watch::Sender<bool>,
        books: Arc<Books>,
    ) -> Live {
        let (engine, turn) = (watch::Sender::new(Some(engine)), tokio::sync::Mutex::default());
        let urgent = watch::Sender::new(0);
        Live { engine, bed, relay, log, boot_id, frozen, books, turn, urgent }
    }

    /// Completes when the process that it runs in has died.
    pub async fn died(&self) {
        let mut engine = self.engine.subscribe();
        loop {
            let now = engine.borrow_and_update().clone();
            let died = async {
                match now {
                    Some(engine) => engine.death.happened().await,
                    // Suspended: it has none.
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Ok(()) = engine.changed() => {}
                () = died => return,
            }
        }
    }

    fn engine(&self) -> Option<Engine> {
        self.engine.borrow().clone()
    }

    /// Whether its clock stands still.
    pub fn is_frozen(&self) -> bool {
        *self.frozen.borrow()
    }

    /// Stops its clock.
    pub async fn freeze(&self, shared: &Shared) -> Result<(), RpcError> {
        let _urgent = self.urgent();
        let _turn = self.turn.lock().await;
        if self.is_frozen() {
            return Ok(());
        }
        let Some(engine) = self.engine() else { return Ok(()) };
        // Before it stands still, so that nobody is blamed for not answering.
        self.frozen.send_replace(true);
        if let Err(error) = engine.qmp.execute("stop", Value::Null).await {
            self.frozen.send_replace(false);
            return Err(internal(&error));
        }
        self.book(|clock, now| clock.frozen_since_ms = Some(now));
        let boot_id = self.boot_id.clone();
        self.tell(shared, MachineState::Frozen { boot_id, suspended: false });
        Ok(())
    }

    /// Gives its memory back: it is saved, and its process ends. A thaw wakes it.
    pub async fn suspend(&self, shared: &Shared) -> Result<(), RpcError> {
        let _urgent = self.urgent();
        let _turn = self.turn.lock().await;
        if !self.is_frozen() {
            return Err(conflict("it runs"));
        }
        let Some(engine) = self.engine() else { return Ok(()) };
        if self.relay.user_streams.available_permits() < USER_STREAMS_MAX {
            return Err(conflict("someone is connected to it"));
        }
        self.bed.save(&engine.qmp, &self.memory_path()).await.map_err(|e| unsaved(&e))?;
        // Its death is no crash from now on.
        self.engine.send_replace(None);
        shared.kill().await;
        shared.net.unplug();
        if let Err(error) = self.books.update(|record| record.qemu = None) {
            tracing::error!(error = format!("{error:#}"), "its sleep is not written down");
        }
        let boot_id = self.boot_id.clone();
        self.tell(shared, MachineState::Frozen { boot_id, suspended: true });
        Ok(())
    }

    /// Takes a commit into a directory. It gives way to whoever freezes the machine or ends it.
    pub async fn commit(
        &self,
        dir: &Path,
        memory: bool,
        durable: bool,
    ) -> Result<Committed, RpcError> {
        let failed =
            |e: &anyhow::Error| RpcError::new(CODE_INTERNAL, format!("no commit was made: {e:#}"));
        let taken = {
            let _turn = self.turn.lock().await;
            if self.is_frozen() {
                return Err(conflict("its clock stands still"));
            }
            let engine = self.engine().ok_or_else(|| conflict("its memory is on disk"))?;
            let source = commit::Origin { qmp: &engine.qmp, bed: &self.bed, relay: &self.relay };
            let mut urgent = self.urgent.subscribe();
            let taken = tokio::select! {
                biased;
                _ = urgent.wait_for(|n| *n > 0) => Err(anyhow::anyhow!("it was to stand still, or to end")),
                taken = commit::take(&source, dir, memory) => taken,
            };
            if taken.is_err() {
                commit::undo(&engine.qmp).await;
            }
            taken.map_err(|e| failed(&e))?
        };
        let group = self.books.record().group;
        commit::keep(&self.bed, &group, taken, dir, durable).await.map_err(|e| failed(&e))
    }

    fn urgent(&self) -> Urgent<'_> {
        self.urgent.send_modify(|n| *n += 1);
        Urgent(&self.urgent)
    }

    /// Starts a process that goes on where the suspended one ended, and stands still like it.
    async fn wake(&self, shared: &Shared) -> anyhow::Result<Engine> {
        let path = self.memory_path();
        let cgroups = self.books.record().group.doors()?;
        let vmm = self.bed.wake(&path, cgroups)?;
        let engine = Engine { qmp: Arc::new(Qmp::start(vmm.qmp)), death: vmm.child.death() };
        let name = ProcessName::of(vmm.child.pid().as_raw_nonzero().get());
        shared.hold(vmm.child);
        self.books.update(|record| record.qemu = name)?;
        let taken = tokio::select! {
            taken = suspend::take_over(&engine.qmp, vmm.state_fd, &path) => taken,
            () = engine.death.happened() => Err(anyhow::anyhow!("QEMU ended")),
        };
        if let Err(error) = taken {
            // What was saved is still there: another try may have more luck.
            let words = shared.kill().await;
            self.books.update(|record| record.qemu = None)?;
            return Err(snapshot::with_last_words(error, &words));
        }
        self.relay.plug(vmm.wires).await?;
        shared.net.plug(vmm.net);
        self.engine.send_replace(Some(engine.clone()));
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!(%error, "what was saved stays there");
        }
        Ok(engine)
    }

    fn memory_path(&self) -> PathBuf {
        self.books.directory().join(run_dir::MEMORY)
    }

    /// Lets it go on, with the host's clock.
    pub async fn thaw(&self, shared: &Shared) -> Result<(), RpcError> {
        if !self.let_go(shared).await.map_err(|e| unwoken(&e))? {
            return Ok(());
        }
        let boot_id = self.boot_id.clone();
        self.tell(shared, MachineState::Running { boot_id });
        // Nobody waits behind this: a machine that does not answer can be frozen meanwhile.
        let set = async {
            let session = self.relay.session().await?;
            let time = SetTime { unix_ns: machine::unix_ns() };
            let _: Value = session.peer.call(method::SET_TIME, &time, RPC_DEADLINE).await?;
            anyhow::Ok(())
        };
        match tokio::time::timeout(CLOCK_DEADLINE, set).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => {
                let text = format!("it goes on, but its clock is late: {e:#}");
                Err(RpcError::new(CODE_INTERNAL, text))
            }
            Err(_) => Err(RpcError::new(CODE_INTERNAL, "it goes on, but its clock is late")),
        }
    }

    /// Lets its processors go on; false when they did already.
    pub async fn let_go(&self, shared: &Shared) -> anyhow::Result<bool> {
        let _urgent = self.urgent();
        let _turn = self.turn.lock().await;
        if !self.is_frozen() {
            return Ok(false);
        }
        let engine = match self.engine() {
            Some(engine) => engine,
            None => self.wake(shared).await?,
        };
        engine.qmp.execute("cont", Value::Null).await?;
        self.book(|clock, now| {
            if let Some(since) = clock.frozen_since_ms.take() {
                clock.frozen_ms += now.saturating_sub(since);
            }
        });
        self.frozen.send_replace(false);
        Ok(true)
    }

    /// Sets its CPU quota.
    pub fn set_quota(&self, cpu: CpuMillis) -> Result<(), RpcError> {
        let group = self.books.record().group;
        group.set_quota(cpu).map_err(|e| RpcError::new(CODE_INTERNAL, e.to_string()))
    }

    fn book(&self, change: impl FnOnce(&mut run_dir::ClockRecord, u64)) {
        let now = monotonic_ms();
        let booked = self.books.update(|record| {
            if let Some(clock) = &mut record.clock {
                change(clock, now);
            }
        });
        if let Err(error) = booked {
            tracing::error!(error = format!("{error:#}"), "the machine's clock is not written");
        }
    }

    /// Tells a state, unless the end was told.
    fn tell(&self, shared: &Shared, state: MachineState) {
        shared.state.send_if_modified(|now| {
            let lives = matches!(now, MachineState::Running { .. } | MachineState::Frozen { .. });
            if lives {
                *now = state;
            }
            lives
        });
    }
}

/// Not in a state for that.
pub fn conflict(text: impl Into<String>) -> RpcError {
    RpcError::new(CODE_CONFLICT, text)
}

fn unsaved(error: &anyhow::Error) -> RpcError {
    RpcError::new(CODE_INTERNAL, format!("it keeps its memory: {error:#}"))
}

fn unwoken(error: &anyhow::Error) -> RpcError {
    RpcError::new(CODE_INTERNAL, format!("it does not go on: {error:#}"))
}

fn internal(error: &QmpError) -> RpcError {
    RpcError::new(CODE_INTERNAL, error.to_string())
}

/// A lock that a panic elsewhere does not take away: what it guards is whole between statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
