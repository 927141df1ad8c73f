//! A machine's life from its birth to its burial, in a worker that has one.

use std::sync::Arc;
use std::time::Instant;

use aegis_wire::bounds::WORKER_GENERATION;
use aegis_wire::worker::{Disk, EndReason, Ended, Launch, MachineState, Spare, commit, run_dir};
use tokio::sync::oneshot;

use crate::cgroup::Host;
use crate::life::{Books, DEATH_DEADLINE, Shared};
use crate::machine::{self, Ground};
use crate::net::Net;
use crate::run_dir::{ProcessName, Record, RunDir};
use crate::running::{End, Running};
use crate::{disk, logs, snapshot};

/// Longest reason of an end, bytes.
const MESSAGE_MAX: usize = 2048;

/// How a machine begins.
pub enum Birth {
    /// Somebody's.
    Launch(Box<Launch>),
    /// Nobody's, until its launch comes.
    Spare(Box<Spare>, oneshot::Receiver<Box<Launch>>),
}

/// Writes down what is about to be made.
pub fn open_books(birth: &Birth, run_dir: RunDir, net: Arc<Net>) -> anyhow::Result<Arc<Books>> {
    let (generation, cgroup, golden, disk) = match birth {
        Birth::Launch(l) => (l.generation, &l.cgroup, &l.golden, l.disk.path.clone()),
        Birth::Spare(s, _) => {
            (s.generation, &s.cgroup, &s.golden, run_dir.path().join(run_dir::SPARE_DISK))
        }
    };
    anyhow::ensure!(
        generation == WORKER_GENERATION,
        "aegisd speaks generation {generation} of the worker protocol, this worker {WORKER_GENERATION}",
    );
    let record = Record {
        worker: ProcessName::of(rustix::process::getpid().as_raw_nonzero().get()),
        group: Host::detect().places(cgroup)?,
        qemu: None,
        disk,
        memory_bytes: golden.memory.bytes(),
        clock: None,
        cpu_before_ns: 0,
    };
    Ok(Arc::new(Books::open(run_dir, record, net)?))
}

/// Boots what is launched, and identifies and runs it.
async fn bear(launch: Launch, shared: Arc<Shared>, books: Arc<Books>) -> anyhow::Result<Running> {
    let ground = Ground::of(&launch);
    shared.net.set(&launch.egress);
    let under = launch.from.as_ref().map(|from| from.dir.join(commit::DISK));
    let disk = disk::open(&launch.disk, under.as_deref(), ground.uid)?;
    let booted = machine::prepare(ground, disk, shared, books).await?.boot().await?;
    // From memory a machine goes on once; what its disk was after that is in no commit.
    if booted.goes_on() {
        booted.adopt(launch).await
    } else {
        booted.identify(launch).await?.run().await
    }
}

/// Boots a spare, waits for its launch, and goes on with it.
async fn bear_spare(
    spare: Spare,
    launch: oneshot::Receiver<Box<Launch>>,
    shared: Arc<Shared>,
    books: Arc<Books>,
) -> anyhow::Result<Running> {
    let ground = Ground::of_spare(&spare);
    let disk = Disk { path: books.record().disk, bytes: spare.disk_bytes };
    let disk = disk::open(&disk, None, ground.uid)?;
    let booted = machine::prepare(ground, disk, shared, books).await?.boot().await?;
    let mut booted = booted.warm().await?;
    let launch = booted.wait_for(launch).await?;
    let same = launch.golden == spare.golden && launch.disk.bytes == spare.disk_bytes;
    anyhow::ensure!(same, "a spare of another kind was launched");
    booted.claim(&launch).await?;
    booted.identify(launch).await?.run().await
}

/// The machine's whole life.
pub async fn live(birth: Birth, shared: &Arc<Shared>, books: Arc<Books>) -> End {
    let mut stop = shared.stop.subscribe();
    let birth = async {
        let shared = Arc::clone(shared);
        match birth {
            Birth::Launch(launch) => bear(*launch, shared, books).await,
            Birth::Spare(spare, launch) => bear_spare(*spare, launch, shared, books).await,
        }
    };
    let born: Option<anyhow::Result<Running>> = tokio::select! {
        biased;
        _ = stop.wait_for(Option::is_some) => None,
        born = birth => Some(born),
    };
    match born {
        None => End {
            reason: EndReason::Stopped,
            exit: None,
            message: "the host stopped it before it ran".to_owned(),
        },
        Some(Ok(running)) => running.until_end().await,
        Some(Err(error)) => {
            boot_failed(format!("{:#}", snapshot::with_last_words(error, &shared.last_words())))
        }
    }
}

/// The end of a machine that never came up.
pub fn boot_failed(message: String) -> End {
    End { reason: EndReason::BootFailed, exit: None, message }
}

/// Destroys what is left, writes down how it ended, and tells.
pub async fn bury(end: End, shared: &Shared, books: Option<Arc<Books>>) {
    let End { reason, exit, mut message } = end;
    shared.net.cut();
    let mut usage = books.as_ref().map(|b| b.sample()).unwrap_or_default();
    let words = shared.kill().await;
    if reason == EndReason::Crashed && !words.is_empty() {
        message = format!("{message}; QEMU said: {words}");
    }
    if let Some(books) = &books {
        // All of its CPU time is counted only now.
        usage = books.sample();
    }
    message.truncate(message.floor_char_boundary(MESSAGE_MAX));
    tracing::info!(?reason, message, "the machine ended");
    let ended = Ended { reason, exit, message, at: logs::now(), usage };
    if let Some(books) = &books {
        if let Err(error) = books.close(&ended) {
            tracing::error!(error = format!("{error:#}"), "the end is not written down");
        }
        let group = books.record().group;
        group.kill(Instant::now() + DEATH_DEADLINE);
        group.remove(Instant::now() + DEATH_DEADLINE);
    }
    shared.live.send_replace(None);
    shared.usage.send_replace(usage);
    shared.state.send_replace(MachineState::Ended(ended));
}
