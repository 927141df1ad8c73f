//! The vers cloud: what is said to it, and what its answers mean (contracts/vers.md).
//!
//! This crate **speaks to the cloud**. What an answer means is decided in [`answer`], without a socket;
//! [`client`] carries. It may not know guests, the ledger, or why somebody wants a machine. The program
//! `aegis-vers-double` beside it is such a cloud in memory, for tests and for trying things out.
#![forbid(unsafe_code)]

pub mod answer;
pub mod client;
pub mod key;
pub mod names;

pub use answer::{Created, Failure};
pub use client::Client;
pub use key::ApiKey;
pub use names::VmDomain;
