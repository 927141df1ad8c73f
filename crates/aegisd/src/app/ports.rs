//! Exposed ports: opened at once where a machine is or will be, recorded so that they stay.

use std::io;

use aegis_rules::change::Change;
use aegis_rules::instance::{Expose, Instance, InstanceState, Wanted};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::EXPOSES_MAX;
use aegis_wire::host::Endpoint;
use aegis_wire::words::{InstanceId, Port};

use super::{App, Error, Host, instance_not_found, instances};

/// Lets the outside reach a port of an instance; a stopped one's is kept for its next start.
pub async fn expose(host: Host, app: &App, name: &str, ask: Expose) -> Result<Endpoint, Error> {
    let instance = instances::find(host, app, name)?;
    may_change(&instance)?;
    let there = instance.spec.exposes.iter().find(|e| e.guest_port == ask.guest_port);
    if let Some(there) = there {
        let same = ask.public_port.is_none() || ask.public_port == there.public_port;
        if !same {
            let message = format!("port {} is exposed already", ask.guest_port);
            let mut refusal = Refusal::new(Code::InstanceState, message)
                .hint("unexpose it first, or leave public_port out");
            refusal.field = Some("public_port".to_owned());
            return Err(refusal.into());
        }
        return endpoint(app, &instance.id, ask.guest_port).await;
    }
    if instance.spec.exposes.len() >= EXPOSES_MAX {
        let most = format!("one of at most {EXPOSES_MAX} exposed ports");
        return Err(Refusal::field("guest_port", most).into());
    }
    // Bound before it is recorded: whether a certain port is free is for the kernel to say.
    let public = app.router.open(&app.lifecycle, &instance.id, &ask).await.map_err(taken)?;
    let change = Change::InstanceExposed {
        id: instance.id.clone(),
        expose: Expose { public_port: Some(public), ..ask },
        at: app.ctx.now(),
    };
    let id = instance.id.clone();
    let written = app
        .ctx
        .ledger
        .write("host", move |facts| {
            may_change(&facts.instance(&id)?.ok_or_else(instance_not_found)?)?;
            Ok((vec![change], ()))
        })
        .await;
    if let Err(error) = written {
        app.router.close_port(&instance.id, ask.guest_port);
        return Err(error.into());
    }
    app.lifecycle.knock(&instance.id);
    endpoint(app, &instance.id, ask.guest_port).await
}

/// Takes that back.
pub async fn unexpose(host: Host, app: &App, name: &str, port: Port) -> Result<(), Error> {
    let instance = instances::find(host, app, name)?;
    let (id, at) = (instance.id.clone(), app.ctx.now());
    app.ctx
        .ledger
        .write("host", move |facts| {
            let now = facts.instance(&id)?.ok_or_else(instance_not_found)?;
            if !now.spec.exposes.iter().any(|e| e.guest_port == port) {
                return Err(not_exposed(port).into());
            }
            Ok((vec![Change::InstanceUnexposed { id, guest_port: port, at }], ()))
        })
        .await?;
    app.router.close_port(&instance.id, port);
    app.lifecycle.knock(&instance.id);
    Ok(())
}

fn may_change(instance: &Instance) -> Result<(), Refusal> {
    if instance.wanted == Wanted::Gone {
        return Err(Refusal::new(Code::InstanceState, "the instance is being destroyed"));
    }
    if instance.remote.is_some() {
        let message = "its machine is in another cloud: no port of this host leads there";
        return Err(Refusal::new(Code::NotEnforceable, message));
    }
    Ok(())
}

fn not_exposed(port: Port) -> Refusal {
    Refusal::new(Code::InstanceNotFound, format!("port {port} is not exposed"))
}

fn taken(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => {
            Refusal::field("public_port", "a port of the host that is free").into()
        }
        _ => error.into(),
    }
}

/// Opens and records public ports for those of an instance's ports that have none yet.
pub(super) async fn assign(app: &App, id: &InstanceId) -> Result<(), Error> {
    let Some(instance) = app.ctx.ledger.read(|f| f.instance(id))? else { return Ok(()) };
    if matches!(instance.state, InstanceState::Stopped | InstanceState::Gone) {
        return Ok(());
    }
    let mut changes = Vec::new();
    for expose in instance.spec.exposes.iter().filter(|e| e.public_port.is_none()) {
        let public_port = app.router.open(&app.lifecycle, id, expose).await?;
        let (id, guest_port) = (id.clone(), expose.guest_port);
        changes.push(Change::InstancePort { id, guest_port, public_port });
    }
    if !changes.is_empty() {
        app.ctx.ledger.write("aegisd", move |_| Ok((changes, ()))).await?;
    }
    Ok(())
}

/// Where an exposed port answers.
pub(super) async fn endpoint(app: &App, id: &InstanceId, port: Port) -> Result<Endpoint, Error> {
    assign(app, id).await?;
    let now = app.ctx.ledger.read(|f| f.instance(id))?.ok_or_else(instance_not_found)?;
    let host = app.ctx.config.ports_bind.to_string();
    let found = now.spec.exposes.iter().find(|e| e.guest_port == port);
    Ok(found.and_then(|e| Endpoint::new(e, &host)).ok_or_else(|| not_exposed(port))?)
}
