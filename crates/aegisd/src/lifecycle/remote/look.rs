//! Looking at the cloud: what an unclear create came to, and whether something is gone.

use std::collections::BTreeSet;

use aegis_rules::change::Change;
use aegis_rules::instance::Instance;
use aegis_rules::remote::{self, By, Label, Sighting, Verdict};
use aegis_vers::Failure;
use aegis_wire::vers::Vm;
use aegis_wire::words::{Time, Uuid};

use super::super::Lifecycle;
use super::super::note::note;
use crate::cloud::Cloud;
use crate::ledger::{self, Facts, WriteError};

/// What an open intent came to.
pub(super) enum Settled {
    /// A machine, which is claimed now; or there is no open intent any more.
    Claimed,
    /// Nothing, which is written down.
    Absent,
    /// It is not known before this time.
    Wait(Time),
}

/// Why nothing came of a look.
#[derive(Debug, thiserror::Error)]
pub(super) enum Blind {
    /// The cloud did not show itself.
    #[error(transparent)]
    Cloud(#[from] Failure),
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] WriteError),
}

impl From<ledger::Error> for Blind {
    fn from(error: ledger::Error) -> Blind {
        Blind::Ledger(error.into())
    }
}

/// The machines that records claim, as the ledger has them in this transaction.
pub(super) fn claimed(facts: &Facts<'_>) -> Result<BTreeSet<Uuid>, ledger::Error> {
    Ok(remote::claimed(&facts.in_cloud(Time(i64::MAX))?))
}

/// Finds out what an open intent came to, and writes it down. Nobody has a machine made meanwhile.
pub(super) async fn settle(
    lifecycle: &Lifecycle,
    cloud: &Cloud,
    instance: &Instance,
) -> Result<Settled, Blind> {
    let _alone = cloud.fence.write().await;
    let ctx = lifecycle.ctx();
    let Some(at) = instance.remote.as_ref().and_then(|r| r.intended_at) else {
        return Ok(Settled::Claimed);
    };
    let Some(golden) = remote::golden(instance) else { return Ok(Settled::Claimed) };
    let within = cloud.terms.within;
    let listed = cloud.client.vms().await?;
    let seen = sightings(cloud, &listed, |s| remote::may_be_of(s, (at, at), within)).await?;
    let taken = ctx.ledger.read(claimed)?;
    let id = &instance.id;
    match remote::reconcile(id, at, &golden, &taken, &seen, within, ctx.now()) {
        Verdict::Adopt(vm) => {
            tracing::warn!(%vm, "this is what the create without a clear answer made");
            claim(lifecycle, instance, vm, By::Look).await?;
            Ok(Settled::Claimed)
        }
        Verdict::Wait(until) => Ok(Settled::Wait(until)),
        Verdict::Absent => {
            tracing::warn!("the create without a clear answer made nothing");
            note(lifecycle, id, None, |_, instance, now| {
                Ok(remote::absent(instance, true, now).into_iter().collect())
            })
            .await?;
            Ok(Settled::Absent)
        }
    }
}

/// Claims a machine for an instance, unless another has it.
pub(super) async fn claim(
    lifecycle: &Lifecycle,
    instance: &Instance,
    vm: Uuid,
    by: By,
) -> Result<(), WriteError> {
    note(lifecycle, &instance.id, None, move |facts, instance, now| {
        let change = remote::claim(instance, &claimed(facts)?, &vm, by, now);
        if change.is_none() {
            tracing::error!(%vm, instance = %instance.id, "it could not be claimed");
        }
        Ok::<Vec<Change>, _>(change.into_iter().collect())
    })
    .await
}

/// The machines that are listed, with the commits of those that are worth a look.
pub(super) async fn sightings(
    cloud: &Cloud,
    listed: &[Vm],
    worth: impl Fn(&Sighting) -> bool,
) -> Result<Vec<Sighting>, Failure> {
    let mut seen = Vec::new();
    for vm in listed {
        let mut sighting = cloud.sighting(vm);
        if worth(&sighting) {
            match cloud.client.metadata(&vm.vm_id).await {
                Ok(metadata) => sighting.parent = metadata.parent_commit_id,
                // It went in between, or is no one's to look at.
                Err(Failure::NotFound(_) | Failure::Forbidden(_)) => {}
                Err(failure) => return Err(failure),
            }
        }
        seen.push(sighting);
    }
    Ok(seen)
}

/// Ends whatever the cloud has of an instance. Returns what it still lists; nothing is the proof.
pub(super) async fn remove(
    cloud: &Cloud,
    instance: &Instance,
    vm: Option<&Uuid>,
) -> Result<Vec<Uuid>, Failure> {
    if let Some(vm) = vm {
        cloud.client.delete(vm).await?;
    }
    let listed = cloud.client.vms().await?;
    let of_it = |seen: &&Vm| {
        let ours = cloud.label_of(seen) == Label::Ours(Some(instance.id.clone()));
        ours || vm == Some(&seen.vm_id)
    };
    let left: Vec<Uuid> = listed.iter().filter(of_it).map(|seen| seen.vm_id.clone()).collect();
    for other in left.iter().filter(|left| vm != Some(left)) {
        // A second one with this instance's label: nobody's, so it goes too.
        cloud.client.delete(other).await?;
    }
    Ok(left)
}

/// Whether the cloud, to a key that it accepts, lists the machine no more.
pub(super) async fn has_vanished(cloud: &Cloud, vm: &Uuid) -> Result<bool, Failure> {
    Ok(!cloud.client.vms().await?.iter().any(|seen| seen.vm_id == *vm))
}
