//! Invites and guests (contracts/couch.md).

use std::collections::BTreeMap;

use aegis_rules::capacity::{self, Need};
use aegis_rules::change::Change;
use aegis_rules::given::Given;
use aegis_rules::guest::{self, Guest, GuestStatus, ReportedUsage};
use aegis_rules::instance::{Expose, IdlePolicy, Protocol, Spec};
use aegis_rules::invite::{self, Fresh, Invite, InviteStatus, Redeem, Redeemed};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::words::{
    GuestId, ImageRef, InstanceId, InviteCode, InviteId, Label, Port, PublicKey, Usage,
};

use super::{App, Error, Host, Public, commits, guest_not_found};
use crate::config::{Config, ProvisionerKind};
use crate::ctx::Ctx;
use crate::keys::{self, hash};
use crate::ledger::Page;

/// The guest port behind `agentEndpoint` where the invite names none (contracts/couch.md 2).
const AGENT_PORT: u64 = 8080;

/// Makes an invite.
pub async fn create_invite(_: Host, app: &App, ask: invite::Create) -> Result<Invite, Error> {
    let commit = ask.offer.golden.as_ref().and_then(ImageRef::commit);
    if let (Some(image), ProvisionerKind::Local) = (&ask.offer.golden, app.ctx.config.provisioner)
        && commit.is_none()
    {
        super::images::check(&app.ctx.config, "golden", image)?;
    }
    if app.ctx.config.provisioner == ProvisionerKind::Vers {
        aegis_rules::remote::admits(&ask)?;
    }
    let now = app.ctx.now();
    let id = keys::invite_id(now)?;
    let code = hash(app.ctx.keys.invite_code(&id).as_str());
    let copy = id.clone();
    let ctx = app.ctx.clone();
    let write = app.ctx.ledger.write("host", move |_| {
        let changes = invite::create(ask, copy, code, now);
        for change in &changes {
            if let Change::InviteCreated(invite) = change {
                // What can't be redeemed is refused now.
                spec(&ctx, invite, None)?;
            }
        }
        Ok((changes, ()))
    });
    write.await?;
    let invite = stored_invite(app, &id)?;
    // Whoever redeems it shall not wait for what can be made before.
    let here = app.ctx.config.provisioner == ProvisionerKind::Local;
    if let Ok(Some(spec)) = spec(&app.ctx, &invite, None)
        && spec.origin.is_none()
        && here
    {
        app.lifecycle.expect(&spec);
    }
    Ok(invite)
}

fn stored_invite(app: &App, id: &InviteId) -> Result<Invite, Error> {
    let not_found = || Refusal::new(Code::InviteNotFound, "invite not found");
    Ok(app.ctx.ledger.read(|f| f.invite(id))?.ok_or_else(not_found)?)
}

/// Lists invites.
pub fn invites(
    _: Host,
    app: &App,
    status: Option<InviteStatus>,
    after: Option<&str>,
    limit: usize,
) -> Result<Page<Invite>, Error> {
    let now = app.ctx.now();
    Ok(app.ctx.ledger.read(|f| f.invites(status, now, after, limit))?)
}

/// Withdraws an invite.
pub async fn revoke_invite(_: Host, app: &App, id: InviteId) -> Result<Invite, Error> {
    let now = app.ctx.now();
    let copy = id.clone();
    app.ctx
        .ledger
        .write("host", move |facts| {
            let found = facts.invite(&copy)?;
            let invite =
                found.ok_or_else(|| Refusal::new(Code::InviteNotFound, "invite not found"))?;
            Ok((invite::revoke(&invite, now)?, ()))
        })
        .await?;
    stored_invite(app, &id)
}

/// Redeems an invite: the answer leaves when invite, guest and intent to provision are on disk.
pub async fn redeem(
    _: Public,
    app: &App,
    code: Option<InviteCode>,
    name: Label,
    public_key: Option<PublicKey>,
    idempotency_key: Option<&str>,
) -> Result<(Guest, String), Error> {
    let unknown = || Refusal::new(Code::UnknownCode, "unknown, expired or revoked invite code");
    let code_hash = hash(code.ok_or_else(unknown)?.as_str());
    let now = app.ctx.now();
    let guest_id = keys::guest_id(now)?;
    let fresh = Fresh {
        token_hash: hash(&app.ctx.keys.guest_token(&guest_id)),
        guest: guest_id,
        instance: keys::instance_id(now)?,
    };
    let ask = Redeem { name, public_key, idempotency: idempotency_key.map(hash) };
    let ctx = app.ctx.clone();
    let guest = app
        .ctx
        .ledger
        .write("public", move |facts| {
            let invite = facts.invite_by_code(&code_hash)?;
            let earlier = match invite.as_ref().and_then(|i| i.guest_id.as_ref()) {
                Some(id) => facts.guest(id)?,
                None => None,
            };
            let spec = match &invite {
                Some(invite) if invite.status_at(now) == InviteStatus::Active => {
                    spec(&ctx, invite, ask.public_key.as_ref())?
                }
                _ => None,
            };
            let in_vers = ctx.config.provisioner == ProvisionerKind::Vers;
            let need = spec.as_ref().filter(|_| !in_vers).map(Need::of);
            let redeemed =
                invite::redeem(invite.as_ref(), earlier.as_ref(), ask, spec, fresh, now)?;
            match if in_vers { redeemed.in_vers() } else { redeemed } {
                Redeemed::New { changes, guest } => {
                    if let Some(need) = need {
                        // After the redeem was judged: who comes with a bad code learns that first.
                        capacity::admit(&ctx.config.capacity, &facts.held()?, &need)?;
                    }
                    Ok((changes, guest))
                }
                Redeemed::Again(guest) => Ok((vec![], guest)),
            }
        })
        .await?;
    if let Some(instance) = &guest.instance {
        app.lifecycle.knock(instance);
    }
    let token = app.ctx.keys.guest_token(&guest.id);
    Ok((*guest, token))
}

/// The machine that an invite becomes; none where guests are activated by hand.
fn spec(ctx: &Ctx, invite: &Invite, key: Option<&PublicKey>) -> Result<Option<Spec>, Refusal> {
    let config = &ctx.config;
    match config.provisioner {
        ProvisionerKind::Local => {}
        ProvisionerKind::Manual => return Ok(None),
        ProvisionerKind::Vers => return Ok(spec_in_vers(config, invite)),
    }
    let golden = invite.offer.golden.clone().unwrap_or_else(|| config.default_image.clone());
    let agent_port = invite
        .offer
        .agent_port
        .unwrap_or_else(|| Port::try_from(AGENT_PORT).expect("8080 is a port"));
    // Awaited where somebody said that something answers there.
    let expected = invite.offer.agent_port.is_some() || config.guest_serves;
    let (cpu, memory, disk) = invite.root_size();
    let made_of = match golden.commit() {
        Some(id) => {
            let kept = ctx.commits.get(&id).ok_or_else(|| {
                let message = format!("the golden {id} is not on this host");
                Refusal::new(Code::NotEnforceable, message).hint("`aegis commits` lists what is")
            })?;
            commits::lasting(&kept)?;
            kept.commit.within(cpu, memory, disk)?
        }
        None => bare(golden, config.guest_command.clone(), invite),
    };
    Ok(Some(Spec {
        exposes: vec![Expose {
            guest_port: agent_port,
            public_port: None,
            protocol: Protocol::Http,
        }],
        await_port: expected.then_some(agent_port),
        idle_policy: IdlePolicy::LeaveRunning,
        authorized_key: key.map(|k| k.as_str().to_owned()),
        given: invite.root_given(),
        ..made_of
    }))
}

/// What is known here of a machine in the vers cloud: its commit. Its size comes with that.
fn spec_in_vers(config: &Config, invite: &Invite) -> Option<Spec> {
    let golden = || config.vers.as_ref()?.golden.as_ref()?.as_str().parse().ok();
    Some(bare(invite.offer.golden.clone().or_else(golden)?, Vec::new(), invite))
}

/// A machine of an invite's size, of which nobody said more.
fn bare(image: ImageRef, command: Vec<String>, invite: &Invite) -> Spec {
    let (cpu, memory, disk) = invite.root_size();
    Spec {
        handle: None,
        image,
        command,
        env: BTreeMap::new(),
        cwd: None,
        cpu,
        memory,
        disk,
        exposes: Vec::new(),
        await_port: None,
        idle_policy: IdlePolicy::LeaveRunning,
        authorized_key: None,
        given: Given::default(),
        origin: None,
        attach: false,
    }
}

/// A guest with its usage, measured up to now.
pub struct Metered {
    /// The guest.
    pub guest: Guest,
    /// Over its whole tree of machines.
    pub usage: Usage,
}

/// A guest with what it used.
pub(super) fn metered(
    app: &App,
    facts: &crate::ledger::Facts<'_>,
    guest: Guest,
) -> Result<Metered, crate::ledger::Error> {
    let mut machines = match guest.instance {
        Some(_) => facts.instances_of(&guest.id)?,
        None => Vec::new(),
    };
    app.ctx.meters.overlay(&mut machines);
    let usage = guest.usage(&machines);
    Ok(Metered { guest, usage })
}

/// A guest looks at itself. A token is dead the moment its guest has ended.
pub fn own_status(_: Public, app: &App, token: &str) -> Result<Metered, Error> {
    let dead = || Refusal::new(Code::InvalidToken, "invalid or expired token");
    let now = app.ctx.now();
    let found = app.ctx.ledger.read(|f| match f.guest_by_token(&hash(token))? {
        Some(guest) if guest.status_at(now).is_live() => metered(app, f, guest).map(Some),
        _ => Ok(None),
    })?;
    Ok(found.ok_or_else(dead)?)
}

/// One guest, as the host sees it.
pub fn guest(_: Host, app: &App, id: &GuestId) -> Result<Metered, Error> {
    let found = app.ctx.ledger.read(|f| match f.guest(id)? {
        Some(guest) => metered(app, f, guest).map(Some),
        None => Ok(None),
    })?;
    Ok(found.ok_or_else(guest_not_found)?)
}

/// Lists guests.
pub fn guests(
    _: Host,
    app: &App,
    status: Option<GuestStatus>,
    after: Option<&str>,
    limit: usize,
) -> Result<Page<Metered>, Error> {
    let now = app.ctx.now();
    Ok(app.ctx.ledger.read(|f| {
        let page = f.guests(status, now, after, limit)?;
        let rows = page.rows.into_iter().map(|g| metered(app, f, g)).collect::<Result<_, _>>()?;
        Ok(Page { rows, next: page.next })
    })?)
}

/// Marks a guest of a manual provisioner as running.
pub async fn activate(
    host: Host,
    app: &App,
    id: GuestId,
    vm_id: String,
    agent_endpoint: String,
) -> Result<Metered, Error> {
    change(app, &id, move |guest, _, now| guest::activate(guest, vm_id, agent_endpoint, now))
        .await?;
    guest(host, app, &id)
}

/// Takes numbers that this host can't measure.
pub async fn report_usage(
    host: Host,
    app: &App,
    id: GuestId,
    asked: ReportedUsage,
) -> Result<Metered, Error> {
    change(app, &id, move |guest, machines, now| {
        let mut changes = guest::report_usage(guest, asked, now)?;
        let mut after = guest.clone();
        changes.iter().for_each(|c| after.apply(c));
        let usage = after.usage(machines);
        changes.extend(guest::exceeded(&after, machines, &usage, now));
        Ok(changes)
    })
    .await?;
    guest(host, app, &id)
}

/// Stops the clock of a guest's machines.
pub async fn freeze(host: Host, app: &App, id: GuestId) -> Result<Metered, Error> {
    change(app, &id, guest::freeze).await?;
    guest(host, app, &id)
}

/// Lets them go on.
pub async fn thaw(host: Host, app: &App, id: GuestId) -> Result<Metered, Error> {
    change(app, &id, guest::thaw).await?;
    guest(host, app, &id)
}

/// Judges something about a guest, writes it, and wakes its machines' drivers.
pub(super) async fn change<F>(app: &App, id: &GuestId, judge: F) -> Result<(), Error>
where
    F: FnOnce(
            &Guest,
            &[aegis_rules::instance::Instance],
            aegis_wire::words::Time,
        ) -> Result<Vec<Change>, Refusal>
        + Send
        + 'static,
{
    let now = app.ctx.now();
    let id = id.clone();
    let touched: Vec<InstanceId> = app
        .ctx
        .ledger
        .write("host", move |facts| {
            let guest = facts.guest(&id)?.ok_or_else(guest_not_found)?;
            let machines = facts.instances_of(&id)?;
            let changes = judge(&guest, &machines, now)?;
            Ok((changes, machines.into_iter().map(|m| m.id).collect()))
        })
        .await?;
    for id in touched {
        app.lifecycle.knock(&id);
    }
    Ok(())
}
