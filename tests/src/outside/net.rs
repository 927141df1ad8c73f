//! The network namespace, and the link that joins it to the host's.

use std::fs::File;
use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};

use rustix::fs::FlockOperation;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Places that there can be at a time: so many /29 are in a /24.
const PLACES: u8 = 32;
/// Where their locks are.
const LOCKS: &str = "/tmp/aegis-outside";
/// Addresses of servers in each /29: the host's end has the first.
const ADDRESSES: std::ops::RangeInclusive<u8> = 2..=6;

/// A namespace with addresses of its own; when this ends, however it ends, they are free again.
pub(super) struct Place {
    number: u8,
    /// Holds the namespace, which has no name any more.
    namespace: File,
    /// Held until the end.
    _lock: File,
}

impl Place {
    /// Takes a free place, or waits for one.
    pub(super) fn open() -> Place {
        std::fs::create_dir_all(LOCKS).unwrap();
        let (number, lock) = take();
        // What a process left behind that was killed in the middle of this.
        let name = format!("aegis-outside-{number}");
        let link = link(number);
        let _ = quietly(&["netns", "del", &name]);
        let _ = quietly(&["link", "del", &link]);
        run(&["netns", "add", &name]);
        let namespace = File::open(format!("/run/netns/{name}")).unwrap();
        run(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &name]);
        let place = Place { number, namespace, _lock: lock };
        batch(&[], &place.host_side(&link));
        batch(&["-n", &name], &place.inside());
        // Kept by the open file alone: it goes with this process.
        run(&["netns", "del", &name]);
        place
    }

    fn host_side(&self, link: &str) -> String {
        let (v4, other, v6) = (self.v4(1), self.other4(1), self.v6(1));
        format!(
            "addr add {v4}/29 dev {link}\naddr add {other}/29 dev {link}\n\
             addr add {v6}/64 dev {link} nodad\nlink set {link} up\n"
        )
    }

    fn inside(&self) -> String {
        use std::fmt::Write as _;
        let mut lines = "link set lo up\nlink set eth0 up\n".to_owned();
        for n in ADDRESSES {
            let (v4, other, v6) = (self.v4(n), self.other4(n), self.v6(n));
            let _ = writeln!(lines, "addr add {v4}/29 dev eth0\naddr add {other}/29 dev eth0");
            let _ = writeln!(lines, "addr add {v6}/64 dev eth0 nodad");
        }
        let (v4, v6) = (self.v4(1), self.v6(1));
        lines + &format!("route add default via {v4}\nroute add default via {v6}\n")
    }

    /// An address of 203.0.113.0/24.
    pub(super) fn v4(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(203, 0, 113, 8 * self.number + n)
    }

    /// An address of 198.51.100.0/24.
    pub(super) fn other4(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(198, 51, 100, 8 * self.number + n)
    }

    /// An address of 2001:db8::/32.
    pub(super) fn v6(&self, n: u8) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, u16::from(self.number), 0, 0, 0, u16::from(n))
    }

    /// Does something inside, in a thread that ends with it. A socket that it makes stays inside.
    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(self.namespace.as_fd(), network).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join()).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // At once; else the kernel does it a while after the last socket inside is closed.
        let _ = quietly(&["link", "del", &link(self.number)]);
    }
}

fn link(number: u8) -> String {
    format!("aegis-out{number}")
}

/// The first free place, else the first that gets free of one's own choice.
fn take() -> (u8, File) {
    let open = |n: u8| File::create(format!("{LOCKS}/{n}.lock")).unwrap();
    for n in 0..PLACES {
        let lock = open(n);
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return (n, lock);
        }
    }
    let n = (std::process::id() % u32::from(PLACES)) as u8;
    let lock = open(n);
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    (n, lock)
}

fn ip() -> Command {
    let mut command = Command::new("ip");
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn quietly(words: &[&str]) -> bool {
    ip().args(words).output().is_ok_and(|done| done.status.success())
}

#[track_caller]
fn run(words: &[&str]) {
    let done = ip().args(words).output().expect("ip, of iproute2");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "ip {}: {said}(tests need root)", words.join(" "));
}

#[track_caller]
fn batch(words: &[&str], lines: &str) {
    let mut child = ip()
        .args(words)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ip, of iproute2");
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{lines}{}", String::from_utf8_lossy(&done.stderr));
}
