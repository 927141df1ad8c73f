//! The laws of Aegis. Values in, values out.
//!
//! This crate **judges**: it says what may happen and what follows from it, and nothing else. It
//! may not know a clock, randomness, files, sockets, async, JSON, HTTP or SQL; whoever asks hands
//! in the facts, the time and fresh ids as values.
#![forbid(unsafe_code)]

pub mod refusal;
pub mod words;
