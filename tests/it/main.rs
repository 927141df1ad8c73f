//! The real programs over real sockets; machines are really booted.
#![allow(clippy::unwrap_used, reason = "tests")]

mod couch;
mod crash;
mod machine;
