//! What machines may be given of this host: the providers behind the LLM door, and host services.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use aegis_rules::given::Models;
use aegis_wire::egress::ServiceName;
use aegis_wire::words::SecretName;
use hyper::Uri;
use serde::Deserialize;

use super::{BadConfig, bad};

/// Output of a call that names none, and where a provider's settings name none, tokens: what the
/// usual models take.
const OUTPUT_DEFAULT: u64 = 16_384;
/// The most that a provider's settings can name.
const OUTPUT_MAX: u64 = 1_000_000;

/// Which API a provider speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vendor {
    /// Chat completions and responses.
    OpenAi,
    /// Messages.
    Anthropic,
}

/// Somebody who sells or serves tokens.
#[derive(Clone, Debug)]
pub struct Provider {
    /// Its name here, and inside: `http://llm.aegis/NAME/…`.
    pub name: ServiceName,
    /// What it speaks.
    pub vendor: Vendor,
    /// Where; without a slash at the end.
    pub base_url: String,
    /// The secret that is its key; none for one that asks for none.
    pub secret: Option<SecretName>,
    /// What may be asked of it.
    pub models: Models,
    /// The most that a call may put out when it does not say how much, tokens.
    pub output: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LlmSection {
    #[serde(default)]
    providers: BTreeMap<String, ProviderSection>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProviderSection {
    kind: Vendor,
    base_url: String,
    secret: Option<String>,
    models: Vec<String>,
    default_output_tokens: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceSection {
    addr: SocketAddr,
}

/// The providers, by name.
pub(super) fn providers(said: LlmSection) -> Result<Vec<Provider>, BadConfig> {
    said.providers.into_iter().map(|(name, said)| provider(name, said)).collect()
}

fn provider(name: String, said: ProviderSection) -> Result<Provider, BadConfig> {
    let at = |field: &str| format!("llm.providers.{name}{field}");
    let label: ServiceName = name.parse().map_err(|e| bad(&at(""), e))?;
    // `/v1/…` without a name goes to the first provider of its kind.
    if name == "v1" {
        return Err(bad(&at(""), "v1 is no name for a provider"));
    }
    let base_url = said.base_url.trim_end_matches('/').to_owned();
    let plain = base_url.parse::<Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.authority().is_some_and(|a| !a.as_str().contains('@'))
            && uri.query().is_none()
    });
    if !plain {
        let form = "must be http://HOST or https://HOST, with or without a path, and nothing more";
        return Err(bad(&at(".base_url"), form));
    }
    // The paths of its API begin with the version, which some write here too.
    let base_url = match said.kind {
        Vendor::Anthropic => base_url.strip_suffix("/v1").unwrap_or(&base_url).to_owned(),
        Vendor::OpenAi => base_url,
    };
    let output = said.default_output_tokens.unwrap_or(OUTPUT_DEFAULT);
    if !(1..=OUTPUT_MAX).contains(&output) {
        let range = format!("must be from 1 to {OUTPUT_MAX}");
        return Err(bad(&at(".default_output_tokens"), range));
    }
    Ok(Provider {
        vendor: said.kind,
        base_url,
        secret: said
            .secret
            .map(|secret| secret.parse())
            .transpose()
            .map_err(|e| bad(&at(".secret"), e))?,
        models: Models::parse(said.models, "models").map_err(|e| bad(&at(""), e))?,
        output,
        name: label,
    })
}

/// The host services, by name.
pub(super) fn services(
    said: BTreeMap<String, ServiceSection>,
) -> Result<BTreeMap<ServiceName, SocketAddr>, BadConfig> {
    said.into_iter()
        .map(|(name, service)| {
            let at = format!("host_services.{name}");
            Ok((name.parse().map_err(|e| bad(&at, e))?, service.addr))
        })
        .collect()
}
