//! The virtio-serial port named `ctl` as an async byte pipe that never ends.
//!
//! While no host is connected, the port is readable, gives 0 bytes, and hangs up, all the time;
//! registered with the runtime directly it would keep it spinning. So an epoll set of its own,
//! edge-triggered, stands between the two: the runtime only sees "something changed". The port is
//! never closed: closing throws away what the host has sent.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::time::Timespec;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::sys;

const PORTS: &str = "/sys/class/virtio-ports";
/// Name of the control port.
pub const NAME: &str = "ctl";

/// The device node of a port, once it is there.
pub fn find(name: &str) -> Option<PathBuf> {
    fs::read_dir(PORTS).ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("name")).ok()?;
        let node = PathBuf::from("/dev").join(entry.file_name());
        (found.trim_end() == name && node.exists()).then_some(node)
    })
}

/// Opens a port so that nobody ever waits in a call.
pub fn open(node: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits() as i32;
    File::options().read(true).write(true).custom_flags(flags).open(node)
}

/// The open port.
pub struct Port {
    file: File,
    waiting: Arc<Waiting>,
}

/// Who wants to know of a change: the reader's and the writer's task.
#[derive(Default)]
struct Waiting {
    reader: Mutex<Option<Waker>>,
    writer: Mutex<Option<Waker>>,
}

impl Port {
    /// Opens the port at `node`; must be called inside the runtime.
    pub fn open(node: &Path) -> io::Result<Port> {
        let file = open(node)?;
        let set = epoll::create(CreateFlags::CLOEXEC)?;
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        epoll::add(&set, &file, EventData::new_u64(0), edges)?;
        let set = sys::watch(set)?;
        let waiting = Arc::new(Waiting::default());
        tokio::spawn(pass_on_changes(set, Arc::clone(&waiting)));
        Ok(Port { file, waiting })
    }

    /// Tries; when the port has nothing to give or no room, `slot` is woken at its next change.
    fn attempt(
        slot: &Mutex<Option<Waker>>,
        cx: &Context<'_>,
        mut try_once: impl FnMut() -> rustix::io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let mut once = || match rustix::io::retry_on_intr(&mut try_once) {
            // No host is connected: it will be.
            Ok(0) | Err(Errno::AGAIN) => None,
            Ok(n) => Some(Ok(n)),
            Err(errno) => Some(Err(errno.into())),
        };
        if let Some(done) = once() {
            return Poll::Ready(done);
        }
        // First the waker, then once more: a change between the two must not be missed.
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        once().map_or(Poll::Pending, Poll::Ready)
    }
}

async fn pass_on_changes(set: AsyncFd<OwnedFd>, waiting: Arc<Waiting>) {
    while let Ok(mut ready) = set.readable().await {
        let mut events = Vec::with_capacity(1);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(set.get_ref(), spare_capacity(&mut events), Some(&now));
        drop(events);
        ready.clear_ready();
        for slot in [&waiting.reader, &waiting.writer] {
            let waker = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Port::attempt(&self.waiting.reader, cx, || {
            rustix::io::read(&self.file, buf.initialize_unfilled())
        });
        read.map_ok(|n| buf.advance(n))
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Port::attempt(&self.waiting.writer, cx, || rustix::io::write(&self.file, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
