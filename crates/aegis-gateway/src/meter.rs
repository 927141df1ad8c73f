//! What was sent and received, and how much more may be.

use std::sync::atomic::{AtomicU64, Ordering};

/// What one gateway counted since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Payload bytes to outside: never less than were sent.
    pub egress_bytes: u64,
    /// Payload bytes from outside that were passed on.
    pub ingress_bytes: u64,
    /// DNS questions asked inside.
    pub dns_queries: u64,
    /// TCP and UDP flows that were let through.
    pub flows: u64,
    /// Flows and questions that were refused.
    pub denied: u64,
}

/// The counters themselves: written by the gateway's thread only.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub egress_bytes: AtomicU64,
    pub ingress_bytes: AtomicU64,
    pub dns_queries: AtomicU64,
    pub flows: AtomicU64,
    pub denied: AtomicU64,
}

impl Counters {
    pub fn read(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            egress_bytes: read(&self.egress_bytes),
            ingress_bytes: read(&self.ingress_bytes),
            dns_queries: read(&self.dns_queries),
            flows: read(&self.flows),
            denied: read(&self.denied),
        }
    }
}
