//! What a guest may reach and spend, changed while it lives: by the host, on request or without.

use aegis_rules::egress::EgressAsk;
use aegis_rules::exceed::{self, Raise};
use aegis_rules::instance::{Instance, find};
use aegis_rules::{request, tokens};
use aegis_wire::host::{DenialShape, EgressShape};
use aegis_wire::words::{GuestId, InstanceId, Limit, Tree};

use super::couch::{self, Metered};
use super::{App, Error, Host, guest_not_found};
use crate::ledger::EventRow;

/// Most denials that one answer lists, the newest.
const DENIALS_MAX: usize = 200;
/// Rows of the trail that are looked through for them at a time.
const PAGE: usize = 1000;

/// What a guest's machines may reach.
pub fn egress(_: Host, app: &App, id: &GuestId) -> Result<EgressShape, Error> {
    let found = app.ctx.ledger.read(|f| {
        let Some(guest) = f.guest(id)? else { return Ok(None) };
        let family = f.instances_of(id)?;
        Ok(Some(guest.instance.as_ref().and_then(|root| find(&family, root).cloned())))
    })?;
    let root = found.ok_or_else(guest_not_found)?.filter(|root| root.remote.is_none());
    let root = root.ok_or_else(request::no_machine)?;
    Ok((&root.egress).into())
}

/// Sets what a guest's machines may reach, at once: what they have open and may not any more is
/// reset. Children keep their own lists beside it. What is absent in `ask` is open: `internet`, and
/// all public addresses where it is the list.
pub async fn set_egress(
    host: Host,
    app: &App,
    id: GuestId,
    ask: EgressAsk,
) -> Result<EgressShape, Error> {
    couch::change(app, &id, move |guest, machines, now| {
        request::set_egress(guest, machines, ask, now)
    })
    .await?;
    egress(host, app, &id)
}

/// Sets limits of a guest anew.
pub async fn set_limits(host: Host, app: &App, id: GuestId, ask: Raise) -> Result<Metered, Error> {
    couch::change(app, &id, move |guest, machines, now| {
        exceed::set_limits(guest, machines, ask, now)
    })
    .await?;
    couch::guest(host, app, &id)
}

/// Decides what a guest's machine asked for.
pub async fn decide(
    host: Host,
    app: &App,
    id: GuestId,
    number: u32,
    grant: bool,
) -> Result<Metered, Error> {
    couch::change(app, &id, move |guest, machines, now| {
        request::decide(guest, machines, number, grant, now)
    })
    .await?;
    couch::guest(host, app, &id)
}

/// What a guest's machines were refused, the newest last.
pub fn denials(host: Host, app: &App, id: &GuestId) -> Result<Vec<DenialShape>, Error> {
    let guest = couch::guest(host, app, id)?.guest;
    let tree = Tree::Invite(guest.invite);
    let (mut after, mut found) = (0, Vec::new());
    loop {
        let rows = app.ctx.ledger.read(|f| f.events(Some(&tree), after, PAGE))?;
        let Some(last) = rows.last() else { break };
        after = last.seq;
        found.extend(rows.iter().filter(|row| row.kind == "instance.denied").map(denial));
        let more = found.len().saturating_sub(DENIALS_MAX);
        found.drain(..more);
    }
    Ok(found)
}

fn denial(row: &EventRow) -> DenialShape {
    let data: std::collections::BTreeMap<String, String> =
        serde_json::from_str(&row.data).unwrap_or_default();
    let text = |name: &str| data.get(name).cloned().unwrap_or_default();
    DenialShape {
        seq: row.seq,
        at: row.at,
        instance: row.subject.clone(),
        method: text("method"),
        rule: text("rule"),
        requested: text("requested"),
        allowed: text("allowed"),
        count: text("count").parse().unwrap_or(1),
    }
}

/// A machine wanted more of this than is left. Where that is the guest's own limit, and not one that
/// a parent set for a child, what the invite says of it follows.
pub async fn exhausted(app: &App, instance: &Instance, limit: Limit) -> Result<(), Error> {
    let Some(id) = instance.guest.clone() else { return Ok(()) };
    let (own, now) = (instance.id.clone(), app.ctx.now());
    let written = app.ctx.ledger.write("aegisd", move |facts| {
        let Some(guest) = facts.guest(&id)? else { return Ok((vec![], vec![])) };
        let family = facts.instances_of(&id)?;
        let left = |id: &InstanceId| tokens::room(&family, Some(&guest), id).map(|r| r.left());
        let root = guest.instance.as_ref().unwrap_or(&own);
        if left(root) > left(&own) {
            return Ok((vec![], vec![]));
        }
        let changes = exceed::spent(&guest, &family, limit, now);
        Ok((changes, family.into_iter().map(|i| i.id).collect()))
    });
    let touched: Vec<InstanceId> = written.await?;
    touched.iter().for_each(|id| app.lifecycle.knock(id));
    Ok(())
}
