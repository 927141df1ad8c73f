//! What a driver does for a machine that runs: its token, its calls, its idleness.

use std::sync::Arc;

use aegis_rules::change::Change;
use aegis_rules::idle::{self, Verdict};
use aegis_rules::instance::{Asked, Instance, Seen, Verb, ask};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::words::{DurationMs, Time};
use aegis_wire::worker::MachineState;

use super::{ACTOR, Driver, wanted_gone};
use crate::keys;
use crate::ledger::WriteError;
use crate::lifecycle::{Presence, calls, steps};

/// What could not be done is tried again after this.
const RETRY_LATER: DurationMs = DurationMs(60_000);
/// No token lives as long.
const NEVER: Time = Time(i64::MAX);

impl Driver {
    /// Says once per machine that it may call and knock.
    pub(super) async fn announce(&mut self, seen: Seen) {
        match seen {
            Seen::Booting | Seen::Running | Seen::Frozen if self.may_call => {}
            Seen::Booting | Seen::Running | Seen::Frozen => {
                self.may_call = true;
                // Nobody listens while the daemon stops.
                let told = &self.lifecycle.inner.told;
                let _ = told.broker.send(self.id.clone()).await;
                let _ = told.hatch.send(Presence::Came(self.id.clone())).await;
            }
            Seen::Nothing | Seen::Leftovers | Seen::Ended => self.leave().await,
        }
    }

    /// Says once that it no longer may.
    pub(super) async fn leave(&mut self) {
        if std::mem::take(&mut self.may_call) {
            let _ = self.lifecycle.inner.told.hatch.send(Presence::Left(self.id.clone())).await;
        }
    }

    /// Has the memory of a machine that has slept for long put on disk. To others it still sleeps.
    async fn suspend(&mut self, instance: &Instance) {
        if matches!(self.link.state(), MachineState::Frozen { suspended: true, .. }) {
            return;
        }
        let ctx = Arc::clone(&self.lifecycle.inner.ctx);
        let knock = Arc::clone(&self.knock);
        let interrupt = wanted_gone(Arc::clone(&ctx), self.id.clone(), knock, instance.wanted);
        let done = tokio::select! {
            done = steps::suspend(&ctx, instance) => done,
            () = interrupt => return,
        };
        if let Err(error) = done {
            tracing::warn!(%error, "its memory stays");
            self.look_at = Some(ctx.now().plus(RETRY_LATER));
        }
    }

    /// Has a machine that nobody uses paused, and later put on disk; says whether a pause was asked
    /// for.
    pub(super) async fn idle(&mut self, instance: &Instance) -> Result<bool, WriteError> {
        let ctx = Arc::clone(&self.lifecycle.inner.ctx);
        let signs = self.use_of.signs(&self.lifecycle, &self.id);
        match idle::judge(instance, &signs, &ctx.config.idle, ctx.now()) {
            Verdict::Stay { until } => {
                self.look_at = until;
                Ok(false)
            }
            Verdict::Suspend => {
                // Not at once again where it failed.
                if self.look_at.is_none_or(|at| at <= ctx.now()) {
                    self.look_at = None;
                    self.suspend(instance).await;
                }
                Ok(false)
            }
            Verdict::Pause => {
                tracing::info!("paused: nobody uses it");
                let (id, now) = (self.id.clone(), ctx.now());
                ctx.ledger
                    .write(ACTOR, move |facts| {
                        let Some(instance) = facts.instance(&id)? else { return Ok((vec![], ())) };
                        let guest = facts.guest_of(&instance)?;
                        let family = facts.family(&instance.tree)?;
                        match ask(&instance, guest.as_ref(), &family, Verb::Pause, now) {
                            Ok(Asked::Yes(changes)) => Ok((changes, ())),
                            // Somebody wished otherwise in between.
                            Ok(Asked::Already) | Err(_) => Ok((vec![], ())),
                        }
                    })
                    .await?;
                Ok(true)
            }
        }
    }

    /// Mints this boot's token: its name is on disk before anybody can show it.
    pub(super) async fn mint(&mut self, instance: &Instance) -> Result<String, WriteError> {
        let jti = keys::uuid().map_err(no_token)?;
        let (token, renew_at) = calls::mint(self.ctx(), instance, &jti).map_err(no_token)?;
        let change = Change::InstanceToken { id: self.id.clone(), jti, at: self.ctx().now() };
        self.ctx().ledger.write(ACTOR, move |_| Ok((vec![change], ()))).await?;
        self.renew_at = Some(renew_at.unwrap_or(NEVER));
        Ok(token)
    }

    /// Hands a running machine a token that lives longer, when its own has little left. It keeps the
    /// name: one holder, one name, and no instant in which neither token is good.
    pub(super) async fn renew_token(&mut self, instance: &Instance) {
        let now = self.ctx().now();
        let Some(jti) = &instance.jti else { return };
        if self.renew_at.is_some_and(|at| now < at) {
            return;
        }
        let ctx = Arc::clone(&self.lifecycle.inner.ctx);
        let knock = Arc::clone(&self.knock);
        let interrupt = wanted_gone(Arc::clone(&ctx), self.id.clone(), knock, instance.wanted);
        let handed = match calls::mint(&ctx, instance, jti) {
            Ok((token, next)) => tokio::select! {
                done = calls::renew_token(&ctx, &self.id, token) => done.map(|()| next),
                () = interrupt => return,
            },
            Err(error) => Err(error),
        };
        self.renew_at = Some(match handed {
            Ok(next) => next.unwrap_or(NEVER),
            Err(error) => {
                tracing::warn!(%error, "its token could not be renewed");
                now.plus(RETRY_LATER)
            }
        });
    }
}

/// A machine without a token is not launched; it is tried again as any other failed boot.
fn no_token(error: impl std::fmt::Display) -> WriteError {
    Refusal::new(Code::NotEnforceable, format!("no capability token: {error}")).into()
}
