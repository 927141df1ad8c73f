//! The only unsafe code of this crate.
#![allow(unsafe_code)]

use rustix::thread::UnshareFlags;

/// Leaves namespaces for new ones.
pub fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: only a table of descriptors that threads no longer share would be dangerous; nobody
    // asks for that.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
