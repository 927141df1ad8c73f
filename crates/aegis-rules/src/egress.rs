//! What a machine may reach: names, addresses and ports, judged one by one (contracts/couch.md 6).
//!
//! A name is judged when it is asked ([`Policy::ask`]), an address when it is connected
//! ([`Policy::connect`]), and what is said on a connection that was let through by name only, when
//! it is said ([`Policy::spoken`]). Some addresses are nobody's to give ([`never`]): no list admits
//! them, in whatever spelling they come.

mod address;
mod list;
mod name;
mod own;
mod policy;

#[cfg(test)]
mod tests;

pub use address::{never, plain};
pub use list::{AllowList, ENTRIES_MAX};
pub use name::{HostName, ServiceName};
pub use own::{Egress, EgressAsk, policy};
pub use policy::{Admitted, Denied, Policy};

/// Stable words for what denied a flow or a question.
pub mod rule {
    /// The invite's `canAccessInternet` is false.
    pub const INTERNET: &str = "can_access_internet";
    /// An allow-list does not admit it.
    pub const ALLOW: &str = "egress_allow";
    /// An address that is never reachable: private, loopback, metadata, the host's own, ….
    pub const NEVER: &str = "never_reachable";
    /// A name whose every answer is an address that is never reachable.
    pub const REBINDING: &str = "rebinding";
    /// The name in a TLS hello is missing, or one that the list does not admit.
    pub const SNI: &str = "tls_name";
    /// The `Host` of an HTTP request is missing, or one that the list does not admit.
    pub const HOST: &str = "http_host";
    /// The machine may use no such host service.
    pub const SERVICE: &str = "can_access_host_services";
    /// The machine has no LLM door.
    pub const LLM: &str = "llm";
    /// The egress envelope is used up.
    pub const LIMIT: &str = "egress_limit";
    /// More flows, or more new ones at a time, than one machine may have.
    pub const FLOWS: &str = "flows";

    /// All of them.
    pub const ALL: [&str; 10] =
        [INTERNET, ALLOW, NEVER, REBINDING, SNI, HOST, SERVICE, LLM, LIMIT, FLOWS];

    /// The word itself, of a text that crossed a border.
    pub fn parse(text: &str) -> Option<&'static str> {
        ALL.into_iter().find(|word| *word == text)
    }
}
