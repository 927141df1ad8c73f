//! What one machine may reach.

use core::net::{IpAddr, SocketAddr};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::address::never;
use super::list::AllowList;
use super::name::{HostName, ServiceName};
use super::rule;

/// What one machine may reach. Every list must admit what is asked for (a child's own list stands
/// beside those of its ancestors), so no list that is added can widen anything. The default is
/// closed.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Policy {
    /// Whether anything outside may be reached at all; public addresses only.
    pub internet: bool,
    /// All of them must admit; none at all means all public addresses.
    pub lists: Vec<AllowList>,
    /// The host services that may be reached.
    pub services: Vec<ServiceName>,
    /// Whether there is an LLM door.
    pub llm: bool,
}

/// Why a flow or a question was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Denied {
    /// One of [`rule`].
    pub rule: &'static str,
    /// What was asked for: a name, or an address with its port.
    pub requested: String,
    /// What would have passed.
    pub allowed: String,
}

impl Denied {
    /// A denial by `rule`.
    pub fn new(
        rule: &'static str,
        requested: impl fmt::Display,
        allowed: impl fmt::Display,
    ) -> Denied {
        Denied { rule, requested: requested.to_string(), allowed: allowed.to_string() }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was denied by {}; allowed: {}", self.requested, self.rule, self.allowed)
    }
}

/// What let a connection through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// Its address, with all lists: nothing that is said on it matters.
    ByAddress,
    /// A name that the address was the answer for: names that are said on it must pass
    /// [`Policy::spoken`], and a TLS hello must say one.
    ByName,
}

impl Policy {
    /// Judges a name that is asked: some port of it must be admitted.
    ///
    /// # Errors
    /// The denial.
    pub fn ask(&self, name: &HostName) -> Result<(), Denied> {
        self.open(name)?;
        match self.lists.iter().find(|list| !list.admits_name(name)) {
            None => Ok(()),
            Some(list) => Err(Denied::new(rule::ALLOW, name, list)),
        }
    }

    /// Judges an address that is connected or sent to. `names` are those that it was the answer
    /// for, `own` the host's addresses.
    ///
    /// # Errors
    /// The denial.
    pub fn connect<'a, N>(
        &self,
        to: SocketAddr,
        names: N,
        own: &[IpAddr],
    ) -> Result<Admitted, Denied>
    where
        N: IntoIterator<Item = &'a HostName>,
    {
        // A machine without internet learns nothing about which addresses are the host's.
        self.open(to)?;
        if let Some(why) = never(to.ip(), own) {
            let allowed = format!("public addresses; this one is {why}");
            return Err(Denied::new(rule::NEVER, to, allowed));
        }
        let Some(list) = self.lists.iter().find(|list| !list.admits_address(to)) else {
            return Ok(Admitted::ByAddress);
        };
        // One name that they all admit: two lists that admit one address by two names have
        // nothing in common.
        if names.into_iter().any(|name| self.admits(to, name)) {
            Ok(Admitted::ByName)
        } else {
            Err(Denied::new(rule::ALLOW, to, list))
        }
    }

    /// Judges the name that is said on a connection which was [`Admitted::ByName`], in a TLS hello
    /// or an HTTP `Host`; `None` if there it says none. `rule` is [`rule::SNI`] or [`rule::HOST`].
    ///
    /// # Errors
    /// The denial.
    pub fn spoken(
        &self,
        to: SocketAddr,
        name: Option<&HostName>,
        rule: &'static str,
    ) -> Result<(), Denied> {
        match name {
            Some(name) if self.admits(to, name) => Ok(()),
            Some(name) => {
                let list = self.lists.iter().find(|list| !passes(list, to, name));
                let allowed = list.map(AllowList::to_string).unwrap_or_default();
                Err(Denied::new(rule, format!("{name} at {to}"), allowed))
            }
            None => Err(Denied::new(rule, to, "a name that the list admits")),
        }
    }

    /// Judges a connection to a host service.
    ///
    /// # Errors
    /// The denial.
    pub fn service(&self, name: &str) -> Result<&ServiceName, Denied> {
        self.services.iter().find(|mine| mine.as_str() == name).ok_or_else(|| {
            let names: Vec<&str> = self.services.iter().map(ServiceName::as_str).collect();
            let allowed = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            Denied::new(rule::SERVICE, format!("{name}.host.aegis"), allowed)
        })
    }

    fn open(&self, requested: impl fmt::Display) -> Result<(), Denied> {
        if self.internet {
            Ok(())
        } else {
            Err(Denied::new(rule::INTERNET, requested, "host services and the LLM door only"))
        }
    }

    fn admits(&self, to: SocketAddr, name: &HostName) -> bool {
        self.lists.iter().all(|list| passes(list, to, name))
    }
}

fn passes(list: &AllowList, to: SocketAddr, name: &HostName) -> bool {
    list.admits_address(to) || list.admits_name_at(name, to.port())
}
