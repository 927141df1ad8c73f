//! What stands between a machine and everything else.
//!
//! ```text
//! QEMU -netdev stream ── frames ──▶ link ─▶ engine ─┬─ flows   TCP, each with a stack of its own
//!                                                   ├─ udp     datagrams
//!                                                   └─ dns     names: asked, judged, remembered
//!              policy (aegis_wire::egress) ─ meter ─┘    │
//!                                  sockets of this process, the hatch's socket
//! ```
//! This crate **carries**: bytes of one machine, to where its [`Policy`] lets them, and no byte more
//! than its allowance. It may not know who the machine is, nor the ledger, nor any key; policy and
//! allowance are handed in, counts and [`News`] are handed out. Every byte that comes over the link
//! is hostile; what a guest can make this process hold is bounded by [`Budgets`].
//!
//! Start reading at [`Gateway`], then `engine`: one thread, which does everything.
#![forbid(unsafe_code)]

mod budgets;
mod dns;
mod doors;
mod engine;
mod handle;
mod link;
mod meter;
mod news;
mod own;
mod packet;
mod reply;
mod spoken;
mod timers;

pub use aegis_wire::egress::Policy;
pub use budgets::Budgets;
pub use handle::{Config, Gateway, ViaHatch};
pub use meter::Counts;
pub use news::News;
