//! `aegis-image` as aegisd starts it: jobs on stdin, real archives, a real registry, and what is left
//! on the disk.

// Tests fail where they stand.
#![allow(clippy::unwrap_used)]

mod archives;
mod hostile;
mod registry;
mod server;
mod support;
