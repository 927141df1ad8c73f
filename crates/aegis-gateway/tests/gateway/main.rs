//! The gateway between a real kernel inside and real servers outside. As root: it needs network
//! namespaces.

#![allow(clippy::unwrap_used, reason = "tests")]

mod flows;
mod support;
