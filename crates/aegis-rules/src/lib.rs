//! The laws of Aegis. Values in, values out.
//!
//! This crate **judges**: it says what may happen and what follows from it, and nothing else. It
//! may not know a clock, randomness, files, sockets, async, JSON, HTTP or SQL; whoever asks hands
//! in the facts, the time and fresh ids as values.
//!
//! Start reading at [`invite`]: an invite becomes a guest; then [`instance`]: what a machine's next
//! step is; then [`authorize`]: what a machine may ask for, and [`cascade`]: what an end takes with it;
//! then [`kill`]: what must be proven gone; [`egress`]: what it may reach; and [`tokens`]: what its
//! LLM calls may cost. All that can ever be written is a [`change::Change`]; [`words`] are what all of
//! them speak.
#![forbid(unsafe_code)]

pub mod allowance;
pub mod audit;
pub mod authorize;
pub mod capability;
pub mod capacity;
pub mod cascade;
pub mod change;
pub mod commit;
pub mod egress;
pub mod envelope;
pub mod exceed;
pub mod given;
pub mod guest;
pub mod idle;
pub mod instance;
pub mod invite;
pub mod kill;
pub mod refusal;
pub mod remote;
pub mod request;
pub mod spawn;
pub mod tokens;
pub mod words;
