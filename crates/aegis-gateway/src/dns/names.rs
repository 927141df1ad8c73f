//! Which addresses were the answer for which names.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use aegis_wire::egress::HostName;

/// Bounds of how long an answer is remembered.
const KEPT: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));
/// Who was told an answer begins to count later than we do.
const GRACE: Duration = Duration::from_secs(10);
/// Names that one address is remembered with.
const NAMES_MAX: usize = 16;

/// Answers, by address.
pub(crate) struct Names {
    most: usize,
    /// Names of all answers: at most `most`.
    known: usize,
    answers: HashMap<IpAddr, Answered>,
}

#[derive(Default)]
struct Answered {
    names: Vec<(HostName, Instant)>,
    /// Flows to it: while there are any, it is not forgotten.
    flows: usize,
}

impl Answered {
    fn until(&self) -> Option<Instant> {
        self.names.iter().map(|(_, until)| *until).max()
    }
}

impl Names {
    pub fn new(most: usize) -> Names {
        Names { most, known: 0, answers: HashMap::new() }
    }

    /// Remembers an answer.
    pub fn remember(&mut self, address: IpAddr, name: &HostName, ttl: u32, now: Instant) {
        let until = now + Duration::from_secs(ttl.into()).clamp(KEPT.0, KEPT.1) + GRACE;
        if self.known >= self.most {
            self.forget(address, now);
        }
        let answered = self.answers.entry(address).or_default();
        let before = answered.names.len();
        answered.names.retain(|(known, _)| known != name);
        if answered.names.len() >= NAMES_MAX {
            answered.names.remove(0);
        }
        answered.names.push((name.clone(), until));
        self.known = self.known + answered.names.len() - before;
    }

    /// The names that an address is the answer for.
    pub fn of(&self, address: IpAddr, now: Instant) -> Vec<HostName> {
        let Some(answered) = self.answers.get(&address) else { return Vec::new() };
        let fresh = |until: &Instant| answered.flows > 0 || *until > now;
        answered.names.iter().filter(|(_, until)| fresh(until)).map(|(n, _)| n.clone()).collect()
    }

    /// A flow to this address begins; true if it is to be released at its end.
    pub fn hold(&mut self, address: IpAddr) -> bool {
        match self.answers.get_mut(&address) {
            Some(answered) => {
                answered.flows += 1;
                true
            }
            None => false,
        }
    }

    /// A flow to this address that was held ends.
    pub fn release(&mut self, address: IpAddr) {
        if let Some(answered) = self.answers.get_mut(&address) {
            answered.flows = answered.flows.saturating_sub(1);
        }
    }

    /// Makes room: what is over, or else what is next to be; what flows need, only if all is needed.
    fn forget(&mut self, but: IpAddr, now: Instant) {
        self.answers.retain(|address, answered| {
            *address == but || answered.flows > 0 || answered.until().is_some_and(|u| u > now)
        });
        self.known = self.answers.values().map(|answered| answered.names.len()).sum();
        while self.known >= self.most {
            let others = self.answers.iter().filter(|(address, _)| **address != but);
            let first = others.min_by_key(|(_, answered)| (answered.flows > 0, answered.until()));
            let Some(address) = first.map(|(address, _)| *address) else { return };
            let gone = self.answers.remove(&address);
            self.known -= gone.map_or(0, |answered| answered.names.len());
        }
    }
}

/// IPv4 addresses that stand for IPv6 ones, for a guest that asks for IPv4 of a name that has none:
/// 198.18.0.0/15 is nobody's (RFC 2544).
pub(crate) struct StandIns {
    most: u32,
    next: u32,
    v6: HashMap<Ipv4Addr, Ipv6Addr>,
    v4: HashMap<Ipv6Addr, Ipv4Addr>,
}

const STAND_INS: u32 = u32::from_be_bytes([198, 18, 0, 0]);
const STAND_INS_MAX: u32 = 1 << 17;

impl StandIns {
    pub fn new(most: usize) -> StandIns {
        let most = u32::try_from(most).unwrap_or(STAND_INS_MAX).clamp(1, STAND_INS_MAX - 1);
        StandIns { most, next: 0, v6: HashMap::new(), v4: HashMap::new() }
    }

    /// The address that stands for this one; the oldest is given up for it if there are too many.
    pub fn give(&mut self, v6: Ipv6Addr) -> Ipv4Addr {
        if let Some(v4) = self.v4.get(&v6) {
            return *v4;
        }
        // Never the first: an address that ends in 0.0 looks like a network to some.
        let v4 = Ipv4Addr::from(STAND_INS + 1 + self.next);
        self.next = (self.next + 1) % self.most;
        if let Some(old) = self.v6.insert(v4, v6) {
            self.v4.remove(&old);
        }
        self.v4.insert(v6, v4);
        v4
    }

    /// What this address stands for.
    pub fn real(&self, v4: Ipv4Addr) -> Option<Ipv6Addr> {
        self.v6.get(&v4).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> HostName {
        text.parse().unwrap()
    }

    #[test]
    fn answers_are_remembered_for_their_time() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let address: IpAddr = "203.0.113.5".parse().unwrap();
        let mut names = Names::new(8);
        names.remember(address, &name("a.example"), 1, start);
        names.remember(address, &name("b.example"), 100_000, start);
        assert_eq!(names.of(address, at(69)), [name("a.example"), name("b.example")]);
        assert_eq!(names.of(address, at(70)), [name("b.example")]);
        assert_eq!(names.of(address, at(3610)), []);
        names.hold(address);
        assert_eq!(names.of(address, at(9999)).len(), 2);
        names.release(address);
        assert_eq!(names.of(address, at(9999)), []);
    }

    #[test]
    fn memory_is_bounded() {
        let start = Instant::now();
        let address = |n: u32| IpAddr::from(Ipv4Addr::from(0xcb00_7100 + n));
        let mut names = Names::new(8);
        names.remember(address(0), &name("held.example"), 60, start);
        names.hold(address(0));
        for n in 1..100 {
            names.remember(address(n), &name("a.example"), n, start);
        }
        assert_eq!((names.answers.len(), names.known), (8, 8));
        assert_eq!(names.of(address(0), start).len(), 1);
        for n in 0..100 {
            names.remember(address(0), &name(&format!("n{n}.example")), 60, start);
        }
        assert_eq!(names.of(address(0), start).len(), NAMES_MAX);
        assert_eq!((names.answers.len(), names.known), (1, NAMES_MAX));
    }

    #[test]
    fn stand_ins_go_round() {
        let v6 = |n: u16| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n);
        let mut ins = StandIns::new(3);
        let first = ins.give(v6(1));
        assert_eq!(first, Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!((ins.give(v6(1)), ins.real(first)), (first, Some(v6(1))));
        for n in 2..=4 {
            ins.give(v6(n));
        }
        assert_eq!(ins.real(first), Some(v6(4)));
        assert_eq!((ins.v4.len(), ins.v6.len()), (3, 3));
    }
}
