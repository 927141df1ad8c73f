//! Facts and what follows from them, written in one transaction.

use aegis_rules::change::Change;
use aegis_rules::guest::Guest;
use aegis_rules::instance::{Fact, Instance, observe};
use aegis_rules::kill;
use aegis_wire::words::{InstanceId, Time};

use super::Lifecycle;
use crate::ledger::{Error, Facts, WriteError};

/// Who writes: the trail says that it was no person.
pub(super) const ACTOR: &str = "aegisd";

/// Records what was seen or done, and what else `also` makes of the record as it is now: what it all
/// changes is for the rules. Others that it has wishes for are told.
pub(super) async fn note(
    lifecycle: &Lifecycle,
    id: &InstanceId,
    fact: Option<Fact>,
    also: impl FnOnce(&Facts<'_>, &Instance, Time) -> Result<Vec<Change>, Error> + Send + 'static,
) -> Result<(), WriteError> {
    let ctx = lifecycle.ctx();
    let (own, now) = (id.clone(), ctx.now());
    let others = ctx
        .ledger
        .write(ACTOR, move |facts| {
            let Some(instance) = facts.instance(&own)? else { return Ok((vec![], vec![])) };
            let guest = facts.guest_of(&instance)?;
            let family = facts.family(&instance.tree)?;
            let mut changes = also(facts, &instance, now)?;
            if let Some(fact) = fact {
                changes.extend(observe(&instance, guest.as_ref(), &family, fact, now));
            }
            if let Some(guest) = guest {
                close_kill(facts, guest, &mut changes)?;
            }
            let wished = changes.iter().filter_map(|change| match change {
                Change::InstanceWanted { id: other, .. } if *other != own => Some(other.clone()),
                _ => None,
            });
            let others: Vec<InstanceId> = wished.collect();
            Ok((changes, others))
        })
        .await?;
    others.iter().for_each(|id| lifecycle.knock(id));
    Ok(())
}

/// When the last machine of a killed guest is proven gone, the receipt is written with that proof.
fn close_kill(facts: &Facts<'_>, mut guest: Guest, changes: &mut Vec<Change>) -> Result<(), Error> {
    if !changes.iter().any(|c| matches!(c, Change::InstanceDestroyed { .. })) {
        return Ok(());
    }
    let mut machines = facts.instances_of(&guest.id)?;
    for change in &*changes {
        guest.apply(change);
        for machine in &mut machines {
            if change.subject().id() == machine.id.as_str() {
                machine.apply(change);
            }
        }
    }
    changes.extend(kill::close(&guest, &machines).unwrap_or_default());
    Ok(())
}
