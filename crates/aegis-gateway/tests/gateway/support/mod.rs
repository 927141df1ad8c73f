//! A world of three network namespaces: a guest (a real kernel behind a tap device), the host where
//! the gateway runs, and outside, which has public documentation addresses. Namespaces have no
//! names, so nothing is left over.

pub mod names;
mod sys;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use aegis_gateway::{Budgets, Config, Counts, Gateway, News, Policy, ViaHatch};
use aegis_wire::egress::{AllowList, Denied};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::mpsc;

/// Long enough for anything that is to happen.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The resolver that the gateway asks.
pub const RESOLVER: &str = "203.0.113.53:53";

/// A network namespace.
pub struct Space(OwnedFd);

impl Space {
    fn new() -> Space {
        let make = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("tests need root");
            sh("ip link set lo up");
            Space(File::open("/proc/thread-self/ns/net").unwrap().into())
        };
        std::thread::spawn(make).join().unwrap()
    }

    /// Runs something inside; sockets that it makes stay there.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = || {
                nix::sched::setns(&self.0, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                f()
            };
            scope.spawn(inside).join().unwrap()
        })
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

pub fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A guest, a gateway, and what is outside.
pub struct World {
    pub guest: Space,
    pub host: Space,
    pub outside: Space,
    pub gateway: Gateway,
    pub news: mpsc::Receiver<News>,
    pub directory: tempfile::TempDir,
    tap: File,
    wire: Option<UnixStream>,
}

impl World {
    /// With an open policy and an allowance that nobody uses up.
    pub fn open() -> World {
        let world = World::new(Budgets::default());
        world.set_policy(internet(&[]));
        world.gateway.set_allowance(1 << 40, false);
        world
    }

    /// With a closed policy, and nothing allowed.
    pub fn new(budgets: Budgets) -> World {
        let [guest, host, outside] = [(); 3].map(|()| Space::new());
        let outside_path = outside.path();
        host.run(|| {
            sh(&format!(
                "ip link add h0 type veth peer name o0 netns {outside_path}
                 ip addr add 203.0.113.1/24 dev h0
                 ip addr add 2001:db8::1/64 dev h0 nodad
                 ip link set h0 up
                 ip route add 198.51.100.0/24 via 203.0.113.5
                 ip route add 169.254.169.254 via 203.0.113.5
                 ip route add 10.0.0.0/8 via 203.0.113.5"
            ));
        });
        outside.run(|| {
            sh("for last in 5 6 53; do ip addr add 203.0.113.$last/24 dev o0; done
                for other in 198.51.100.7/24 169.254.169.254/32 10.1.2.3/32; do
                    ip addr add $other dev lo
                done
                ip addr add 2001:db8::5/64 dev o0 nodad
                ip addr add 2001:db8::6/64 dev o0 nodad
                ip link set o0 up");
        });
        let tap = guest.run(|| {
            let tap = sys::tap("eth0");
            sh("ip link set eth0 mtu 65520
                ip addr add 172.16.0.2/24 dev eth0
                ip addr add fd61:6567:6973::2/64 dev eth0 nodad
                sysctl -qw net.ipv4.tcp_syn_retries=2 net.ipv6.conf.eth0.accept_ra=0
                ip link set eth0 up
                ip route add default via 172.16.0.1
                ip -6 route add default via fd61:6567:6973::1");
            tap
        });
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            door: directory.path().join("door.sock"),
            resolvers: vec![RESOLVER.parse().unwrap()],
            budgets,
            book: None,
        };
        let gateway = host.run(|| Gateway::start(config).unwrap());
        let news = gateway.news().unwrap();
        let mut world = World { guest, host, outside, gateway, news, directory, tap, wire: None };
        world.plug();
        world
    }

    /// Plugs the guest's card in, again.
    pub fn plug(&mut self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.gateway.plug(theirs.into());
        let (tap, wire) = (self.tap.try_clone().unwrap(), ours.try_clone().unwrap());
        std::thread::spawn(move || bridge(tap, wire));
        if let Some(old) = self.wire.replace(ours) {
            let _ = old.shutdown(std::net::Shutdown::Both);
        }
    }

    pub fn set_policy(&self, policy: Policy) {
        self.gateway.set_policy(policy, ViaHatch::default());
    }

    pub fn door(&self) -> PathBuf {
        self.directory.path().join("door.sock")
    }

    pub fn counts(&self) -> Counts {
        self.gateway.counts()
    }

    /// A listener outside.
    pub fn listen(&self, at: &str) -> TcpListener {
        self.outside.run(|| TcpListener::bind(at).unwrap())
    }

    /// A connection from inside.
    pub fn connect(&self, to: &str) -> std::io::Result<TcpStream> {
        let to: SocketAddr = to.parse().unwrap();
        let stream = self.guest.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Both ends of a connection through the gateway.
    pub fn pair(&self, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let inside = self.connect(&listener.local_addr().unwrap().to_string()).unwrap();
        let (outside, _) = listener.accept().unwrap();
        outside.set_read_timeout(Some(PATIENCE)).unwrap();
        (inside, outside)
    }

    /// Asserts that a connection is refused, at once.
    pub fn refused(&self, to: &str) {
        match self.connect(to) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {}
            other => panic!("{to}: {other:?}"),
        }
    }

    pub fn udp(&self) -> UdpSocket {
        let socket = self.guest.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// The next news.
    pub fn next_news(&mut self) -> News {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.news.try_recv() {
                Ok(news) => return news,
                Err(_) if Instant::now() < deadline => std::thread::yield_now(),
                Err(e) => panic!("no news: {e}"),
            }
        }
    }

    /// The next denial.
    pub fn denial(&mut self) -> Denied {
        loop {
            if let News::Denied { denied, .. } = self.next_news() {
                return denied;
            }
        }
    }
}

/// A policy with internet and these lists.
pub fn internet(lists: &[&[&str]]) -> Policy {
    let parse = |list: &&[&str]| {
        let texts: Vec<String> = list.iter().map(|text| (*text).to_owned()).collect();
        AllowList::parse(&texts, "egressAllow").unwrap()
    };
    Policy { internet: true, lists: lists.iter().map(parse).collect(), ..Policy::default() }
}

/// What is left to read, and whether it ended well.
pub fn read_all(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).map(|_| bytes)
}

/// What comes back for an echo from inside: `None` if it can't be reached.
pub fn echo(world: &World, to: IpAddr, data: &[u8]) -> Option<Vec<u8>> {
    use rustix::net::{AddressFamily, SocketType, ipproto, socket};
    let (family, protocol, kind) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128),
    };
    // The kernel fills in checksum and identity.
    let socket = world.guest.run(|| {
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        socket(family, SocketType::DGRAM, Some(protocol)).unwrap()
    });
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(SocketAddr::new(to, 0)).unwrap();
    let mut packet = vec![kind, 0, 0, 0, 0, 0, 0, 1];
    packet.extend(data);
    socket.send(&packet).unwrap();
    let mut answer = [0; 2048];
    match socket.recv(&mut answer) {
        Ok(length) => Some(answer[8..length].to_vec()),
        Err(e) if e.kind() == std::io::ErrorKind::HostUnreachable => None,
        Err(e) => panic!("{to}: {e}"),
    }
}

/// Passes frames between a tap device and the gateway's link.
fn bridge(mut tap: File, mut wire: UnixStream) {
    let mut frame = vec![0; 4 + 66_000];
    let mut waiting: Vec<u8> = Vec::new();
    loop {
        let mut ready = [PollFd::new(&tap, PollFlags::IN), PollFd::new(&wire, PollFlags::IN)];
        poll(&mut ready, None).unwrap();
        let [from_tap, from_wire] = ready.map(|fd| !fd.revents().is_empty());
        if from_wire {
            let mut part = vec![0; 1 << 20];
            match wire.read(&mut part) {
                Ok(0) | Err(_) => return,
                Ok(bytes) => waiting.extend_from_slice(&part[..bytes]),
            }
            let mut at = 0;
            while let Some((length, rest)) = waiting[at..].split_first_chunk() {
                let length = u32::from_be_bytes(*length) as usize;
                let Some(frame) = rest.get(..length) else { break };
                // The card may be down.
                let _ = tap.write(frame);
                at += 4 + length;
            }
            waiting.drain(..at);
        }
        if from_tap {
            let Ok(bytes) = tap.read(&mut frame[4..]) else { return };
            frame[..4].copy_from_slice(&(bytes as u32).to_be_bytes());
            if wire.write_all(&frame[..4 + bytes]).is_err() {
                return;
            }
        }
    }
}
