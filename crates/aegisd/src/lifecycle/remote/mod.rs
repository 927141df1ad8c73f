//! Guests' machines in the vers cloud: the same wishes, plan and facts as for machines of this host, and
//! other steps.
//!
//! ```text
//! intent in the ledger ─▶ POST from_commit ─▶ claim in the ledger ─▶ label ─▶ looked at, every few s
//!        └── no clear answer: look.rs finds what it made, or that it made nothing; only then again
//! ```
//! Nothing is proven by an answer to a delete: a list, to a key that it accepts, must show the machine
//! no more. `sweep.rs` ends what is ours and nobody's.

mod driver;
mod look;
mod sweep;

pub(super) use driver::run;
pub use sweep::sweep;
