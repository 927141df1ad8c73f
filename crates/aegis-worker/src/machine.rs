//! The machine's life: `Prepared → Booted → Identified → Running`, by value, so that no machine can
//! run user code before it has an identity of its own.
//!
//! ```text
//! Prepared    golden memory at hand, cgroups made, disk file there      nothing of it runs
//! Booted      a clone of the snapshot runs, twin of all others          only the harness in it;
//!             a spare waits here until it is launched
//! Identified  clock, randomness, names, disk are its own
//! Running     CPU quota in force, primary process started
//! ```

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::{IDENTIFY_DEADLINE, RPC_DEADLINE, WARM_DEADLINE};
use aegis_wire::channel::rpc::CODE_CONFLICT;
use aegis_wire::channel::workspace::Mount;
use aegis_wire::channel::{
    Adopt, AwaitPort, Identified as IdentifiedAnswer, Identify, Own, Started, StreamHead, Warm,
    guest, method,
};
use aegis_wire::pipe::peer::CallError;
use aegis_wire::worker::{From, Golden, Launch, MachineState, STAGE_PORT, Spare, run_dir};
use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};

use crate::cgroup::{Group, Host, Limits};
use crate::child::Death;
use crate::life::{Books, Engine, Live, Shared};
use crate::logs::Log;
use crate::qemu::{self, Birth, Cage, Parts};
use crate::qmp::{QMP_DEADLINE, Qmp, Seen};
use crate::relay::{self, Relay, Session};
use crate::run_dir::{ClockRecord, ProcessName, monotonic_ms};
use crate::running::Running;
use crate::suspend::Bed;
use crate::workspace::Workspace;
use crate::{commit, disk, exec, golden, snapshot, sys};

/// Threads of a machine's QEMU: virtual CPUs, workers of disk I/O, a few of its own.
const THREADS_MAX: u32 = 256;
/// What is known of a machine before anybody knows whose it will be.
pub struct Ground<'a> {
    /// What it is cloned from.
    pub golden: &'a Golden,
    /// Its cgroup, below each controller's root.
    pub cgroup: &'a str,
    /// Whether it may run without limits.
    pub require_limits: bool,
    /// Its own user, where it has one.
    pub uid: Option<u32>,
    /// The commit that it starts from.
    pub from: Option<&'a From>,
}

impl<'a> Ground<'a> {
    /// Of a machine that was asked for.
    pub fn of(launch: &'a Launch) -> Ground<'a> {
        Ground {
            golden: &launch.golden,
            cgroup: &launch.cgroup,
            require_limits: launch.require_limits,
            uid: qemu::own_uid(launch.instance_id.as_str()),
            from: launch.from.as_ref(),
        }
    }

    /// Of a spare one.
    pub fn of_spare(spare: &'a Spare) -> Ground<'a> {
        Ground {
            golden: &spare.golden,
            cgroup: &spare.cgroup,
            require_limits: spare.require_limits,
            uid: qemu::own_uid(spare.id.as_str()),
            from: None,
        }
    }
}

/// What all phases have.
struct Base {
    shared: Arc<Shared>,
    books: Arc<Books>,
}

/// Nothing runs yet.
pub struct Prepared<'a> {
    base: Base,
    ground: Ground<'a>,
    place: golden::Place,
    golden: snapshot::Snapshot,
    disk: disk::Opened,
    goes_on: bool,
}

/// A twin of all other clones.
pub struct Booted {
    base: Base,
    bed: Bed,
    death: Death,
    qmp: Qmp,
    relay: Relay,
    frozen: watch::Sender<bool>,
    disk: disk::Opened,
    goes_on: bool,
}

/// A machine of its own.
pub struct Identified {
    base: Base,
    bed: Bed,
    launch: Launch,
    log: Arc<Log>,
    death: Death,
    qmp: Qmp,
    relay: Relay,
    frozen: watch::Sender<bool>,
    boot_id: String,
}

/// Makes everything ready. The books say what, before it is made.
pub async fn prepare(
    ground: Ground<'_>,
    disk: disk::Opened,
    shared: Arc<Shared>,
    books: Arc<Books>,
) -> anyhow::Result<Prepared<'_>> {
    shared.stage("golden");
    let memory = ground.from.filter(|from| from.memory && disk.is_new());
    let source = match memory {
        None => golden::Source::Golden(ground.golden.clone()),
        Some(from) => {
            golden::Source::Commit { golden: ground.golden.clone(), dir: from.dir.clone() }
        }
    };
    let place = source.place()?;
    if let Some(from) = ground.from {
        commit::fits(from, memory.is_some(), &place, disk.bytes)?;
    }
    let memory_bytes = qemu::memory_limit(ground.golden.memory);
    let limits = Limits { memory_bytes, pids: THREADS_MAX };
    match Host::detect().make(ground.cgroup, limits) {
        Ok(group) => books.update(|record| record.group = group)?,
        Err(error) if ground.require_limits => {
            return Err(error).context("its limits can't be enforced");
        }
        Err(error) => {
            tracing::warn!(%error, "this machine's limits are not enforced");
            books.update(|record| record.group = Group::default())?;
        }
    }
    let (lease, ready) = golden::obtain(&source, &place).await?;
    books.hold(lease.held);
    let golden = lease.snapshot;
    tracing::info!(key = ready.key, cached = ready.cached, ms = ready.elapsed_ms, "golden");
    let goes_on = memory.is_some();
    Ok(Prepared { base: Base { shared, books }, ground, place, golden, disk, goes_on })
}

impl Prepared<'_> {
    /// Starts the clone. Its process is held at once, whatever comes after.
    pub async fn boot(self) -> anyhow::Result<Booted> {
        let Prepared { base, ground, place, golden, mut disk, goes_on } = self;
        base.shared.stage("clone");
        let parts = Parts {
            memory: golden.memory,
            base: snapshot::open_shared(&ground.golden.base)?,
            disk: disk.file.try_clone()?,
            under: disk.under.as_ref().map(OwnedFd::try_clone).transpose()?,
            kernel: snapshot::open_shared(&ground.golden.kernel)?,
            initrd: None,
            state: Some(golden.state),
        };
        let cgroups = base.books.record().group.doors().context("can't open its cgroups")?;
        let cage = Cage { cgroups, uid: ground.uid, file_size_max: Some(disk.file_max) };
        let clock = ClockRecord { started_ms: monotonic_ms(), ..ClockRecord::default() };
        let program = &ground.golden.qemu;
        let bed = Bed::of(ground.golden, &place, &parts, &cage, disk.bytes)?;
        let vmm = qemu::start(program, place.shape, Birth::Clone, parts, cage)?;
        let death = vmm.child.death();
        let pid = vmm.child.pid().as_raw_nonzero().get();
        base.shared.hold(vmm.child);
        base.shared.net.plug(vmm.net);
        // While QEMU starts, which takes longer.
        disk.begin()?;
        let qmp = Qmp::start(vmm.qmp);
        let (frozen, frozen_seen) = watch::channel(false);
        let relay = Relay::start(vmm.wires, frozen_seen, Arc::clone(&base.shared.broker));
        base.books.update(|record| {
            record.qemu = ProcessName::of(pid);
            record.clock = Some(clock);
        })?;
        let restored = restore(&qmp, vmm.state_fd, Birth::Clone, QMP_DEADLINE);
        alive(death.happened(), restored).await?;
        Ok(Booted { base, bed, death, qmp, relay, frozen, disk, goes_on })
    }
}

/// Lets a QEMU that was not started as a golden one take over what was saved, within a deadline;
/// completes when a clone runs, and when a woken machine is whole.
pub async fn restore(
    qmp: &Qmp,
    state_fd: Option<i32>,
    birth: Birth,
    deadline: Duration,
) -> anyhow::Result<()> {
    let state_fd = state_fd.context("nothing was saved")?;
    let capabilities = json!({"capabilities": [
        {"capability": "x-ignore-shared", "state": birth == Birth::Clone},
        {"capability": "events", "state": true},
    ]});
    // All at once: QEMU reads them in order as soon as it reads at all.
    let sent = [
        qmp.send("qmp_capabilities", Value::Null, None).await?,
        qmp.send("migrate-set-capabilities", capabilities, None).await?,
        qmp.send("migrate-incoming", json!({"uri": format!("fd:{state_fd}")}), None).await?,
    ];
    for command in sent {
        command.answer().await?;
    }
    let mut seen = qmp.seen();
    let whole = |s: &Seen| match birth {
        Birth::Wake => s.migration == "completed",
        _ => s.resumed,
    };
    let done = seen.wait_for(|s| whole(s) || s.closed || s.migration == "failed");
    let end = tokio::time::timeout(deadline, done)
        .await
        .with_context(|| format!("it was not whole within {}s", deadline.as_secs()))??;
    anyhow::ensure!(whole(&end), "QEMU could not take over what was saved");
    Ok(())
}

impl Booted {
    /// Has a spare do what every machine does first. It stays a twin: what it reads and translates
    /// is the same in all, and nothing of it is kept.
    pub async fn warm(mut self) -> anyhow::Result<Booted> {
        self.base.shared.stage("warm");
        let size = json!({"node-name": qemu::DISK_NODE, "size": self.disk.bytes});
        let warm = Warm { disk_bytes: self.disk.bytes };
        let work = async {
            let resize = self.qmp.execute("block_resize", size);
            let (resized, formatted, session) =
                tokio::join!(resize, self.disk.finish(), self.relay.session());
            resized?;
            formatted?;
            let session = session?;
            let _: Value = session.peer.call(method::WARM, &warm, WARM_DEADLINE).await?;
            // It takes no time from anybody while it waits.
            self.frozen.send_replace(true);
            self.qmp.execute("stop", Value::Null).await?;
            anyhow::Ok(())
        };
        alive(self.death.happened(), work).await?;
        self.base.shared.state.send_replace(MachineState::Spare);
        Ok(self)
    }

    /// Waits for what a spare will be.
    pub async fn wait_for(&self, launch: oneshot::Receiver<Box<Launch>>) -> anyhow::Result<Launch> {
        let told = async { launch.await.context("it was not needed any more") };
        alive(self.death.happened(), told).await.map(|launch| *launch)
    }

    /// Makes a spare the machine that is asked for: its disk gets its place, and what it used until
    /// now is nobody's.
    pub async fn claim(&mut self, launch: &Launch) -> anyhow::Result<()> {
        self.base.shared.net.set(&launch.egress);
        self.qmp.execute("cont", Value::Null).await?;
        self.frozen.send_replace(false);
        let before = self.base.books.sample();
        let run_dir = self.base.books.follow(launch.instance_id.as_str())?;
        self.disk.settle(&run_dir.join(run_dir::SPARE_DISK), &launch.disk.path)?;
        let clock = ClockRecord { started_ms: monotonic_ms(), ..ClockRecord::default() };
        self.base.books.update(|record| {
            record.disk = launch.disk.path.clone();
            record.clock = Some(clock);
            record.cpu_before_ns = before.cpu_ns;
        })?;
        self.base.books.restart();
        Ok(())
    }

    /// Gives the clone what no other clone has. Nothing but the harness ran in it until now.
    pub async fn identify(self, launch: Launch) -> anyhow::Result<Identified> {
        let Booted { base, bed, death, qmp, relay, frozen, mut disk, .. } = self;
        base.shared.stage("identify");
        let log = open_log(&launch)?;
        let size = json!({"node-name": qemu::DISK_NODE, "size": disk.bytes});
        let disk_bytes = disk.bytes;
        let work = async {
            let (resized, formatted, session) =
                tokio::join!(qmp.execute("block_resize", size), disk.finish(), relay.session());
            resized?;
            formatted?;
            let session = session?;
            let identify = identity(&launch, disk_bytes)?;
            let identified =
                session.peer.call(method::IDENTIFY, &identify, IDENTIFY_DEADLINE).await?;
            own_boot_id(identified, &launch)
        };
        let boot_id = alive(death.happened(), work).await?;
        Ok(Identified { base, bed, launch, log, death, qmp, relay, frozen, boot_id })
    }
}

/// What no other machine has.
fn identity(launch: &Launch, disk_bytes: u64) -> anyhow::Result<Identify> {
    let mut entropy = [0; 64];
    relay::random(&mut entropy)?;
    let mut machine_id = [0; 16];
    relay::random(&mut machine_id)?;
    // Unicast, and administered by nobody but us.
    let mut mac = [0x02, 0, 0, 0, 0, 0];
    relay::random(&mut mac[1..])?;
    Ok(Identify {
        unix_ns: unix_ns(),
        entropy: STANDARD.encode(entropy),
        hostname: launch.hostname.clone(),
        machine_id: snapshot::hex(&machine_id),
        boot_id: launch.boot_id.clone(),
        disk_bytes,
        mac,
    })
}

/// What is said inside is only told on when it is what we said.
fn own_boot_id(said: IdentifiedAnswer, launch: &Launch) -> anyhow::Result<String> {
    anyhow::ensure!(
        said.boot_id == launch.boot_id,
        "the machine shows another boot id than it was given"
    );
    Ok(said.boot_id)
}

fn open_log(launch: &Launch) -> anyhow::Result<Arc<Log>> {
    let log = Log::open(&launch.log_dir, launch.instance_id.clone());
    log.map(Arc::new).with_context(|| format!("can't open the log in {}", launch.log_dir.display()))
}

impl Identified {
    /// Puts the CPU quota in force and starts the primary process.
    pub async fn run(self) -> anyhow::Result<Running> {
        let Identified { base, bed, launch, log, death, qmp, relay, frozen, boot_id } = self;
        let Base { shared, books } = base;
        shared.stage("run");
        limit_cpu(&books, &launch)?;
        let workspace = lent(&launch, &books, &books.record().disk)?;
        let workspace_mount = mount(&launch);
        let mut run = launch.run;
        run.own.workspace = workspace_mount;
        run.env.insert(guest::ID_ENV.to_owned(), launch.instance_id.to_string());
        let work = async {
            let session = relay.session().await?;
            if let Some(workspace) = workspace {
                tokio::spawn(workspace.serve(relay.clone()));
            }
            let drained = follow(&session, &relay, &log).await?;
            let _: Started = session.peer.call(method::RUN, &run, RPC_DEADLINE).await?;
            anyhow::Ok(drained)
        };
        let drained = alive(death.happened(), work).await?;
        let engine = Engine { qmp: Arc::new(qmp), death };
        let live = Live::new(engine, bed, relay, log, boot_id, frozen, Arc::clone(&books));
        up(shared, books, live, drained, launch.await_port).await
    }
}

impl Booted {
    /// Whether its processes run already, and only stand still.
    pub fn goes_on(&self) -> bool {
        self.goes_on
    }

    /// Gives a machine that came from a commit's memory what no other one has; its processes go on
    /// then.
    pub async fn adopt(self, launch: Launch) -> anyhow::Result<Running> {
        let Booted {
            base: Base { shared, books }, bed, death, qmp, relay, frozen, mut disk, ..
        } = self;
        shared.stage("adopt");
        let log = open_log(&launch)?;
        limit_cpu(&books, &launch)?;
        // Its disk has its name only once nothing can fail any more.
        let workspace = lent(&launch, &books, Path::new(&sys::fd_path(&disk.file)))?;
        let work = async {
            let session = relay.session().await?;
            if let Some(workspace) = workspace {
                tokio::spawn(workspace.serve(relay.clone()));
            }
            let drained = follow(&session, &relay, &log).await?;
            let mut env = launch.run.env.clone();
            env.insert(guest::ID_ENV.to_owned(), launch.instance_id.to_string());
            let adopt = Adopt {
                identity: identity(&launch, disk.bytes)?,
                env,
                own: Own { workspace: mount(&launch), ..launch.run.own.clone() },
            };
            let adopted = session.peer.call(method::ADOPT, &adopt, IDENTIFY_DEADLINE).await?;
            let boot_id = own_boot_id(adopted, &launch)?;
            // From now on its disk and its memory are no longer what the commit holds.
            disk.finish().await?;
            anyhow::Ok((boot_id, drained))
        };
        let (boot_id, drained) = alive(death.happened(), work).await?;
        let engine = Engine { qmp: Arc::new(qmp), death };
        let live = Live::new(engine, bed, relay, log, boot_id, frozen, Arc::clone(&books));
        up(shared, books, live, drained, launch.await_port).await
    }
}

/// Its processes run: it is said to, once the port accepts that is awaited.
async fn up(
    shared: Arc<Shared>,
    books: Arc<Books>,
    live: Live,
    drained: watch::Receiver<bool>,
    await_port: Option<u16>,
) -> anyhow::Result<Running> {
    let live = Arc::new(live);
    if let Some(port) = await_port {
        shared.stage(STAGE_PORT);
        let mut exited = live.relay.exited.clone();
        tokio::select! {
            accepts = alive(live.died(), accepts(&live.relay, port)) => accepts?,
            _ = exited.wait_for(Option::is_some) => {
                return Ok(Running::new(shared, books, live, drained));
            }
        }
    }
    shared.live.send_replace(Some(Arc::clone(&live)));
    tracing::info!(boot_id = live.boot_id, "running");
    shared.state.send_replace(MachineState::Running { boot_id: live.boot_id.clone() });
    Ok(Running::new(shared, books, live, drained))
}

/// The folder that it gets, if it gets one; what it adds counts beside what its disk takes.
fn lent(launch: &Launch, books: &Arc<Books>, disk: &Path) -> anyhow::Result<Option<Workspace>> {
    let Some(lend) = &launch.workspace else { return Ok(None) };
    let disk = File::open(disk).context("its disk")?;
    Ok(Some(Workspace::open(lend, Arc::clone(books), disk, launch.disk.bytes)?))
}

/// What it is told of that.
fn mount(launch: &Launch) -> Option<Mount> {
    launch.workspace.as_ref().map(|lend| Mount { read_only: lend.read_only })
}

/// Puts the CPU quota in force.
fn limit_cpu(books: &Books, launch: &Launch) -> anyhow::Result<()> {
    match books.record().group.set_quota(launch.cpu) {
        Err(error) if launch.require_limits => {
            Err(error).context("its CPU limit can't be enforced")
        }
        Err(error) => {
            tracing::warn!(%error, "this machine's CPU limit is not enforced");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Follows the output of the primary process; what comes back says when all of it is in the log.
async fn follow(
    session: &Session,
    relay: &Relay,
    log: &Arc<Log>,
) -> anyhow::Result<watch::Receiver<bool>> {
    let (tell_drained, drained) = watch::channel(false);
    let logs = relay::open_stream(&session.mux, &StreamHead::Logs, &[]).await?;
    let (log, sessions) = (Arc::clone(log), relay.clone());
    tokio::spawn(async move { exec::primary(logs, sessions, &log, tell_drained).await });
    Ok(drained)
}

/// Works as long as the VMM lives.
pub async fn alive<T, E: Into<anyhow::Error>>(
    death: impl Future<Output = ()>,
    work: impl Future<Output = Result<T, E>>,
) -> anyhow::Result<T> {
    tokio::select! {
        done = work => done.map_err(Into::into),
        () = death => anyhow::bail!("the VMM died"),
    }
}

/// Waits until a port inside accepts, for as long as it takes: who asked for it may give up.
async fn accepts(relay: &Relay, port: u16) -> anyhow::Result<()> {
    let wait = RPC_DEADLINE.saturating_sub(Duration::from_secs(5));
    let timeout_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    loop {
        let session = relay.session().await?;
        let ask = AwaitPort { port, timeout_ms };
        match session.peer.call::<_, Value>(method::AWAIT_PORT, &ask, RPC_DEADLINE).await {
            Ok(_) => return Ok(()),
            Err(CallError::Refused { error, .. }) if error.code == CODE_CONFLICT => {}
            // The relay opens a new session, or gives up.
            Err(CallError::Closed { .. } | CallError::Deadline { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The host's clock, nanoseconds since 1970.
pub fn unix_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}
