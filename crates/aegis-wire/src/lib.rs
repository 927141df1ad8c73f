//! What crosses the borders between the programs of Aegis.
//!
//! This crate **says**: shapes, frames and bounds that two processes must agree on. It may not
//! know who listens, and it decides nothing.
//!
//! ```text
//! client ── couch, host ──▶ aegisd ── worker ──▶ aegis-worker ── channel (+ pipe) ──▶ harness
//!            error                    gateway ── door ──▶ aegisd          bounds of all: bounds
//! ```
//! Start reading at [`worker`] for what a machine is made of, at [`channel`] for what is said to it.
#![forbid(unsafe_code)]

pub mod bounds;
pub mod channel;
pub mod couch;
pub mod door;
pub mod error;
pub mod files;
pub mod host;
pub mod images;
pub mod json;
pub mod link;
pub mod logs;
pub mod path;
#[cfg(feature = "pipe")]
pub mod pipe;
pub mod vers;
pub mod worker;

pub use aegis_rules::audit;
pub use aegis_rules::egress;
pub use aegis_rules::refusal;
pub use aegis_rules::words;
