//! What the gateway has to tell, and how little of it when a guest provokes much.

use aegis_wire::egress::Denied;

/// What the gateway tells its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Less than half of the last allowance is left, or somebody wants to send and nothing is: ask
    /// for more.
    Low,
    /// Somebody wants to send, and what was allowed is used up for good.
    Exhausted,
    /// A flow or a question was refused.
    Denied {
        /// By what, and what would have passed.
        denied: Denied,
        /// How many times, since it was told last.
        count: u64,
    },
}
