//! The kill switch: write it, then wait for the proof (contracts/couch.md 7).

use aegis_rules::guest::Guest;
use aegis_rules::kill;
use aegis_wire::bounds::KILL_VERIFY_DEADLINE;
use aegis_wire::words::GuestId;

use super::{App, Error, Host, couch, guest_not_found};

/// Revokes a guest and destroys all of its machines. Returns the guest with its receipt, or without
/// one when the proof takes longer than [`KILL_VERIFY_DEADLINE`]; then it still goes on.
pub async fn kill(_: Host, app: &App, id: GuestId) -> Result<Guest, Error> {
    let mut commits = app.ctx.ledger.commits();
    couch::change(app, &id, kill::open_whole).await?;
    let proven = async {
        loop {
            let guest = app.ctx.ledger.read(|f| f.guest(&id))?.ok_or_else(guest_not_found)?;
            if guest.receipt.is_some() || commits.changed().await.is_err() {
                return Ok::<Guest, Error>(guest);
            }
        }
    };
    match tokio::time::timeout(KILL_VERIFY_DEADLINE, proven).await {
        Ok(guest) => guest,
        Err(_) => Ok(app.ctx.ledger.read(|f| f.guest(&id))?.ok_or_else(guest_not_found)?),
    }
}
