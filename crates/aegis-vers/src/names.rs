//! Names: what a machine is called on the network.

use std::fmt;
use std::str::FromStr;

use aegis_wire::words::{BadWord, Uuid};

/// The domain below which every machine has its name: `vm.vers.sh`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDomain(String);

impl VmDomain {
    /// The domain that goes with an API's host: without a leading `api.`, below `vm.`
    /// (contracts/vers.md 5).
    pub fn of_api(host: &str) -> VmDomain {
        VmDomain(format!("vm.{}", host.strip_prefix("api.").unwrap_or(host)))
    }

    /// Where a machine answers; TLS ends at the cloud's edge.
    pub fn endpoint(&self, vm: &Uuid) -> String {
        format!("https://{vm}.{}", self.0)
    }
}

impl FromStr for VmDomain {
    type Err = BadWord;
    fn from_str(text: &str) -> Result<VmDomain, BadWord> {
        let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':');
        let fits = !text.is_empty() && text.len() <= 200 && text.bytes().all(fine);
        if fits && !text.starts_with('.') {
            Ok(VmDomain(text.to_owned()))
        } else {
            Err(BadWord::new("domain", "a domain name, with or without a port"))
        }
    }
}

impl fmt::Display for VmDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_domain_follows_the_api() {
        let vm: Uuid = "0b9cf0ad-8d4e-4a4b-9c4b-3f3d1f0a6a01".parse().unwrap();
        let at = |host: &str| VmDomain::of_api(host).endpoint(&vm);
        assert_eq!(at("api.vers.sh"), format!("https://{vm}.vm.vers.sh"));
        assert_eq!(at("vers.example.org"), format!("https://{vm}.vm.vers.example.org"));
        assert_eq!(VmDomain::of_api("api.vers.sh").to_string(), "vm.vers.sh");
        for bad in ["", ".x", "a/b", "a b"] {
            assert!(bad.parse::<VmDomain>().is_err(), "{bad}");
        }
    }
}
