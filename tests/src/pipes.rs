//! Writing to somebody who may not read.

use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// Who takes nothing for so long is held up.
const QUIET: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Writes until nothing more is taken, or until `most` bytes were; returns how many were.
pub fn flood(to: &impl AsFd, most: usize) -> usize {
    let flags = fcntl_getfl(to).unwrap();
    fcntl_setfl(to, flags | OFlags::NONBLOCK).unwrap();
    let mut taken = 0;
    while taken < most && poll(&mut [PollFd::new(to, PollFlags::OUT)], Some(&QUIET)).unwrap() > 0 {
        match rustix::io::write(to, &[b'x'; 64 * 1024]) {
            Ok(n) => taken += n,
            Err(Errno::AGAIN) => {}
            Err(e) => panic!("after {taken} bytes: {e}"),
        }
    }
    taken
}
