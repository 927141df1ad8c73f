//! What a machine may ask of the host: itself and its own children (contracts/aegis.md 3 and 4).
//!
//! Every function judges by `rules::authorize` upon facts of the transaction in which it writes, so
//! that racing calls can't pass a limit together, and a spawn is written whole or not at all.

use aegis_rules::authorize::{Call, Claims, Grant, Request, SpawnAsk, authorize};
use aegis_rules::capacity::{self, Need};
use aegis_rules::change::Change;
use aegis_rules::envelope;
use aegis_rules::instance::{Expose, Instance, Origin, subtree};
use aegis_rules::refusal::{Code, Refusal};
use aegis_rules::request::Wish;
use aegis_rules::spawn::{self, Permit};
use aegis_wire::channel::files::FileAsk;
use aegis_wire::host::{
    AccessShape, CapabilityShape, ChildShape, Create, Endpoint, EnvelopeShape, Exec, LeaseShape,
    LimitsShape, SelfShape, StatusWord,
};
use aegis_wire::words::{DiskBytes, DurationMs, InstanceId, Port, Time};
use serde::Serialize;
use tokio::sync::mpsc;

use super::commits::{self, Take};
use super::exec::{self, Running};
use super::instances::{self, Goal};
use super::{App, Error, files, instance_not_found, logs, ports, secrets, workspaces};
use crate::ctx::Ctx;
use crate::keys;
use crate::ledger::{Facts, WriteError};
use crate::tokens;

/// Disk of a child whose spawn names none, where its envelope has as much.
const CHILD_DISK: DiskBytes = DiskBytes(2_000_000_000);

/// Proof that a machine asks: its call came over its own connection, with a token of this daemon.
/// Whether the token is that instance's current one is judged with everything else.
pub struct Caller {
    pub(super) channel: InstanceId,
    pub(super) claims: Claims,
}

impl Caller {
    /// Only for the broker, which looked at the token.
    pub fn verified(channel: InstanceId, claims: tokens::Claims) -> Caller {
        let exp = Time(claims.exp.saturating_mul(1000));
        let cap = claims.cap.into_words();
        Caller { channel, claims: Claims { sub: claims.sub, exp, jti: claims.jti, cap } }
    }

    /// Who did it, for the trail.
    fn actor(&self) -> String {
        format!("instance:{}", self.channel)
    }
}

/// What a call is judged upon.
struct Scene {
    family: Vec<Instance>,
    grant: Grant,
}

impl Scene {
    fn record(&self, id: &InstanceId) -> Result<&Instance, Refusal> {
        self.family.iter().find(|i| i.id == *id).ok_or_else(instance_not_found)
    }
}

fn judge(
    facts: &Facts<'_>,
    caller: &Caller,
    request: Request<'_>,
    now: Time,
) -> Result<Scene, WriteError> {
    let own = facts.instance(&caller.channel)?;
    let family = match &own {
        Some(own) => facts.family(&own.tree)?,
        None => Vec::new(),
    };
    let guest = own.as_ref().map_or(Ok(None), |own| facts.guest_of(own))?;
    let call = Call {
        channel: &caller.channel,
        claims: &caller.claims,
        family: &family,
        guest: guest.as_ref(),
    };
    let grant = authorize(&call, request, now)?;
    Ok(Scene { family, grant })
}

/// Judges a call that only looks.
fn look(caller: &Caller, app: &App, request: Request<'_>) -> Result<Scene, Error> {
    let now = app.ctx.now();
    Ok(app.ctx.ledger.read(|f| Ok(judge(f, caller, request, now)))??)
}

/// A grant for something else than was asked: the laws and this file are not of one mind.
fn odd_grant() -> Error {
    Error::Io(std::io::Error::other("a grant does not fit its request"))
}

fn address(app: &App) -> String {
    app.ctx.config.ports_bind.to_string()
}

/// Makes a child.
pub async fn spawn(caller: &Caller, app: &App, create: Create) -> Result<ChildShape, Error> {
    let now = app.ctx.now();
    let fresh = keys::instance_id(now)?;
    if create.kit.is_some() {
        return Err(Refusal::field("kit", "absent: only a host starts kits").into());
    }
    if create.attach {
        return Err(Refusal::field("attach", "left out: only a host's client attaches").into());
    }
    if create.commit.is_some() {
        let refusal = Refusal::field("commit", "left out: commits are the host's");
        return Err(refusal.hint("from: \"self\" starts a child from what you are now").into());
    }
    let config = app.ctx.config.clone();
    let source = create.from.as_ref().map(|from| source(caller, app, from)).transpose()?;
    let spec = match &source {
        Some(source) => commits::preview(source, &create, now)?,
        None => {
            let disk = match create.disk {
                Some(disk) => disk,
                None => default_disk(caller, app, now)?,
            };
            let command = "a list of words: the child's primary process";
            instances::spec(&create, &config, disk, command)?
        }
    };
    let workspace = match create.workspace {
        Some(ask) => Some(workspaces::look_for_child(caller, app, ask).await?),
        None => None,
    };
    let mut ask = SpawnAsk {
        spec,
        services: create.services,
        workspace: workspace.as_ref().map(|looked| looked.wish.clone()),
        capabilities: create.capabilities,
        envelope: create.envelope,
        egress: create.egress,
    };
    let (owned, actor) = (caller.copy(), caller.actor());
    let mut held = None;
    if let Some(source) = source {
        // What may not be is refused before a machine stands still for it.
        look(caller, app, Request::Spawn(Box::new(ask.clone())))?;
        let take = Take { name: None, disk_only: create.disk_only, temporary: true };
        let (kept, hold) = commits::keep(app, &source.id, take, &actor).await?;
        ask.spec.origin = Some(Origin { commit: kept.commit.id, memory: kept.commit.with_memory });
        held = Some(hold);
    }
    let sizes = app.ctx.clone();
    let child = app
        .ctx
        .ledger
        .write(&actor, move |facts| {
            let scene = judge(facts, &owned, Request::Spawn(Box::new(ask)), now)?;
            let Grant::Spawn(permit) = scene.grant else {
                return Err(Refusal::new(Code::MalformedRequest, "this is no spawn").into());
            };
            if permit.spec().origin.is_none() {
                super::images::check(&config, "image_ref", &permit.spec().image)?;
            }
            if let Some(handle) = &permit.spec().handle
                && let Some(there) = facts.instance_by_handle(handle)?
            {
                // Whose it is is nobody's business but its parent's.
                let own = there.parent.as_ref() == Some(permit.parent());
                let hint = if own {
                    "it is your own child: start it again, or delete it first"
                } else {
                    "choose another handle, or none"
                };
                let message = format!("the handle {handle} is taken");
                return Err(Refusal::new(Code::HandleTaken, message).hint(hint).into());
            }
            check_size(&sizes, &permit)?;
            let folder = workspace.map(|looked| looked.folder(&permit)).transpose()?.flatten();
            secrets::check(facts, &permit.spec().given.secrets)?;
            capacity::admit(&config.capacity, &facts.held()?, &Need::of(permit.spec()))?;
            let (changes, child) = spawn::spawn(permit.lend(folder), fresh, now);
            Ok((changes, child))
        })
        .await?;
    drop(held);
    app.lifecycle.knock(&child.id);
    ports::assign(app, &child.id).await?;
    // It may have ended, and be forgotten, already.
    let now = app.ctx.ledger.read(|f| f.instance(&child.id))?.unwrap_or(child);
    Ok(ChildShape::new(&now, &address(app)))
}

/// What a machine means by `from`: itself, or a child.
fn source(caller: &Caller, app: &App, from: &str) -> Result<Instance, Error> {
    let (scene, id) = if from == SELF {
        (look(caller, app, Request::SelfInfo)?, caller.channel.clone())
    } else {
        let scene = look(caller, app, Request::Get(from))?;
        let Grant::Child(id) = &scene.grant else { return Err(odd_grant()) };
        let id = id.clone();
        (scene, id)
    };
    Ok(scene.record(&id)?.clone())
}

/// How a machine names itself.
const SELF: &str = "self";
/// Sizes of machines that one tree may ask for.
const SIZES_MAX: usize = 8;

/// Every size of machine is another snapshot, whose making is nobody's CPU time: a tree has some, not
/// any number.
fn check_size(ctx: &Ctx, permit: &Permit) -> Result<(), Refusal> {
    let spec = permit.spec();
    let size = (spec.image.clone(), spec.cpu.vcpus(), spec.memory);
    if ctx.sizes.admit(permit.tree(), size, SIZES_MAX) {
        return Ok(());
    }
    let message = format!("this tree has asked for machines of {SIZES_MAX} sizes already");
    let mut refusal = Refusal::denied("sizes", message);
    refusal.allowed = Some(SIZES_MAX.to_string());
    refusal.hint = Some("use image_ref, vcpus and memory_mb of an earlier child".to_owned());
    Err(refusal)
}

fn default_disk(caller: &Caller, app: &App, now: Time) -> Result<DiskBytes, Error> {
    let scene = look(caller, app, Request::SelfInfo)?;
    Ok(envelope::left(&scene.family, &caller.channel, now).disk.min(CHILD_DISK))
}

/// The machine's own children.
pub fn children(caller: &Caller, app: &App) -> Result<Vec<ChildShape>, Error> {
    let scene = look(caller, app, Request::List)?;
    let Grant::Children(ids) = &scene.grant else { return Err(odd_grant()) };
    let host = address(app);
    ids.iter().map(|id| Ok(ChildShape::new(scene.record(id)?, &host))).collect()
}

/// One of them.
pub fn child(caller: &Caller, app: &App, name: &str) -> Result<ChildShape, Error> {
    let scene = look(caller, app, Request::Get(name))?;
    let Grant::Child(id) = &scene.grant else { return Err(odd_grant()) };
    Ok(ChildShape::new(scene.record(id)?, &address(app)))
}

/// What was written for a call, and of which instances something is to be waited for.
struct Written {
    id: InstanceId,
    subtree: Vec<InstanceId>,
}

/// Judges a call that writes, and writes it.
async fn act<F>(caller: &Caller, app: &App, with: F) -> Result<Written, Error>
where
    F: FnOnce(&Facts<'_>, &Caller, Time) -> Result<Scene, WriteError> + Send + 'static,
{
    let now = app.ctx.now();
    let owned = caller.copy();
    let written = app
        .ctx
        .ledger
        .write(&caller.actor(), move |facts| {
            let scene = with(facts, &owned, now)?;
            let Grant::Changes { id, changes } = scene.grant else {
                return Err(Refusal::new(Code::MalformedRequest, "nothing to write").into());
            };
            let subtree = subtree(&scene.family, &id).into_iter().map(|i| i.id.clone()).collect();
            Ok((changes, Written { id, subtree }))
        })
        .await?;
    for id in &written.subtree {
        app.lifecycle.knock(id);
    }
    Ok(written)
}

/// Starts a stopped child again.
pub async fn start(caller: &Caller, app: &App, name: &str) -> Result<StatusWord, Error> {
    let name = name.to_owned();
    let config = app.ctx.config.clone();
    let written = act(caller, app, move |facts, caller, now| {
        let scene = judge(facts, caller, Request::Start(&name), now)?;
        if let Grant::Changes { id, changes } = &scene.grant
            && changes.iter().any(|c| matches!(c, Change::InstanceStarts { .. }))
        {
            let child = scene.record(id)?;
            capacity::admit(&config.capacity, &facts.held()?, &Need::again(&child.spec))?;
        }
        Ok(scene)
    })
    .await?;
    let now = app.ctx.ledger.read(|f| f.instance(&written.id))?;
    let status = now.map_or("stopped", |i| i.state.word()).to_owned();
    Ok(StatusWord { status })
}

/// Stops a child and all below it; the answer comes when they have stopped.
pub async fn stop(caller: &Caller, app: &App, name: &str) -> Result<StatusWord, Error> {
    let name = name.to_owned();
    let written =
        act(caller, app, move |facts, caller, now| judge(facts, caller, Request::Stop(&name), now))
            .await?;
    let reached = instances::reach(app, &written.subtree, Goal::Stopped).await?;
    Ok(StatusWord { status: if reached { "stopped" } else { "stopping" }.to_owned() })
}

/// Deletes a child and all below it; the answer comes when they are proven gone.
pub async fn delete(caller: &Caller, app: &App, name: &str) -> Result<StatusWord, Error> {
    let name = name.to_owned();
    let written = act(caller, app, move |facts, caller, now| {
        judge(facts, caller, Request::Delete(&name), now)
    })
    .await?;
    let reached = instances::reach(app, &written.subtree, Goal::Gone).await?;
    Ok(StatusWord { status: if reached { "deleted" } else { "deleting" }.to_owned() })
}

/// Runs a command in a child; waits for a starting one, wakes a paused one.
pub async fn exec(caller: &Caller, app: &App, name: &str, ask: Exec) -> Result<Running, Error> {
    let name = name.to_owned();
    let command = ask.start.command.clone();
    let written = act(caller, app, move |facts, caller, now| {
        judge(facts, caller, Request::Exec(&name, &command), now)
    })
    .await?;
    exec::run(app, &written.id, ask, exec::CHILD_WAIT).await
}

/// Asks for something with a child's files; waits for a starting one, wakes a paused one. What
/// changes them is in the trail.
pub async fn files(
    caller: &Caller,
    app: &App,
    name: &str,
    ask: FileAsk,
) -> Result<files::Open, Error> {
    let name = name.to_owned();
    let what = ask.changes().then(|| format!("{} {}", ask.word(), ask.path().lossy()));
    let written = act(caller, app, move |facts, caller, now| {
        judge(facts, caller, Request::Files { child: &name, what: what.as_deref() }, now)
    })
    .await?;
    files::open(app, &written.id, ask, exec::CHILD_WAIT).await
}

/// A child's logs.
pub fn logs(
    caller: &Caller,
    app: &App,
    name: &str,
    which: logs::Ask,
) -> Result<mpsc::Receiver<std::io::Result<String>>, Error> {
    let scene = look(caller, app, Request::Logs(name))?;
    let Grant::Child(id) = &scene.grant else { return Err(odd_grant()) };
    Ok(logs::read(app, id, which))
}

/// The machine itself, and what is left of its envelope.
pub fn own(caller: &Caller, app: &App) -> Result<SelfShape, Error> {
    let now = app.ctx.now();
    let mut scene = look(caller, app, Request::SelfInfo)?;
    app.ctx.meters.overlay(&mut scene.family);
    let own = scene.record(&caller.channel)?;
    let host = address(app);
    Ok(SelfShape {
        id: own.id.to_string(),
        handle: own.spec.handle.as_ref().map(ToString::to_string).unwrap_or_default(),
        state: own.state.word().to_owned(),
        image: own.spec.image.to_string(),
        parent_id: own.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
        endpoints: own.spec.exposes.iter().filter_map(|e| Endpoint::new(e, &host)).collect(),
        capabilities: CapabilityShape::of(&caller.claims.cap),
        envelope: room(&scene.family, own, now),
        lease: LeaseShape::of(own, now),
    })
}

/// What a subtree may hold and spend, does, and still may.
pub fn room(family: &[Instance], of: &Instance, now: Time) -> EnvelopeShape {
    EnvelopeShape {
        limit: LimitsShape::of(&of.envelope),
        spent: LimitsShape::of(&envelope::spent(family, &of.id, now)),
        left: LimitsShape::of(&envelope::room(family, &of.id, now)),
    }
}

/// Holds off idling for a while.
pub async fn hold(
    caller: &Caller,
    app: &App,
    ttl_ms: u64,
    reason: Option<String>,
) -> Result<LeaseShape, Error> {
    act(caller, app, move |facts, caller, now| {
        let ttl = DurationMs(ttl_ms);
        judge(facts, caller, Request::Keepalive { ttl, reason }, now)
    })
    .await?;
    lease(caller, app)
}

/// Lets it idle again.
pub async fn release(caller: &Caller, app: &App) -> Result<LeaseShape, Error> {
    act(caller, app, |facts, caller, now| judge(facts, caller, Request::ReleaseKeepalive, now))
        .await?;
    lease(caller, app)
}

fn lease(caller: &Caller, app: &App) -> Result<LeaseShape, Error> {
    let own = app.ctx.ledger.read(|f| f.instance(&caller.channel))?;
    Ok(LeaseShape::of(&own.ok_or_else(instance_not_found)?, app.ctx.now()))
}

/// Lets the outside reach a port of the machine.
pub async fn expose(caller: &Caller, app: &App, ask: Expose) -> Result<Endpoint, Error> {
    act(caller, app, move |facts, caller, now| judge(facts, caller, Request::Expose(ask), now))
        .await?;
    ports::endpoint(app, &caller.channel, ask.guest_port).await
}

/// Takes that back.
pub async fn unexpose(caller: &Caller, app: &App, port: Port) -> Result<StatusWord, Error> {
    act(caller, app, move |facts, caller, now| judge(facts, caller, Request::Unexpose(port), now))
        .await?;
    app.router.close_port(&caller.channel, port);
    Ok(StatusWord { status: "unexposed".to_owned() })
}

/// What the caller's guest has asked the host for.
#[derive(Serialize)]
pub struct Requests {
    requests: Vec<AccessShape>,
}

/// Asks the host for more than was given. It does not wait for the answer.
pub async fn request_access(
    caller: &Caller,
    app: &App,
    wish: Wish,
    reason: Option<String>,
) -> Result<Requests, Error> {
    act(caller, app, move |facts, caller, now| {
        judge(facts, caller, Request::Access { wish, reason }, now)
    })
    .await?;
    requests(caller, app)
}

/// What was asked for by this machine, and what came of it.
pub fn requests(caller: &Caller, app: &App) -> Result<Requests, Error> {
    look(caller, app, Request::SelfInfo)?;
    let guest = app.ctx.ledger.read(|f| match f.instance(&caller.channel)? {
        Some(own) => f.guest_of(&own),
        None => Ok(None),
    })?;
    let all = guest.iter().flat_map(aegis_wire::host::requests);
    Ok(Requests { requests: all.filter(|r| r.instance == caller.channel.as_str()).collect() })
}

/// Keeps in the trail that something was refused.
pub async fn note_denial(
    app: &App,
    id: &InstanceId,
    method: &str,
    refusal: &Refusal,
    target: Option<&str>,
) -> Result<(), WriteError> {
    let change = Change::denied(id.clone(), method, refusal, target, app.ctx.now());
    let actor = format!("instance:{id}");
    app.ctx.ledger.write(&actor, move |_| Ok((vec![change], ()))).await
}

impl Caller {
    /// For the writer's thread, inside of this file.
    fn copy(&self) -> Caller {
        Caller { channel: self.channel.clone(), claims: self.claims.clone() }
    }
}
