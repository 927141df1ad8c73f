//! The integration tests: the real programs as processes, spoken to over their sockets. One binary;
//! the kit is the crate's library.

// Tests fail where they stand.
#![allow(clippy::unwrap_used)]

mod budget;
mod channel;
mod cli;
mod commits;
mod couch;
mod crash;
mod doors;
mod egress;
mod events;
mod files;
mod guest;
mod host;
mod hostile;
mod images;
mod inside;
mod lending;
mod llm;
mod logs;
mod many;
mod metrics;
mod outside;
mod placeholders;
mod secrets;
mod services;
mod spares;
mod stdin;
mod terminal;
mod tidy;
mod tree;
mod values;
mod vers;
mod vers_double;
mod web;
mod workspace;
