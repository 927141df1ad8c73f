//! UDP: one socket outside for each pair of ends, forgotten when it is silent.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use aegis_wire::egress::{Admitted, Denied, Policy, rule};
use mio::Interest;
use mio::net::UdpSocket;

use super::flow::Outside;
use super::tcp::outside_may_stay;
use super::{Engine, SOON, Who, is_gateway};
use crate::dns::{self, Asker};
use crate::packet::{Ends, Ip, Udp};
use crate::reply::{self, Quote, Unreachable};

/// QUIC: the name in its hello is not to be read.
const QUIC: u16 = 443;
/// Datagrams of one flow before others have their turn.
const TURN: usize = 64;

pub(crate) struct UdpFlow {
    ends: Ends,
    pub(super) outside: Outside,
    socket: UdpSocket,
    last_used: Instant,
    idle: Duration,
    /// The start of what was sent last: quoted if nobody was there.
    quote: Quote,
    remembered: bool,
}

impl Engine {
    /// A datagram from the guest.
    pub(super) fn datagram(&mut self, ip: &Ip<'_>, udp: Udp<'_>) {
        let ends = ip.ends(udp.from_port, udp.to_port);
        let to = ends.to.ip();
        // Announcements to a network that has nobody else; no reason for news.
        let is_to_all = to.is_multicast() || to == IpAddr::V4(Ipv4Addr::BROADCAST);
        if self.is_cut || is_to_all || udp.from_port == 0 || udp.to_port == 0 {
            return;
        }
        if is_gateway(to) && ends.to.port() == dns::PORT {
            return self.asked(Asker::Datagram(ends), udp.data);
        }
        if is_gateway(to) || self.doors.is_here(to) {
            return reply::unreachable(ip.bytes, Unreachable::Port, &mut self.outgoing);
        }
        let slot = match self.datagrams_by_ends.get(&ends) {
            Some(slot) => *slot,
            None => match self.open_datagrams(ends, ip) {
                Ok(slot) => slot,
                Err(denied) => {
                    if let Some(denied) = denied {
                        self.deny(denied);
                    }
                    return reply::unreachable(ip.bytes, Unreachable::Port, &mut self.outgoing);
                }
            },
        };
        self.send_datagram(slot, ip, udp.data);
    }

    /// A socket for a new pair of ends; without a denial if the kernel has none.
    fn open_datagrams(&mut self, ends: Ends, ip: &Ip<'_>) -> Result<usize, Option<Denied>> {
        let budgets = &self.config.budgets;
        if self.datagrams.len() >= budgets.udp_flows {
            let allowed = format!("{} UDP flows at a time", budgets.udp_flows);
            return Err(Some(Denied::new(rule::FLOWS, "another UDP flow", allowed)));
        }
        if !self.bucket.take(self.now) {
            let allowed = format!("{} new flows per second", budgets.new_flows_per_second);
            return Err(Some(Denied::new(rule::FLOWS, "another new flow", allowed)));
        }
        let is_dns = ends.to.port() == dns::PORT;
        let idle = if is_dns { budgets.udp_dns_idle } else { budgets.udp_idle };
        let outside = self.judge_outside(ends.to)?;
        if outside.by == Admitted::ByName && outside.to.port() == QUIC {
            return Err(Some(Denied::new(
                rule::SNI,
                outside.to,
                "TLS over TCP, which shows its name",
            )));
        }
        let slot = self.datagrams.vacant_key();
        let socket = connected(outside.to)
            .and_then(|mut socket| {
                let token = Who::Udp(slot).token();
                self.poll.registry().register(&mut socket, token, Interest::READABLE)?;
                Ok(socket)
            })
            .map_err(|error| {
                tracing::debug!(%error, "no socket for datagrams");
                None
            })?;
        if socket.local_addr().is_ok_and(|local| local.ip() == outside.to.ip()) {
            let allowed = "other hosts than this one";
            return Err(Some(Denied::new(rule::NEVER, outside.to, allowed)));
        }
        let remembered = self.dns.names.hold(outside.to.ip());
        let (last_used, quote) = (self.now, Quote::of(ip));
        let flow = UdpFlow { ends, outside, socket, last_used, idle, quote, remembered };
        self.datagrams.insert(flow);
        self.datagrams_by_ends.insert(ends, slot);
        self.timers.arm(Who::Udp(slot), self.now + idle);
        self.shared.counters.opened();
        Ok(slot)
    }

    fn send_datagram(&mut self, slot: usize, ip: &Ip<'_>, data: &[u8]) {
        // In one piece or not at all.
        let left = self.meter.left() >= data.len();
        let paid = if left { self.meter.take(data.len()) } else { 0 };
        if paid < data.len() {
            self.meter.give_back(paid);
            self.meter.tell_empty(&self.teller);
            if self.meter.is_exhausted() {
                let to = self.datagrams[slot].outside.to;
                self.deny(Denied::new(rule::LIMIT, to, "nothing more"));
                self.exhaust();
            }
            return;
        }
        let flow = &mut self.datagrams[slot];
        flow.last_used = self.now;
        flow.quote = Quote::of(ip);
        // The first error is that of an earlier datagram.
        let mut sent = flow.socket.send(data);
        if sent.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
            flow.quote.unreachable(Unreachable::Port, &mut self.outgoing);
            sent = flow.socket.send(data);
        }
        if sent.is_err() {
            self.meter.give_back(data.len());
        }
    }

    /// Datagrams, or errors, came from outside.
    pub(super) fn datagrams_woken(&mut self, slot: usize) {
        let Some(flow) = self.datagrams.get_mut(slot) else { return };
        for _ in 0..TURN {
            match flow.socket.recv(&mut self.scratch) {
                Ok(bytes) => {
                    flow.last_used = self.now;
                    if reply::datagram(flow.ends, &self.scratch[..bytes], &mut self.outgoing) {
                        self.shared.counters.received(bytes);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    flow.quote.unreachable(Unreachable::Port, &mut self.outgoing);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Also any other error: silence is what UDP has for it.
                Err(_) => return,
            }
        }
        // The kernel says it once only: look again soon.
        self.timers.arm(Who::Udp(slot), self.now + SOON);
    }

    pub(super) fn datagrams_due(&mut self, slot: usize) {
        let Some(flow) = self.datagrams.get(slot) else { return };
        let until = flow.last_used + flow.idle;
        if until <= self.now {
            return self.remove_datagrams(slot);
        }
        self.timers.arm(Who::Udp(slot), until);
        self.datagrams_woken(slot);
    }

    pub(super) fn drop_datagrams(&mut self, which: impl Fn(&UdpFlow) -> bool) {
        let slots: Vec<usize> =
            self.datagrams.iter().filter(|(_, flow)| which(flow)).map(|(slot, _)| slot).collect();
        for slot in slots {
            self.remove_datagrams(slot);
        }
    }

    fn remove_datagrams(&mut self, slot: usize) {
        let Some(flow) = self.datagrams.try_remove(slot) else { return };
        self.datagrams_by_ends.remove(&flow.ends);
        self.timers.disarm(Who::Udp(slot));
        if flow.remembered {
            self.dns.names.release(flow.outside.to.ip());
        }
    }
}

/// Whether a policy that came later lets a flow be.
pub(super) fn may_stay(flow: &UdpFlow, policy: &Policy, own: &[IpAddr]) -> bool {
    outside_may_stay(&flow.outside, policy, own)
}

/// A socket with a port that the kernel draws, for one other end only.
pub(crate) fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(to)?;
    Ok(socket)
}
