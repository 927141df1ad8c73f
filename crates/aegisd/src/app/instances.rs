//! Instances, as the host asks for them (contracts/aegis.md 1).

use std::collections::BTreeMap;
use std::time::Duration;

use aegis_rules::capability::Capabilities;
use aegis_rules::capacity::{self, Need};
use aegis_rules::change::Change;
use aegis_rules::envelope::{self, EnvelopeAsk};
use aegis_rules::given::Given;
use aegis_rules::guest::Guest;
use aegis_rules::instance::{Asked, Instance, InstanceState, Spec, Verb, Wanted, ask, subtree};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::egress::ServiceName;
use aegis_wire::host::{Create, Exec, InstanceShape};
use aegis_wire::words::{CpuMillis, DiskBytes, Handle, InstanceId, Limits, MemoryMb, Time, Tree};

use super::exec::{self, Running};
use super::{App, Error, Host, commits, images, instance_not_found, secrets, tree, workspaces};
use crate::config::Config;
use crate::images::{Images, is_ours};
use crate::keys;
use crate::ledger::{self, Facts, WriteError};

/// A verb waits this long for its effect before it answers what is so far.
const EFFECT_WAIT: Duration = Duration::from_secs(30);
/// CPU quota where none is asked for.
pub(super) const DEFAULT_CPU: CpuMillis = CpuMillis(1000);
/// Memory where none is asked for.
pub(super) const DEFAULT_MEMORY: MemoryMb = MemoryMb(512);

/// An instance, or the one that was meant by its handle.
pub fn find(_: Host, app: &App, name: &str) -> Result<Instance, Error> {
    Ok(app.ctx.ledger.read(|f| lookup(f, name))?.ok_or_else(instance_not_found)?)
}

fn lookup(facts: &Facts<'_>, name: &str) -> Result<Option<Instance>, ledger::Error> {
    if let Ok(id) = name.parse::<InstanceId>() {
        return facts.instance(&id);
    }
    match name.parse::<Handle>() {
        Ok(handle) => facts.instance_by_handle(&handle),
        Err(_) => Ok(None),
    }
}

/// All instances that are not gone.
pub fn list(_: Host, app: &App) -> Result<Vec<Instance>, Error> {
    Ok(app.ctx.ledger.read(|f| f.instances())?)
}

/// An instance as clients see it, with what the daemon knows of its use.
pub fn shape(app: &App, instance: &Instance) -> InstanceShape {
    let mut live = instance.clone();
    app.ctx.meters.overlay(std::slice::from_mut(&mut live));
    let connections = app.router.connections(&live.id);
    let host = app.ctx.config.ports_bind.to_string();
    let used = app.ctx.meters.used_at(&live.id).unwrap_or(live.updated_at);
    let active = if connections > 0 { app.ctx.now() } else { used.max(live.updated_at) };
    InstanceShape::new(&live, &host, connections, active, app.ctx.now())
}

/// The same of one by itself, with what is left of its envelope.
pub fn full_shape(app: &App, instance: &Instance) -> Result<InstanceShape, Error> {
    let mut family = app.ctx.ledger.read(|f| f.family(&instance.tree))?;
    app.ctx.meters.overlay(&mut family);
    let mut shape = shape(app, instance);
    shape.envelope = Some(tree::room(&family, instance, app.ctx.now()));
    Ok(shape)
}

/// What create did.
pub enum Created {
    /// A new instance.
    New(Instance),
    /// The handle's stopped instance runs again, from its stored config.
    Restarted(Instance),
}

/// Makes an instance, or starts the stopped one of that handle again. An image that is not there is
/// pulled, where the settings say so and nothing else is wrong.
pub async fn create(host: Host, app: &App, create: Create) -> Result<Created, Error> {
    create_lent(host, app, create, None).await
}

/// The same, lent by the vers API under these labels, where there are some.
pub async fn create_lent(
    _: Host,
    app: &App,
    create: Create,
    lent: Option<BTreeMap<String, String>>,
) -> Result<Created, Error> {
    match make(app, create.clone(), lent.clone()).await {
        Err(Error::Refused(refusal))
            if refusal.field.as_deref() == Some("image_ref") && create.commit.is_none() =>
        {
            let image = create.image.as_ref().unwrap_or(&app.ctx.config.default_image);
            images::provide(app, image, refusal).await?;
            make(app, create, lent).await
        }
        done => done,
    }
}

async fn make(
    app: &App,
    create: Create,
    lent: Option<BTreeMap<String, String>>,
) -> Result<Created, Error> {
    let now = app.ctx.now();
    let id = keys::instance_id(now)?;
    let config = app.ctx.config.clone();
    let (origin, _held) = commits::meant(&app.ctx, &create)?.unzip();
    let workspace = match &create.workspace {
        Some(ask) => Some(workspaces::of_host(app, ask.clone()).await?),
        None => None,
    };
    let (id, is_new) = app
        .ctx
        .ledger
        .write("host", move |facts| {
            if let Some(handle) = &create.handle
                && let Some(there) = facts.instance_by_handle(handle)?
            {
                if there.wanted != Wanted::Stopped || there.state != InstanceState::Stopped {
                    let message = format!("instance {handle} exists and is {}", there.state.word());
                    return Err(Refusal::new(Code::HandleTaken, message).into());
                }
                if there.parent.is_some() {
                    // A machine chose that name: who means an instance of their own gets none of its.
                    let message = format!("the handle {handle} is taken by {}, a child", there.id);
                    let refusal = Refusal::new(Code::HandleTaken, message);
                    let hint = "choose another handle; a stopped child is started by its id";
                    return Err(refusal.hint(hint).into());
                }
                let guest = facts.guest_of(&there)?;
                let changes = start(facts, &config, &there, guest.as_ref(), now)?;
                return Ok((changes, (there.id, false)));
            }
            if create.from.is_some() {
                let what = "left out: only a machine has a self; fork makes machines of one";
                return Err(Refusal::field("from", what).into());
            }
            let mut spec = match &origin {
                Some(kept) => commits::spec(&kept.commit, &create)?,
                None => new_spec(&create, &config)?,
            };
            spec.given.workspace = workspace;
            let rights = create.capabilities.granted()?;
            if let Some(kit) = &create.kit {
                rights.within(&config.kits).map_err(|refusal| beyond_kits(kit, refusal))?;
            }
            secrets::check(facts, &spec.given.secrets)?;
            if origin.is_none() {
                images::check(&config, "image_ref", &spec.image)?;
            }
            check_services(&config, &spec.given.services)?;
            capacity::admit(&config.capacity, &facts.held()?, &Need::of(&spec))?;
            let instance = of_host(&config, id.clone(), spec, rights, &create.envelope, now)?
                .with_egress(create.egress.granted())
                .lent_as(lent);
            Ok((vec![Change::InstanceCreated(Box::new(instance))], (id, true)))
        })
        .await?;
    app.lifecycle.knock(&id);
    let instance = app.ctx.ledger.read(|f| f.instance(&id))?.ok_or_else(instance_not_found)?;
    Ok(if is_new { Created::New(instance) } else { Created::Restarted(instance) })
}

/// The record of a new instance of the host's own.
fn of_host(
    config: &Config,
    id: InstanceId,
    spec: Spec,
    rights: Capabilities,
    envelope: &EnvelopeAsk,
    now: Time,
) -> Result<Instance, Refusal> {
    let room = envelope::narrow(&envelope::of_host(&config.capacity), envelope);
    let ends_at = envelope.duration.map(|length| now.plus(length));
    let tree = Tree::Instance(id.clone());
    let instance =
        Instance::new(id, tree, None, None, spec, now).with_rights(rights, room, ends_at);
    if envelope::Draw::of_new(&instance.spec).fits(&instance.envelope) {
        return Ok(instance);
    }
    Err(Refusal::field("envelope", "at least as large as the instance's own CPU, memory and disk"))
}

/// What an instance is made of that starts from an image.
fn new_spec(create: &Create, config: &Config) -> Result<Spec, Refusal> {
    let disk = create.disk.unwrap_or(DiskBytes(Limits::default().disk.0 / 2));
    if create.command.is_none() {
        let image = create.image.as_ref().unwrap_or(&config.default_image);
        // Whether it names a command, nobody knows before it is there.
        if !is_ours(image) {
            images::check(config, "image_ref", image)?;
        }
    }
    let command =
        "a list of words: a new instance needs its primary process, and its image names none";
    spec(create, config, disk, command)
}

/// What an instance is made of, with this host's defaults and its image's command; `command` says
/// what its command must be where the image has none.
pub(super) fn spec(
    create: &Create,
    config: &Config,
    disk: DiskBytes,
    command: &str,
) -> Result<Spec, Refusal> {
    let missing = || Refusal::field("command", command);
    let image = create.image.clone().unwrap_or_else(|| config.default_image.clone());
    let command = match &create.command {
        Some(command) => command.clone(),
        None => Images::of(&config.home).find(&image).map(|i| i.run.command()).unwrap_or_default(),
    };
    if command.is_empty() {
        return Err(missing());
    }
    Ok(Spec {
        handle: create.handle.clone(),
        command,
        image,
        env: create.env.clone(),
        cwd: create.cwd.clone(),
        cpu: create.cpu.unwrap_or(DEFAULT_CPU),
        memory: create.memory.unwrap_or(DEFAULT_MEMORY),
        disk,
        exposes: create.exposes.clone(),
        await_port: None,
        idle_policy: create.idle_policy,
        authorized_key: None,
        given: given(create),
        origin: None,
        attach: create.attach,
    })
}

/// What an instance is given that is asked for.
pub(super) fn given(create: &Create) -> Given {
    Given {
        secrets: create.secrets.clone(),
        services: create.services.clone().unwrap_or_default(),
        models: create.models.clone(),
        // Which folder that is, is looked at apart.
        workspace: None,
    }
}

/// A kit comes from elsewhere: the host says in its settings what it lets kits have.
fn beyond_kits(kit: &str, refusal: Refusal) -> Refusal {
    let mut refusal = refusal;
    refusal.message =
        format!("the kit {kit} asks for more than this host lets kits have: {refusal}");
    refusal.hint =
        Some("raise [kits] in aegis.toml if you trust the kit, or lower it there".into());
    refusal
}

/// Refuses services that this host does not have.
fn check_services(config: &Config, asked: &[ServiceName]) -> Result<(), Refusal> {
    match asked.iter().find(|name| !config.host_services.contains_key(name)) {
        None => Ok(()),
        Some(name) => {
            let known: Vec<&str> = config.host_services.keys().map(ServiceName::as_str).collect();
            let known = if known.is_empty() { "it has none".to_owned() } else { known.join(", ") };
            let mut refusal =
                Refusal::field("host_services", format!("services of this host: {known}"));
            refusal.requested = Some(name.to_string());
            Err(refusal.hint("[host_services.NAME] in aegis.toml names them"))
        }
    }
}

fn start(
    facts: &Facts<'_>,
    config: &Config,
    instance: &Instance,
    guest: Option<&Guest>,
    now: Time,
) -> Result<Vec<Change>, WriteError> {
    match ask(instance, guest, &facts.family(&instance.tree)?, Verb::Start, now)? {
        Asked::Already => Ok(vec![]),
        Asked::Yes(changes) => {
            capacity::admit(&config.capacity, &facts.held()?, &Need::again(&instance.spec))?;
            Ok(changes)
        }
    }
}

/// What all instances of a set are to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// No machine.
    Stopped,
    /// Proven gone.
    Gone,
    /// Its clock stands still.
    Paused,
    /// It runs.
    Running,
}

impl Goal {
    fn met(self, now: Option<&Instance>) -> bool {
        match (self, now) {
            (_, None) => true,
            (Goal::Stopped, Some(i)) => !i.is_live(),
            (Goal::Gone, Some(i)) => i.state == InstanceState::Gone,
            // Another wish may have come in between: then there is nothing to wait for.
            (Goal::Paused, Some(i)) => {
                i.state == InstanceState::Paused || i.wanted != Wanted::Paused
            }
            (Goal::Running, Some(i)) => {
                i.state == InstanceState::Running || i.wanted != Wanted::Running
            }
        }
    }
}

/// Waits until all of these instances have reached something; says whether they did in time.
pub(super) async fn reach(app: &App, ids: &[InstanceId], goal: Goal) -> Result<bool, Error> {
    let mut commits = app.ctx.ledger.commits();
    let reached = async {
        loop {
            let met = app.ctx.ledger.read(|f| {
                for id in ids {
                    if !goal.met(f.instance(id)?.as_ref()) {
                        return Ok(false);
                    }
                }
                Ok(true)
            })?;
            if met {
                return Ok::<_, Error>(true);
            }
            if commits.changed().await.is_err() {
                return Err(ledger::Error::Closed.into());
            }
        }
    };
    tokio::time::timeout(EFFECT_WAIT, reached).await.unwrap_or(Ok(false))
}

/// Does what a host asks of an instance, and waits until it is so, for it and for all that ends with
/// it. Returns the record as it is then; `None` when it was deleted.
pub async fn act(_: Host, app: &App, name: &str, verb: Verb) -> Result<Option<Instance>, Error> {
    let (id, subtree) = write_verb(app, name, verb).await?;
    let one = std::slice::from_ref(&id);
    match verb {
        Verb::Stop | Verb::Disable => reach(app, &subtree, Goal::Stopped).await?,
        Verb::Delete => reach(app, &subtree, Goal::Gone).await?,
        Verb::Pause => reach(app, one, Goal::Paused).await?,
        Verb::Resume => reach(app, one, Goal::Running).await?,
        Verb::Start | Verb::Exec | Verb::Wake => true,
    };
    Ok(app.ctx.ledger.read(|f| f.instance(&id))?)
}

/// Writes what a host asks. Returns whom, and all below it.
async fn write_verb(
    app: &App,
    name: &str,
    verb: Verb,
) -> Result<(InstanceId, Vec<InstanceId>), Error> {
    let now = app.ctx.now();
    let name = name.to_owned();
    let config = app.ctx.config.clone();
    let (id, subtree) = app
        .ctx
        .ledger
        .write("host", move |facts| {
            let instance = lookup(facts, &name)?.ok_or_else(instance_not_found)?;
            let guest = facts.guest_of(&instance)?;
            let family = facts.family(&instance.tree)?;
            let changes = if verb == Verb::Start {
                start(facts, &config, &instance, guest.as_ref(), now)?
            } else {
                match ask(&instance, guest.as_ref(), &family, verb, now)? {
                    Asked::Already => vec![],
                    Asked::Yes(changes) => changes,
                }
            };
            let below: Vec<InstanceId> =
                subtree(&family, &instance.id).into_iter().map(|i| i.id.clone()).collect();
            Ok((changes, (instance.id, below)))
        })
        .await?;
    for id in &subtree {
        app.lifecycle.knock(id);
    }
    Ok((id, subtree))
}

/// Deletes stopped host instances that stopped at least this long ago.
pub async fn prune(host: Host, app: &App, older_ms: u64) -> Result<Vec<InstanceId>, Error> {
    let now = app.ctx.now();
    let old: Vec<InstanceId> = list(host, app)?
        .into_iter()
        .filter(|i| i.state == InstanceState::Stopped && i.guest.is_none())
        .filter(|i| i.stopped_at.is_some_and(|at| now.since(at).0 >= older_ms))
        .map(|i| i.id)
        .collect();
    for id in &old {
        match act(host, app, id.as_str(), Verb::Delete).await {
            // It went with its parent.
            Err(Error::Refused(refusal)) if refusal.code == Code::InstanceNotFound => {}
            done => drop(done?),
        }
    }
    Ok(old)
}

/// Runs a command; waits for a starting machine, wakes a paused one.
pub async fn exec(_: Host, app: &App, name: &str, ask: Exec) -> Result<Running, Error> {
    let id = to_run_in(app, name).await?;
    exec::run(app, &id, ask, exec::HOST_WAIT).await
}

/// The instance in which something is to run; a paused one is asked to wake.
pub(super) async fn to_run_in(app: &App, name: &str) -> Result<InstanceId, Error> {
    Ok(write_verb(app, name, Verb::Exec).await?.0)
}
