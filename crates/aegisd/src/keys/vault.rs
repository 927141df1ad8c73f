//! Secrets of the host: sealed where they lie, and the placeholders that machines get instead.

use std::io;

use aegis_wire::egress::HostName;
use aegis_wire::words::{InstanceId, SecretName};
use aes_gcm::aead::{Aead as _, KeyInit as _, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use zeroize::Zeroizing;

use super::{Key, random};

/// What every placeholder begins with.
pub const PLACEHOLDER: &str = "aegis-secret-";

/// A secret as it lies in the ledger.
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Never the same twice under one key.
    pub nonce: [u8; 12],
    /// AES-256-GCM, with its tag.
    pub bytes: Vec<u8>,
}

/// Seals and opens secrets.
pub struct Vault {
    cipher: Aes256Gcm,
    placeholders: Key,
}

impl Vault {
    pub(super) fn new(key: &[u8; 32], placeholders: Key) -> Vault {
        Vault { cipher: Aes256Gcm::new(key.into()), placeholders }
    }

    /// Seals a secret; it opens under this name and with these hosts only.
    ///
    /// # Errors
    /// The operating system gave no randomness.
    pub fn seal(
        &self,
        name: &SecretName,
        hosts: Option<&[HostName]>,
        value: &str,
    ) -> io::Result<Sealed> {
        let nonce = random::<12>()?;
        let aad = bound(name, hosts);
        let payload = Payload { msg: value.as_bytes(), aad: aad.as_bytes() };
        let bytes = self
            .cipher
            .encrypt(&Nonce::from(nonce), payload)
            .map_err(|_| io::Error::other("a secret could not be sealed"))?;
        Ok(Sealed { nonce, bytes })
    }

    /// Opens what [`Vault::seal`] sealed; `None` for anything else.
    pub fn open(
        &self,
        name: &SecretName,
        hosts: Option<&[HostName]>,
        sealed: &Sealed,
    ) -> Option<Zeroizing<String>> {
        let aad = bound(name, hosts);
        let payload = Payload { msg: &sealed.bytes, aad: aad.as_bytes() };
        let bytes = self.cipher.decrypt(&Nonce::from(sealed.nonce), payload).ok()?;
        String::from_utf8(bytes).ok().map(Zeroizing::new)
    }

    /// What stands for a secret in one machine; worthless everywhere else.
    pub fn placeholder(&self, instance: &InstanceId, name: &SecretName) -> String {
        let mac = self.placeholders.mac(&format!("{instance} {name}"));
        format!("{PLACEHOLDER}{name}-{}", aegis_rules::audit::hex(&mac[..8]))
    }
}

/// What a sealed secret is bound to: nobody gives it another name, or other hosts, in the file.
fn bound(name: &SecretName, hosts: Option<&[HostName]>) -> String {
    let hosts = match hosts {
        None => "plain".to_owned(),
        Some(hosts) => {
            let listed: Vec<&str> = hosts.iter().map(HostName::as_str).collect();
            format!("proxy {}", listed.join(","))
        }
    };
    format!("aegis secret v1\n{name}\n{hosts}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Keys;

    #[test]
    fn a_secret_opens_under_its_own_name_hosts_and_home_only() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (own, other) = (Keys::open(a.path()).unwrap(), Keys::open(b.path()).unwrap());
        let name: SecretName = "KEY".parse().unwrap();
        let hosts: Vec<HostName> = vec!["api.example.com".parse().unwrap()];
        let sealed = own.vault.seal(&name, Some(&hosts), "hush").unwrap();
        let open = |keys: &Keys, name: &str, hosts: Option<&[HostName]>, sealed: &Sealed| {
            keys.vault.open(&name.parse().unwrap(), hosts, sealed).map(|v| v.to_string())
        };
        assert_eq!(open(&own, "KEY", Some(&hosts), &sealed).as_deref(), Some("hush"));
        assert_eq!(open(&own, "KEY2", Some(&hosts), &sealed), None);
        assert_eq!(open(&own, "KEY", Some(&[]), &sealed), None);
        assert_eq!(open(&own, "KEY", None, &sealed), None);
        assert_eq!(open(&other, "KEY", Some(&hosts), &sealed), None);
        let mut bent = sealed.clone();
        bent.bytes[0] ^= 1;
        assert_eq!(open(&own, "KEY", Some(&hosts), &bent), None);
        let again = own.vault.seal(&name, Some(&hosts), "hush").unwrap();
        assert!(again.nonce != sealed.nonce && again.bytes != sealed.bytes);
    }

    #[test]
    fn a_placeholder_is_one_machines_own() {
        let dir = tempfile::tempdir().unwrap();
        let vault = Keys::open(dir.path()).unwrap().vault;
        let id = |n: u32| format!("inst-01ARZ3NDEKTSV4RRFFQ6{n:06}").parse().unwrap();
        let name = |n: &str| n.parse().unwrap();
        let own = vault.placeholder(&id(1), &name("KEY"));
        assert!(
            own.starts_with("aegis-secret-KEY-") && own.len() == "aegis-secret-KEY-".len() + 16
        );
        assert_eq!(own, vault.placeholder(&id(1), &name("KEY")));
        assert_ne!(own, vault.placeholder(&id(2), &name("KEY")));
        assert_ne!(own[17..], vault.placeholder(&id(1), &name("YEK"))[17..]);
    }
}
