//! Commits and forks (contracts/aegis.md 7): keeping a machine that runs, and starting others from it.

use std::collections::BTreeMap;
use std::io;

use aegis_rules::capability::Capabilities;
use aegis_rules::capacity::{self, Need};
use aegis_rules::change::Change;
use aegis_rules::commit::{self, Commit, Wish};
use aegis_rules::given::{Given, Secrets};
use aegis_rules::instance::{Instance, Spec};
use aegis_rules::invite::{Invite, InviteStatus};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::COMMIT_DEADLINE;
use aegis_wire::channel::rpc::CODE_CONFLICT;
use aegis_wire::host::{CommitShape, Create, Fork};
use aegis_wire::words::{CommitId, Handle, ImageRef, InstanceId, Time, Tree};

use super::exec::{HOST_WAIT, once_running};
use super::{App, Error, Host, instance_not_found, instances};
use crate::commits::{Held, Kept};
use crate::config::Config;
use crate::ctx::{Ctx, InUse};
use crate::keys;
use crate::ledger::{self, Facts, WriteError};
use crate::lifecycle::{self, WorkerError};

/// So many times a machine's memory is taken while it is saved: the machine's own, what is sent, and the
/// copy's.
const SAVED_TAKES: u64 = 3;
/// Invites that are looked at before a commit goes; a host with more has other worries.
const INVITES_MAX: usize = 100_000;

/// What is to be kept of a machine.
pub(super) struct Take {
    /// The host's name for it.
    pub(super) name: Option<Handle>,
    /// Its disk alone.
    pub(super) disk_only: bool,
    /// It goes with the last machine that is made of it.
    pub(super) temporary: bool,
}

pub(super) fn not_found() -> Refusal {
    Refusal::new(Code::CommitNotFound, "commit not found").hint("`aegis commits` lists them")
}

/// Keeps a machine as it is now; a paused one wakes for it.
pub async fn commit(
    _: Host,
    app: &App,
    name: &str,
    as_name: Option<Handle>,
    disk_only: bool,
) -> Result<CommitShape, Error> {
    let id = instances::to_run_in(app, name).await?;
    let take = Take { name: as_name, disk_only, temporary: false };
    let (kept, _held) = keep(app, &id, take, "host").await?;
    Ok(shape(&kept, 0))
}

/// Keeps the machine of an instance that was asked to run. Who gets it holds it: until then the sweep
/// takes a temporary one.
pub(super) async fn keep(
    app: &App,
    id: &InstanceId,
    take: Take,
    actor: &str,
) -> Result<(Kept, Held), Error> {
    let _in_use = InUse::begin(&app.ctx, id);
    let (kept, held) =
        once_running(app, id, HOST_WAIT + COMMIT_DEADLINE, || attempt(app, id, &take)).await?;
    let change = Change::InstanceCommitted {
        id: id.clone(),
        commit: kept.commit.id.clone(),
        memory: kept.commit.with_memory,
        at: app.ctx.now(),
    };
    // None is there that the trail does not know.
    app.ctx.ledger.write(actor, move |_| Ok((vec![change], ()))).await?;
    app.ctx.commits.keep(&kept)?;
    Ok((kept, held))
}

/// `None` where the machine does not run at this instant.
async fn attempt(app: &App, id: &InstanceId, take: &Take) -> Result<Option<(Kept, Held)>, Error> {
    let ctx = &app.ctx;
    let now = ctx.now();
    let source = ctx.ledger.read(|f| f.instance(id))?.ok_or_else(instance_not_found)?;
    let injected = lifecycle::injected(ctx, id)?;
    commit::may_take(&source, !take.disk_only, injected.as_ref())?;
    let _turn = match take.disk_only {
        true => None,
        false => ctx.commits.turn().await,
    };
    let room = source.spec.memory.bytes().saturating_mul(SAVED_TAKES);
    if !take.disk_only && !lifecycle::has_room(room) {
        let message = "the host is short of memory: saving a machine's takes three times as much for a moment";
        return Err(Refusal::new(Code::NoCapacity, message).into());
    }
    let new = keys::commit_id(now)?;
    let held = ctx.commits.hold(&new);
    let dir = ctx.commits.begin(&new)?;
    let made = match lifecycle::commit(ctx, id, dir, !take.disk_only, !take.temporary).await {
        Ok(made) => made,
        Err(WorkerError::Refused(error)) if error.code == CODE_CONFLICT => return Ok(None),
        Err(WorkerError::Refused(error)) => {
            tracing::warn!(instance = %id, error = error.message, "no commit was made");
            // Paths of the host are nobody's inside.
            let message = "no commit could be made; the daemon's log says why";
            return Err(Error::Machine(message.to_owned()));
        }
        Err(error) => return Err(error.into()),
    };
    let digest = lifecycle::image(ctx, &source).and_then(|image| image.digest);
    let name = take.name.clone();
    let commit = commit::take(&source, new, name, !take.disk_only, take.temporary, now);
    Ok(Some((Kept { commit, digest, made }, held)))
}

fn shape(kept: &Kept, in_use: u64) -> CommitShape {
    CommitShape::new(&kept.commit, kept.made.bytes, kept.made.stopped_us, in_use)
}

fn uses(instances: &[Instance], id: &CommitId) -> u64 {
    let of = |i: &&Instance| i.spec.origin.as_ref().is_some_and(|o| o.commit == *id);
    instances.iter().filter(of).count() as u64
}

/// All of them, the oldest first.
pub fn list(_: Host, app: &App) -> Result<Vec<CommitShape>, Error> {
    let instances = app.ctx.ledger.read(|f| f.instances())?;
    let all = app.ctx.commits.all();
    Ok(all.iter().map(|kept| shape(kept, uses(&instances, &kept.commit.id))).collect())
}

/// One, by id or name.
pub fn find(_: Host, app: &App, name: &str) -> Result<CommitShape, Error> {
    let kept = app.ctx.commits.find(name).ok_or_else(not_found)?;
    let instances = app.ctx.ledger.read(|f| f.instances())?;
    Ok(shape(&kept, uses(&instances, &kept.commit.id)))
}

/// Removes one, unless an instance starts from it or an invite is to.
pub async fn remove(_: Host, app: &App, name: &str) -> Result<(), Error> {
    let kept = app.ctx.commits.find(name).ok_or_else(not_found)?;
    let (id, now) = (kept.commit.id, app.ctx.now());
    let commits = app.ctx.commits.clone();
    let (gone, rest) = (id.clone(), commits.clone());
    // In the writer: no instance is made meanwhile.
    app.ctx
        .ledger
        .write("host", move |facts| {
            let n = uses(&facts.instances()?, &id);
            if n > 0 {
                let message = format!("{n} instances start from commit {id}");
                return Err(Refusal::new(Code::CommitInUse, message)
                    .hint("delete them first: their disks lie over its disk")
                    .into());
            }
            if commits.is_held(&id) {
                let message = format!("a machine is being made of commit {id}");
                return Err(Refusal::new(Code::CommitInUse, message).into());
            }
            let golden = |i: &Invite| i.offer.golden.as_ref().and_then(ImageRef::commit);
            let invites = facts.invites(Some(InviteStatus::Active), now, None, INVITES_MAX)?;
            if invites.rows.iter().any(|i| golden(i).as_ref() == Some(&id)) {
                let message = format!("an invite is to become commit {id}");
                return Err(Refusal::new(Code::CommitInUse, message)
                    .hint("revoke it first: `aegis invite list`")
                    .into());
            }
            let gone = commits.remove(&id);
            gone.map_err(|e| ledger::Error::Commit(format!("{id} stays: {e}")))?;
            Ok((vec![], ()))
        })
        .await?;
    // It may be large: not in the writer, whom a kill may wait for.
    let cleared = tokio::task::spawn_blocking(move || rest.clear(&gone)).await;
    Ok(cleared.map_err(io::Error::other)??)
}

/// The commit that a request names, held until its instance is written.
pub(super) fn meant(ctx: &Ctx, create: &Create) -> Result<Option<(Kept, Held)>, Refusal> {
    let image = create.image.as_ref().unwrap_or(&ctx.config.default_image);
    let by_image = || image.commit().map(String::from);
    let Some(name) = create.commit.clone().or_else(by_image) else { return Ok(None) };
    let named = ctx.commits.find(&name).ok_or_else(not_found)?;
    lasting(&named)?;
    // Who removes it looks for this; so whether it is there still is looked at once more behind it.
    let held = ctx.commits.hold(&named.commit.id);
    let kept = ctx.commits.get(&named.commit.id).ok_or_else(not_found)?;
    Ok(Some((kept, held)))
}

/// Refuses what goes with the machines of a fork.
pub(super) fn lasting(kept: &Kept) -> Result<(), Refusal> {
    if kept.commit.temporary {
        let id = &kept.commit.id;
        let message = format!("commit {id} is a fork's own, and goes with its machines");
        return Err(Refusal::new(Code::CommitInUse, message).hint("take one: `aegis commit NAME`"));
    }
    Ok(())
}

/// What an instance that starts from a commit is made of.
pub(super) fn spec(commit: &Commit, create: &Create) -> Result<Spec, Refusal> {
    let spec = commit.spec(Wish {
        disk_only: create.disk_only,
        image: create.image.clone().filter(|image| image.commit().is_none()),
        command: create.command.clone(),
        cpu: create.cpu,
        memory: create.memory,
        disk: create.disk,
        env: create.env.clone(),
        cwd: create.cwd.clone(),
        exposes: create.exposes.clone(),
    })?;
    if create.attach && spec.origin.as_ref().is_some_and(|origin| origin.memory) {
        let what = "left out: what goes on from a commit's memory runs already";
        return Err(Refusal::field("attach", what));
    }
    Ok(Spec {
        handle: create.handle.clone(),
        attach: create.attach,
        idle_policy: create.idle_policy,
        given: instances::given(create),
        ..spec
    })
}

/// What an instance would be made of that starts from what another one is now.
pub(super) fn preview(source: &Instance, create: &Create, now: Time) -> Result<Spec, Error> {
    let commit = commit::take(source, keys::commit_id(now)?, None, !create.disk_only, true, now);
    Ok(spec(&commit, create)?)
}

/// What a fork made.
pub struct Forked {
    /// What they start from.
    pub commit: CommitShape,
    /// The machines.
    pub instances: Vec<Instance>,
}

/// Makes machines of one that runs: each goes on where it was, as itself. All are there or none.
pub async fn fork(host: Host, app: &App, name: &str, fork: Fork) -> Result<Forked, Error> {
    let source = instances::find(host, app, name)?;
    if source.guest.is_some() || source.parent.is_some() {
        let message = format!(
            "{} belongs to a tree whose limits and end would not hold for forks of it",
            source.name()
        );
        return Err(Refusal::new(Code::InstanceState, message)
            .hint("commit it, and start machines of your own from that, with limits that you give")
            .into());
    }
    let id = instances::to_run_in(app, source.id.as_str()).await?;
    // What can't be is refused before anything is made.
    let config = app.ctx.config.clone();
    app.ctx.ledger.read(|f| Ok(admit(&config, f, &source.spec, &fork.handles)))??;
    let take = Take { name: None, disk_only: fork.disk_only, temporary: true };
    let (kept, _held) = keep(app, &id, take, "host").await?;
    let spec = kept.commit.spec(Wish { disk_only: fork.disk_only, ..Wish::default() })?;
    let now = app.ctx.now();
    let ids: io::Result<Vec<InstanceId>> =
        fork.handles.iter().map(|_| keys::instance_id(now)).collect();
    let ids = ids?;
    // As in the source, but for what it may do besides computing, and for its secrets.
    let given = Given { secrets: Secrets::default(), ..source.spec.given.clone() };
    let spec = Spec { given, ..spec };
    let made = app.ctx.ledger.write("host", move |facts| {
        admit(&config, facts, &spec, &fork.handles)?;
        let mut made = Vec::new();
        for (id, handle) in ids.into_iter().zip(fork.handles) {
            let (tree, spec) = (Tree::Instance(id.clone()), Spec { handle, ..spec.clone() });
            let lent = source.lent.as_ref().map(|_| BTreeMap::new());
            made.push(
                Instance::new(id, tree, None, None, spec, now)
                    .with_rights(Capabilities::default(), source.envelope, source.ends_at)
                    .with_egress(source.egress.clone())
                    .lent_as(lent),
            );
        }
        let created = made.iter().map(|i| Change::InstanceCreated(Box::new(i.clone()))).collect();
        Ok((created, made))
    });
    let made = made.await?;
    made.iter().for_each(|instance| app.lifecycle.knock(&instance.id));
    Ok(Forked { commit: shape(&kept, made.len() as u64), instances: made })
}

/// Whether there is room for so many machines, and their names are free.
fn admit(
    config: &Config,
    facts: &Facts<'_>,
    spec: &Spec,
    handles: &[Option<Handle>],
) -> Result<(), WriteError> {
    let (mut held, need) = (facts.held()?, Need::of(spec));
    for handle in handles {
        capacity::admit(&config.capacity, &held, &need)?;
        held = held.and(&need);
        if let Some(handle) = handle
            && facts.instance_by_handle(handle)?.is_some()
        {
            let message = format!("the handle {handle} is taken");
            return Err(Refusal::new(Code::HandleTaken, message).into());
        }
    }
    Ok(())
}
