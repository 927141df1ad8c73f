//! Executing one step. Each is safe to repeat, finds its outside effect by the instance's id, and
//! holds no policy: what a fact means is for the rules.

use std::path::PathBuf;

use aegis_rules::allowance::{self, More};
use aegis_rules::egress::policy;
use aegis_rules::instance::{Fact, Instance, Spec, find};
use aegis_wire::bounds::{
    CA_HOSTS_MAX, COMMIT_DEADLINE, GUEST_STOP_GRACE, HOST_STOP_DEADLINE, KILL_FREEZE_DEADLINE,
    KILL_VERIFY_DEADLINE, RPC_DEADLINE, WORKER_GENERATION,
};
use aegis_wire::channel::{Own, Run};
use aegis_wire::egress::HostName;
use aegis_wire::words::{CpuMillis, DurationMs, EgressBytes, InstanceId, MemoryMb, Usage};
use aegis_wire::worker::{
    Committed, Disk, Egress, From, Golden, GoldenReady, Launch, Lend, Reap, Reaped, Request,
    Sample, Trimmed,
};

use super::environment::{environment, note_injected};
use super::image;
use super::pool::Pool;
use super::worker::{self, Connection, WorkerError};
use crate::ctx::Ctx;
use crate::images::Image;
use crate::workspaces::Workspaces;
use crate::{keys, ledger};

/// Memory goes to disk, or comes from there, within this.
const SUSPEND_DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

/// Name of the cgroup of an instance: homes do not meet.
pub(super) fn cgroup(ctx: &Ctx, instance: &str) -> String {
    let home = keys::hash(&ctx.config.home.to_string_lossy());
    format!("aegis/{}/{instance}", aegis_rules::audit::hex(&home.0[..4]))
}

/// A worker's sample as the rules count.
pub(super) fn usage(sample: &Sample) -> Usage {
    Usage {
        cpu_ns: sample.cpu_ns,
        memory_peak_bytes: sample.memory_peak_bytes,
        disk_bytes: sample.disk_bytes,
        // Where nobody could look, all that it was allowed counts.
        egress: sample.egress_bytes.unwrap_or(EgressBytes(u64::MAX)),
        uptime: DurationMs(sample.uptime_ms),
        ..Usage::default()
    }
}

/// Gets a worker, started now or before, and says launch; what follows on the connection is its
/// watch.
pub(super) async fn launch(
    ctx: &Ctx,
    pool: &Pool,
    instance: &Instance,
    token: String,
) -> Result<Connection, WorkerError> {
    let program = |e: std::io::Error| WorkerError::Program(e.to_string());
    let spec = &instance.spec;
    let dir = ctx.instance_dir(&instance.id);
    let log_dir = dir.join("logs");
    std::fs::create_dir_all(&log_dir).map_err(program)?;
    let machines = &ctx.config.machines;
    let egress = egress(ctx, instance).map_err(|e| WorkerError::Program(e.to_string()))?;
    let image = image::pinned(ctx, instance)?;
    let environment = environment(ctx, instance, &image.run)?;
    // Before a machine has any of it.
    note_injected(ctx, &instance.id, environment.injected.as_ref())?;
    let launch = Launch {
        generation: WORKER_GENERATION,
        instance_id: instance.id.clone(),
        golden: golden(ctx, spec, &image),
        cpu: spec.cpu,
        disk: Disk { path: ctx.disk(&instance.id), bytes: spec.disk },
        from: spec
            .origin
            .as_ref()
            .map(|origin| From { dir: ctx.commits.place(&origin.commit), memory: origin.memory }),
        cgroup: cgroup(ctx, instance.id.as_str()),
        require_limits: machines.require_limits,
        hostname: hostname(instance),
        boot_id: keys::uuid().map_err(program)?,
        run: Run {
            command: spec.command.clone(),
            env: environment.vars,
            cwd: spec.cwd.clone().or_else(|| image.cwd()),
            user: image.run.user.clone(),
            attach: spec.attach,
            expose_ports: spec.exposes.iter().map(|e| e.guest_port.get()).collect(),
            own: Own {
                capability_token: Some(token),
                authorized_key: spec.authorized_key.clone(),
                ca_certificate: authority(ctx, instance, &egress)?,
                // The worker says so, once it has the folder.
                workspace: None,
            },
        },
        egress,
        await_port: spec.await_port.map(|p| p.get()),
        log_dir,
        workspace: workspace(ctx, spec)?,
    };
    if launch.from.is_none() {
        // The next one will most likely be like this one.
        pool.wish(launch.golden.clone(), spec.disk);
    }
    // A disk that was used before, or is a commit's, is not a spare's.
    if launch.from.is_none()
        && !launch.disk.path.exists()
        && let Some(connection) = pool.launch(&launch).await
    {
        return Ok(connection);
    }
    worker::start(ctx, &instance.id).map_err(program)?;
    worker::say(ctx, &instance.id, &Request::Launch(Box::new(launch))).await
}

/// The folder that a machine gets, made if it is a named one.
fn workspace(ctx: &Ctx, spec: &Spec) -> Result<Option<Lend>, WorkerError> {
    let Some(folder) = &spec.given.workspace else { return Ok(None) };
    let path = PathBuf::from(&folder.path);
    let made = Workspaces::of(&ctx.config.home).provide(&path);
    made.map_err(|e| WorkerError::Program(format!("its workspace {}: {e}", path.display())))?;
    Ok(Some(Lend { path, read_only: folder.read_only }))
}

/// The certificate of the machine's own authority, for the hosts whose TLS goes through its hatch.
fn authority(
    ctx: &Ctx,
    instance: &Instance,
    terms: &Egress,
) -> Result<Option<String>, WorkerError> {
    if !terms.via_door_tls {
        return Ok(None);
    }
    let hosts = terms.via_door.iter().filter_map(|host| host.parse().ok());
    let hosts: Vec<HostName> = hosts.filter(is_outside).collect();
    if hosts.len() > CA_HOSTS_MAX {
        let message = format!("its proxy secrets name more than {CA_HOSTS_MAX} hosts");
        return Err(WorkerError::Program(message));
    }
    let authorities = &ctx.keys.authorities;
    let signed = authorities.certificate(&instance.id, &hosts, ctx.now(), instance.ends_at);
    signed.map(Some).map_err(|e| WorkerError::Program(e.to_string()))
}

/// Whether a host is none of this host's doors, which speak plain HTTP only.
fn is_outside(host: &HostName) -> bool {
    !host.is_below("aegis")
}

/// What a machine is cloned from.
pub(super) fn golden(ctx: &Ctx, spec: &Spec, image: &Image) -> Golden {
    golden_of(ctx, image, spec.cpu, spec.memory)
}

/// Makes sure that there is what machines of this kind are cloned from.
pub async fn warm(
    ctx: &Ctx,
    image: &Image,
    cpu: CpuMillis,
    memory: MemoryMb,
) -> Result<GoldenReady, WorkerError> {
    worker::golden(ctx, &golden_of(ctx, image, cpu, memory)).await
}

fn golden_of(ctx: &Ctx, image: &Image, cpu: CpuMillis, memory: MemoryMb) -> Golden {
    let machines = &ctx.config.machines;
    Golden {
        dir: ctx.config.home.join("golden"),
        qemu: machines.qemu.clone(),
        kernel: machines.kernel.clone(),
        modules: machines.modules.clone(),
        harness: machines.programs.join("aegis-harness"),
        mcp: machines.programs.join("aegis-mcp-guest"),
        base: image.base.clone(),
        vcpus: cpu.vcpus(),
        memory,
        accel: machines.accel,
    }
}

/// A host name has at most 63 of letters, digits and `-`.
fn hostname(instance: &Instance) -> String {
    let name: String = instance
        .name()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(63)
        .collect();
    name.trim_matches('-').to_owned()
}

/// What a machine may reach and send now, as its tree's records say.
pub(super) fn egress(ctx: &Ctx, instance: &Instance) -> Result<Egress, ledger::Error> {
    ctx.ledger.read(|facts| {
        let family = facts.family(&instance.tree)?;
        let own = find(&family, &instance.id).unwrap_or(instance);
        let reach = ctx.reach(facts, &family, &instance.id)?;
        let via_door = reach.via_hatch.iter().map(ToString::to_string).collect();
        Ok(Egress {
            policy: policy(&family, &instance.id, reach.services, reach.llm),
            ceiling: allowance::ceiling(&family, &instance.id),
            last: matches!(allowance::more(&family, &instance.id), More::Spent(_)),
            version: own.egress_version,
            via_door_tls: ctx.config.tls_ca && reach.via_hatch.iter().any(is_outside),
            via_door,
            resolvers: ctx.config.resolvers.clone(),
        })
    })
}

/// Tells a machine's gateway what it may let through.
pub(super) async fn say_egress(
    ctx: &Ctx,
    id: &InstanceId,
    terms: &Egress,
) -> Result<(), WorkerError> {
    let request = Request::Egress(Box::new(terms.clone()));
    worker::ask(ctx, id, &request, RPC_DEADLINE).await.map(drop)
}

/// Sets a machine's CPU quota.
pub(super) async fn say_quota(
    ctx: &Ctx,
    id: &InstanceId,
    cpu: CpuMillis,
) -> Result<(), WorkerError> {
    worker::ask(ctx, id, &Request::Quota { cpu }, RPC_DEADLINE).await.map(drop)
}

/// Takes back what a machine may send; returns what it has sent.
pub(super) async fn trim_egress(
    ctx: &Ctx,
    id: &InstanceId,
    version: u64,
) -> Result<EgressBytes, WorkerError> {
    let mut connection =
        worker::ask(ctx, id, &Request::TrimEgress { version }, RPC_DEADLINE).await?;
    let line = tokio::time::timeout(RPC_DEADLINE, worker::read_line::<_, Trimmed>(&mut connection));
    let said = line.await.map_err(|_| WorkerError::Deadline(RPC_DEADLINE))?;
    let trimmed = said.map_err(WorkerError::Gone)?;
    Ok(trimmed.ok_or_else(|| WorkerError::Gone(std::io::ErrorKind::UnexpectedEof.into()))?.ceiling)
}

pub(super) async fn freeze(ctx: &Ctx, instance: &Instance) -> Result<(), WorkerError> {
    worker::ask(ctx, &instance.id, &Request::Freeze { cut: false }, RPC_DEADLINE).await.map(drop)
}

pub(super) async fn thaw(ctx: &Ctx, instance: &Instance) -> Result<(), WorkerError> {
    worker::ask(ctx, &instance.id, &Request::Thaw, SUSPEND_DEADLINE).await.map(drop)
}

/// Keeps a machine's disk, and its memory, in a directory.
pub async fn commit(
    ctx: &Ctx,
    id: &InstanceId,
    dir: PathBuf,
    memory: bool,
    durable: bool,
) -> Result<Committed, WorkerError> {
    let request = Request::Commit { dir, memory, durable };
    let mut connection = worker::ask(ctx, id, &request, COMMIT_DEADLINE + RPC_DEADLINE).await?;
    let made: Option<Committed> =
        worker::read_line(&mut connection).await.map_err(WorkerError::Gone)?;
    made.ok_or_else(|| WorkerError::Gone(std::io::ErrorKind::UnexpectedEof.into()))
}

/// Puts the memory of a machine that stands still on disk.
pub(super) async fn suspend(ctx: &Ctx, instance: &Instance) -> Result<(), WorkerError> {
    worker::ask(ctx, &instance.id, &Request::Suspend, SUSPEND_DEADLINE).await.map(drop)
}

/// Ends the machine in order; one whose memory is on disk wakes before. What it leaves is cleared by
/// the next step.
pub(super) async fn shutdown(
    ctx: &Ctx,
    instance: &Instance,
    suspended: bool,
) -> Result<(), WorkerError> {
    let grace_ms = u64::try_from(GUEST_STOP_GRACE.as_millis()).unwrap_or(u64::MAX);
    let waking = if suspended { SUSPEND_DEADLINE } else { std::time::Duration::ZERO };
    let deadline = HOST_STOP_DEADLINE + waking;
    worker::ask(ctx, &instance.id, &Request::Stop { grace_ms }, deadline).await.map(drop)
}

/// Removes what an ended machine left, but its disk.
pub(super) async fn clear(ctx: &Ctx, instance: &Instance) -> Result<Fact, WorkerError> {
    let reaped = reap(ctx, &instance.id, false).await?;
    if !reaped.remaining.is_empty() {
        return Err(WorkerError::Program(format!("reap: {}", reaped.remaining.join("; "))));
    }
    Ok(Fact::Cleared { usage: reaped.usage.as_ref().map(usage) })
}

/// Freezes, destroys, proves. The freeze is short and best effort: what can't be frozen in time is
/// destroyed all the same.
pub(super) async fn destroy(ctx: &Ctx, instance: &Instance) -> Result<Fact, WorkerError> {
    let frozen =
        worker::ask(ctx, &instance.id, &Request::Freeze { cut: true }, KILL_FREEZE_DEADLINE)
            .await
            .is_ok();
    let frozen_at = frozen.then(|| ctx.now());
    let reaped = reap(ctx, &instance.id, true).await?;
    if reaped.remaining.is_empty() && instance.guest.is_none() {
        // The record goes too; what is answered as deleted leaves nothing.
        forget(ctx, &instance.id);
    }
    Ok(Fact::Destroyed {
        frozen_at,
        usage: reaped.usage.as_ref().map(usage),
        verified: reaped.verified,
        remaining: reaped.remaining,
    })
}

/// Removes what was kept for a record that is no longer kept: its logs.
pub(super) fn forget(ctx: &Ctx, id: &InstanceId) {
    let dir = ctx.instance_dir(id);
    match std::fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(instance = %id, %error, "{} stays", dir.display());
        }
        _ => {}
    }
}

/// Removes a machine that no record bears, a spare or what is left of one; `disk` says whether a disk
/// may be there.
pub(super) async fn reap_stray(ctx: &Ctx, id: &InstanceId, disk: bool) {
    match reap(ctx, id, disk).await {
        Ok(reaped) if reaped.remaining.is_empty() => {}
        Ok(reaped) => tracing::error!(machine = %id, remaining = ?reaped.remaining, "it stays"),
        Err(error) => tracing::error!(machine = %id, %error, "it stays"),
    }
}

async fn reap(ctx: &Ctx, id: &InstanceId, disk: bool) -> Result<Reaped, WorkerError> {
    let deadline_ms = u64::try_from(KILL_VERIFY_DEADLINE.as_millis()).unwrap_or(u64::MAX);
    let ask = Reap {
        run_dir: ctx.run_dir(id),
        cgroup: cgroup(ctx, id.as_str()),
        disk: disk.then(|| ctx.disk(id)),
        deadline_ms,
    };
    worker::reap(ctx, &ask).await
}
