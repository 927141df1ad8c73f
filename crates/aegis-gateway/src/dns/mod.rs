//! The machine's resolver: names are judged when they are asked, answers before they are given, and
//! what was answered is remembered, so that a connection can be judged by its name.

mod message;
mod names;
mod query;
mod server;

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use aegis_wire::egress::plain;
use slab::Slab;

use crate::budgets::{Bucket, Budgets};
use crate::packet::Ends;
use names::{Names, StandIns};
use query::Query;

/// Where questions are taken.
pub(crate) const PORT: u16 = 53;

/// State of the resolver.
pub(crate) struct Dns {
    pub names: Names,
    stand_ins: StandIns,
    queries: Slab<Query>,
    bucket: Bucket,
}

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    Datagram(Ends),
    /// A flow, by its slot and serial.
    Stream(usize, u64),
}

/// Questions over TCP.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    received: Vec<u8>,
    /// Questions that have no answer yet.
    open: usize,
    /// It broke the rules, or its answer found no room.
    broken: bool,
}

impl Dns {
    pub fn new(budgets: &Budgets, now: Instant) -> Dns {
        Dns {
            bucket: Bucket::new(budgets.questions_per_second, budgets.questions_burst, now),
            names: Names::new(budgets.names_remembered),
            stand_ins: StandIns::new(budgets.names_remembered),
            queries: Slab::new(),
        }
    }

    /// What is really connected when the guest connects to this address.
    pub fn real(&self, to: SocketAddr) -> SocketAddr {
        let ip = match plain(to.ip()) {
            IpAddr::V4(v4) => self.stand_ins.real(v4).map_or(IpAddr::V4(v4), IpAddr::V6),
            v6 => v6,
        };
        SocketAddr::new(ip, to.port())
    }
}
