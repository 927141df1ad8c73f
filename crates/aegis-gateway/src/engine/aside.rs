//! TCP through the hatch: flows whose requests get secrets there, from their start or once a TLS hello
//! asked for a host.

use std::io;

use aegis_wire::egress::HostName;
use mio::Interest;
use mio::net::UnixStream;

use super::flow::{Other, Stage};
use super::tcp::REDIAL;
use super::{Engine, Who};
use crate::doors;
use crate::handle::ViaHatch;

/// Where TLS is.
const TLS_PORT: u16 = 443;

/// Hosts that are reached through the hatch.
#[derive(Default)]
pub(crate) struct Hosts {
    http: Vec<HostName>,
    https: Vec<HostName>,
}

/// Whether a flow to outside goes through the hatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    /// It goes straight on.
    Nobody,
    /// It does, and speaks HTTP.
    Http,
    /// It does where its hello asks for one of these.
    Hello(Vec<HostName>),
}

impl Hosts {
    /// What can be no name of a host is none of them.
    pub fn parse(said: &ViaHatch) -> Hosts {
        let names = |texts: &[String]| texts.iter().filter_map(|t| t.parse().ok()).collect();
        Hosts { http: names(&said.http), https: names(&said.https) }
    }

    /// How a flow to this port goes, at an address that these names led to.
    pub fn via(&self, port: u16, names: &[HostName]) -> Via {
        match port {
            doors::PORT if names.iter().any(|name| self.http.contains(name)) => Via::Http,
            TLS_PORT => {
                let asked = names.iter().filter(|name| self.https.contains(name));
                match asked.cloned().collect::<Vec<_>>() {
                    none if none.is_empty() => Via::Nobody,
                    some => Via::Hello(some),
                }
            }
            _ => Via::Nobody,
        }
    }
}

impl Engine {
    /// Connects a flow's other end to the hatch; its queue may be full.
    pub(super) fn dial_hatch(&self, slot: usize) -> io::Result<Other> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let mut stream = UnixStream::connect(&self.config.door)?;
        self.poll.registry().register(&mut stream, Who::Tcp(slot).token(), interest)?;
        Ok(Other::Unix(stream))
    }

    /// A flow goes through the hatch after all. What it was connected to has heard nothing of it.
    pub(super) fn turn_aside(&mut self, slot: usize) {
        let until = self.now + self.config.budgets.connect;
        let Some(flow) = self.flows.get_mut(slot) else { return };
        flow.other = None;
        flow.stage = Stage::Turning { until };
        self.knock_aside(slot);
    }

    /// Knocks for a flow that turns aside.
    pub(super) fn knock_aside(&mut self, slot: usize) {
        match self.dial_hatch(slot) {
            Ok(hatch) => {
                let Some(flow) = self.flows.get_mut(slot) else { return };
                (flow.other, flow.stage) = (Some(hatch), Stage::Open);
                (flow.readable, flow.writable, flow.other_closed) = (true, true, false);
                self.queue(slot);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.timers.arm(Who::Tcp(slot), self.now + REDIAL);
            }
            Err(error) => {
                tracing::debug!(%error, "the hatch can't be dialled");
                self.reset(slot, true);
            }
        }
    }
}
