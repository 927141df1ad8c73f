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

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SecretsSection {
    /// Whether placeholders work inside of TLS.
    #[serde(default)]
    pub(super) tls_ca: bool,
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

#[cfg(test)]
mod tests {
    use super::*;

    const PROVIDER: &str =
        "kind = 'openai'\nbase_url = 'http://127.0.0.1:1/v1/'\nmodels = ['gpt-*']";

    fn read(name: &str, section: &str) -> Result<Vec<Provider>, BadConfig> {
        let text = format!("[providers.{name}]\n{section}");
        providers(toml::from_str(&text).map_err(|e| bad("aegis.toml", e))?)
    }

    #[test]
    fn a_provider_is_read() {
        let local = read("local", PROVIDER).unwrap().remove(0);
        assert_eq!((local.name.as_str(), local.vendor), ("local", Vendor::OpenAi));
        assert_eq!((local.base_url.as_str(), &local.secret), ("http://127.0.0.1:1/v1", &None));
        assert!(local.models.admit("gpt-5") && !local.models.admit("o3"));
        let anthropic = "kind = 'anthropic'\nbase_url = 'https://x/v1'\nmodels = []\nsecret = 'K'";
        let anthropic = read("a", anthropic).unwrap().remove(0);
        assert_eq!(anthropic.base_url, "https://x");
        assert!(!anthropic.models.admit("claude"), "an empty list allows nothing");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (name, change, setting) in [
            ("v1", "", "llm.providers.v1"),
            ("Up", "", "llm.providers.Up"),
            ("x", "secret = 'lower'", "llm.providers.x.secret"),
            ("x", "default_output_tokens = 0", "llm.providers.x.default_output_tokens"),
            ("x", "key = 'sk'", "aegis.toml"),
        ] {
            let wrong = read(name, &format!("{PROVIDER}\n{change}")).unwrap_err();
            assert_eq!(wrong.setting, setting, "{change}");
        }
        for url in ["ftp://x", "https://key@x", "https://x?key=1", "x", ""] {
            let section = format!("kind = 'openai'\nbase_url = '{url}'\nmodels = []");
            let wrong = read("x", &section).unwrap_err();
            assert_eq!(wrong.setting, "llm.providers.x.base_url", "{url}");
        }
        assert!(read("x", "kind = 'openai'\nbase_url = 'http://x'").is_err(), "models are named");
    }

    #[test]
    fn services_have_labels_and_addresses() {
        let read = |text: &str| services(toml::from_str(text).map_err(|e| bad("aegis.toml", e))?);
        assert_eq!(read("[web]\naddr = '[::1]:1'").unwrap().len(), 1);
        for wrong in ["[UP]\naddr = '1.2.3.4:1'", "[x]\naddr = 'here'", "[x]\naddr = 'host:1'"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
