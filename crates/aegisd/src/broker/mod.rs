//! The broker: answers what machines ask of the host (contracts/aegis.md 3 to 5).
//!
//! ```text
//! worker ── Brokered line ──▶ line.rs: bounds, rates ──▶ call.rs: token, params ──▶ app/tree.rs
//!        ◀─ BrokerAnswer ────                                                          │
//!        ◀─ GuestStream: NDJSON of an exec or of logs ── bulk.rs ◀────────────────────┘
//! ```
//! One task per running machine. What comes over a machine's connection is believed to come from
//! that machine, and nothing more is believed: its token must be the current one of that very
//! instance.

mod bulk;
mod call;
mod line;
mod rates;

use std::collections::HashMap;

use aegis_wire::words::InstanceId;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::Instrument as _;

use crate::app::App;

/// Machines that were said to run and are not served yet; more wait in their drivers.
pub const MACHINES_WAITING: usize = 64;

/// Serves every machine that is said to run, for as long as its worker is there.
pub async fn run(app: App, mut machines: mpsc::Receiver<InstanceId>) {
    let mut open: HashMap<InstanceId, AbortHandle> = HashMap::new();
    while let Some(id) = machines.recv().await {
        open.retain(|_, task| !task.is_finished());
        let span = tracing::error_span!("broker", instance = %id);
        let serving = line::serve(app.clone(), id.clone()).instrument(span);
        let task = tokio::spawn(serving).abort_handle();
        // An earlier one is of an earlier boot.
        if let Some(earlier) = open.insert(id, task) {
            earlier.abort();
        }
    }
}
