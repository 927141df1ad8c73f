//! One task per instance whose machine is in the cloud: look, plan, do one step, record, again.
//!
//! A create that is under way is not broken off, not even by a kill: its answer says what there is to
//! end, and comes within the deadline. Everything else gives way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aegis_rules::change::Change;
use aegis_rules::instance::{Exit, Fact, Instance, InstanceState, Plan, Seen, Step, Wanted, plan};
use aegis_rules::kill::MUST_VERIFY_ELSEWHERE;
use aegis_rules::remote::{self, By};
use aegis_vers::{Created, Failure};
use aegis_wire::vers::{Vm, VmState, WrittenState};
use aegis_wire::words::{InstanceId, Time, Uuid};
use tokio::sync::Notify;

use super::super::driver::wanted_gone;
use super::super::{Lifecycle, note};
use super::look::{self, Blind, Settled};
use crate::cloud::Cloud;
use crate::ctx::{Ctx, Shared};
use crate::ledger::{Error, WriteError};

/// What failed is tried again after this, and then ever more slowly.
const RETRY: Duration = Duration::from_millis(500);
/// A machine that boots is looked at this often (contracts/vers.md 3).
const BOOT_POLL: Duration = Duration::from_secs(2);
/// Who has no account any more is looked at this often.
const NO_ACCOUNT: Duration = Duration::from_secs(60);

/// Drives one instance until it is at rest without a machine.
pub(in super::super) async fn run(lifecycle: Lifecycle, id: InstanceId, knock: Arc<Notify>) {
    let mut driver =
        Driver { lifecycle, id, knock, failures: 0, not_before: None, boots_since: None };
    loop {
        match driver.turn().await {
            Ok(Turn::Again) => {}
            Ok(Turn::Done) => {
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
    /// Looks and steps that failed, one after the other.
    failures: u32,
    /// The cloud asked not to be asked for a machine before.
    not_before: Option<Time>,
    /// Since when it is seen to boot.
    boots_since: Option<Instant>,
}

enum Turn {
    Again,
    Done,
}

/// A machine as it was just seen.
struct Sight {
    seen: Seen,
    vm: Option<Vm>,
}

impl Driver {
    fn ctx(&self) -> &Ctx {
        self.lifecycle.ctx()
    }

    fn shared(&self) -> Shared {
        Arc::clone(&self.lifecycle.inner.ctx)
    }

    fn record(&self) -> Result<Option<Instance>, Error> {
        self.ctx().ledger.read(|f| f.instance(&self.id))
    }

    async fn turn(&mut self) -> Result<Turn, WriteError> {
        let Some(instance) = self.record()? else { return Ok(Turn::Done) };
        let shared = self.shared();
        let Some(cloud) = &shared.cloud else {
            if !instance.is_live() {
                return Ok(Turn::Done);
            }
            tracing::error!("its machine is in the vers cloud, and no key is set for that");
            self.pause(NO_ACCOUNT).await;
            return Ok(Turn::Again);
        };
        let interrupt = self.killed(&instance);
        let sight = tokio::select! {
            sight = look(cloud, &instance) => sight,
            () = interrupt => return Ok(Turn::Again),
        };
        let sight = match sight {
            Ok(sight) => sight,
            Err(failure) => {
                self.failed("look", &failure).await?;
                return Ok(Turn::Again);
            }
        };
        if sight.seen != Seen::Booting {
            self.boots_since = None;
        }
        self.catch_up(cloud, &instance, &sight).await?;
        let Some(instance) = self.record()? else { return Ok(Turn::Again) };
        match plan(&instance, sight.seen, self.ctx().now()) {
            Plan::Do(step) => self.act(cloud, &instance, step).await?,
            Plan::WaitUntil(then) => self.pause(self.ctx().clock.until(then)).await,
            Plan::Lost => {
                let message = "its machine is gone: the vers cloud does not list it any more";
                self.note(Some(self.ended(message))).await?;
            }
            Plan::Rest if !instance.is_live() => return Ok(Turn::Done),
            Plan::Rest => self.rest(cloud, &instance, &sight).await?,
        }
        Ok(Turn::Again)
    }

    /// Records what the cloud says and the ledger does not know yet.
    async fn catch_up(
        &mut self,
        cloud: &Cloud,
        instance: &Instance,
        sight: &Sight,
    ) -> Result<(), WriteError> {
        match (sight.seen, &sight.vm) {
            (Seen::Running, Some(vm)) => {
                self.label(cloud, instance, vm).await;
                let endpoint = Some(cloud.domain.endpoint(&vm.vm_id));
                self.note(Some(Fact::Runs { boot_id: vm.vm_id.to_string(), endpoint })).await
            }
            (Seen::Frozen, _) if matches!(instance.wanted, Wanted::Paused | Wanted::Frozen) => {
                self.note(Some(Fact::Froze)).await
            }
            (Seen::Ended, _) if instance.state != InstanceState::Starting => {
                self.note(Some(self.ended("its machine died: the vers cloud says dead"))).await
            }
            _ => Ok(()),
        }
    }

    fn ended(&self, message: &str) -> Fact {
        Fact::Ended(Exit { code: None, message: message.to_owned(), at: self.ctx().now() })
    }

    /// Nothing is to be done: waits for a knock, or for the next look.
    async fn rest(
        &mut self,
        cloud: &Cloud,
        instance: &Instance,
        sight: &Sight,
    ) -> Result<(), WriteError> {
        self.failures = 0;
        if sight.seen != Seen::Booting {
            self.pause(cloud.terms.poll).await;
            return Ok(());
        }
        if let Some(vm) = &sight.vm {
            self.label(cloud, instance, vm).await;
        }
        if self.boots_since.get_or_insert_with(Instant::now).elapsed() < cloud.terms.boot {
            self.pause(BOOT_POLL.min(cloud.terms.poll)).await;
            return Ok(());
        }
        let message = format!("its machine did not boot within {} s", cloud.terms.boot.as_secs());
        self.give_up(cloud, instance, message).await
    }

    async fn act(
        &mut self,
        cloud: &Cloud,
        instance: &Instance,
        step: Step,
    ) -> Result<(), WriteError> {
        tracing::debug!(?step, "step");
        match step {
            Step::Launch => self.launch(cloud, instance).await,
            Step::Freeze => self.set_state(cloud, instance, WrittenState::Paused).await,
            Step::Thaw => self.set_state(cloud, instance, WrittenState::Running).await,
            Step::Clear if is_coming_up(instance) && has_vm(instance) => {
                let message = "its machine ended before it ran".to_owned();
                self.give_up(cloud, instance, message).await
            }
            Step::Shutdown | Step::Clear => match self.end(cloud, instance).await? {
                Ended::Proven => self.close(Fact::Cleared { usage: None }).await,
                Ended::Not(why) => self.failed("end", &why).await,
            },
            Step::Destroy => self.destroy(cloud, instance).await,
        }
    }

    /// Has a machine made: the intent is written before, the claim after.
    async fn launch(&mut self, cloud: &Cloud, instance: &Instance) -> Result<(), WriteError> {
        if let Some(at) = self.not_before.take_if(|at| *at > self.lifecycle.ctx().now()) {
            self.pause(self.ctx().clock.until(at)).await;
            self.not_before = Some(at);
            return Ok(());
        }
        let Some(golden) = remote::golden(instance) else {
            let message = "its commit has no id of the vers cloud".to_owned();
            return self.note(Some(Fact::BootFailed { message })).await;
        };
        let under_way = cloud.fence.read().await;
        if !self.intend().await? {
            return Ok(());
        }
        match cloud.client.from_commit(&golden).await {
            Created::Made(vm) => {
                look::claim(&self.lifecycle, instance, vm.clone(), By::Answer).await?;
                drop(under_way);
                let none = BTreeMap::new();
                if let Err(failure) = cloud.client.label(&vm, cloud.labels(instance, &none)).await {
                    tracing::warn!(%failure, "it has no label yet");
                }
                self.failures = 0;
                Ok(())
            }
            Created::Refused(failure) => {
                self.not_before = failure.after().map(|after| self.later(after));
                self.close(Fact::BootFailed { message: failure.to_string() }).await
            }
            Created::Unclear(failure) => {
                tracing::warn!(%failure, "a create without a clear answer");
                let message = format!("{failure}; whether it made a machine is being looked for");
                self.note(Some(Fact::BootFailed { message })).await
            }
        }
    }

    fn later(&self, after: Duration) -> Time {
        let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        self.ctx().now().plus(aegis_wire::words::DurationMs(millis))
    }

    /// Writes the intent, unless nobody wants a machine any more.
    async fn intend(&self) -> Result<bool, WriteError> {
        let (id, now) = (self.id.clone(), self.ctx().now());
        let write = self.ctx().ledger.write(note::ACTOR, move |facts| {
            let found = facts.instance(&id)?.filter(|i| !i.is_ending());
            let intent = found.and_then(|instance| remote::intend(&instance, now));
            let begun = intent.is_some();
            Ok((intent.into_iter().collect(), begun))
        });
        write.await
    }

    /// Sees to it that a machine bears our labels.
    async fn label(&self, cloud: &Cloud, instance: &Instance, vm: &Vm) {
        let wanted = cloud.labels(instance, &vm.labels);
        if wanted != vm.labels
            && let Err(failure) = cloud.client.label(&vm.vm_id, wanted).await
        {
            tracing::warn!(%failure, "it has no label yet");
        }
    }

    async fn set_state(
        &mut self,
        cloud: &Cloud,
        instance: &Instance,
        state: WrittenState,
    ) -> Result<(), WriteError> {
        let Some(vm) = vm_of(instance) else { return Ok(()) };
        let interrupt = self.killed(instance);
        let done = tokio::select! {
            done = cloud.client.set_state(vm, state) => done,
            () = interrupt => return Ok(()),
        };
        match done {
            Ok(()) => self.failures = 0,
            Err(failure) => return self.failed("set the state", &failure).await,
        }
        // What it says of itself counts; it may take a moment.
        self.pause(RETRY).await;
        Ok(())
    }

    /// A machine that never ran is ended, and another is asked for later.
    async fn give_up(
        &mut self,
        cloud: &Cloud,
        instance: &Instance,
        message: String,
    ) -> Result<(), WriteError> {
        match self.end(cloud, instance).await? {
            Ended::Proven => {
                self.boots_since = None;
                self.close(Fact::Cleared { usage: None }).await?;
                self.note(Some(Fact::BootFailed { message })).await
            }
            Ended::Not(why) => self.failed("end", &why).await,
        }
    }

    async fn destroy(&mut self, cloud: &Cloud, instance: &Instance) -> Result<(), WriteError> {
        let remaining = match self.end(cloud, instance).await? {
            Ended::Proven => {
                let verified = MUST_VERIFY_ELSEWHERE.map(str::to_owned).to_vec();
                return self.close(destroyed(verified, vec![])).await;
            }
            Ended::Not(why) => vec![why.to_string()],
        };
        self.note(Some(destroyed(vec![], remaining))).await?;
        let pause = RETRY.saturating_mul(1 << self.failures.min(2));
        self.failures = self.failures.saturating_add(1);
        self.pause(pause).await;
        Ok(())
    }

    /// Ends what the cloud has of this instance, and proves it.
    async fn end(&mut self, cloud: &Cloud, instance: &Instance) -> Result<Ended, WriteError> {
        let mut instance = instance.clone();
        if instance.remote.as_ref().is_some_and(|r| r.intended_at.is_some()) {
            match look::settle(&self.lifecycle, cloud, &instance).await {
                Ok(Settled::Wait(until)) => {
                    let left = self.ctx().clock.until(until).min(BOOT_POLL);
                    // A kill says first that it can't be proven yet.
                    if instance.wanted != Wanted::Gone {
                        self.pause(left).await;
                    }
                    return Ok(Ended::Not(Why::Unsettled(until)));
                }
                Ok(Settled::Claimed | Settled::Absent) => {}
                Err(Blind::Cloud(failure)) => return Ok(Ended::Not(Why::Cloud(failure))),
                Err(Blind::Ledger(error)) => return Err(error),
            }
            let Some(settled) = self.record()? else { return Ok(Ended::Proven) };
            // Somebody wants it still: then what was found is its machine.
            if has_vm(&settled) && !settled.is_ending() {
                return Ok(Ended::Not(Why::Found));
            }
            instance = settled;
        }
        match look::remove(cloud, &instance, vm_of(&instance)).await {
            Ok(left) if left.is_empty() => Ok(Ended::Proven),
            Ok(left) => Ok(Ended::Not(Why::Listed(left))),
            Err(failure) => Ok(Ended::Not(Why::Cloud(failure))),
        }
    }

    /// Something failed: says so, also to the guest that waits for its machine, and pauses.
    async fn failed(
        &mut self,
        what: &str,
        why: &(impl std::fmt::Display + AsksForTime),
    ) -> Result<(), WriteError> {
        if !why.is_a_fault() {
            return Ok(());
        }
        tracing::warn!(what, %why, "tried again");
        let message = why.to_string();
        self.note_with(None, move |facts, instance, now| {
            let guest = facts.guest_of(instance)?;
            // Said once, not at every try.
            let news = guest.filter(|g| {
                instance.state == InstanceState::Starting
                    && g.status_at(now).is_live()
                    && g.provision_error.as_deref() != Some(message.as_str())
            });
            Ok(news
                .map(|g| Change::ProvisionFailed { id: g.id, reason: message, at: now })
                .into_iter()
                .collect())
        })
        .await?;
        let usual = RETRY.saturating_mul(1 << self.failures.min(6));
        self.failures = self.failures.saturating_add(1);
        self.pause(why.asks_for().unwrap_or(usual).max(usual)).await;
        Ok(())
    }

    async fn pause(&self, most: Duration) {
        // A knock ends the wait: a wish may have changed.
        let _ = tokio::time::timeout(most, self.knock.notified()).await;
    }

    fn killed(&self, instance: &Instance) -> impl Future<Output = ()> + use<> {
        let knock = Arc::clone(&self.knock);
        wanted_gone(self.shared(), self.id.clone(), knock, instance.wanted)
    }

    async fn note(&self, fact: Option<Fact>) -> Result<(), WriteError> {
        self.note_with(fact, |_, _, _| Ok(vec![])).await
    }

    /// Records a fact, and with it that there is no machine.
    async fn close(&self, fact: Fact) -> Result<(), WriteError> {
        self.note_with(Some(fact), |_, instance, now| {
            Ok(remote::absent(instance, false, now).into_iter().collect())
        })
        .await
    }

    async fn note_with(
        &self,
        fact: Option<Fact>,
        also: impl FnOnce(&crate::ledger::Facts<'_>, &Instance, Time) -> Result<Vec<Change>, Error>
        + Send
        + 'static,
    ) -> Result<(), WriteError> {
        note::note(&self.lifecycle, &self.id, fact, also).await
    }
}

/// Whether an end is proven.
enum Ended {
    Proven,
    Not(Why),
}

/// Why an end is not proven.
#[derive(Debug, thiserror::Error)]
enum Why {
    #[error(transparent)]
    Cloud(Failure),
    #[error("the vers cloud still lists {}", .0.iter().map(Uuid::as_str).collect::<Vec<_>>().join(", "))]
    Listed(Vec<Uuid>),
    #[error("a create that the vers cloud did not answer may make a machine until {0}")]
    Unsettled(Time),
    #[error("its machine was found")]
    Found,
}

/// What the other side asks for where it fails.
trait AsksForTime {
    fn asks_for(&self) -> Option<Duration>;
    fn is_a_fault(&self) -> bool;
}

impl AsksForTime for Failure {
    fn asks_for(&self) -> Option<Duration> {
        self.after()
    }
    fn is_a_fault(&self) -> bool {
        true
    }
}

impl AsksForTime for Why {
    fn asks_for(&self) -> Option<Duration> {
        match self {
            Why::Cloud(failure) => failure.after(),
            _ => None,
        }
    }
    fn is_a_fault(&self) -> bool {
        matches!(self, Why::Cloud(_) | Why::Listed(_))
    }
}

fn destroyed(verified: Vec<String>, remaining: Vec<String>) -> Fact {
    Fact::Destroyed { frozen_at: None, verified, remaining, usage: None }
}

fn is_coming_up(instance: &Instance) -> bool {
    instance.state == InstanceState::Starting && !instance.is_ending()
}

fn vm_of(instance: &Instance) -> Option<&Uuid> {
    instance.remote.as_ref()?.vm.as_ref()
}

fn has_vm(instance: &Instance) -> bool {
    vm_of(instance).is_some()
}

/// Looks at an instance's machine. Of one that is to end nothing needs to be seen.
async fn look(cloud: &Cloud, instance: &Instance) -> Result<Sight, Failure> {
    let is_open = instance.remote.as_ref().is_some_and(remote::Remote::is_open);
    let unseen = |seen| Ok(Sight { seen, vm: None });
    let Some(vm) = vm_of(instance).filter(|_| !instance.is_ending()) else {
        return unseen(if is_open { Seen::Leftovers } else { Seen::Nothing });
    };
    let status = match cloud.client.status(vm).await {
        Ok(status) => status,
        Err(Failure::Conflict(_)) => return unseen(Seen::Frozen),
        Err(failure @ (Failure::NotFound(_) | Failure::Forbidden(_))) => {
            if look::has_vanished(cloud, vm).await? {
                return unseen(Seen::Leftovers);
            }
            return Err(failure);
        }
        Err(failure) => return Err(failure),
    };
    let seen = match status.state {
        VmState::Booting => Seen::Booting,
        VmState::Running => Seen::Running,
        VmState::Paused | VmState::Sleeping => Seen::Frozen,
        VmState::Dead => Seen::Ended,
        VmState::Unknown => {
            let text = "its machine is in a state that is not known here".to_owned();
            return Err(Failure::Unreadable(text));
        }
    };
    Ok(Sight { seen, vm: Some(status) })
}
