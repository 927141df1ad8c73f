//! What a machine may ask for (contracts/aegis.md 3, seeds/002 "Validation Flow").
//!
//! One pure function: claims × records × request → [`Grant`] or a refusal that says the rule, what
//! was asked for and what would pass. The signature was verified before there were [`Claims`] (step
//! 1); everything else is here. Its answer holds for the transaction whose records it was given.

use crate::capability::{
    Capabilities, CapabilityAsk, PATTERN_MAX, Workspace, WorkspaceAsk, narrow,
};
use crate::change::Change;
use crate::egress::{EgressAsk, ServiceName};
use crate::envelope::{self, Draw, EnvelopeAsk};
use crate::given;
use crate::guest::Guest;
use crate::instance::{
    Asked, Expose, Instance, InstanceState, Spec, Verb, Wanted, ask, children, find,
};
use crate::refusal::{Code, Refusal};
use crate::request::{self, Wish};
use crate::spawn::Permit;
use crate::words::{DiskBytes, DurationMs, InstanceId, Port, Time};

/// Longest lease.
pub const LEASE_MAX: DurationMs = DurationMs(24 * DurationMs::HOUR);
/// Longest reason of a lease, characters.
pub const REASON_MAX: usize = 200;

/// What a token says whose signature is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Whose it is.
    pub sub: InstanceId,
    /// When it ends.
    pub exp: Time,
    /// Its name.
    pub jti: String,
    /// What it permits.
    pub cap: Capabilities,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The instance over whose machine's channel the request came.
    pub channel: &'a InstanceId,
    /// What the token says that came with it.
    pub claims: &'a Claims,
    /// All records of the tree of `channel`; none where it has no record.
    pub family: &'a [Instance],
    /// The guest of `channel`, where it has one.
    pub guest: Option<&'a Guest>,
}

/// A child that is asked for, parsed; defaults are filled in, and checked like what was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct SpawnAsk {
    /// What it is made of.
    pub spec: Spec,
    /// Host services; absent is its parent's.
    pub services: Option<Vec<ServiceName>>,
    /// Its workspace.
    pub workspace: Option<WorkspaceAsk>,
    /// What it may do.
    pub capabilities: CapabilityAsk,
    /// What it and its descendants may hold and spend.
    pub envelope: EnvelopeAsk,
    /// What it and its descendants may reach, of what its parent may.
    pub egress: EgressAsk,
}

/// What is asked for. A child is named by id or handle.
#[derive(Clone, Debug, PartialEq)]
pub enum Request<'a> {
    /// To see itself.
    SelfInfo,
    /// To see its children.
    List,
    /// To see a child.
    Get(&'a str),
    /// To read a child's logs.
    Logs(&'a str),
    /// To start a stopped child.
    Start(&'a str),
    /// To stop a child.
    Stop(&'a str),
    /// To delete a child.
    Delete(&'a str),
    /// To run a command in a child.
    Exec(&'a str, &'a [String]),
    /// To look at a child's files; or to change them: then `what` says it.
    Files {
        /// The child.
        child: &'a str,
        /// One word and the path, for the trail.
        what: Option<&'a str>,
    },
    /// To have one more child.
    Spawn(Box<SpawnAsk>),
    /// Not to be paused for idleness.
    Keepalive {
        /// For how long.
        ttl: DurationMs,
        /// For people.
        reason: Option<String>,
    },
    /// To be paused again.
    ReleaseKeepalive,
    /// That one of its ports may be reached.
    Expose(Expose),
    /// That it may not any more.
    Unexpose(Port),
    /// That the host gives it more.
    Access {
        /// Of what.
        wish: Wish,
        /// For people.
        reason: Option<String>,
    },
}

/// A yes.
#[derive(Clone, Debug, PartialEq)]
pub enum Grant {
    /// It may see itself.
    Own,
    /// It may see these children.
    Children(Vec<InstanceId>),
    /// It may see this child.
    Child(InstanceId),
    /// This is to be written, for the caller itself or one of its children.
    Changes {
        /// Whom it is about.
        id: InstanceId,
        /// What; empty where it is so already.
        changes: Vec<Change>,
    },
    /// It may have one more child.
    Spawn(Box<Permit>),
}

/// Judges a request from inside of a machine.
pub fn authorize(call: &Call<'_>, request: Request<'_>, now: Time) -> Result<Grant, Refusal> {
    let caller = identify(call, now)?;
    // The token never permits more than the record does.
    let may = caller.capabilities.meet(&call.claims.cap);
    let own = |changes| Ok(Grant::Changes { id: caller.id.clone(), changes });
    match request {
        Request::SelfInfo => Ok(Grant::Own),
        Request::List => {
            let all = children(call.family, &caller.id).filter(|c| is_visible(c));
            Ok(Grant::Children(all.map(|c| c.id.clone()).collect()))
        }
        Request::Get(name) | Request::Logs(name) => {
            Ok(Grant::Child(child(call, caller, name)?.id.clone()))
        }
        Request::Start(name) => {
            let child = child(call, caller, name)?;
            if child.wanted == Wanted::Stopped {
                may_spawn(&may)?;
                room_for_child(call, caller, &may)?;
            }
            act(call, child, Verb::Start, now)
        }
        Request::Stop(name) => act(call, child(call, caller, name)?, Verb::Stop, now),
        Request::Delete(name) => act(call, child(call, caller, name)?, Verb::Delete, now),
        Request::Exec(name, command) => {
            let child = child(call, caller, name)?;
            let mut grant = act(call, child, Verb::Exec, now)?;
            if let Grant::Changes { changes, .. } = &mut grant {
                changes.push(Change::ChildExec {
                    id: child.id.clone(),
                    parent: caller.id.clone(),
                    command: command.to_vec(),
                    at: now,
                });
            }
            Ok(grant)
        }
        Request::Files { child: name, what } => {
            let child = child(call, caller, name)?;
            let mut grant = act(call, child, Verb::Exec, now)?;
            if let (Grant::Changes { changes, .. }, Some(what)) = (&mut grant, what) {
                let (id, parent) = (child.id.clone(), caller.id.clone());
                changes.push(Change::ChildFiles { id, parent, what: what.to_owned(), at: now });
            }
            Ok(grant)
        }
        Request::Spawn(ask) => {
            spawn(call, caller, &may, *ask, now).map(|p| Grant::Spawn(Box::new(p)))
        }
        Request::Keepalive { ttl, reason } => own(vec![keepalive(caller, ttl, reason, now)?]),
        Request::ReleaseKeepalive => match caller.lease {
            Some(_) => own(vec![Change::LeaseReleased { id: caller.id.clone(), at: now }]),
            None => own(vec![]),
        },
        Request::Expose(asked) => own(expose(caller, &may, asked, now)?),
        Request::Unexpose(guest_port) => {
            if !caller.spec.exposes.iter().any(|e| e.guest_port == guest_port) {
                let message = format!("port {guest_port} is not exposed");
                return Err(Refusal::new(Code::InstanceNotFound, message));
            }
            own(vec![Change::InstanceUnexposed { id: caller.id.clone(), guest_port, at: now }])
        }
        Request::Access { wish, reason } => {
            own(request::raise(call.guest, &caller.id, wish, reason, now)?)
        }
    }
}

/// Whose token it is, whether it holds now, and whether its machine runs (steps 2 and "state").
fn identify<'a>(call: &Call<'a>, now: Time) -> Result<&'a Instance, Refusal> {
    let claims = call.claims;
    if claims.sub != *call.channel {
        return Err(Refusal::denied("sub", "this token belongs to another instance"));
    }
    if now >= claims.exp {
        return Err(Refusal::denied("exp", "this token's time is over"));
    }
    let caller = find(call.family, call.channel)
        .ok_or_else(|| Refusal::denied("sub", "this token's instance has ended"))?;
    if caller.jti.as_deref() != Some(claims.jti.as_str()) {
        let refusal = Refusal::denied("jti", "this token was replaced by another one");
        return Err(refusal.hint("a machine gets its new token by itself; ask again"));
    }
    let guest_lives = match (&caller.guest, call.guest) {
        (None, _) => true,
        (Some(id), Some(guest)) => *id == guest.id && guest.status_at(now).is_live(),
        (Some(_), None) => false,
    };
    if !guest_lives || caller.is_over(now) {
        return Err(Refusal::denied("exp", "the time of this instance's envelope is over"));
    }
    // One that starts calls before the port is open that is awaited.
    if caller.wanted != Wanted::Running || !caller.is_live() {
        let refusal = Refusal::new(Code::InstanceState, "this instance is not running");
        return Err(refusal.rule("state").amounts(caller.wanted.word(), "running"));
    }
    Ok(caller)
}

fn is_visible(child: &Instance) -> bool {
    child.state != InstanceState::Gone && child.wanted != Wanted::Gone
}

/// A child by id or handle; whether anything else of that name exists is never told.
fn child<'a>(call: &Call<'a>, caller: &'a Instance, name: &str) -> Result<&'a Instance, Refusal> {
    children(call.family, &caller.id)
        .filter(|c| is_visible(c))
        .find(|c| {
            c.id.as_str() == name || c.spec.handle.as_ref().is_some_and(|h| h.as_str() == name)
        })
        .ok_or_else(|| {
            Refusal::new(Code::InstanceNotFound, "instance not found among your children")
                .hint("GET /v1/instances lists them")
        })
}

fn act(call: &Call<'_>, child: &Instance, verb: Verb, now: Time) -> Result<Grant, Refusal> {
    let changes = match ask(child, call.guest, call.family, verb, now)? {
        Asked::Already => vec![],
        Asked::Yes(changes) => changes,
    };
    Ok(Grant::Changes { id: child.id.clone(), changes })
}

/// Steps 3 and 4.
fn may_spawn(may: &Capabilities) -> Result<(), Refusal> {
    if !may.spawn {
        return Err(Refusal::denied("spawn", "this instance may not have children")
            .amounts("true", "false")
            .hint("do the work in this machine; only the host can let it spawn"));
    }
    if may.spawn_depth == 0 {
        return Err(Refusal::denied("spawn_depth", "no deeper level of instances is allowed")
            .amounts("1", "0")
            .hint("let an instance nearer to the root spawn it"));
    }
    Ok(())
}

/// Step 5.
fn room_for_child(call: &Call<'_>, caller: &Instance, may: &Capabilities) -> Result<(), Refusal> {
    let live = children(call.family, &caller.id).filter(|c| c.is_live() || !c.is_ending()).count();
    if live >= may.max_children as usize {
        return Err(Refusal::denied(
            "max_children",
            format!("this instance has {live} live children of at most {}", may.max_children),
        )
        .amounts((live + 1).to_string(), may.max_children.to_string())
        .hint("stop or delete a child first"));
    }
    Ok(())
}

fn spawn(
    call: &Call<'_>,
    caller: &Instance,
    may: &Capabilities,
    asked: SpawnAsk,
    now: Time,
) -> Result<Permit, Refusal> {
    may_spawn(may)?;
    room_for_child(call, caller, may)?;
    let workspace = within_claims(may, &asked)?;
    let SpawnAsk { mut spec, services, capabilities, envelope: limits, egress, .. } = asked;
    spec.given.services = given::services_of_child(&caller.spec.given, services)?;
    // A default that was cut down to what is left must not become a machine without a disk.
    spec.disk = spec.disk.max(DiskBytes::LEAST);
    if let Some(expose) = spec.exposes.iter().find(|e| e.public_port.is_some()) {
        let field = format!("exposes[{}].public_port", expose.guest_port);
        return Err(Refusal::field(field, "left out: the host chooses its own ports"));
    }
    let capabilities = narrow(may, &capabilities)?;

    let mut envelope = envelope::narrow(&caller.envelope, &limits);
    let ends = limits.duration.map(|length| now.plus(length));
    let ends_at = caller.ends_at.into_iter().chain(ends).min();
    if let Some(end) = ends_at {
        envelope.duration = end.since(now);
    }
    envelope::admit(call.family, &caller.id, &Draw::of_new(&spec))?;
    envelope::holds(&envelope, &spec)?;
    Ok(Permit {
        parent: caller.id.clone(),
        tree: caller.tree.clone(),
        guest: caller.guest.clone(),
        spec,
        capabilities,
        envelope,
        egress: egress.granted(),
        ends_at,
        workspace,
    })
}

/// Steps 6 to 9.
fn within_claims(may: &Capabilities, asked: &SpawnAsk) -> Result<Option<Workspace>, Refusal> {
    let spec = &asked.spec;
    if !may.allows_image(&spec.image) {
        return Err(Refusal::denied(
            "allowed_images",
            format!("image {} is not allowed for children of this instance", spec.image),
        )
        .amounts(spec.image.as_str(), listed(&may.allowed_images))
        .hint("set image_ref to an allowed image"));
    }
    let most = |rule, what: &str, asked: f64, allowed: f64| {
        let (asked, allowed) = (crate::words::Number(asked), crate::words::Number(allowed));
        Refusal::denied(rule, format!("a child may have at most {allowed} {what}, not {asked}"))
            .amounts(asked.to_string(), allowed.to_string())
    };
    if spec.memory > may.max_memory {
        let (asked, allowed) = (f64::from(spec.memory.0), f64::from(may.max_memory.0));
        return Err(most("max_memory_mb", "MB of memory", asked, allowed)
            .hint("set memory_mb to what is allowed"));
    }
    if !may.allows_cpu(spec.cpu) {
        return Err(most("max_vcpus", "virtual CPUs", spec.cpu.cores(), may.max_vcpus.into())
            .hint("set vcpus to what is allowed"));
    }
    if spec.exposes.len() > may.max_expose_ports as usize {
        let asked = spec.exposes.len() as f64;
        return Err(most("max_expose_ports", "exposed ports", asked, may.max_expose_ports.into())
            .hint("expose fewer ports"));
    }
    let secrets = asked.spec.given.secrets.texts();
    if let Some(secret) = may.forbidden_secret(&secrets) {
        return Err(Refusal::denied(
            "allowed_secrets",
            format!("secret {} may not be given to children of this instance", brief(secret)),
        )
        .amounts(brief(secret), listed(&may.allowed_secrets))
        .hint("leave it out"));
    }
    asked
        .workspace
        .as_ref()
        .map(|asked| {
            may.workspace(asked).ok_or_else(|| {
                Refusal::denied(
                    "allowed_workspaces",
                    format!("workspace {} may not be given to children", brief(&asked.given)),
                )
                .amounts(brief(&asked.given), listed(&may.allowed_workspaces))
                .hint("give an existing directory that is allowed, or one below /workspace")
            })
        })
        .transpose()
}

/// What a machine wrote, short enough to be said again.
fn brief(text: &str) -> String {
    text.chars().take(PATTERN_MAX).collect()
}

fn listed(allowed: &[String]) -> String {
    if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") }
}

fn keepalive(
    caller: &Instance,
    ttl: DurationMs,
    reason: Option<String>,
    now: Time,
) -> Result<Change, Refusal> {
    if ttl.0 == 0 || ttl > LEASE_MAX {
        return Err(Refusal::out_of_range(
            "ttl_ms".to_owned(),
            ttl.0.to_string(),
            format!("a whole number from 1 to {}", LEASE_MAX.0),
        ));
    }
    if reason.as_ref().is_some_and(|r| r.chars().count() > REASON_MAX) {
        return Err(Refusal::field("reason", format!("at most {REASON_MAX} characters")));
    }
    let asked = now.plus(ttl);
    let expires_at = caller.ends_at.map_or(asked, |end| end.min(asked));
    Ok(Change::LeaseHeld { id: caller.id.clone(), reason, expires_at, at: now })
}

fn expose(
    caller: &Instance,
    may: &Capabilities,
    asked: Expose,
    now: Time,
) -> Result<Vec<Change>, Refusal> {
    if asked.public_port.is_some() {
        return Err(Refusal::field("public_port", "left out: the host chooses its own ports"));
    }
    let exposes = &caller.spec.exposes;
    let there = exposes.iter().find(|e| e.guest_port == asked.guest_port);
    if there.is_some_and(|e| e.protocol == asked.protocol) {
        return Ok(vec![]);
    }
    if there.is_none() && exposes.len() >= may.max_expose_ports as usize {
        let (asked, allowed) = (exposes.len() + 1, may.max_expose_ports);
        return Err(Refusal::denied(
            "max_expose_ports",
            format!("this instance may have at most {allowed} exposed ports"),
        )
        .amounts(asked.to_string(), allowed.to_string())
        .hint("unexpose another port first"));
    }
    let expose = Expose { public_port: there.and_then(|e| e.public_port), ..asked };
    Ok(vec![Change::InstanceExposed { id: caller.id.clone(), expose, at: now }])
}

#[cfg(test)]
mod tests;
