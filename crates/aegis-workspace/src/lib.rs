//! Lends one folder of the host to one machine.
//!
//! ```text
//! guest's kernel ── /dev/fuse ── harness ── a stream of the channel ── worker ── socket ──▶ serve
//!                                                                                            │
//!     confine: a root, a user, nothing else        folder: one request → one answer  ◀───────┘
//!                                     names · files · list ── nodes (what is known) · handles
//!                                                          └─ quota (what it may add)
//! ```
//! The messages are the kernel's own (`linux/fuse.h`), carried as they are. A server of our own and not
//! a crate's: those that there are serve kernels that they trust, know files by open descriptors or
//! by handles that need root's rights, and count nothing.
//!
//! Every byte that comes is hostile: a machine's root can say what it likes. So a name is one
//! component and is never followed; what is known, open and in flight is bounded; what is added is
//! counted before it is written.

mod abi;
mod confine;
mod files;
mod folder;
mod handles;
mod list;
mod names;
mod news;
mod nodes;
mod opened;
mod quota;
mod reply;
mod serve;
mod stamp;
mod sys;
#[cfg(test)]
mod tests;
mod watch;

pub use serve::{Terms, open, serve};
