//! After a start: the ledger against what is there.

use std::collections::HashSet;

use aegis_wire::words::InstanceId;
use aegis_wire::worker::{Event, Request};
use anyhow::Context as _;

use super::{Lifecycle, steps, worker};
use crate::ctx::Ctx;

/// Gives every instance its driver, and destroys machines without a record: a record is written
/// before its machine is made, so one without it can only be left over.
pub(super) async fn adopt(lifecycle: &Lifecycle) -> anyhow::Result<()> {
    let ctx = &lifecycle.inner.ctx;
    let run = ctx.config.home.join("run");
    std::fs::create_dir_all(&run).with_context(|| format!("cannot make {}", run.display()))?;
    let instances = ctx.ledger.read(|f| f.instances())?;
    let known: HashSet<&InstanceId> = instances.iter().map(|i| &i.id).collect();
    for entry in std::fs::read_dir(&run)? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().and_then(|n| n.parse::<InstanceId>().ok()) else { continue };
        if known.contains(&id) {
            continue;
        }
        tracing::warn!(instance = %id, "a machine without a record is destroyed");
        steps::reap_stray(ctx, &id, true).await;
    }
    forget_logs(ctx)?;
    for instance in &instances {
        // Counts must not go down while the driver is on its way: ask the living workers first.
        if instance.is_live()
            && let Ok(mut watch) = worker::say(ctx, &instance.id, &Request::Watch).await
        {
            let first = async {
                for _ in 0..2 {
                    if let Ok(Some(Event::Usage(sample))) = worker::read_line(&mut watch).await {
                        ctx.meters.note(&instance.id, steps::usage(&sample));
                        return;
                    }
                }
            };
            let _ = tokio::time::timeout(std::time::Duration::from_millis(200), first).await;
        }
        lifecycle.knock(&instance.id);
    }
    Ok(())
}

/// Removes logs whose record went when the daemon did. A disk is nobody's to remove here.
fn forget_logs(ctx: &Ctx) -> anyhow::Result<()> {
    let Ok(entries) = std::fs::read_dir(ctx.config.home.join("instances")) else { return Ok(()) };
    for entry in entries {
        let name = entry?.file_name();
        let Some(id) = name.to_str().and_then(|n| n.parse::<InstanceId>().ok()) else { continue };
        let has_disk = ctx.disk(&id).exists();
        if !has_disk && ctx.ledger.read(|f| f.instance(&id))?.is_none() {
            steps::forget(ctx, &id);
        }
    }
    Ok(())
}
