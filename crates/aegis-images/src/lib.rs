//! Images: from registries and archives to one read-only file that machines lie on.
//!
//! What is read here was written by strangers, so the program `aegis-image` is started for one job,
//! confines itself ([`confine`]) and reaches one directory only: the blobs' ([`blobs`]). What it
//! leaves in there `aegisd` looks at and takes over.

pub mod blobs;
pub mod confine;
pub mod digest;
pub mod erofs;
pub mod import;
pub mod job;
pub mod layer;
pub mod manifest;
pub mod pull;
mod sys;
pub mod tree;

pub use sys::own_pids;
