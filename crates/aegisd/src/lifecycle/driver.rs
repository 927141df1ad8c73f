//! One instance's task: look, plan, do one step, record, again.

mod care;
mod egress;

use std::sync::Arc;
use std::time::{Duration, Instant};

use aegis_rules::change::Change;
use aegis_rules::instance::{Exit, Fact, Instance, InstanceState, Plan, Seen, Step, Wanted, plan};
use aegis_wire::words::{EgressBytes, InstanceId, Port, Time, Usage};
use aegis_wire::worker::{EndReason, Ended, Event, MachineState, STAGE_PORT};
use tokio::sync::Notify;

use self::egress::Told;
use super::idle::Watch;
use super::link::{Link, News};
use super::note::{self, ACTOR};
use super::pool::Birth;
use super::{Lifecycle, steps};
use crate::ctx::{Ctx, Shared};
use crate::ledger::{Error, WriteError};
use crate::metrics::Boot;

/// A step that fails without a fact is tried again after this.
const RETRY: Duration = Duration::from_millis(500);
/// Usage is written at least this often while it grows, milliseconds.
const USAGE_WRITTEN_EVERY_MS: u64 = 10_000;

/// A driver looks at least this often whether there is something to renew.
const LOOK_EVERY: Duration = Duration::from_secs(600);

/// Drives one instance until it is at rest without a machine.
pub(super) async fn run(lifecycle: Lifecycle, id: InstanceId, knock: Arc<Notify>) {
    let use_of = Watch::new(lifecycle.ctx().now());
    let mut driver = Driver {
        lifecycle,
        id,
        knock,
        link: Link::new(),
        usage_written: Time(0),
        failures: 0,
        birth: None,
        launched: None,
        may_call: false,
        renew_at: None,
        use_of,
        was: Seen::Nothing,
        look_at: None,
        told: Told::default(),
    };
    if let Ok(Some(Instance { guest: Some(guest), .. })) = driver.record() {
        tracing::Span::current().record("guest", tracing::field::display(guest));
    }
    loop {
        match driver.turn().await {
            Ok(Turn::Again) => {}
            Ok(Turn::Done) => {
                driver.leave().await;
                if driver.lifecycle.retire(&driver.id, &driver.knock) {
                    return;
                }
            }
            Err(error) => {
                let chain = anyhow::Error::from(error);
                tracing::error!(error = format!("{chain:#}"), "a turn failed");
                driver.pause(RETRY).await;
            }
        }
    }
}

struct Driver {
    lifecycle: Lifecycle,
    id: InstanceId,
    knock: Arc<Notify>,
    link: Link,
    usage_written: Time,
    /// Steps that failed, one after the other.
    failures: u32,
    /// While its machine is on the way.
    birth: Option<Birth>,
    /// When the launch began that is not known yet to have come to something.
    launched: Option<Instant>,
    /// Whether it was said that this machine may call.
    may_call: bool,
    /// When its token is to be renewed; at once where this daemon did not mint it.
    renew_at: Option<Time>,
    /// Whether it is used.
    use_of: Watch,
    /// What was seen in the last turn.
    was: Seen,
    told: Told,
    /// When to look again whether it is used.
    look_at: Option<Time>,
}

enum Turn {
    Again,
    Done,
}

impl Driver {
    fn ctx(&self) -> &Ctx {
        &self.lifecycle.inner.ctx
    }

    fn record(&self) -> Result<Option<Instance>, Error> {
        self.ctx().ledger.read(|f| f.instance(&self.id))
    }

    async fn turn(&mut self) -> Result<Turn, WriteError> {
        let Some(instance) = self.record()? else {
            self.lifecycle.inner.router.close(&self.id);
            self.ctx().meters.forget(&self.id);
            // Nobody could ask for its logs any more.
            steps::forget(self.ctx(), &self.id);
            return Ok(Turn::Done);
        };
        let ctx = Arc::clone(&self.lifecycle.inner.ctx);
        let seen = self.link.look(&ctx, &self.id).await;
        // What its processes do first takes as long as they want, and nobody waits for it.
        let born =
            matches!(self.link.state(), MachineState::Booting { stage } if stage == STAGE_PORT);
        if seen != Seen::Booting || born {
            self.birth = None;
        }
        self.announce(seen).await;
        if let (Seen::Running, Some(launched)) = (seen, self.launched) {
            let took = launched.elapsed();
            tracing::info!(ms = took.as_millis() as u64, "its machine runs");
            ctx.metrics.boot(Boot::Ran(took));
            self.launched = None;
        }
        if seen == Seen::Running && self.was != Seen::Running {
            self.use_of.wakes(ctx.now());
            // Who goes on against a limit that was passed is told so again.
            self.told.clear();
        }
        self.was = seen;
        self.allow_again().await?;
        self.tell(&instance, seen).await;
        if seen == Seen::Running || seen == Seen::Frozen || seen == Seen::Ended {
            self.catch_up(&instance, seen).await?;
        }
        // Catching up may have changed what is wanted.
        let Some(instance) = self.record()? else { return Ok(Turn::Again) };
        match plan(&instance, seen, ctx.now()) {
            Plan::Do(step) => self.act(&instance, step).await,
            Plan::WaitUntil(then) => {
                self.pause(ctx.clock.until(then)).await;
                Ok(Turn::Again)
            }
            Plan::Lost => {
                let exit = Exit {
                    code: None,
                    message: "the machine was lost: its worker ended without a word".to_owned(),
                    at: ctx.now(),
                };
                self.note(Fact::Ended(exit)).await?;
                Ok(Turn::Again)
            }
            Plan::Rest if !instance.is_live() => {
                if wakes(&instance) {
                    self.open_ports(&instance).await?;
                } else {
                    self.lifecycle.inner.router.close(&self.id);
                }
                ctx.meters.forget(&self.id);
                Ok(Turn::Done)
            }
            Plan::Rest => {
                if seen == Seen::Running {
                    self.renew_token(&instance).await;
                }
                if self.idle(&instance).await? {
                    return Ok(Turn::Again);
                }
                self.wait().await?;
                Ok(Turn::Again)
            }
        }
    }

    /// Records what the worker says and the ledger does not know yet.
    async fn catch_up(&mut self, instance: &Instance, seen: Seen) -> Result<(), WriteError> {
        match (seen, self.link.state().clone()) {
            (Seen::Running, MachineState::Running { boot_id }) => {
                let endpoint = self.open_ports(instance).await?;
                self.note(Fact::Runs { boot_id, endpoint }).await
            }
            (Seen::Frozen, MachineState::Frozen { .. }) => {
                self.open_ports(instance).await?;
                if matches!(instance.wanted, Wanted::Paused | Wanted::Frozen) {
                    self.note(Fact::Froze).await?;
                }
                Ok(())
            }
            (Seen::Ended, _) => match self.link.ended().cloned() {
                Some(ended) => self.note_end(&ended).await,
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    async fn note_end(&mut self, ended: &Ended) -> Result<(), WriteError> {
        self.note(Fact::Final(steps::usage(&ended.usage))).await?;
        self.note(match ended.reason {
            EndReason::BootFailed => Fact::BootFailed { message: ended.message.clone() },
            EndReason::Exited | EndReason::Stopped | EndReason::Crashed => Fact::Ended(Exit {
                code: ended.exit.map(|e| e.code),
                message: ended.message.clone(),
                at: ended.at,
            }),
        })
        .await
    }

    /// Listens on the instance's public ports; chooses and records those that have none yet.
    /// Returns where the first one answers: for a guest, that of its agent.
    async fn open_ports(&self, instance: &Instance) -> Result<Option<String>, WriteError> {
        let router = &self.lifecycle.inner.router;
        router.keep(&self.id, &instance.spec.exposes);
        let mut first = None;
        for expose in &instance.spec.exposes {
            match router.open(&self.lifecycle, &self.id, expose).await {
                Ok(public_port) => {
                    if expose.public_port != Some(public_port) {
                        self.note_port(expose.guest_port, public_port).await?;
                    }
                    if first.is_none() {
                        let host = self.ctx().config.ports_bind;
                        let protocol = expose.protocol.word();
                        first = Some(format!("{protocol}://{host}:{public_port}"));
                    }
                }
                Err(error) => {
                    tracing::error!(port = %expose.guest_port, %error,
                        "a public port could not be opened");
                }
            }
        }
        Ok(first)
    }

    async fn note_port(&self, guest_port: Port, public_port: Port) -> Result<(), WriteError> {
        let id = self.id.clone();
        let change = Change::InstancePort { id, guest_port, public_port };
        self.ctx().ledger.write(ACTOR, move |_| Ok((vec![change], ()))).await
    }

    /// Acts, unless the instance is wanted gone meanwhile; records what came of it.
    async fn act(&mut self, instance: &Instance, step: Step) -> Result<Turn, WriteError> {
        let ctx = Arc::clone(&self.lifecycle.inner.ctx);
        tracing::debug!(?step, "step");
        let knock = Arc::clone(&self.knock);
        let interrupt = wanted_gone(Arc::clone(&ctx), self.id.clone(), knock, instance.wanted);
        match step {
            Step::Launch => {
                let pool = self.lifecycle.pool().clone();
                if instance.egress_allowed != EgressBytes(0) {
                    // Of an earlier boot whose end was not written down: all that it might have
                    // sent counts.
                    self.note(Fact::Cleared { usage: None }).await?;
                    return Ok(Turn::Again);
                }
                let mut birth = pool.birth();
                tokio::select! {
                    () = birth.turn() => self.birth = Some(birth),
                    () = interrupt => return Ok(Turn::Again),
                }
                // The wait may have been long.
                if self.record()?.is_none_or(|now| now.wanted != instance.wanted) {
                    return Ok(Turn::Again);
                }
                // It may send something from its first packet on.
                egress::lease(&ctx, &self.id).await?;
                self.told.clear();
                self.launched = Some(Instant::now());
                let launched = match self.mint(instance).await {
                    Ok(token) => steps::launch(&ctx, &pool, instance, token).await,
                    Err(WriteError::Refused(refusal)) => {
                        Err(super::WorkerError::Program(refusal.message))
                    }
                    Err(error) => return Err(error),
                };
                match launched {
                    Ok(connection) => self.link.launched(connection),
                    Err(error) => {
                        let message = format!("{:#}", anyhow::Error::from(error));
                        if !ctx.run_dir(&self.id).exists() {
                            // No gateway ever was: nothing was sent.
                            self.note(Fact::Final(Usage::default())).await?;
                        }
                        self.note(Fact::BootFailed { message }).await?;
                    }
                }
            }
            Step::Freeze => {
                let done = tokio::select! {
                    done = steps::freeze(&ctx, instance) => done,
                    () = interrupt => return Ok(Turn::Again),
                };
                // What the watch said last is of before: look anew.
                self.link.clear();
                self.settle(step, done.map(|()| Fact::Froze)).await?;
            }
            Step::Thaw => {
                let done = tokio::select! {
                    done = steps::thaw(&ctx, instance) => done,
                    () = interrupt => return Ok(Turn::Again),
                };
                if let Err(error) = done {
                    self.failed(step, &error).await;
                } else {
                    self.failures = 0;
                    // The worker says `running` on the watch; look there before planning again.
                    self.link.clear();
                }
            }
            Step::Shutdown => {
                let suspended =
                    matches!(self.link.state(), MachineState::Frozen { suspended: true, .. });
                let done = tokio::select! {
                    done = steps::shutdown(&ctx, instance, suspended) => done,
                    () = interrupt => return Ok(Turn::Again),
                };
                if let Err(error) = done {
                    // By force, then: what is left without a worker is cleared.
                    tracing::warn!(%error, "no orderly end");
                    let cleared = steps::clear(&ctx, instance).await;
                    self.link.clear();
                    self.settle(step, cleared).await?;
                } else {
                    self.link.clear();
                }
            }
            Step::Clear => {
                let cleared = steps::clear(&ctx, instance).await;
                self.link.clear();
                self.settle(step, cleared).await?;
            }
            Step::Destroy => {
                self.lifecycle.inner.router.close(&self.id);
                let destroyed = steps::destroy(&ctx, instance).await;
                self.link.clear();
                let unproven = matches!(&destroyed, Ok(Fact::Destroyed { remaining, .. }) if !remaining.is_empty());
                self.settle(step, destroyed).await?;
                if unproven {
                    self.pause(RETRY).await;
                }
            }
        }
        Ok(Turn::Again)
    }

    async fn settle(
        &mut self,
        step: Step,
        done: Result<Fact, super::WorkerError>,
    ) -> Result<(), WriteError> {
        match done {
            Ok(fact) => {
                self.failures = 0;
                self.note(fact).await
            }
            Err(error) => {
                self.failed(step, &error).await;
                Ok(())
            }
        }
    }

    async fn failed(&mut self, step: Step, error: &super::WorkerError) {
        tracing::warn!(?step, %error, "a step failed; it is tried again");
        // Whatever was known of the machine is to be looked at again.
        self.link.clear();
        // A machine that can't be woken is not asked twice a second for ever.
        let again = if step == Step::Destroy { 0 } else { self.failures.min(7) };
        self.failures = self.failures.saturating_add(1);
        let pause = RETRY.saturating_mul(1 << again);
        self.pause(pause).await;
    }

    /// Waits for a knock or the worker's next word, and records the word.
    async fn wait(&mut self) -> Result<(), WriteError> {
        // A machine that stands still takes no token: nothing is due there before it wakes.
        let renew_at = self.renew_at.filter(|_| self.was == Seen::Running);
        let next = [renew_at, self.look_at, self.told.again_at].into_iter().flatten().min();
        let look = next.map_or(LOOK_EVERY, |at| self.ctx().clock.until(at).min(LOOK_EVERY));
        let news = tokio::select! {
            () = self.knock.notified() => {
                self.told.stale();
                return Ok(());
            }
            () = tokio::time::sleep(look) => return Ok(()),
            news = self.link.news() => news,
        };
        match news {
            News::Event(Event::Usage(sample)) => {
                let usage = steps::usage(&sample);
                self.ctx().meters.note(&self.id, usage);
                self.use_of.sample(&self.lifecycle, &self.id, &sample);
                let now = self.ctx().now();
                if now.since(self.usage_written).0 >= USAGE_WRITTEN_EVERY_MS
                    || self.passes_limit()?
                {
                    self.usage_written = now;
                    self.note(Fact::Used(usage)).await?;
                }
                Ok(())
            }
            News::Event(Event::Egress(news)) => self.hear(news).await,
            // The next turn catches up with it.
            News::Event(Event::State(_)) | News::Lost => {
                self.told.stale();
                Ok(())
            }
        }
    }

    /// Whether the live sample passes a limit that was not noted yet.
    fn passes_limit(&self) -> Result<bool, Error> {
        let live = self.ctx().meters.get(&self.id);
        let now = self.ctx().now();
        self.ctx().ledger.read(|f| {
            let Some(instance) = f.instance(&self.id)? else { return Ok(false) };
            let Some(guest) = f.guest_of(&instance)? else { return Ok(false) };
            let mut family = f.family(&instance.tree)?;
            let own = family.iter_mut().filter(|i| i.id == self.id);
            own.for_each(|i| i.usage_boot = i.usage_boot.at_least(live));
            let total = guest.usage(&family);
            let passed = total.violations(&guest.limits, now.since(guest.created_at));
            Ok(!guest.limits_exceeded && !passed.is_empty())
        })
    }

    async fn pause(&mut self, most: Duration) {
        // A knock ends the wait: a wish may have changed.
        self.told.stale();
        let _ = tokio::time::timeout(most, self.knock.notified()).await;
    }

    /// Records a fact: what it changes is for the rules. Others that it has wishes for are told.
    async fn note(&mut self, fact: Fact) -> Result<(), WriteError> {
        if matches!(fact, Fact::BootFailed { .. }) && self.launched.take().is_some() {
            self.ctx().metrics.boot(Boot::Failed);
        }
        note::note(&self.lifecycle, &self.id, Some(fact), |_, _, _| Ok(vec![])).await
    }
}

/// Whether a connection to a stopped instance's port starts it again: then the port stays open. The
/// machine of a guest ends with its guest.
fn wakes(instance: &Instance) -> bool {
    let of_guest = instance.guest.is_some() && instance.parent.is_none();
    instance.enabled && instance.state == InstanceState::Stopped && !of_guest
}

/// Completes when the instance is wanted gone; knocks that mean something else wait for the step.
pub(super) async fn wanted_gone(ctx: Shared, id: InstanceId, knock: Arc<Notify>, was: Wanted) {
    let mut commits = ctx.ledger.commits();
    while was != Wanted::Gone && commits.changed().await.is_ok() {
        let now = ctx.ledger.read(|f| f.instance(&id));
        if matches!(now, Ok(Some(i)) if i.wanted == Wanted::Gone) {
            // The knock that came with it is looked at in the next turn.
            knock.notify_one();
            return;
        }
    }
    std::future::pending().await
}
