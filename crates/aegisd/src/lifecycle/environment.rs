//! The environment of a machine's primary process: its own, its secrets, and where the LLM door is.
//! Values are looked up at every start, handed to the worker, and written nowhere.

use std::collections::BTreeMap;

use aegis_rules::given::{self, Secrets};
use aegis_rules::instance::Instance;
use aegis_wire::bounds::SECRETS_INJECTED_MAX;
use aegis_wire::images::RunConfig;
use aegis_wire::words::{InstanceId, SecretName};

use super::worker::WorkerError;
use crate::config::Vendor;
use crate::ctx::Ctx;

/// Where the LLM door is, inside.
const LLM_URL: &str = "http://llm.aegis";
/// What stands in the place of a vendor's key: SDKs start, and the door drops it.
const DUMMY_KEY: &str = "aegis";

/// What a machine is given in its environment.
pub(super) struct Environment {
    /// Of its primary process.
    pub(super) vars: BTreeMap<String, String>,
    /// A secret whose value is among them, if there is one.
    pub(super) injected: Option<SecretName>,
}

/// What the primary process gets. What is in the instance's own environment stays; its image's lies
/// below all.
pub(super) fn environment(
    ctx: &Ctx,
    instance: &Instance,
    image: &RunConfig,
) -> Result<Environment, WorkerError> {
    let mut env = instance.spec.env.clone();
    let (mut bytes, mut injected) = (0, None);
    for name in names(ctx, &instance.spec.given.secrets)? {
        let (value, is_secret) = value(ctx, instance, &name)?;
        bytes += serde_json::to_string(&value).map_or(value.len(), |json| json.len());
        if is_secret {
            injected = Some(name.clone());
        }
        env.entry(name.into()).or_insert(value);
    }
    if bytes > SECRETS_INJECTED_MAX {
        return Err(failed(format!(
            "its secrets together have more than {SECRETS_INJECTED_MAX} bytes"
        )));
    }
    for (name, value) in llm(ctx, instance)? {
        env.entry(name).or_insert(value);
    }
    for (name, value) in &image.env {
        env.entry(name.clone()).or_insert_with(|| value.clone());
    }
    Ok(Environment { vars: env, injected })
}

/// Names, in an instance's directory, a secret whose value is in its machine.
const INJECTED: &str = "injected";

/// Writes down whether the machine that is about to start gets the value of a secret: what is kept of
/// its memory would hold it, whatever is said of the secret later.
pub(super) fn note_injected(
    ctx: &Ctx,
    id: &InstanceId,
    injected: Option<&SecretName>,
) -> Result<(), WorkerError> {
    let path = ctx.instance_dir(id).join(INJECTED);
    let noted = match injected {
        Some(name) => std::fs::write(path, name.as_str()),
        None => match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        },
    };
    noted.map_err(|e| failed(format!("what it is given can't be noted: {e}")))
}

/// A secret whose value is in the machine of an instance.
///
/// # Errors
/// Nobody can say.
pub fn injected(ctx: &Ctx, id: &InstanceId) -> std::io::Result<Option<SecretName>> {
    match std::fs::read_to_string(ctx.instance_dir(id).join(INJECTED)) {
        Ok(name) => name.parse().map(Some).map_err(std::io::Error::other),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn failed(why: impl Into<String>) -> WorkerError {
    WorkerError::Program(why.into())
}

fn names(ctx: &Ctx, secrets: &Secrets) -> Result<Vec<SecretName>, WorkerError> {
    match secrets {
        Secrets::Named(names) => Ok(names.clone()),
        Secrets::All => {
            let all = ctx.ledger.read(|f| f.secrets()).map_err(|e| failed(e.to_string()))?;
            Ok(all.into_iter().map(|s| s.name).collect())
        }
    }
}

/// What a machine gets of a secret: the secret, its placeholder, or nothing of a vendor's key; and
/// whether it is the secret itself.
fn value(ctx: &Ctx, instance: &Instance, name: &SecretName) -> Result<(String, bool), WorkerError> {
    if ctx.is_vendors_key(name) {
        // The door adds it on the host: so a kit that asks for it works, and is metered.
        return Ok((DUMMY_KEY.to_owned(), false));
    }
    let secret = ctx.secret(name).map_err(|e| failed(e.to_string()))?;
    let secret = secret.ok_or_else(|| failed(format!("this host keeps no secret {name}")))?;
    Ok(match secret.hosts {
        Some(_) => (ctx.keys.vault.placeholder(&instance.id, name), false),
        None => (secret.value.to_string(), true),
    })
}

fn llm(ctx: &Ctx, instance: &Instance) -> Result<Vec<(String, String)>, WorkerError> {
    let providers = &ctx.config.providers;
    let family =
        ctx.ledger.read(|f| f.family(&instance.tree)).map_err(|e| failed(e.to_string()))?;
    if providers.is_empty() || !given::has_llm(&family, &instance.id) {
        return Ok(Vec::new());
    }
    let mut vars = vec![("AEGIS_LLM_URL".to_owned(), LLM_URL.to_owned())];
    for (vendor, word, path) in
        [(Vendor::OpenAi, "OPENAI", "/v1"), (Vendor::Anthropic, "ANTHROPIC", "")]
    {
        let Some(first) = providers.iter().find(|p| p.vendor == vendor) else { continue };
        vars.push((format!("{word}_BASE_URL"), format!("{LLM_URL}/{}{path}", first.name)));
        vars.push((format!("{word}_API_KEY"), DUMMY_KEY.to_owned()));
    }
    Ok(vars)
}
