//! `aegis-worker floor`: the time from starting QEMU to the first answer of a bare clone. Nothing
//! that runs machines on this host can be faster, so it is what the rest is compared with.

use std::time::{Duration, Instant};

use aegis_wire::bounds::IDENTIFY_DEADLINE;
use aegis_wire::channel::{Health, method};
use aegis_wire::pipe::session::Pipe;
use aegis_wire::worker::Golden;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::qemu::{self, Birth, Cage, Parts};
use crate::qmp::{QMP_DEADLINE, Qmp};
use crate::{golden, machine, relay, snapshot};

/// What to measure.
#[derive(Deserialize)]
pub struct Ask {
    golden: Golden,
    /// So many clones, one after the other.
    n: usize,
}

/// What was measured.
#[derive(Serialize)]
pub struct Floor {
    /// Milliseconds from the start of QEMU to the first answer, of each clone.
    clone_to_rpc_ms: Vec<f64>,
}

/// Measures.
pub async fn floor(ask: &Ask) -> anyhow::Result<Floor> {
    let place = golden::place(&ask.golden)?;
    let source = golden::Source::Golden(ask.golden.clone());
    let mut clone_to_rpc_ms = Vec::new();
    for _ in 0..ask.n {
        let (lease, _) = golden::obtain(&source, &place).await?;
        clone_to_rpc_ms.push(one(&ask.golden, &place, lease.snapshot).await?.as_secs_f64() * 1e3);
    }
    Ok(Floor { clone_to_rpc_ms })
}

async fn one(
    golden: &Golden,
    place: &golden::Place,
    snapshot: snapshot::Snapshot,
) -> anyhow::Result<Duration> {
    let parts = Parts {
        memory: snapshot.memory,
        base: snapshot::open_shared(&golden.base)?,
        disk: snapshot::placeholder_disk()?,
        under: None,
        kernel: snapshot::open_shared(&golden.kernel)?,
        initrd: None,
        state: Some(snapshot.state),
    };
    let began = Instant::now();
    let mut vmm = qemu::start(&golden.qemu, place.shape, Birth::Clone, parts, Cage::default())?;
    let qmp = Qmp::start(vmm.qmp);
    let mut pipe = Pipe::new(vmm.wires.ctl);
    let death = vmm.child.death();
    let work = async {
        machine::restore(&qmp, vmm.state_fd, Birth::Clone, QMP_DEADLINE).await?;
        relay::one_session(&mut pipe, IDENTIFY_DEADLINE, async |peer| {
            let _: Health = peer.call(method::HEALTH, &Value::Null, IDENTIFY_DEADLINE).await?;
            Ok(began.elapsed())
        })
        .await
    };
    let took = tokio::select! {
        took = work => took,
        () = death.happened() => Err(anyhow::anyhow!("QEMU ended")),
    };
    vmm.child.kill();
    vmm.child.wait().await?;
    took.map_err(|error| snapshot::with_last_words(error, &vmm.child.last_words()))
}
