//! What the kernel tells about devices: they come, and disks change their size.

use std::io;
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

use crate::sys;

/// Group of the kernel's own messages.
const KERNEL_GROUP: u32 = 1;
/// Largest message, bytes.
const MESSAGE_MAX: usize = 4096;

/// The kernel's messages about devices.
pub struct Uevents {
    socket: Mutex<AsyncFd<OwnedFd>>,
}

impl Uevents {
    /// Listens from now on.
    pub fn listen() -> io::Result<Uevents> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::DGRAM;
        let protocol = Some(netlink::KOBJECT_UEVENT);
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, kind, flags, protocol)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Uevents { socket: Mutex::new(sys::watch(socket)?) })
    }

    /// Looks until `look` finds something: now, and after each message. `None` after the deadline.
    pub async fn until<T>(
        &self,
        deadline: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let socket = self.socket.lock().await;
        let found = async {
            loop {
                // Messages that came before the look say nothing new after it.
                forget(socket.get_ref());
                if let Some(found) = look() {
                    return Some(found);
                }
                let mut ready = socket.readable().await.ok()?;
                forget(socket.get_ref());
                ready.clear_ready();
            }
        };
        tokio::time::timeout(deadline, found).await.ok().flatten().or_else(look)
    }
}

/// Reads and drops all messages; a lost one (`ENOBUFS`) is no reason to stop.
fn forget(socket: &OwnedFd) {
    let mut message = [0u8; MESSAGE_MAX];
    loop {
        match rustix::net::recv(socket, &mut message[..], RecvFlags::DONTWAIT) {
            Ok(_) | Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
