//! Addresses on the link that lead to the hatch: the LLM door and the host's services.

use std::net::{IpAddr, Ipv4Addr};

use aegis_wire::door::Knock;
use aegis_wire::egress::{Denied, HostName, Policy, ServiceName, rule};

/// Where all doors listen.
pub(crate) const PORT: u16 = 80;
/// The zone of all doors' names.
pub(crate) const ZONE: &str = "aegis";

const LLM: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 3);
const LLM_NAME: &str = "llm.aegis";
const SERVICES_ZONE: &str = "host.aegis";
/// Services that have an address: `172.16.1.1` to `172.16.1.254`.
const SERVICES_MAX: usize = 254;

/// Which service has which address. An address once given is never another's: what a guest
/// remembered must not lead elsewhere.
#[derive(Default)]
pub(crate) struct Doors {
    given: Vec<ServiceName>,
}

impl Doors {
    /// Gives the services of a policy their addresses.
    pub fn learn(&mut self, policy: &Policy) {
        for service in &policy.services {
            if self.given.len() < SERVICES_MAX && !self.given.contains(service) {
                self.given.push(service.clone());
            }
        }
    }

    /// The address of a name below [`ZONE`]; `Ok(None)` for a name that nobody has.
    pub fn resolve(&self, name: &HostName, policy: &Policy) -> Result<Option<Ipv4Addr>, Denied> {
        if name.as_str() == LLM_NAME {
            return llm(policy).map(|()| Some(LLM));
        }
        let service = name.as_str().strip_suffix(SERVICES_ZONE).and_then(|n| n.strip_suffix('.'));
        let Some(service) = service else { return Ok(None) };
        let service = policy.service(service)?;
        Ok(self.given.iter().position(|given| given == service).map(address))
    }

    /// What is behind an address of the link; `Ok(None)` if nothing is.
    pub fn behind(&self, to: Ipv4Addr, policy: &Policy) -> Result<Option<Knock>, Denied> {
        if to == LLM {
            return llm(policy).map(|()| Some(Knock::Llm));
        }
        match self.given.iter().enumerate().find(|(at, _)| address(*at) == to) {
            Some((_, given)) => {
                let name = policy.service(given.as_str())?.as_str().to_owned();
                Ok(Some(Knock::Service { name }))
            }
            None => Ok(None),
        }
    }

    /// Whether some door is there, open or not.
    pub fn is_here(&self, to: IpAddr) -> bool {
        let IpAddr::V4(to) = to else { return false };
        to == LLM || (0..self.given.len()).any(|at| address(at) == to)
    }
}

fn llm(policy: &Policy) -> Result<(), Denied> {
    if policy.llm { Ok(()) } else { Err(Denied::new(rule::LLM, LLM_NAME, "none")) }
}

fn address(at: usize) -> Ipv4Addr {
    Ipv4Addr::new(172, 16, 1, u8::try_from(at + 1).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(services: &[&str], llm: bool) -> Policy {
        let services = services.iter().map(|name| name.parse().unwrap()).collect();
        Policy { services, llm, ..Policy::default() }
    }

    #[test]
    fn a_service_keeps_its_address() {
        let mut doors = Doors::default();
        let first = policy(&["git", "ollama"], true);
        doors.learn(&first);
        let second = policy(&["pip", "ollama"], false);
        doors.learn(&second);
        let resolve = |name: &str, policy: &Policy| doors.resolve(&name.parse().unwrap(), policy);
        let ollama = resolve("ollama.host.aegis", &first).unwrap();
        assert_eq!(ollama, Some(Ipv4Addr::new(172, 16, 1, 2)));
        assert_eq!(resolve("ollama.host.aegis", &second).unwrap(), ollama);
        assert_eq!(resolve("git.host.aegis", &second).unwrap_err().rule, rule::SERVICE);
        assert_eq!(resolve("llm.aegis", &first).unwrap(), Some(LLM));
        assert_eq!(resolve("llm.aegis", &second).unwrap_err().rule, rule::LLM);
        for nobody in ["aegis", "host.aegis", "x.aegis", "xllm.aegis", "a.llm.aegis"] {
            assert_eq!(resolve(nobody, &first), Ok(None), "{nobody}");
        }
        assert!(resolve("a.git.host.aegis", &first).is_err());
        let behind = |last, policy: &Policy| doors.behind(Ipv4Addr::new(172, 16, 1, last), policy);
        assert_eq!(behind(2, &second), Ok(Some(Knock::Service { name: "ollama".to_owned() })));
        assert_eq!(behind(1, &second).unwrap_err().rule, rule::SERVICE);
        assert_eq!(behind(4, &second), Ok(None));
        assert_eq!(doors.behind(LLM, &first), Ok(Some(Knock::Llm)));
    }
}
