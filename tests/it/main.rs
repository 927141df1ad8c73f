//! The integration tests: the real programs as processes, spoken to over their sockets. One binary;
//! the kit is the crate's library.

// Tests fail where they stand.
#![allow(clippy::unwrap_used)]

mod budget;
mod channel;
mod cli;
mod couch;
mod crash;
mod doors;
mod guest;
mod host;
mod hostile;
mod llm;
mod many;
mod secrets;
mod services;
mod spares;
mod tidy;
mod tree;
mod values;
