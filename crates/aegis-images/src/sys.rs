//! The only unsafe code of this crate: a process id space of its own.
#![allow(unsafe_code)]

use std::io;

use rustix::thread::UnshareFlags;

/// Children from now on live in a process id space of their own: when the first of them ends, so do
/// all that it started.
pub fn own_pids() -> io::Result<()> {
    // SAFETY: only who is born later is affected; no descriptor, memory or thread of this process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }.map_err(io::Error::from)
}
