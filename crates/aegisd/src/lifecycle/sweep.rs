//! The sweeper: ends what the clock has ended, though nobody asks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aegis_rules::{guest, instance, invite};
use aegis_wire::words::{CommitId, InstanceId, Time};

use super::Lifecycle;
use crate::ctx::{Ctx, Shared};
use crate::ledger::{self, Facts, WriteError};

/// Records ended per transaction.
const BATCH: usize = 200;
/// Longest sleep: a bound, should a wake-up be lost.
const LONGEST: Duration = Duration::from_secs(60);
/// Pause after the ledger failed.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Runs for ever; woken by the next end that the ledger knows, or by a change of it.
pub async fn sweep(ctx: Shared, lifecycle: Lifecycle) {
    let mut commits = ctx.ledger.commits();
    loop {
        commits.mark_unchanged();
        sweep_commits(&ctx).await;
        let wait = match pass(&ctx, &lifecycle).await {
            Ok(Some(next)) => ctx.clock.until(next).min(LONGEST),
            Ok(None) => LONGEST,
            Err(error) => {
                let chain = anyhow::Error::from(error);
                tracing::error!(error = format!("{chain:#}"), "a sweep failed");
                AFTER_FAILURE
            }
        };
        // Under a steady load of commits one look a second is enough for an end that lies ahead.
        let changed = async {
            let _ = commits.changed().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = changed => {}
        }
    }
}

/// One pass; returns when the next one is due.
async fn pass(ctx: &Shared, lifecycle: &Lifecycle) -> Result<Option<Time>, WriteError> {
    loop {
        let now = ctx.now();
        let due = ctx.ledger.read(|f| {
            let (invites, guests) = (f.due_invites(now, 1)?, f.due_guests(now, 1)?);
            Ok(invites.len() + guests.len() + f.due_instances(now, 1)?.len())
        })?;
        if due == 0 {
            return Ok(ctx.ledger.read(|f| f.next_due())?);
        }
        let touched: Vec<InstanceId> = ctx
            .ledger
            .write("clock", move |facts| {
                let mut changes = Vec::new();
                let mut touched = Vec::new();
                for due in facts.due_invites(now, BATCH)? {
                    changes.extend(invite::expire(&due, now));
                }
                for due in facts.due_guests(now, BATCH)? {
                    let machines = facts.instances_of(&due.id)?;
                    changes.extend(guest::expire(&due, &machines, now));
                    touched.extend(machines.into_iter().map(|m| m.id));
                }
                for due in facts.due_instances(now, BATCH)? {
                    // A guest's end takes its machines with it, further than this.
                    if !touched.contains(&due.id) {
                        changes.extend(instance::expire(&due, now));
                        touched.push(due.id);
                    }
                }
                Ok((changes, touched))
            })
            .await?;
        for id in touched {
            lifecycle.knock(&id);
        }
    }
}

/// Removes what is left of commits: gigabytes, perhaps, so by a thread that may wait.
async fn sweep_commits(ctx: &Shared) {
    let ctx = Arc::clone(ctx);
    let work = move || ctx.commits.sweep(|| ctx.ledger.read(|facts| used(&ctx, facts)));
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "commits were not swept"),
        Err(error) => tracing::error!(%error, "commits were not swept"),
    }
}

/// Commits that instances name, and whether one of them has not started yet: it has no disk.
fn used(ctx: &Ctx, facts: &Facts<'_>) -> Result<BTreeMap<CommitId, bool>, ledger::Error> {
    let mut used = BTreeMap::new();
    for instance in facts.instances()? {
        let Some(origin) = instance.spec.origin else { continue };
        let awaited = !ctx.disk(&instance.id).exists();
        *used.entry(origin.commit).or_insert(false) |= awaited;
    }
    Ok(used)
}
