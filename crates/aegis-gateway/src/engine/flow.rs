//! One TCP flow: a stack of its own towards the guest, a socket towards its other end, and bytes
//! between them.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::time::{Duration, Instant};

use aegis_wire::door::Knock;
use aegis_wire::egress::{Admitted, Denied, HostName, Policy, rule};
use mio::net::{TcpStream, UnixStream};
use smoltcp::iface::{SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::tcp;
use smoltcp::wire::IpListenEndpoint;

use super::aside::Via;
use crate::dns::Stream;
use crate::meter::{Counters, Meter};
use crate::packet::Ends;
use crate::spoken::{FIRST_MAX, Heard, listen};

/// An answer that comes so soon takes the acknowledgement along: one packet less for the guest.
const ACK_DELAY: smoltcp::time::Duration = smoltcp::time::Duration::from_millis(1);
/// What one flow may move before others have their turn, bytes.
const TURN: usize = 1024 * 1024;
/// What is read and thrown away of a flow that ends, reads.
const DRAIN: usize = 64;
/// A server outside that is silent for so long is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

pub(crate) struct Flow {
    pub ends: Ends,
    /// No other flow of this gateway had it.
    pub serial: u64,
    pub target: Target,
    pub stage: Stage,
    /// The guest's end, once it was answered.
    pub stack: Option<Stack>,
    pub other: Option<Other>,
    /// Whether the other end may have something, or take something; known by trying.
    pub readable: bool,
    pub writable: bool,
    /// Nothing will come behind what there is to read.
    pub other_closed: bool,
    /// Said to the other end before anything else.
    pub prefix: Vec<u8>,
    /// What the guest says first is held until a name was heard in it.
    pub held: bool,
    /// Its address is not forgotten while it lives.
    pub remembered: bool,
    /// Ends of the two directions: the guest's, passed on; the other end's, passed on.
    pub guest_ended: bool,
    pub passed_on: bool,
    pub other_ended: bool,
    /// In the queue of those with something to do; waiting for room on the link; for allowance.
    pub queued: bool,
    pub starved: bool,
    pub thirsty: bool,
    pub last_used: Instant,
    /// Of the machine's buffers, bytes.
    pub buffers: usize,
}

/// Where a flow goes.
pub(crate) enum Target {
    Outside(Outside),
    Door(Knock),
    Dns(Stream),
}

/// What was judged when a flow to outside was let through.
#[derive(Clone, Debug)]
pub(crate) struct Outside {
    /// What is really connected.
    pub to: SocketAddr,
    /// What this address was the answer for.
    pub names: Vec<HostName>,
    pub by: Admitted,
    /// What was said in the first bytes, and where.
    pub said: Option<(&'static str, Vec<HostName>)>,
    /// The hatch may put secrets into its requests.
    pub via: Via,
}

pub(crate) enum Stage {
    /// The other end is not there yet, and the guest has no answer.
    Dialing {
        syn: Box<[u8]>,
        until: Instant,
    },
    /// The guest shakes hands.
    Accepting {
        until: Instant,
    },
    Open,
    /// Its other end is to be the hatch from now on.
    Turning {
        until: Instant,
    },
    /// Nothing is left but to tell the guest.
    Resetting {
        until: Instant,
    },
}

/// smoltcp's side: a set of one socket, so that no packet is looked for in another flow.
pub(crate) struct Stack {
    pub sockets: SocketSet<'static>,
    pub handle: SocketHandle,
}

pub(crate) enum Other {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// What a turn of a flow came to.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    /// There is more to move, but others wait.
    pub again: bool,
    /// It wants to send, and nothing is allowed any more.
    pub thirsty: bool,
    /// Its hello asks for a host that is reached through the hatch.
    pub aside: bool,
}

/// What becomes of what the guest said first.
enum Hold {
    More,
    On,
    Aside,
}

/// Why a flow must be reset.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The other end failed.
    Other,
    /// What was said was refused.
    Denied(Denied),
}

/// What a turn needs of the gateway.
pub(crate) struct Gate<'a> {
    pub meter: &'a mut Meter,
    pub counters: &'a Counters,
    pub policy: &'a Policy,
    pub now: Instant,
}

impl Stack {
    /// A socket that takes the connection which was asked for, and no other.
    pub fn new(ends: Ends, buffer: usize) -> Stack {
        let ring = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut socket = tcp::Socket::new(ring(), ring());
        // The link loses nothing and has no far end: waiting to send more at once gains nothing.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(ACK_DELAY));
        let endpoint = IpListenEndpoint { addr: Some(ends.to.ip().into()), port: ends.to.port() };
        if let Err(error) = socket.listen(endpoint) {
            // Port 0 only, which is refused before; without an endpoint it answers nothing.
            tracing::debug!(%error, "no socket for a flow");
        }
        let mut sockets = SocketSet::new(vec![SocketStorage::EMPTY]);
        let handle = sockets.add(socket);
        Stack { sockets, handle }
    }

    pub fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }
}

impl Flow {
    pub fn is_metered(&self) -> bool {
        matches!(self.target, Target::Outside(_))
    }

    /// The address that is remembered for as long as this flow lives.
    pub fn outside(&self) -> Option<IpAddr> {
        match &self.target {
            Target::Outside(outside) => Some(outside.to.ip()),
            Target::Door(_) | Target::Dns(_) => None,
        }
    }

    /// Moves what can be moved, both ways.
    pub fn turn(&mut self, gate: &mut Gate<'_>) -> Result<Turn, Broken> {
        let (Some(stack), Some(other)) = (&mut self.stack, &mut self.other) else {
            return Ok(Turn::default());
        };
        let metered = matches!(self.target, Target::Outside(_));
        let socket = stack.sockets.get_mut::<tcp::Socket<'_>>(stack.handle);
        if matches!(
            socket.state(),
            tcp::State::CloseWait
                | tcp::State::LastAck
                | tcp::State::Closing
                | tcp::State::TimeWait
        ) {
            self.guest_ended = true;
        }
        let (mut sent_up, mut sent_down) = (0, 0);
        let mut thirsty = false;

        if self.held {
            let Target::Outside(outside) = &mut self.target else { return Ok(Turn::default()) };
            match hold(socket, self.guest_ended, outside, &mut self.prefix, gate)? {
                Hold::More => {}
                Hold::On => self.held = false,
                Hold::Aside => {
                    self.held = false;
                    return Ok(Turn { aside: true, ..Turn::default() });
                }
            }
        }
        while !self.held && self.writable && sent_up < TURN {
            if !self.prefix.is_empty() {
                match attempt(|| other.write(&self.prefix))? {
                    None => self.writable = false,
                    Some(bytes) => drop(self.prefix.drain(..bytes)),
                }
                continue;
            }
            if !socket.can_recv() {
                break;
            }
            let sent = socket.recv(|bytes| {
                // Paid before it is sent.
                let paid = if metered { gate.meter.take(bytes.len()) } else { bytes.len() };
                if paid == 0 {
                    thirsty = true;
                    return (0, Ok(None));
                }
                let sent = attempt(|| other.write(&bytes[..paid]));
                // The kernel stops short only where there is no room.
                self.writable = matches!(sent, Ok(Some(count)) if count == paid);
                let count = sent.as_ref().ok().copied().flatten().unwrap_or(0);
                if metered {
                    gate.meter.give_back(paid - count);
                }
                (count, sent)
            });
            if thirsty {
                break;
            }
            match sent {
                Ok(Ok(Some(bytes))) => sent_up += bytes,
                Ok(Ok(None)) => {}
                Ok(Err(broken)) => return Err(broken),
                Err(_) => break,
            }
        }
        let all_passed = !self.held && self.prefix.is_empty() && !socket.can_recv();
        if self.guest_ended && all_passed && !self.passed_on {
            self.passed_on = true;
            // Where it fails the other end is gone, which reading tells.
            let _ = other.shutdown(Shutdown::Write);
        }

        while self.readable && !self.other_ended && socket.can_send() && sent_down < TURN {
            let mut ended = false;
            let received = socket.send(|room| {
                let received = attempt(|| other.read(room));
                // As above, where nothing is left; but there its end may wait.
                self.readable =
                    self.other_closed || matches!(received, Ok(Some(count)) if count == room.len());
                let count = received.as_ref().ok().copied().flatten().unwrap_or(0);
                ended = matches!(received, Ok(Some(0)));
                (count, received)
            });
            match received {
                Ok(Ok(Some(bytes))) => {
                    sent_down += bytes;
                    if metered {
                        gate.counters.received(bytes);
                    }
                }
                Ok(Ok(None)) => break,
                Ok(Err(broken)) => return Err(broken),
                Err(_) => break,
            }
            if ended {
                self.other_ended = true;
                socket.close();
            }
        }
        if sent_up + sent_down > 0 {
            self.last_used = gate.now;
        }
        Ok(Turn { again: sent_up >= TURN || sent_down >= TURN, thirsty, aside: false })
    }

    /// Whether nothing is left to be said in either direction, and the guest knows it.
    pub fn is_over(&mut self) -> bool {
        let (well, passed_on) = (self.ended_well(), self.passed_on);
        let Some(stack) = &mut self.stack else { return false };
        let socket = stack.socket();
        match socket.state() {
            // Its last word was heard, or it was reset by either side.
            tcp::State::Closed | tcp::State::Listen if socket.remote_endpoint().is_none() => {
                !well || passed_on
            }
            // Both ends were said and heard. Who waits for strays is the guest's kernel.
            tcp::State::TimeWait => passed_on,
            _ => false,
        }
    }

    /// Whether it ended as connections should.
    pub fn ended_well(&self) -> bool {
        self.guest_ended && self.other_ended
    }
}

/// Looks for a name in what the guest said first.
fn hold(
    socket: &mut tcp::Socket<'_>,
    ended: bool,
    outside: &mut Outside,
    prefix: &mut Vec<u8>,
    gate: &Gate<'_>,
) -> Result<Hold, Broken> {
    let room = socket.recv_capacity().min(FIRST_MAX);
    let first = if socket.can_recv() { socket.peek(FIRST_MAX).unwrap_or_default() } else { &[] };
    let heard = listen(first, room, ended);
    let denied = match heard {
        Heard::More => return Ok(Hold::More),
        Heard::Other if outside.via == Via::Http && !first.is_empty() => {
            Denied::new(rule::HOST, outside.to, "HTTP, as a secret may be put into it")
        }
        Heard::Other => return Ok(Hold::On),
        // It was listened to for the hatch alone, and is not for it.
        Heard::Unclear(_) if outside.by == Admitted::ByAddress && outside.via != Via::Http => {
            return Ok(Hold::On);
        }
        Heard::Names(rule, names) => match judge(outside, rule, &names, gate.policy) {
            Ok(asked) => {
                let aside = matches!(asked, Some(Knock::Https { .. }));
                prefix.extend(asked.iter().flat_map(knock));
                outside.said = Some((rule, names));
                return Ok(if aside { Hold::Aside } else { Hold::On });
            }
            Err(denied) => denied,
        },
        Heard::Unclear(rule) => match gate.policy.spoken(outside.to, None, rule) {
            Ok(()) => return Ok(Hold::On),
            Err(denied) => denied,
        },
    };
    Err(Broken::Denied(denied))
}

/// Judges what was said; the knock at the hatch, if it goes there.
fn judge(
    outside: &Outside,
    rule: &'static str,
    names: &[HostName],
    policy: &Policy,
) -> Result<Option<Knock>, Denied> {
    if outside.by == Admitted::ByName {
        for name in names {
            policy.spoken(outside.to, Some(name), rule)?;
        }
    }
    if let Via::Hello(hosts) = &outside.via {
        // One name, which led here: all else is between the guest and who is there.
        let asked = (names.len() == 1 && rule == rule::SNI).then(|| &names[0]);
        let host = asked.filter(|name| hosts.contains(name));
        return Ok(host.map(|h| Knock::Https { to: outside.to, host: h.to_string() }));
    }
    if outside.via == Via::Nobody {
        return Ok(None);
    }
    // A secret goes only where the name that it is for led; so no other name is said there.
    let (Some(host), true) = (names.first(), rule == rule::HOST) else {
        return Err(Denied::new(rule, outside.to, "plain HTTP"));
    };
    if let Some(other) = names.iter().find(|name| !outside.names.contains(name) || *name != host) {
        let led: Vec<&str> = outside.names.iter().map(HostName::as_str).collect();
        return Err(Denied::new(rule, format!("{other} at {}", outside.to), led.join(", ")));
    }
    Ok(Some(Knock::Http { to: outside.to, host: host.to_string() }))
}

/// A knock as it is said.
pub(crate) fn knock(knock: &Knock) -> Vec<u8> {
    let mut line = serde_json::to_vec(knock).expect("a knock is plain JSON");
    line.push(b'\n');
    line
}

/// Tries until it is done or would block (`None`).
fn attempt(mut f: impl FnMut() -> io::Result<usize>) -> Result<Option<usize>, Broken> {
    loop {
        match f() {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Broken::Other),
        }
    }
}

impl Other {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Other::Tcp(stream) => stream.read(room),
            Other::Unix(stream) => stream.read(room),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Other::Tcp(stream) => stream.write(bytes),
            Other::Unix(stream) => stream.write(bytes),
        }
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Other::Tcp(stream) => stream.shutdown(how),
            Other::Unix(stream) => stream.shutdown(how),
        }
    }

    /// Whether the connection is there; `None` if that is not decided yet.
    pub fn connected(&self) -> io::Result<Option<()>> {
        let (error, peer) = match self {
            Other::Tcp(stream) => (stream.take_error()?, stream.peer_addr().map(drop)),
            Other::Unix(stream) => (stream.take_error()?, stream.peer_addr().map(drop)),
        };
        match (error, peer) {
            (Some(error), _) => Err(error),
            (None, Ok(())) => Ok(Some(())),
            (None, Err(e)) if e.kind() == io::ErrorKind::NotConnected => Ok(None),
            (None, Err(e)) => Err(e),
        }
    }

    /// Whether both ends are on this host, by one address.
    pub fn is_own(&self) -> bool {
        match self {
            Other::Tcp(stream) => match (stream.local_addr(), stream.peer_addr()) {
                (Ok(local), Ok(peer)) => local.ip() == peer.ip(),
                _ => true,
            },
            Other::Unix(_) => false,
        }
    }

    /// Prepares a connection to outside. `kernel` bounds what the kernel holds for it, bytes.
    pub fn prepare(&self, kernel: Option<usize>) {
        let Other::Tcp(stream) = self else { return };
        // None of them is needed for being right.
        let _ = stream.set_nodelay(true);
        let _ = rustix::net::sockopt::set_socket_keepalive(stream, true);
        let _ = rustix::net::sockopt::set_tcp_keepidle(stream, KEEP_ALIVE);
        if let Some(bytes) = kernel {
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size(stream, bytes);
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(stream, bytes);
        }
    }

    /// Says the last word, so that what was sent still arrives once it is closed: the kernel throws
    /// that away where something was left unread.
    pub fn finish(&mut self, scratch: &mut [u8]) {
        let _ = self.shutdown(Shutdown::Write);
        for _ in 0..DRAIN {
            if !self.read(scratch).is_ok_and(|bytes| bytes > 0) {
                return;
            }
        }
    }

    /// From now on closing it means a reset, and what is not sent yet is not sent at all.
    pub fn reset_on_close(&self) {
        if let Other::Tcp(stream) = self {
            let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
        }
    }
}
