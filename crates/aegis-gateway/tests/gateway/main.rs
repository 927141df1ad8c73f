//! The gateway between a real kernel inside and real servers outside. As root: it needs network
//! namespaces.

#![allow(clippy::unwrap_used, reason = "tests")]

mod doors;
mod flows;
mod hostile;
mod metering;
mod names;
mod policy;
mod support;
