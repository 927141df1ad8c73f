//! The account in the vers cloud that this daemon has, if it has one.

use std::collections::BTreeMap;
use std::fs;

use aegis_rules::instance::Instance;
use aegis_rules::remote::{Label, Sighting};
use aegis_vers::{ApiKey, Client, VmDomain};
use aegis_wire::vers::Vm;
use anyhow::Context as _;
use tokio::sync::RwLock;

use crate::config::{Vers, VersKey};
use crate::keys::Keys;
use crate::roots;

/// Label of every machine of ours: which daemon's.
const HOST: &str = "aegis-host";
/// Label: of which instance here.
const INSTANCE: &str = "aegis-instance";
/// Label, for people: of which guest.
const GUEST: &str = "aegis-guest";

/// An account.
pub struct Cloud {
    /// Speaks for it.
    pub client: Client,
    /// The domain of its machines.
    pub domain: VmDomain,
    /// How patient we are.
    pub terms: Vers,
    /// Held for reading by whoever has a machine made, until it is claimed; for writing by whoever says
    /// what an unclear create came to, or what is nobody's.
    pub fence: RwLock<()>,
    mark: String,
}

impl Cloud {
    /// Opens the account that the settings name.
    pub fn open(terms: Vers, keys: &Keys) -> anyhow::Result<Cloud> {
        let key: ApiKey = match &terms.key {
            VersKey::Given(key) => key.clone(),
            VersKey::File(path) => {
                let text =
                    zeroize::Zeroizing::new(fs::read_to_string(path).with_context(|| {
                        format!("vers.api_key_file: cannot read {}", path.display())
                    })?);
                text.parse().with_context(|| format!("vers.api_key_file {}", path.display()))?
            }
        };
        Ok(Cloud {
            client: Client::new(&terms.base_url, &key, roots::client(), terms.deadlines),
            domain: terms.domain.clone(),
            terms,
            fence: RwLock::new(()),
            mark: keys.cloud_mark(),
        })
    }

    /// The labels that an instance's machine is to have, beside those that it has.
    pub fn labels(
        &self,
        instance: &Instance,
        there: &BTreeMap<String, String>,
    ) -> BTreeMap<String, String> {
        let mut labels = there.clone();
        labels.insert(HOST.to_owned(), self.mark.clone());
        labels.insert(INSTANCE.to_owned(), instance.id.to_string());
        if let Some(guest) = &instance.guest {
            labels.insert(GUEST.to_owned(), guest.to_string());
        }
        labels
    }

    /// Whose a machine is, by its labels.
    pub fn label_of(&self, vm: &Vm) -> Label {
        match vm.labels.get(HOST) {
            Some(mark) if *mark == self.mark => {
                Label::Ours(vm.labels.get(INSTANCE).and_then(|text| text.parse().ok()))
            }
            None if vm.labels.is_empty() => Label::None,
            _ => Label::Foreign,
        }
    }

    /// A machine as the rules look at it, without its commit.
    pub fn sighting(&self, vm: &Vm) -> Sighting {
        Sighting {
            vm: vm.vm_id.clone(),
            created_at: vm.created_at.parse().ok(),
            label: self.label_of(vm),
            parent: None,
        }
    }
}
