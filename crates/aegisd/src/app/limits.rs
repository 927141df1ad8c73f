//! What happens when a guest has used up what it may spend.

use aegis_rules::change::Change;
use aegis_rules::instance::Instance;
use aegis_wire::words::Limit;

use super::{App, Error};

/// Notes, once, that an instance's guest has nothing left of this.
pub async fn exhausted(app: &App, instance: &Instance, limit: Limit) -> Result<(), Error> {
    let Some(id) = instance.guest.clone() else { return Ok(()) };
    let now = app.ctx.now();
    let written = app.ctx.ledger.write("aegisd", move |facts| {
        let Some(guest) = facts.guest(&id)? else { return Ok((vec![], ())) };
        if guest.limits_exceeded || !guest.status_at(now).is_live() {
            return Ok((vec![], ()));
        }
        let usage = guest.usage(&facts.instances_of(&id)?);
        let used = match limit {
            Limit::Tokens => usage.tokens.0 as f64,
            Limit::Egress => usage.egress.gb(),
            // The others are passed by being measured, and noted there.
            Limit::Cpu | Limit::Memory | Limit::Disk | Limit::Duration => {
                return Ok((vec![], ()));
            }
        };
        let allowed = guest.limits.get(limit);
        let violation = aegis_wire::words::Violation { limit, used, allowed };
        let violations = vec![violation.to_string()];
        Ok((vec![Change::LimitsExceeded { id, violations, at: now }], ()))
    });
    Ok(written.await?)
}
