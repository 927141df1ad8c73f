//! The outside: a network of its own behind a link, with public addresses that belong to nobody
//! (RFC 5737, RFC 3849), and real servers at them. What a machine reaches there it reaches as it
//! would reach anybody: nothing in the product knows of it.
//!
//! ```text
//! host ── aegis-outN, .1 ── veth ── eth0, .2 to .6 ── servers: 53 names, 80 443 8080 8443 web and
//!         203.0.113.8N/29, 198.51.100.8N/29,          git, 7 echo, 9 sink, 19 source
//!         2001:db8:0:N::/64
//! ```
//! The servers are tasks of this process whose sockets are inside. Several outsides exist at once.

mod dns;
mod git;
mod net;
mod plain;
mod seen;
mod tls;
mod web;

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use tokio::runtime::Runtime;

use dns::Zone;
use net::Place;
use plain::Habit;
use seen::Seen;
use web::Web;

pub use dns::Fact;
pub use seen::{Question, Request};

/// Where TCP and UDP give back what they get.
pub const ECHO: u16 = 7;
/// Where TCP and UDP take all; TCP says at the end how much it was.
pub const SINK: u16 = 9;
/// Where TCP gives without end.
pub const SOURCE: u16 = 19;
/// Where names are asked for, by UDP and TCP.
pub const DNS: u16 = 53;
/// Where the web is.
pub const HTTP: [u16; 2] = [80, 8080];
/// Where the web is with TLS.
pub const HTTPS: [u16; 2] = [443, 8443];

/// An outside, with its servers running.
pub struct Outside {
    /// Its sockets are the last that is inside.
    servers: Option<Runtime>,
    place: Place,
    seen: Arc<Seen>,
    zone: Arc<Zone>,
    files: TempDir,
    commit: String,
}

impl Outside {
    /// Makes one; waits where there are too many.
    #[expect(clippy::new_without_default, reason = "it is much work, and takes a place")]
    pub fn new() -> Outside {
        let place = Place::open();
        let files = tempfile::Builder::new().prefix("aegis-outside-").tempdir().unwrap();
        let addresses: Vec<IpAddr> = (2..=6)
            .flat_map(|n| [place.v4(n).into(), place.other4(n).into(), place.v6(n).into()])
            .collect();
        let (acceptor, authority) = tls::open(&addresses);
        std::fs::write(files.path().join("ca.pem"), authority).unwrap();
        let commit = git::make(files.path());
        let seen = Arc::new(Seen::default());
        let zone = Arc::new(Zone::new(&place, Arc::clone(&seen)));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let outside = Outside { servers: Some(runtime), place, seen, zone, files, commit };
        outside.serve(acceptor);
        outside
    }

    fn serve(&self, tls: tokio_rustls::TlsAcceptor) {
        let seen = &self.seen;
        let git = self.files.path().to_owned();
        let web = Arc::new(Web { seen: Arc::clone(seen), tls, git });
        for (ports, tls) in [(HTTP, false), (HTTPS, true)] {
            for port in ports {
                let web = Arc::clone(&web);
                self.tcp(port, |listener| web.serve(port, listener, tls));
            }
        }
        for (port, habit) in [(ECHO, Habit::Echo), (SINK, Habit::Sink), (SOURCE, Habit::Source)] {
            self.tcp(port, |listener| plain::serve(habit, seen.port(port), listener));
        }
        for (port, habit) in [(ECHO, Habit::Echo), (SINK, Habit::Sink)] {
            self.udp(port, |socket| plain::serve_udp(habit, seen.port(port), socket));
        }
        self.tcp(DNS, |listener| Arc::clone(&self.zone).serve_tcp(listener));
        self.udp(DNS, |socket| Arc::clone(&self.zone).serve_udp(socket));
    }

    fn spawn(&self, server: impl Future<Output = io::Result<()>> + Send + 'static) {
        self.servers.as_ref().expect("until the end").spawn(server);
    }

    /// Listens inside, at all addresses.
    fn tcp<F>(&self, port: u16, serve: impl FnOnce(tokio::net::TcpListener) -> F)
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = self.place.within(|| TcpListener::bind(any)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let _in = self.servers.as_ref().expect("until the end").enter();
        self.spawn(serve(tokio::net::TcpListener::from_std(listener).unwrap()));
    }

    /// Takes datagrams inside, at each address by a socket of its own: what one answers leaves from
    /// the address that was asked.
    fn udp<F>(&self, port: u16, serve: impl Fn(tokio::net::UdpSocket) -> F)
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let addresses = (2..=6).flat_map(|n| {
            [self.place.v4(n).into(), self.place.other4(n).into(), self.place.v6(n).into()]
        });
        let bind = |address: IpAddr| UdpSocket::bind((address, port)).unwrap();
        let sockets: Vec<_> = self.place.within(|| addresses.map(bind).collect());
        for socket in sockets {
            socket.set_nonblocking(true).unwrap();
            let _in = self.servers.as_ref().expect("until the end").enter();
            self.spawn(serve(tokio::net::UdpSocket::from_std(socket).unwrap()));
        }
    }

    /// The address of `allowed.test`; there are more, at which the same servers are.
    pub fn v4(&self) -> Ipv4Addr {
        self.place.v4(2)
    }

    /// The IPv6 address of `allowed.test`.
    pub fn v6(&self) -> Ipv6Addr {
        self.place.v6(2)
    }

    /// The address of `other.test`, in 198.51.100.0/24.
    pub fn other(&self) -> Ipv4Addr {
        self.place.other4(2)
    }

    /// The host's own address on the link; public by its looks, and nobody's to reach.
    pub fn host(&self) -> Ipv4Addr {
        self.place.v4(1)
    }

    /// The host's own IPv6 address on the link.
    pub fn host6(&self) -> Ipv6Addr {
        self.place.v6(1)
    }

    /// All addresses in 203.0.113.0/24, as an allow-list has them.
    pub fn network(&self) -> String {
        format!("{}/29", self.place.v4(0))
    }

    /// The name server, for a daemon's settings.
    pub fn resolver(&self) -> SocketAddr {
        (self.v4(), DNS).into()
    }

    /// A port at [`Outside::v4`].
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.v4(), port).into()
    }

    /// The certificate of the authority that the servers' certificates are of, PEM.
    pub fn authority(&self) -> PathBuf {
        self.files.path().join("ca.pem")
    }

    /// Path of a repository that anybody may clone and push to, below any web address, and the
    /// commit at its head.
    pub fn repository(&self) -> (String, &str) {
        (format!("{}{}", git::PREFIX, git::NAME), &self.commit)
    }

    /// Where its files lie on the host.
    pub fn repository_directory(&self) -> PathBuf {
        self.files.path().join(git::NAME)
    }

    /// Says something of a name, from now on.
    pub fn name(&self, name: &str, fact: Fact) {
        self.zone.set(name, fact);
    }

    /// Payload that came in, at all ports but that for names: of TCP what is in the stream, of UDP
    /// what is in the datagram.
    pub fn received(&self) -> u64 {
        self.seen.received(None)
    }

    /// Payload that came in at one port.
    pub fn received_at(&self, port: u16) -> u64 {
        self.seen.received(Some(port))
    }

    /// Connections that came in at one port.
    pub fn connections_at(&self, port: u16) -> u64 {
        self.seen.connections(port)
    }

    /// HTTP requests, in the order in which they came.
    pub fn requests(&self) -> Vec<Request> {
        self.seen.requests()
    }

    /// Questions for names, in the order in which they came.
    pub fn questions(&self) -> Vec<Question> {
        self.seen.questions()
    }

    /// Does something inside the namespace: a socket that it makes stays there.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.place.within(work)
    }

    /// A directory that goes with this outside.
    pub fn files(&self) -> &Path {
        self.files.path()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if let Some(servers) = self.servers.take() {
            servers.shutdown_background();
        }
    }
}
