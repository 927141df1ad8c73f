//! The gateway's thread: it waits for the link, for sockets, for the owner and for deadlines, and
//! does what they bring, a bounded part at a time.

mod aside;
mod flow;
mod tcp;
mod udp;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aegis_wire::egress::{Denied, Policy};
use aegis_wire::link::{GATEWAY, PREFIX};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use smoltcp::iface::{self, Interface, SocketSet};
use smoltcp::wire::{HardwareAddress, IpCidr};

use crate::budgets::Bucket;
use crate::dns;
use crate::doors::Doors;
use crate::handle::{Config, Link, Shared, ViaHatch, Wanted};
use crate::link::{Incoming, Outgoing, Port, Read};
use crate::meter::Meter;
use crate::news::{Denials, Teller};
use crate::own::OwnAddresses;
use crate::packet::{self, Content, Ends, Ip, Payload};
use crate::reply::{self, Unreachable};
use crate::timers::Timers;

pub(crate) use flow::{Flow, Target};
pub(crate) use udp::{UdpFlow, connected};

/// Woken by the owner.
pub(crate) const OWNER: Token = Token(0);
const LINK: Token = Token(1);
/// What is read from the link before flows have their turn, reads.
const READS: usize = 8;
/// What the kernel holds of frames that the card did not read yet, bytes.
const LINK_BUFFER: usize = 1024 * 1024;

/// The next turn: never this one again.
const SOON: Duration = Duration::from_micros(1);

/// Who a deadline or a readiness is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Who {
    Tcp(usize),
    Udp(usize),
    Query(usize),
    Denials,
}

impl Who {
    const KINDS: usize = 3;
    const FIRST: usize = 2;

    pub fn token(self) -> Token {
        let (kind, slot) = match self {
            Who::Tcp(slot) => (0, slot),
            Who::Udp(slot) => (1, slot),
            Who::Query(slot) => (2, slot),
            Who::Denials => unreachable!("denials have no socket"),
        };
        Token(Who::FIRST + slot * Who::KINDS + kind)
    }

    fn from(token: Token) -> Option<Who> {
        let number = token.0.checked_sub(Who::FIRST)?;
        let slot = number / Who::KINDS;
        Some(match number % Who::KINDS {
            0 => Who::Tcp(slot),
            1 => Who::Udp(slot),
            _ => Who::Query(slot),
        })
    }
}

/// The machine's card.
struct Card {
    fd: OwnedFd,
    readable: bool,
    writable: bool,
    /// Nothing will come behind what is there.
    closed: bool,
}

pub(crate) struct Engine {
    pub config: Config,
    pub poll: Poll,
    pub shared: Arc<Shared>,
    pub teller: Teller,
    pub denials: Denials,
    pub meter: Meter,
    pub policy: Policy,
    pub via_hatch: aside::Hosts,
    pub doors: Doors,
    pub own: OwnAddresses,
    pub dns: dns::Dns,
    /// Nothing goes any more, for good.
    pub is_cut: bool,
    /// The owner has let go.
    is_ended: bool,
    pub now: Instant,
    started: Instant,
    card: Option<Card>,
    /// What came over an earlier link is void.
    is_other_link: bool,
    incoming: Incoming,
    pub outgoing: Outgoing,
    interface: Interface,
    nobody: SocketSet<'static>,
    pub timers: Timers<Who>,
    pub bucket: Bucket,
    pub flows: Slab<Flow>,
    by_ends: HashMap<Ends, usize>,
    serial: u64,
    /// Flows with something to do; those that wait for room on the link; for allowance.
    ready: VecDeque<usize>,
    starved: VecDeque<usize>,
    thirsty: Vec<usize>,
    /// Bytes of buffers that all flows have.
    buffers: usize,
    pub datagrams: Slab<UdpFlow>,
    datagrams_by_ends: HashMap<Ends, usize>,
    /// Where a datagram from outside is read to.
    pub scratch: Box<[u8]>,
}

impl Engine {
    pub fn new(mut config: Config, poll: Poll, shared: Arc<Shared>, teller: Teller) -> Engine {
        let now = Instant::now();
        let mut outgoing = Outgoing::new();
        let mut setup = iface::Config::new(HardwareAddress::Ip);
        setup.random_seed = getrandom::u64().expect("the kernel has randomness");
        let mut port = Port { incoming: None, outgoing: &mut outgoing };
        let mut interface = Interface::new(setup, &mut port, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Both fit: smoltcp has room for two.
            let _ = addresses.push(IpCidr::new(IpAddr::V4(GATEWAY.0).into(), PREFIX.0));
            let _ = addresses.push(IpCidr::new(IpAddr::V6(GATEWAY.1).into(), PREFIX.1));
        });
        interface.set_any_ip(true);
        let counters = shared.counters.clone();
        let budgets = config.budgets.clone();
        Engine {
            denials: Denials::new(counters.clone()),
            meter: Meter::new(counters, config.book.take()),
            dns: dns::Dns::new(&budgets, now),
            bucket: Bucket::new(budgets.new_flows_per_second, budgets.new_flows_burst, now),
            policy: Policy::default(),
            via_hatch: aside::Hosts::default(),
            doors: Doors::default(),
            own: OwnAddresses::default(),
            is_cut: false,
            is_ended: false,
            now,
            started: now,
            card: None,
            is_other_link: false,
            incoming: Incoming::new(),
            outgoing,
            interface,
            nobody: SocketSet::new(Vec::new()),
            timers: Timers::new(),
            flows: Slab::new(),
            by_ends: HashMap::new(),
            serial: 0,
            ready: VecDeque::new(),
            starved: VecDeque::new(),
            thirsty: Vec::new(),
            buffers: 0,
            datagrams: Slab::new(),
            datagrams_by_ends: HashMap::new(),
            scratch: vec![0; 64 * 1024].into_boxed_slice(),
            config,
            poll,
            shared,
            teller,
        }
    }

    /// Runs until the owner lets go.
    pub fn run(mut self) {
        let mut events = Events::with_capacity(256);
        loop {
            match self.poll.poll(&mut events, self.patience()) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the gateway can't wait for anything");
                    return;
                }
            }
            self.now = Instant::now();
            for event in &events {
                match event.token() {
                    OWNER => drop(self.obey()),
                    LINK => {
                        if let Some(card) = &mut self.card {
                            card.readable |= event.is_readable() || event.is_read_closed();
                            card.closed |= event.is_read_closed();
                            card.writable |= event.is_writable();
                        }
                    }
                    token => self.woken(token, event),
                }
            }
            self.receive();
            if self.is_ended {
                return;
            }
            self.take_turns();
            self.feed_starved();
            while let Some(who) = self.timers.due(self.now) {
                self.due(who);
            }
            self.meter.tell(&self.teller);
            self.write();
        }
    }

    /// How long there is nothing to do by itself.
    fn patience(&self) -> Option<Duration> {
        if !self.ready.is_empty() || self.card.as_ref().is_some_and(|card| card.readable) {
            return Some(Duration::ZERO);
        }
        self.timers.next().map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn woken(&mut self, token: Token, event: &mio::event::Event) {
        let readable = event.is_readable() || event.is_read_closed() || event.is_error();
        let writable = event.is_writable() || event.is_write_closed() || event.is_error();
        let closed = event.is_read_closed() || event.is_error();
        match Who::from(token) {
            Some(Who::Tcp(slot)) => self.flow_woken(slot, readable, writable, closed),
            Some(Who::Udp(slot)) => self.datagrams_woken(slot),
            Some(Who::Query(slot)) => self.query_woken(slot),
            Some(Who::Denials) | None => {}
        }
    }

    fn due(&mut self, who: Who) {
        match who {
            Who::Tcp(slot) => self.flow_due(slot),
            Who::Udp(slot) => self.datagrams_due(slot),
            Who::Query(slot) => self.query_due(slot),
            Who::Denials => {
                if let Some(at) = self.denials.tell(&self.teller, self.now) {
                    self.timers.arm(Who::Denials, at);
                }
            }
        }
    }

    /// Does what the owner wants, if there is anything; true if the link is another one then.
    fn obey(&mut self) -> bool {
        let Some(wanted) = self.shared.take() else { return false };
        self.is_ended |= wanted.end;
        let link = wanted.link.is_some();
        self.become_true(wanted);
        link
    }

    /// Makes it true; a policy is in force before the link that comes with it.
    fn become_true(&mut self, wanted: Wanted) {
        if wanted.cut && !self.is_cut {
            self.is_cut = true;
            self.reset_which(|_| true, true);
            self.drop_datagrams(|_| true);
            self.drop_queries();
        }
        if let Some((policy, via_hatch)) = wanted.policy {
            self.set_policy(policy, &via_hatch);
        }
        if let Some(door) = wanted.door {
            self.config.door = door;
        }
        if let Some(resolvers) = wanted.resolvers {
            self.config.resolvers = resolvers;
        }
        for answer in wanted.trim {
            // Who asked may have left.
            let _ = answer.send(self.meter.trim());
        }
        // An allowance that comes with it was made later.
        if let Some((ceiling, last)) = wanted.allowance {
            self.meter.set(ceiling, last);
            for slot in std::mem::take(&mut self.thirsty) {
                if let Some(flow) = self.flows.get_mut(slot) {
                    flow.thirsty = false;
                }
                self.queue(slot);
            }
        }
        match wanted.link {
            None => {}
            Some(Link::Unplugged) => self.unplug(),
            Some(Link::Plugged(fd)) => {
                self.unplug();
                if let Err(error) = self.plug(fd) {
                    tracing::error!(%error, "a link can't be used");
                }
            }
        }
    }

    fn set_policy(&mut self, policy: Policy, via_hatch: &ViaHatch) {
        self.doors.learn(&policy);
        self.policy = policy;
        self.via_hatch = aside::Hosts::parse(via_hatch);
        let own = self.own.at(self.now).to_vec();
        let policy = self.policy.clone();
        let mut refused: Vec<usize> = Vec::new();
        for (slot, flow) in &self.flows {
            if !tcp::may_stay(flow, &policy, &own) {
                refused.push(slot);
            }
        }
        for slot in refused {
            self.reset(slot, true);
        }
        self.drop_datagrams(|flow| !udp::may_stay(flow, &policy, &own));
        self.drop_denied_queries();
    }

    fn plug(&mut self, fd: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // Where it fails the kernel's own measure holds.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&fd, LINK_BUFFER);
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut SourceFd(&fd.as_raw_fd()), LINK, interest)?;
        self.card = Some(Card { fd, readable: true, writable: true, closed: false });
        Ok(())
    }

    /// Drops the link, and all that went over it.
    fn unplug(&mut self) {
        if let Some(card) = self.card.take() {
            let _ = self.poll.registry().deregister(&mut SourceFd(&card.fd.as_raw_fd()));
        }
        let slots: Vec<usize> = self.flows.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.remove(slot);
        }
        self.drop_datagrams(|_| true);
        self.drop_queries();
        self.is_other_link = true;
        self.outgoing.clear();
    }

    /// Takes frames from the link, as many as one turn allows.
    fn receive(&mut self) {
        // Borrowed out of the engine, so that a frame is looked at where it lies.
        let mut incoming = std::mem::replace(&mut self.incoming, Incoming::none());
        self.void_earlier(&mut incoming);
        for _ in 0..READS {
            let Some(card) = self.card.as_mut().filter(|card| card.readable) else { break };
            match incoming.read(&card.fd) {
                Ok(Read::More) => {}
                Ok(Read::All) => card.readable = card.closed,
                Ok(Read::Nothing) => {
                    card.readable = false;
                    break;
                }
                Ok(Read::End) => {
                    tracing::debug!("the machine's card is gone");
                    self.unplug();
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "the link failed");
                    self.unplug();
                    break;
                }
            }
            // What was wanted before a frame was sent is true before it is looked at.
            if self.obey() {
                break;
            }
            loop {
                match incoming.frame() {
                    Ok(Some(frame)) => self.frame(frame),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "the link is dropped");
                        self.unplug();
                        break;
                    }
                }
            }
        }
        self.void_earlier(&mut incoming);
        self.incoming = incoming;
    }

    fn void_earlier(&mut self, incoming: &mut Incoming) {
        if std::mem::take(&mut self.is_other_link) {
            incoming.clear();
        }
    }

    fn frame(&mut self, frame: &[u8]) {
        let Some(frame) = packet::parse(frame) else { return };
        self.outgoing.card = frame.card;
        match frame.content {
            Content::Arp(packet) => reply::arp(packet, &mut self.outgoing),
            Content::Ip(ip) => match ip.payload {
                Payload::Icmp(packet) => self.icmp(&ip, packet),
                // Whoever sends in another's name has no answer to expect.
                _ if !ip.is_from_guest() => {}
                Payload::Tcp(tcp) => self.segment(&ip, tcp),
                Payload::Udp(udp) => self.datagram(&ip, udp),
            },
        }
    }

    fn icmp(&mut self, ip: &Ip<'_>, packet: &[u8]) {
        let doors = &self.doors;
        let is_here = |address| is_gateway(address) || doors.is_here(address);
        if !reply::icmp(ip, packet, &mut self.outgoing, is_here) && ip.is_from_guest() {
            // No echo goes outside: its payload would be unmetered, and nobody needs it.
            reply::unreachable(ip.bytes, Unreachable::Prohibited, &mut self.outgoing);
        }
    }

    /// Writes what waits for the card.
    pub fn write(&mut self) {
        let Some(card) = self.card.as_mut().filter(|card| card.writable) else { return };
        match self.outgoing.write(&card.fd) {
            Ok(all) => card.writable = all,
            // Reading finds it gone, and cleans up.
            Err(_) => (card.readable, card.writable) = (true, false),
        }
    }

    pub fn deny(&mut self, denied: Denied) {
        self.denials.add(denied, &self.teller, self.now);
        if let Some(at) = self.denials.next() {
            self.timers.arm(Who::Denials, at);
        }
    }

    fn smol_now(&self) -> smoltcp::time::Instant {
        let micros = self.now.duration_since(self.started).as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    fn smol_instant(&self, at: smoltcp::time::Instant) -> Instant {
        let micros = u64::try_from(at.total_micros()).unwrap_or(0);
        self.started + Duration::from_micros(micros)
    }
}

/// Whether an address is the gateway's own.
pub(crate) fn is_gateway(address: IpAddr) -> bool {
    address == IpAddr::V4(GATEWAY.0) || address == IpAddr::V6(GATEWAY.1)
}
