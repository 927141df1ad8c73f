//! The one call that has no safe form: making a network card out of a descriptor.

#![allow(unsafe_code, reason = "an ioctl that no crate of ours wraps")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd as _;

const TAP: i16 = 0x0002;
const NO_PACKET_INFO: i16 = 0x1000;

/// `struct ifreq`
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(set_interface, 0x4004_54ca, Request);

/// A network card of this name in the current namespace; what is read and written are its frames.
pub fn tap(name: &str) -> File {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = Request { name: [0; 16], flags: TAP | NO_PACKET_INFO, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the descriptor is open, and the request outlives the call, which only reads it.
    unsafe { set_interface(file.as_raw_fd(), &request) }.unwrap();
    file
}
