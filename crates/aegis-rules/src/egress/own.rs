//! What an instance's own record says of its reach; what holds is this and that of all above it.

use super::{AllowList, Policy, ServiceName};
use crate::instance::{Instance, ancestors};
use crate::refusal::Refusal;
use crate::words::InstanceId;

/// What one record lets its machine, and all below it, reach. The default is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Egress {
    /// Whether anything outside may be reached.
    pub internet: bool,
    /// What of it; absent means all public addresses, empty means none.
    pub allow: Option<AllowList>,
}

impl Egress {
    /// All public addresses.
    pub const PUBLIC: Egress = Egress { internet: true, allow: None };

    /// The same, and what `more` admits.
    ///
    /// # Errors
    /// When that is too long a list.
    pub fn with(&self, more: &AllowList) -> Result<Egress, Refusal> {
        let allow = match (self.internet, &self.allow) {
            (true, None) => None,
            (true, Some(list)) => Some(list.with(more)?),
            (false, _) => Some(more.clone()),
        };
        Ok(Egress { internet: true, allow })
    }
}

/// What an instance asks for, for itself or for a child; what is absent is as above it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressAsk {
    /// Whether anything outside shall be reached.
    pub internet: Option<bool>,
    /// What of it.
    pub allow: Option<AllowList>,
}

impl EgressAsk {
    /// What a record says that was asked for: its ancestors' records narrow it further.
    pub fn granted(self) -> Egress {
        Egress { internet: self.internet.unwrap_or(true), allow: self.allow }
    }
}

/// What the machine of an instance may reach now: every record from its own up to the root has a
/// say. `services` and `llm` were judged elsewhere.
pub fn policy(
    family: &[Instance],
    id: &InstanceId,
    services: Vec<ServiceName>,
    llm: bool,
) -> Policy {
    let mut policy = Policy { internet: false, lists: Vec::new(), services, llm };
    let mut internet = None;
    for instance in ancestors(family, id) {
        let own = &instance.egress;
        internet = Some(internet.unwrap_or(true) && own.internet);
        policy.lists.extend(own.allow.clone());
    }
    // Who has no record reaches nothing.
    policy.internet = internet.unwrap_or(false);
    policy
}
