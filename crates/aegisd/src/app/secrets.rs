//! Secrets of the host (contracts/aegis.md 1): kept, listed by name, forgotten; and who gets which.

use aegis_rules::change::Change;
use aegis_rules::given::Secrets;
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::egress::HostName;
use aegis_wire::host::SecretShape;
use aegis_wire::words::SecretName;
use zeroize::Zeroizing;

use super::{App, Error, Host, instances};
use crate::ledger::{Facts, StoredSecret, WriteError};

fn not_found(name: &SecretName) -> Refusal {
    Refusal::new(Code::SecretNotFound, format!("this host keeps no secret {name}"))
}

/// Keeps a secret, in the place of an earlier one of its name. Machines that run keep what they got.
pub async fn set(
    _: Host,
    app: &App,
    name: SecretName,
    value: Zeroizing<String>,
    hosts: Option<Vec<HostName>>,
) -> Result<StoredSecret, Error> {
    let sealed = app.ctx.keys.vault.seal(&name, hosts.as_deref(), &value)?;
    let secret = StoredSecret { name, hosts, updated_at: app.ctx.now(), sealed };
    app.ctx.ledger.keep_secret("host", secret.clone()).await?;
    Ok(secret)
}

/// All of them.
pub fn list(_: Host, app: &App) -> Result<Vec<StoredSecret>, Error> {
    Ok(app.ctx.ledger.read(|f| f.secrets())?)
}

/// One of them.
pub fn get(_: Host, app: &App, name: &SecretName) -> Result<StoredSecret, Error> {
    Ok(app.ctx.ledger.read(|f| f.secret(name))?.ok_or_else(|| not_found(name))?)
}

/// Forgets one. Machines that run keep what they got; their next start fails, and says why.
pub async fn delete(_: Host, app: &App, name: SecretName) -> Result<(), Error> {
    let missing = not_found(&name);
    match app.ctx.ledger.forget_secret("host", name, app.ctx.now()).await? {
        true => Ok(()),
        false => Err(missing.into()),
    }
}

/// Refuses names that this host does not keep.
pub(super) fn check(facts: &Facts<'_>, secrets: &Secrets) -> Result<(), WriteError> {
    if *secrets == Secrets::default() {
        return Ok(());
    }
    let kept: Vec<SecretName> = facts.secrets()?.into_iter().map(|s| s.name).collect();
    match secrets.missing(|name| kept.contains(name)) {
        None => Ok(()),
        Some(name) => {
            let allowed = "names of secrets that this host keeps";
            let mut refusal = Refusal::field("secrets", allowed);
            refusal.message = format!("{refusal}; it keeps no {name}");
            refusal.requested = Some(name.to_string());
            Err(refusal.hint("the host sets one with `aegis secret set NAME`").into())
        }
    }
}

/// Replaces what an instance gets at its next start.
pub async fn inject(host: Host, app: &App, name: &str, secrets: Secrets) -> Result<(), Error> {
    let id = instances::find(host, app, name)?.id;
    let now = app.ctx.now();
    let written = app.ctx.ledger.write("host", move |facts| {
        check(facts, &secrets)?;
        match facts.instance(&id)? {
            None => Err(super::instance_not_found().into()),
            Some(of) if of.spec.given.secrets == secrets => Ok((vec![], ())),
            Some(_) => Ok((vec![Change::InstanceSecrets { id, secrets, at: now }], ())),
        }
    });
    Ok(written.await?)
}

impl From<StoredSecret> for SecretShape {
    fn from(secret: StoredSecret) -> SecretShape {
        SecretShape {
            name: secret.name.to_string(),
            proxy: secret.hosts.is_some(),
            hosts: secret.hosts.iter().flatten().map(ToString::to_string).collect(),
            updated_at: secret.updated_at,
        }
    }
}
