//! What a driver does for its machine's gateway: what it may reach, what it may send, and what
//! follows when it wants more.
//!
//! ```text
//! record changed ──▶ terms ──▶ Request::Egress
//! gateway: low ──▶ rules::allowance::more ─┬─ yes: written, then told
//!                                          ├─ others hold unused bytes: called back, then again
//!                                          └─ spent: told; whoever still wants to send passes the limit
//! ```

use std::sync::Arc;

use aegis_rules::allowance::{self, More};
use aegis_rules::change::Change;
use aegis_rules::egress::{Denied, rule};
use aegis_rules::exceed;
use aegis_rules::instance::{Fact, Instance, Seen, Wanted};
use aegis_wire::words::{CpuMillis, DurationMs, InstanceId, Limit, OnLimit, Time};
use aegis_wire::worker::{Egress, EgressNews};

use super::{ACTOR, Driver};
use crate::ctx::Ctx;
use crate::ledger::WriteError;
use crate::lifecycle::steps;

/// Denials of one machine that are kept in an hour; more are only logged, once.
const DENIALS_PER_HOUR: u32 = 600;
const HOUR_MS: u64 = 3_600_000;
/// Who was allowed something else while it was called is called again after this.
const CALL_AGAIN: DurationMs = DurationMs(100);
/// How much of its CPU a throttled machine keeps: one part of so many.
const THROTTLED_PARTS: u32 = 10;

/// What a machine was told last, and what it was refused lately.
#[derive(Default)]
pub(super) struct Told {
    terms: Option<Egress>,
    // Nothing was written since that could change it.
    heard: bool,
    cpu: Option<CpuMillis>,
    /// It needs more, and others still hold what they may not need: tried again then.
    pub(super) again_at: Option<Time>,
    /// When others were called last.
    called_at: Option<Time>,
    hour: Option<Time>,
    denials: u32,
}

impl Told {
    /// Something was written: look again what the machine should hear.
    pub(super) fn stale(&mut self) {
        self.heard = false;
    }

    /// A new machine: what another was told is of no worth.
    pub(super) fn clear(&mut self) {
        (self.terms, self.cpu, self.heard, self.again_at) = (None, None, false, None);
    }
}

impl Driver {
    /// Has the machine hear what holds now, where that is something else than it heard last.
    pub(super) async fn tell(&mut self, instance: &Instance, seen: Seen) {
        if !matches!(seen, Seen::Booting | Seen::Running | Seen::Frozen) {
            self.told.clear();
            return;
        }
        if self.told.heard {
            return;
        }
        self.told.heard = true;
        let ctx = Arc::clone(&self.lifecycle.inner.ctx);
        let terms = match steps::egress(&ctx, instance) {
            Ok(terms) => terms,
            Err(error) => {
                tracing::error!(instance = %self.id, %error, "what it may reach is not known");
                return;
            }
        };
        if self.told.terms.as_ref() != Some(&terms) {
            match steps::say_egress(&ctx, &self.id, &terms).await {
                Ok(()) => self.told.terms = Some(terms),
                Err(error) => {
                    tracing::warn!(instance = %self.id, %error, "its gateway does not hear");
                    self.told.stale();
                }
            }
        }
        if seen == Seen::Running {
            self.tell_quota(&ctx, instance).await;
        }
    }

    /// A guest that passed a limit and shall be throttled gets less CPU.
    async fn tell_quota(&mut self, ctx: &Ctx, instance: &Instance) {
        let guest = ctx.ledger.read(|f| f.guest_of(instance)).ok().flatten();
        let throttled =
            guest.is_some_and(|g| g.limits_exceeded && g.on_limit == Some(OnLimit::Throttle));
        let cpu = match throttled {
            true => CpuMillis((instance.spec.cpu.0 / THROTTLED_PARTS).max(10)),
            false => instance.spec.cpu,
        };
        // It is launched with all of it.
        if self.told.cpu.unwrap_or(instance.spec.cpu) == cpu {
            return;
        }
        match steps::say_quota(ctx, &self.id, cpu).await {
            Ok(()) => self.told.cpu = Some(cpu),
            Err(error) => {
                tracing::warn!(instance = %self.id, %error, "its CPU quota stays");
                self.told.stale();
            }
        }
    }

    /// Takes a word of the machine's gateway.
    pub(super) async fn hear(&mut self, news: EgressNews) -> Result<(), WriteError> {
        self.told.stale();
        match news {
            EgressNews::Low => self.allow_more().await,
            EgressNews::Spent => self.spent().await,
            EgressNews::Denied { rule, requested, allowed, count } => {
                let Some(rule) = rule::parse(&rule) else { return Ok(()) };
                self.note_denial(Denied { rule, requested, allowed }, count).await
            }
        }
    }

    async fn allow_more(&mut self) -> Result<(), WriteError> {
        let ctx = Arc::clone(&self.lifecycle.inner.ctx);
        // Who stands still needs nothing; it is told again when it goes on.
        if self.record()?.is_none_or(|i| i.wanted == Wanted::Frozen) {
            return Ok(());
        }
        // Others are not called without end for what is too little to be of use.
        if self.told.called_at.is_some_and(|at| ctx.now().since(at) < CALL_AGAIN) {
            self.told.again_at = Some(ctx.now().plus(CALL_AGAIN));
            return Ok(());
        }
        let unused = match lease(&ctx, &self.id).await? {
            More::CallBack(others) => others,
            More::Yes(_) | More::Spent(_) => return Ok(()),
        };
        self.told.called_at = Some(ctx.now());
        for other in unused {
            if let Err(error) = call_back(&ctx, &other).await {
                tracing::warn!(instance = %other, error = format!("{:#}", anyhow::Error::from(error)),
                    "what it may send could not be called back");
            }
        }
        if let More::CallBack(_) = lease(&ctx, &self.id).await? {
            self.told.again_at = Some(ctx.now().plus(CALL_AGAIN));
        }
        Ok(())
    }

    /// Goes on where what others hold could not be called back.
    pub(super) async fn allow_again(&mut self) -> Result<(), WriteError> {
        if self.told.again_at.is_some_and(|at| at <= self.ctx().now()) {
            self.told.again_at = None;
            self.told.stale();
            self.allow_more().await?;
        }
        Ok(())
    }

    /// Someone in the machine wants to send, and its envelope has nothing left.
    async fn spent(&mut self) -> Result<(), WriteError> {
        // What it did send was told before; what it may not send any more is nobody's to call back.
        self.note(Fact::Used(self.ctx().meters.get(&self.id))).await?;
        let (id, now) = (self.id.clone(), self.ctx().now());
        let touched = self
            .ctx()
            .ledger
            .write(ACTOR, move |facts| {
                let Some(instance) = facts.instance(&id)? else { return Ok((vec![], vec![])) };
                let family = facts.family(&instance.tree)?;
                let Some(guest) = facts.guest_of(&instance)? else { return Ok((vec![], vec![])) };
                // Of a child that spent its own part nobody else suffers; and something may have
                // been freed or raised since.
                let root = guest.instance.as_ref().unwrap_or(&id);
                let nothing_left = match allowance::more(&family, root) {
                    More::Spent(_) => true,
                    // What it may still send itself is too little for what it wants to.
                    More::CallBack(others) => others.iter().all(|other| *other == id),
                    More::Yes(_) => false,
                };
                if !nothing_left {
                    return Ok((vec![], vec![]));
                }
                let changes = exceed::spent(&guest, &family, Limit::Egress, now);
                Ok((changes, family.into_iter().map(|i| i.id).collect()))
            })
            .await?;
        touched.iter().for_each(|id| self.lifecycle.knock(id));
        Ok(())
    }

    async fn note_denial(&mut self, denied: Denied, count: u64) -> Result<(), WriteError> {
        let now = self.ctx().now();
        if self.told.hour.is_none_or(|hour| now.since(hour).0 >= HOUR_MS) {
            (self.told.hour, self.told.denials) = (Some(now), 0);
        }
        self.told.denials += 1;
        if self.told.denials > DENIALS_PER_HOUR {
            if self.told.denials == DENIALS_PER_HOUR + 1 {
                tracing::warn!(instance = %self.id, "more of what it is denied is not noted");
            }
            return Ok(());
        }
        let change = Change::EgressDenied { id: self.id.clone(), denied, count, at: now };
        self.ctx().ledger.write(ACTOR, move |_| Ok((vec![change], ()))).await
    }
}

/// Writes what a machine that needs more may send; its driver's next turn tells it.
pub(super) async fn lease(ctx: &Ctx, id: &InstanceId) -> Result<More, WriteError> {
    let id = id.clone();
    ctx.ledger
        .write(ACTOR, move |facts| {
            let Some(instance) = facts.instance(&id)? else {
                return Ok((vec![], More::Spent(Default::default())));
            };
            let more = allowance::more(&facts.family(&instance.tree)?, &id);
            let change = match &more {
                More::Yes(allowance) => allowance::allow(&instance, *allowance),
                More::CallBack(_) | More::Spent(_) => None,
            };
            Ok((change.into_iter().collect(), more))
        })
        .await
}

/// Calls back what a machine may send and has not sent: first that, then what came of it, is written.
async fn call_back(ctx: &Ctx, id: &InstanceId) -> Result<(), CallBackError> {
    let own = id.clone();
    let version = ctx
        .ledger
        .write(ACTOR, move |facts| {
            let Some(instance) = facts.instance(&own)? else { return Ok((vec![], None)) };
            Ok((vec![allowance::call_back(&instance)], Some(instance.egress_version + 1)))
        })
        .await?;
    let Some(version) = version else { return Ok(()) };
    let trimmed = steps::trim_egress(ctx, id, version).await?;
    let own = id.clone();
    ctx.ledger
        .write(ACTOR, move |facts| {
            let Some(instance) = facts.instance(&own)? else { return Ok((vec![], ())) };
            Ok((allowance::give_back(&instance, version, trimmed), ()))
        })
        .await?;
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum CallBackError {
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Worker(#[from] crate::lifecycle::WorkerError),
}
