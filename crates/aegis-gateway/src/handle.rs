//! The gateway as its owner sees it.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aegis_wire::egress::Policy;
use tokio::sync::{mpsc, oneshot};

use crate::budgets::Budgets;
use crate::engine::{self, Engine};
use crate::meter::{Counters, Counts};
use crate::news::{News, Teller};

/// What a gateway needs to begin.
#[derive(Debug)]
pub struct Config {
    /// The hatch's socket of this machine.
    pub door: PathBuf,
    /// Who is asked for names, in this order; nobody: names fail.
    pub resolvers: Vec<SocketAddr>,
    /// What the machine may make the gateway hold.
    pub budgets: Budgets,
    /// Where the number of bytes sent is written (eight bytes, low end first, at the beginning)
    /// before they leave: it outlives this process.
    pub book: Option<File>,
}

/// Hosts that are reached through the hatch, which puts secrets into requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ViaHatch {
    /// By plain HTTP, at port 80.
    pub http: Vec<String>,
    /// By TLS, at port 443, where a hello asks for one of them at an address that it led to. What asks
    /// for another there goes straight on.
    pub https: Vec<String>,
}

/// A running gateway: one thread. It ends when the last handle is dropped.
#[derive(Clone)]
pub struct Gateway(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    waker: mio::Waker,
    news: Mutex<Option<mpsc::Receiver<News>>>,
}

/// What the owner's threads and the gateway's have in common.
#[derive(Default)]
pub(crate) struct Shared {
    wanted: Mutex<Wanted>,
    /// Something is wanted.
    pending: AtomicBool,
    pub counters: Arc<Counters>,
}

/// What is to become true. Levels, not a queue: what is set twice before it is looked at holds in
/// its last form.
#[derive(Default)]
pub(crate) struct Wanted {
    pub end: bool,
    pub cut: bool,
    pub policy: Option<(Policy, ViaHatch)>,
    pub allowance: Option<(u64, bool)>,
    /// Answered with what was sent; nothing more is until an allowance comes that was set later.
    pub trim: Vec<oneshot::Sender<u64>>,
    pub resolvers: Option<Vec<SocketAddr>>,
    pub door: Option<PathBuf>,
    pub link: Option<Link>,
}

pub(crate) enum Link {
    Plugged(OwnedFd),
    Unplugged,
}

impl Shared {
    /// Takes what is to become true, if there is anything.
    pub fn take(&self) -> Option<Wanted> {
        let pending = self.pending.load(Ordering::Acquire);
        pending.then(|| {
            let mut wanted = self.lock();
            self.pending.store(false, Ordering::Release);
            std::mem::take(&mut *wanted)
        })
    }

    fn lock(&self) -> MutexGuard<'_, Wanted> {
        // Nothing that holds it can panic half-way.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gateway {
    /// Starts a gateway on a thread of its own: policy closed, nothing plugged, nothing allowed.
    /// Raises this process's limit of descriptors, as far as it can, to what the budgets need; where
    /// that is not enough there are fewer flows.
    ///
    /// # Errors
    /// Of the kernel: no descriptors or threads left.
    pub fn start(mut config: Config) -> io::Result<Gateway> {
        config.budgets = config.budgets.within_descriptors();
        let poll = mio::Poll::new()?;
        let waker = mio::Waker::new(poll.registry(), engine::OWNER)?;
        let (teller, news) = Teller::new();
        let shared = Arc::new(Shared::default());
        let engine = Engine::new(config, poll, shared.clone(), teller);
        std::thread::Builder::new().name("gateway".to_owned()).spawn(move || {
            let run = AssertUnwindSafe(|| engine.run());
            // What it held is closed then: the machine has no network, and nobody else is hurt.
            if std::panic::catch_unwind(run).is_err() {
                tracing::error!("the gateway failed");
            }
        })?;
        Ok(Gateway(Arc::new(Handle { shared, waker, news: Mutex::new(Some(news)) })))
    }

    /// Takes a connected unix stream socket of a machine's network card. It replaces an earlier
    /// one, whose flows are dropped.
    pub fn plug(&self, link: OwnedFd) {
        self.want(|wanted| wanted.link = Some(Link::Plugged(link)));
    }

    /// Drops the link and all flows: the machine is suspended.
    pub fn unplug(&self) {
        self.want(|wanted| wanted.link = Some(Link::Unplugged));
    }

    /// What the machine may reach from now on; flows that it may not have any more are reset. What goes
    /// to the hosts in `via_hatch` goes through the hatch.
    ///
    /// A policy is in force for every frame that is sent after this returned; one that is set before
    /// a link is plugged, before its first frame.
    pub fn set_policy(&self, policy: Policy, via_hatch: ViaHatch) {
        self.want(|wanted| wanted.policy = Some((policy, via_hatch)));
    }

    /// Payload bytes to outside that may have been sent in all, since the start. With `last` no
    /// more will come: at that byte all flows to outside are reset, and new ones refused. Without,
    /// they wait.
    pub fn set_allowance(&self, ceiling: u64, last: bool) {
        self.want(|wanted| wanted.allowance = Some((ceiling, last)));
    }

    /// Takes back what may be sent and was not; returns what was sent since the start. `None` when the
    /// gateway has ended.
    pub async fn trim(&self) -> Option<u64> {
        let (answer, answered) = oneshot::channel();
        self.want(|wanted| {
            wanted.allowance = None;
            wanted.trim.push(answer);
        });
        answered.await.ok()
    }

    /// Who is asked for names from now on, in this order.
    pub fn set_resolvers(&self, resolvers: Vec<SocketAddr>) {
        self.want(|wanted| wanted.resolvers = Some(resolvers));
    }

    /// The hatch's socket is now there.
    pub fn set_door(&self, door: PathBuf) {
        self.want(|wanted| wanted.door = Some(door));
    }

    /// Resets every flow and lets nothing new through, for good.
    pub fn cut(&self) {
        self.want(|wanted| wanted.cut = true);
    }

    /// What was counted up to now; takes no lock.
    pub fn counts(&self) -> Counts {
        self.0.shared.counters.read()
    }

    /// What the gateway tells; `None` if it was taken before. The channel is bounded, and news that
    /// find no room are dropped. It ends with the gateway's thread.
    pub fn news(&self) -> Option<mpsc::Receiver<News>> {
        self.0.news.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn want(&self, change: impl FnOnce(&mut Wanted)) {
        self.0.want(change);
    }
}

impl Handle {
    fn want(&self, change: impl FnOnce(&mut Wanted)) {
        {
            let mut wanted = self.shared.lock();
            change(&mut wanted);
            self.shared.pending.store(true, Ordering::Release);
        }
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "the gateway can't be woken");
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.want(|wanted| wanted.end = true);
    }
}
