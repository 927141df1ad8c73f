//! Instances, as the host asks for them (contracts/aegis.md 1).

use std::time::Duration;

use aegis_rules::capacity::{self, Need};
use aegis_rules::change::Change;
use aegis_rules::guest::Guest;
use aegis_rules::instance::{Asked, Instance, InstanceState, Spec, Verb, Wanted, ask};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::channel::ExecStart;
use aegis_wire::channel::rpc::CODE_CONFLICT;
use aegis_wire::host::{Create, InstanceShape};
use aegis_wire::words::{Handle, InstanceId, Limits, Tree};
use aegis_wire::worker::Reply;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::UnixStream;

use super::{App, Error, Host, instance_not_found};
use crate::keys;
use crate::ledger::{self, Facts, WriteError};
use crate::lifecycle;

/// An exec waits this long for a machine that is still starting.
const EXEC_WAIT: Duration = Duration::from_secs(120);
/// A verb waits this long for its effect before it answers what is so far.
const EFFECT_WAIT: Duration = Duration::from_secs(30);

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
    live.usage_boot = live.usage_boot.at_least(app.ctx.meters.get(&live.id));
    let connections = app.router.connections(&live.id);
    let host = app.ctx.config.ports_bind.to_string();
    let active = if connections > 0 { app.ctx.now() } else { live.updated_at };
    InstanceShape::new(&live, &host, connections, active)
}

/// What create did.
pub enum Created {
    /// A new instance.
    New(Instance),
    /// The handle's stopped instance runs again, from its stored config.
    Restarted(Instance),
}

/// Makes an instance, or starts the stopped one of that handle again.
pub async fn create(_: Host, app: &App, create: Create) -> Result<Created, Error> {
    let now = app.ctx.now();
    let id = keys::instance_id(now)?;
    let config = app.ctx.config.clone();
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
                let guest = guest_of(facts, &there)?;
                let changes = start(facts, &config, &there, guest.as_ref(), now)?;
                return Ok((changes, (there.id, false)));
            }
            let missing = || {
                Refusal::field(
                    "command",
                    "a list of words: a new instance needs its primary process",
                )
            };
            let defaults = Limits::default();
            let spec = Spec {
                handle: create.handle,
                image: create.image.unwrap_or_else(|| config.default_image.clone()),
                command: create.command.ok_or_else(missing)?,
                env: create.env,
                cwd: create.cwd,
                cpu: create.cpu.unwrap_or(aegis_wire::words::CpuMillis(1000)),
                memory: create.memory.unwrap_or(aegis_wire::words::MemoryMb(512)),
                disk: create.disk.unwrap_or(aegis_wire::words::DiskBytes(defaults.disk.0 / 2)),
                exposes: create.exposes,
                await_port: None,
                idle_policy: create.idle_policy,
                authorized_key: None,
            };
            let need = Need { memory: spec.memory, disk: spec.disk, vcpus: spec.cpu.vcpus() };
            capacity::admit(&config.capacity, &facts.held()?, &need)?;
            let tree = Tree::Instance(id.clone());
            let instance = Instance::new(id.clone(), tree, None, None, spec, now);
            Ok((vec![Change::InstanceCreated(Box::new(instance))], (id, true)))
        })
        .await?;
    app.lifecycle.knock(&id);
    let instance = app.ctx.ledger.read(|f| f.instance(&id))?.ok_or_else(instance_not_found)?;
    Ok(if is_new { Created::New(instance) } else { Created::Restarted(instance) })
}

fn guest_of(facts: &Facts<'_>, instance: &Instance) -> Result<Option<Guest>, ledger::Error> {
    match &instance.guest {
        Some(id) => facts.guest(id),
        None => Ok(None),
    }
}

fn start(
    facts: &Facts<'_>,
    config: &crate::config::Config,
    instance: &Instance,
    guest: Option<&Guest>,
    now: aegis_wire::words::Time,
) -> Result<Vec<Change>, WriteError> {
    match ask(instance, guest, Verb::Start, now)? {
        Asked::Already => Ok(vec![]),
        Asked::Yes(changes) => {
            let need = Need {
                memory: instance.spec.memory,
                // Its disk is there and counted.
                disk: aegis_wire::words::DiskBytes(0),
                vcpus: instance.spec.cpu.vcpus(),
            };
            capacity::admit(&config.capacity, &facts.held()?, &need)?;
            Ok(changes)
        }
    }
}

/// Does what a host asks of an instance, and waits until it is so. Returns the record as it is then;
/// `None` when it was deleted.
pub async fn act(_: Host, app: &App, name: &str, verb: Verb) -> Result<Option<Instance>, Error> {
    let id = write_verb(app, name, verb).await?;
    let mut commits = app.ctx.ledger.commits();
    let reached = async {
        loop {
            let now = app.ctx.ledger.read(|f| f.instance(&id))?;
            let done = match (&now, verb) {
                (None, _) => true,
                (Some(i), Verb::Stop | Verb::Disable) => !i.is_live(),
                (Some(i), Verb::Pause) => {
                    i.state == InstanceState::Paused || i.wanted != Wanted::Paused
                }
                (Some(i), Verb::Resume) => {
                    i.state == InstanceState::Running || i.wanted != Wanted::Running
                }
                (Some(i), Verb::Delete) => i.state == InstanceState::Gone,
                (Some(_), Verb::Start | Verb::Exec) => true,
            };
            if done || commits.changed().await.is_err() {
                return Ok::<_, Error>(now);
            }
        }
    };
    match tokio::time::timeout(EFFECT_WAIT, reached).await {
        Ok(now) => now,
        Err(_) => Ok(app.ctx.ledger.read(|f| f.instance(&id))?),
    }
}

async fn write_verb(app: &App, name: &str, verb: Verb) -> Result<InstanceId, Error> {
    let now = app.ctx.now();
    let name = name.to_owned();
    let config = app.ctx.config.clone();
    let id = app
        .ctx
        .ledger
        .write("host", move |facts| {
            let instance = lookup(facts, &name)?.ok_or_else(instance_not_found)?;
            let guest = guest_of(facts, &instance)?;
            let changes = if verb == Verb::Start {
                start(facts, &config, &instance, guest.as_ref(), now)?
            } else {
                match ask(&instance, guest.as_ref(), verb, now)? {
                    Asked::Already => vec![],
                    Asked::Yes(changes) => changes,
                }
            };
            Ok((changes, instance.id))
        })
        .await?;
    app.lifecycle.knock(&id);
    Ok(id)
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
        act(host, app, id.as_str(), Verb::Delete).await?;
    }
    Ok(old)
}

/// A running command: its NDJSON follows on the connection.
pub struct Exec {
    /// Where it runs.
    pub instance: InstanceId,
    /// Names it in logs.
    pub exec_id: String,
    /// Its NDJSON.
    pub lines: BufReader<UnixStream>,
}

/// Runs a command; waits for a starting machine, wakes a paused one.
pub async fn exec(_: Host, app: &App, name: &str, start: ExecStart) -> Result<Exec, Error> {
    let id = write_verb(app, name, Verb::Exec).await?;
    let mut commits = app.ctx.ledger.commits();
    let started = async {
        loop {
            let now = app.ctx.ledger.read(|f| f.instance(&id))?.ok_or_else(instance_not_found)?;
            if now.wanted != Wanted::Running {
                let ended =
                    now.exit.map(|e| e.message).unwrap_or_else(|| "it was stopped".to_owned());
                let message = format!("the machine ended before the command ran: {ended}");
                return Err(Error::Refused(Refusal::new(Code::InstanceState, message)));
            }
            if now.state == InstanceState::Running {
                let exec_id = keys::uuid()?;
                let mut lines =
                    lifecycle::exec(&app.ctx, &id, exec_id.clone(), start.clone()).await?;
                if !still_frozen(&mut lines).await? {
                    return Ok(Exec { instance: id.clone(), exec_id, lines });
                }
                // Asked while it was about to be frozen and then thawed: that is recorded soon.
            }
            if commits.changed().await.is_err() {
                return Err(ledger::Error::Closed.into());
            }
        }
    };
    tokio::time::timeout(EXEC_WAIT, started).await.map_err(|_| {
        let message = format!("the machine did not run within {}s", EXEC_WAIT.as_secs());
        Error::Refused(Refusal::new(Code::InstanceState, message))
    })?
}

/// Whether the worker refuses because its machine does not run at this instant. Nothing is taken
/// out of the stream.
async fn still_frozen(lines: &mut BufReader<UnixStream>) -> Result<bool, Error> {
    let begin = lines.fill_buf().await?;
    let reply = serde_json::from_slice::<Reply>(begin.trim_ascii_end());
    Ok(matches!(reply, Ok(Reply { error: Some(error), .. }) if error.code == CODE_CONFLICT))
}
