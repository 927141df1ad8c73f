//! Ends machines in the cloud that are ours and nobody's: what a create made of which nothing ever
//! became known, and what a lost ledger left.

use aegis_rules::remote;
use aegis_wire::words::Time;

use super::look::{self, Blind};
use crate::cloud::Cloud;
use crate::ctx::Shared;

/// Looks every now and then, for ever; ends at once where there is no account.
pub async fn sweep(ctx: Shared) {
    let Some(cloud) = &ctx.cloud else { return };
    loop {
        if let Err(blind) = pass(&ctx, cloud).await {
            tracing::warn!(%blind, "machines that are nobody's were not looked for");
        }
        tokio::time::sleep(cloud.terms.sweep).await;
    }
}

async fn pass(ctx: &Shared, cloud: &Cloud) -> Result<(), Blind> {
    let since = Time(ctx.now().0.saturating_sub_unsigned(2 * remote::LATE.0));
    // Nothing is made meanwhile, so that what nobody claims is not on its way to somebody.
    let _alone = cloud.fence.write().await;
    let listed = cloud.client.vms().await?;
    let records = ctx.ledger.read(|f| f.in_cloud(since))?;
    let worth = |s: &remote::Sighting| remote::may_be_stray(&records, s);
    let seen = look::sightings(cloud, &listed, worth).await?;
    for vm in remote::strays(&records, &seen) {
        tracing::warn!(%vm, "a machine of ours that is nobody's is ended");
        if let Err(failure) = cloud.client.delete(&vm).await {
            tracing::warn!(%vm, %failure, "it stays until the next look");
        }
    }
    Ok(())
}
