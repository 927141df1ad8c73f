//! What a machine shows of its being used, seen from outside: CPU, network, log growth, and who is
//! connected (contracts/aegis.md 2). Whether that is idleness is for the rules.

use aegis_rules::idle::Signs;
use aegis_wire::words::{InstanceId, Time};
use aegis_wire::worker::Sample;

use super::Lifecycle;

/// A machine that carries less than this between two samples waits for something, bytes.
const QUIET_BYTES: u64 = 4096;
/// A machine below this share of one core does nothing: the emulator's own ticks are less.
const BUSY_PERMILLE: u64 = 50;

/// What was seen of one machine.
pub(super) struct Watch {
    active_at: Time,
    sample: Option<(u64, u64, Time)>,
    log_bytes: u64,
}

impl Watch {
    /// Nothing was seen before now.
    pub(super) fn new(now: Time) -> Watch {
        Watch { active_at: now, sample: None, log_bytes: 0 }
    }

    /// It was started or let go on.
    pub(super) fn wakes(&mut self, now: Time) {
        *self = Watch { log_bytes: self.log_bytes, ..Watch::new(now) };
    }

    /// Takes a sample of its usage, and looks whether its log grew.
    pub(super) fn sample(&mut self, lifecycle: &Lifecycle, id: &InstanceId, sample: &Sample) {
        let now = lifecycle.ctx().now();
        let sent = sample.egress_bytes.map_or(0, |e| e.0);
        let carried = sent.saturating_add(sample.ingress_bytes);
        if let Some((cpu_ns, carried_before, at)) = self.sample {
            let wall_ns = now.since(at).0.saturating_mul(1_000_000);
            let used = sample.cpu_ns.saturating_sub(cpu_ns);
            let busy = used.saturating_mul(1000) > wall_ns.saturating_mul(BUSY_PERMILLE);
            if busy || carried.saturating_sub(carried_before) > QUIET_BYTES {
                self.active_at = now;
            }
        }
        self.sample = Some((sample.cpu_ns, carried, now));
        let log = lifecycle.ctx().instance_dir(id).join("logs/log.ndjson");
        let bytes = std::fs::metadata(log).map_or(0, |m| m.len());
        if bytes != self.log_bytes {
            self.log_bytes = bytes;
            self.active_at = now;
        }
    }

    /// The signs as the rules judge them.
    pub(super) fn signs(&self, lifecycle: &Lifecycle, id: &InstanceId) -> Signs {
        let ctx = lifecycle.ctx();
        let used = ctx.meters.used_at(id);
        let users = ctx.meters.users(id);
        Signs {
            last_active: used.map_or(self.active_at, |at| at.max(self.active_at)),
            connections: users.saturating_add(lifecycle.inner.router.connections(id)),
        }
    }
}
