//! TCP: what may be opened is dialled first and answered then, so that who is not there or may not
//! be reached is a reset.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use aegis_wire::door::Knock;
use aegis_wire::egress::{Admitted, Denied, Policy, rule};
use mio::Interest;
use mio::net::TcpStream;
use smoltcp::iface::{PollIngressSingleResult, PollResult};
use smoltcp::socket::tcp::State;

use super::aside::Via;
use super::flow::{Broken, Flow, Gate, Other, Outside, Stack, Stage, Target, knock};
use super::{Engine, SOON, Who, is_gateway};
use crate::budgets::BUFFER_MIN;
use crate::dns;
use crate::doors;
use crate::link::Port;
use crate::packet::{Ends, Ip, Tcp};

/// Flows with less buffer than this get less from the kernel, too.
const BUFFER_PLENTY: usize = 128 * 1024;
/// A door whose queue is full is tried again after this.
pub(super) const REDIAL: Duration = Duration::from_millis(20);

impl Engine {
    /// A TCP segment from the guest.
    pub(super) fn segment(&mut self, ip: &Ip<'_>, tcp: Tcp) {
        let ends = ip.ends(tcp.from_port, tcp.to_port);
        match self.by_ends.get(&ends) {
            Some(&slot) if matches!(self.flows[slot].stage, Stage::Dialing { .. }) => {
                if tcp.resets {
                    self.remove(slot);
                }
            }
            Some(&slot) => {
                self.hand_in(slot, ip.bytes);
                self.queue(slot);
            }
            None if tcp.opens && tcp.from_port != 0 && tcp.to_port != 0 => match self.judge(ends) {
                Ok(Some(target)) => self.open(ends, target, ip.bytes),
                Ok(None) => self.refuse(ip.bytes),
                Err(denied) => {
                    self.deny(denied);
                    self.refuse(ip.bytes);
                }
            },
            None => self.refuse(ip.bytes),
        }
    }

    /// Where a connection goes, if anywhere.
    fn judge(&mut self, ends: Ends) -> Result<Option<Target>, Denied> {
        if self.is_cut {
            return Ok(None);
        }
        let (most, budgets) = (self.config.budgets.tcp_flows, &self.config.budgets);
        if self.flows.len() >= most {
            let allowed = format!("{most} TCP flows at a time");
            return Err(Denied::new(rule::FLOWS, "another TCP flow", allowed));
        }
        if !self.bucket.take(self.now) {
            let allowed = format!("{} new flows per second", budgets.new_flows_per_second);
            return Err(Denied::new(rule::FLOWS, "another new flow", allowed));
        }
        if is_gateway(ends.to.ip()) {
            let stream = || Target::Dns(dns::Stream::default());
            return Ok((ends.to.port() == dns::PORT).then(stream));
        }
        if let IpAddr::V4(to) = ends.to.ip()
            && self.doors.is_here(ends.to.ip())
        {
            if ends.to.port() != doors::PORT {
                return Ok(None);
            }
            return Ok(self.doors.behind(to, &self.policy)?.map(Target::Door));
        }
        self.judge_outside(ends.to).map(|outside| Some(Target::Outside(outside)))
    }

    /// Judges an address outside, for TCP and UDP.
    pub(super) fn judge_outside(&mut self, to: SocketAddr) -> Result<Outside, Denied> {
        let to = self.dns.real(to);
        let names = self.dns.names.of(to.ip(), self.now);
        let by = self.policy.connect(to, &names, self.own.at(self.now))?;
        if self.meter.is_exhausted() {
            return Err(Denied::new(rule::LIMIT, to, "nothing more"));
        }
        let via = self.via_hatch.via(to.port(), &names);
        Ok(Outside { to, names, by, said: None, via })
    }

    fn open(&mut self, ends: Ends, target: Target, syn: &[u8]) {
        let until = self.now + self.config.budgets.connect;
        let (prefix, held) = match &target {
            Target::Door(door) => (knock(door), false),
            Target::Outside(o) => (Vec::new(), o.via != Via::Nobody || o.by == Admitted::ByName),
            Target::Dns(_) => (Vec::new(), false),
        };
        self.serial += 1;
        let mut flow = Flow {
            ends,
            serial: self.serial,
            target,
            stage: Stage::Dialing { syn: syn.into(), until },
            stack: None,
            other: None,
            readable: false,
            other_closed: false,
            writable: false,
            prefix,
            held,
            remembered: false,
            guest_ended: false,
            passed_on: false,
            other_ended: false,
            queued: false,
            starved: false,
            thirsty: false,
            last_used: self.now,
            buffers: 0,
        };
        if let Some(address) = flow.outside() {
            flow.remembered = self.dns.names.hold(address);
        }
        let is_dns = matches!(flow.target, Target::Dns(_));
        let slot = self.flows.insert(flow);
        self.by_ends.insert(ends, slot);
        if is_dns {
            return self.accept(slot);
        }
        self.timers.arm(Who::Tcp(slot), until);
        self.dial(slot);
    }

    /// Begins to connect the other end.
    fn dial(&mut self, slot: usize) {
        let direct = match &self.flows[slot].target {
            // Who is not there is told so, also where a hello may lead it aside.
            Target::Outside(outside) if outside.via != Via::Http => Some(outside.to),
            _ => None,
        };
        let token = Who::Tcp(slot).token();
        let interest = Interest::READABLE | Interest::WRITABLE;
        let registry = self.poll.registry();
        let other = match direct {
            Some(to) => TcpStream::connect(to).and_then(|mut stream| {
                registry.register(&mut stream, token, interest)?;
                Ok(Other::Tcp(stream))
            }),
            None => self.dial_hatch(slot),
        };
        match other {
            Ok(other) => {
                self.flows[slot].other = Some(other);
                self.dialled(slot);
            }
            Err(e) if direct.is_none() && e.kind() == io::ErrorKind::WouldBlock => {
                self.timers.arm(Who::Tcp(slot), self.now + REDIAL);
            }
            Err(error) => {
                tracing::debug!(%error, "nobody can be dialled");
                self.fail(slot);
            }
        }
    }

    /// Looks whether the other end is there.
    fn dialled(&mut self, slot: usize) {
        let Some(other) = &self.flows[slot].other else { return };
        match other.connected() {
            Ok(None) => {}
            Ok(Some(())) if other.is_own() => {
                // The host's addresses changed since they were read.
                let Target::Outside(outside) = &self.flows[slot].target else { return };
                let denied = Denied::new(rule::NEVER, outside.to, "other hosts than this one");
                self.deny(denied);
                self.fail(slot);
            }
            Ok(Some(())) => self.accept(slot),
            Err(_) => self.fail(slot),
        }
    }

    /// The other end is there: now the guest is answered.
    fn accept(&mut self, slot: usize) {
        let until = self.now + self.config.budgets.connect;
        let share = self.config.budgets.buffer(self.flows.len(), self.buffers);
        let flow = &mut self.flows[slot];
        let is_dns = matches!(flow.target, Target::Dns(_));
        let buffer = if is_dns { BUFFER_MIN } else { share };
        let opened = Stage::Accepting { until };
        let Stage::Dialing { syn, .. } = std::mem::replace(&mut flow.stage, opened) else { return };
        if let Some(other) = &flow.other {
            other.prepare((buffer < BUFFER_PLENTY).then_some(buffer));
        }
        flow.stack = Some(Stack::new(flow.ends, buffer));
        flow.buffers = 2 * buffer;
        self.buffers += flow.buffers;
        // The kernel says once that it can be written, which may have been said before.
        (flow.readable, flow.writable) = (true, true);
        if !is_dns {
            self.shared.counters.opened();
        }
        self.hand_in(slot, &syn);
        self.queue(slot);
    }

    /// The other end is not to be had: the guest's SYN gets a reset.
    fn fail(&mut self, slot: usize) {
        if let Stage::Dialing { syn, .. } = &mut self.flows[slot].stage {
            let syn = std::mem::take(syn);
            self.refuse(&syn);
        }
        self.remove(slot);
    }

    /// Gives a packet to a flow's stack.
    fn hand_in(&mut self, slot: usize, packet: &[u8]) {
        let now = self.smol_now();
        let Some(stack) = &mut self.flows[slot].stack else { return };
        let mut port = Port { incoming: Some(packet), outgoing: &mut self.outgoing };
        self.interface.poll_ingress_single(now, &mut port, &mut stack.sockets);
    }

    /// Answers a segment that belongs to no flow.
    fn refuse(&mut self, packet: &[u8]) {
        let now = self.smol_now();
        let mut port = Port { incoming: Some(packet), outgoing: &mut self.outgoing };
        let _: PollIngressSingleResult =
            self.interface.poll_ingress_single(now, &mut port, &mut self.nobody);
    }

    pub(super) fn flow_woken(&mut self, slot: usize, readable: bool, writable: bool, closed: bool) {
        let Some(flow) = self.flows.get_mut(slot) else { return };
        flow.other_closed |= closed;
        flow.readable |= readable;
        flow.writable |= writable;
        if matches!(flow.stage, Stage::Dialing { .. }) {
            self.dialled(slot);
        } else {
            self.queue(slot);
        }
    }

    /// Lets a flow have its turn.
    pub(crate) fn queue(&mut self, slot: usize) {
        if let Some(flow) = self.flows.get_mut(slot)
            && !flow.queued
        {
            flow.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// One turn for each flow that waits for it.
    pub(super) fn take_turns(&mut self) {
        for _ in 0..self.ready.len() {
            let Some(slot) = self.ready.pop_front() else { return };
            self.take_turn(slot);
        }
    }

    fn take_turn(&mut self, slot: usize) {
        let Some(flow) = self.flows.get_mut(slot) else { return };
        flow.queued = false;
        let Some(stack) = &mut flow.stack else { return };
        let state = stack.socket().state();
        if matches!(flow.stage, Stage::Accepting { .. })
            && !matches!(state, State::Listen | State::SynReceived)
        {
            flow.stage = Stage::Open;
        }
        if matches!(flow.stage, Stage::Open) {
            let mut gate = Gate {
                meter: &mut self.meter,
                counters: &self.shared.counters,
                policy: &self.policy,
                now: self.now,
            };
            match flow.turn(&mut gate) {
                Ok(turn) => {
                    if turn.aside {
                        return self.turn_aside(slot);
                    }
                    if turn.again {
                        self.queue(slot);
                    }
                    if turn.thirsty {
                        self.thirst(slot);
                    }
                }
                Err(Broken::Other) => return self.reset(slot, false),
                Err(Broken::Denied(denied)) => {
                    self.deny(denied);
                    return self.reset(slot, true);
                }
            }
            self.answer_stream(slot);
        }
        self.send(slot);
        self.settle(slot);
    }

    /// A flow wants to send more than is allowed.
    fn thirst(&mut self, slot: usize) {
        self.meter.tell_empty(&self.teller);
        if self.meter.is_exhausted() {
            if let Some(Target::Outside(outside)) = self.flows.get(slot).map(|flow| &flow.target) {
                let denied = Denied::new(rule::LIMIT, outside.to, "nothing more");
                self.deny(denied);
            }
            self.exhaust();
        } else if let Some(flow) = self.flows.get_mut(slot)
            && !flow.thirsty
        {
            flow.thirsty = true;
            self.thirsty.push(slot);
        }
    }

    /// All that was allowed is sent: what goes outside ends. What was counted still arrives.
    pub(crate) fn exhaust(&mut self) {
        self.reset_which(Flow::is_metered, false);
        self.drop_datagrams(|_| true);
    }

    /// Sends what a flow's stack has to say, as far as there is room.
    fn send(&mut self, slot: usize) {
        let now = self.smol_now();
        while let Some(flow) = self.flows.get_mut(slot) {
            let Some(stack) = &mut flow.stack else { return };
            if !self.outgoing.has_room() {
                self.write();
                if !self.outgoing.has_room() {
                    let flow = &mut self.flows[slot];
                    if !flow.starved {
                        flow.starved = true;
                        self.starved.push_back(slot);
                    }
                    return;
                }
                continue;
            }
            let mut port = Port { incoming: None, outgoing: &mut self.outgoing };
            match self.interface.poll_egress(now, &mut port, &mut stack.sockets) {
                PollResult::None => return,
                PollResult::SocketStateChanged => {}
            }
        }
    }

    /// Lets flows send that found no room before.
    pub(super) fn feed_starved(&mut self) {
        for _ in 0..self.starved.len() {
            if !self.outgoing.has_room() {
                self.write();
                if !self.outgoing.has_room() {
                    return;
                }
            }
            let Some(slot) = self.starved.pop_front() else { return };
            if let Some(flow) = self.flows.get_mut(slot) {
                flow.starved = false;
                self.send(slot);
                self.settle(slot);
            }
        }
    }

    /// Removes a flow that is over, or sees to it that it is looked at in time.
    fn settle(&mut self, slot: usize) {
        let now = self.smol_now();
        let Some(flow) = self.flows.get_mut(slot) else { return };
        if flow.is_over() {
            return self.remove(slot);
        }
        let idle = flow.last_used + self.config.budgets.tcp_idle;
        let mut at = match &flow.stage {
            Stage::Dialing { until, .. }
            | Stage::Accepting { until }
            | Stage::Resetting { until } => *until,
            Stage::Turning { until } => (*until).min(self.now + REDIAL),
            Stage::Open => idle,
        };
        if let (false, Some(stack)) = (flow.starved, &flow.stack)
            && let Some(due) = self.interface.poll_at(now, &stack.sockets)
        {
            at = at.min(self.smol_instant(due).max(self.now + SOON));
        }
        self.timers.arm(Who::Tcp(slot), at);
    }

    pub(super) fn flow_due(&mut self, slot: usize) {
        let idle = self.config.budgets.tcp_idle;
        let Some(flow) = self.flows.get(slot) else { return };
        let over = |until: &Instant| *until <= self.now;
        match &flow.stage {
            Stage::Dialing { until, .. } if over(until) => self.fail(slot),
            Stage::Dialing { until, .. } => {
                let until = *until;
                let absent = flow.other.is_none();
                self.timers.arm(Who::Tcp(slot), until);
                if absent {
                    self.dial(slot);
                }
            }
            Stage::Accepting { until } | Stage::Turning { until } if over(until) => {
                self.reset(slot, true);
            }
            Stage::Turning { .. } => self.knock_aside(slot),
            Stage::Open if over(&(flow.last_used + idle)) => self.reset(slot, true),
            // It does not listen.
            Stage::Resetting { until } if over(until) => self.remove(slot),
            Stage::Accepting { .. } | Stage::Open | Stage::Resetting { .. } => {
                self.send(slot);
                self.settle(slot);
            }
        }
    }

    /// Resets a flow. With `hard`, what the other end has not yet is lost.
    pub(super) fn reset(&mut self, slot: usize, hard: bool) {
        let Some(flow) = self.flows.get_mut(slot) else { return };
        let Some(stack) = &mut flow.stack else { return self.fail(slot) };
        stack.socket().abort();
        flow.stage = Stage::Resetting { until: self.now + self.config.budgets.connect };
        match flow.other.take() {
            Some(other) if hard => other.reset_on_close(),
            Some(mut other) => other.finish(&mut self.scratch),
            None => {}
        }
        self.send(slot);
        self.settle(slot);
    }

    pub(super) fn reset_which(&mut self, which: impl Fn(&Flow) -> bool, hard: bool) {
        let slots: Vec<usize> =
            self.flows.iter().filter(|(_, flow)| which(flow)).map(|(slot, _)| slot).collect();
        for slot in slots {
            self.reset(slot, hard);
        }
    }

    pub(super) fn remove(&mut self, slot: usize) {
        let Some(flow) = self.flows.try_remove(slot) else { return };
        self.by_ends.remove(&flow.ends);
        self.timers.disarm(Who::Tcp(slot));
        self.buffers -= flow.buffers;
        if flow.starved {
            self.starved.retain(|starved| *starved != slot);
        }
        if flow.thirsty {
            self.thirsty.retain(|thirsty| *thirsty != slot);
        }
        if let (true, Some(address)) = (flow.remembered, flow.outside()) {
            self.dns.names.release(address);
        }
        if let (false, Some(other)) = (flow.ended_well(), &flow.other) {
            other.reset_on_close();
        }
    }
}

/// Whether a policy that came later lets a flow be.
pub(super) fn may_stay(flow: &Flow, policy: &Policy, own: &[IpAddr]) -> bool {
    match &flow.target {
        Target::Dns(_) => true,
        Target::Door(Knock::Llm) => policy.llm,
        Target::Door(Knock::Service { name }) => policy.service(name).is_ok(),
        Target::Door(Knock::Http { .. } | Knock::Https { .. }) => false,
        Target::Outside(outside) => outside_may_stay(outside, policy, own),
    }
}

/// As [`may_stay`], for TCP and UDP.
pub(super) fn outside_may_stay(outside: &Outside, policy: &Policy, own: &[IpAddr]) -> bool {
    match policy.connect(outside.to, &outside.names, own) {
        Err(_) => false,
        Ok(Admitted::ByAddress) => true,
        // What it said first was not listened to then.
        Ok(Admitted::ByName) if outside.by == Admitted::ByAddress => false,
        Ok(Admitted::ByName) => outside.said.as_ref().is_none_or(|(rule, names)| {
            names.iter().all(|name| policy.spoken(outside.to, Some(name), rule).is_ok())
        }),
    }
}
