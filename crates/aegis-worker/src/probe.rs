//! `aegis-worker probe`: what this host can do for machines.

use std::time::Instant;

use aegis_wire::bounds::WORKER_GENERATION;
use aegis_wire::worker::Probe;

use crate::cgroup::{Host, Limits};
use crate::qemu;

/// Looks, by trying: a group with all limits is made and removed.
pub fn probe() -> Probe {
    let kvm = qemu::kvm();
    let host = Host::detect();
    let name = format!("aegis/probe-{}", rustix::process::getpid().as_raw_nonzero());
    let made = host.make(&name, Limits { memory_bytes: 1 << 30, pids: 16 });
    let (limits, limits_reason) = match made {
        Ok(group) => {
            group.remove(Instant::now());
            (["cpu", "memory", "pids"].map(str::to_owned).to_vec(), None)
        }
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    Probe {
        generation: WORKER_GENERATION,
        accel: if kvm.is_ok() { "kvm" } else { "tcg" }.to_owned(),
        accel_reason: kvm.err(),
        cgroups: host.name().to_owned(),
        limits,
        limits_reason,
        own_uid: rustix::process::geteuid().is_root(),
    }
}
