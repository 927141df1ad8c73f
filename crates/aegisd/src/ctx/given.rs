//! What machines are given of this host, looked up in ledger and settings.

use aegis_rules::given::{self, Reach};
use aegis_rules::instance::Instance;
use aegis_wire::egress::HostName;
use aegis_wire::words::{InstanceId, SecretName};
use zeroize::Zeroizing;

use super::Ctx;
use crate::ledger::{self, Facts};

/// A secret of the host, for whoever needs it now. It has no `Debug`.
pub struct Secret {
    /// The secret itself; wiped when it is dropped.
    pub value: Zeroizing<String>,
    /// Where its placeholder stands for it; `None` where machines get it as it is.
    pub hosts: Option<Vec<HostName>>,
}

impl Ctx {
    /// A secret of the host, opened.
    pub fn secret(&self, name: &SecretName) -> Result<Option<Secret>, ledger::Error> {
        let Some(stored) = self.ledger.read(|f| f.secret(name))? else { return Ok(None) };
        match self.keys.vault.open(name, stored.hosts.as_deref(), &stored.sealed) {
            Some(value) => Ok(Some(Secret { value, hosts: stored.hosts })),
            None => Err(ledger::Error::Damaged {
                table: "secret",
                id: name.to_string(),
                what: "it does not open with this home's master.key".to_owned(),
            }),
        }
    }

    /// Whether a secret is the key of a provider of the LLM door: no machine gets it.
    pub fn is_vendors_key(&self, name: &SecretName) -> bool {
        self.config.providers.iter().any(|p| p.secret.as_ref() == Some(name))
    }

    /// The proxy secrets of an instance: name, placeholder, and where it stands for the secret.
    pub fn placeholders(
        &self,
        facts: &Facts<'_>,
        instance: &Instance,
    ) -> Result<Vec<(SecretName, String, Vec<HostName>)>, ledger::Error> {
        let all = facts.secrets()?.into_iter();
        let own = all.filter(|s| instance.spec.given.secrets.have(&s.name));
        Ok(own
            .filter(|s| !self.is_vendors_key(&s.name))
            .filter_map(|s| {
                let text = self.keys.vault.placeholder(&instance.id, &s.name);
                Some((s.name, text, s.hosts?))
            })
            .collect())
    }

    /// What of this host an instance may reach now. `family` are all records of its tree.
    pub fn reach(
        &self,
        facts: &Facts<'_>,
        family: &[Instance],
        id: &InstanceId,
    ) -> Result<Reach, ledger::Error> {
        let proxied: Vec<(SecretName, Vec<HostName>)> = facts
            .secrets()?
            .into_iter()
            .filter(|s| !self.is_vendors_key(&s.name))
            .filter_map(|s| Some((s.name, s.hosts?)))
            .collect();
        let host = self.config.host_services.keys();
        let has_providers = !self.config.providers.is_empty();
        Ok(given::reach(family, id, host, has_providers, &proxied))
    }
}
