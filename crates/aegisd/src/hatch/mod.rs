//! The hatch: what a machine may reach on its host by HTTP (contracts/couch.md 6).
//!
//! ```text
//! gateway ── RUN_DIR/door.sock: Knock line, then HTTP/1.1 ──▶ door.rs: is it served?
//!   llm.aegis       ──▶ llm/: model, worst case reserved, key added ──▶ vendor ──▶ settled
//!   NAME.host.aegis ──▶ forward.rs: is it given? placeholders ──▶ [host_services.NAME] addr
//!   plain HTTP      ──▶ forward.rs: placeholders ──▶ the address that policy allowed
//!   https           ──▶ tls.rs: by the machine's own authority, then as above, by TLS again
//! ```
//! One task per machine that may call, and one per connection of it. The path of the socket says
//! which machine it is; nothing that comes over it is believed. All ends the moment when the machine
//! is wanted stopped, frozen or gone: the second step of a kill.

mod answer;
mod door;
mod forward;
mod llm;
mod machine;
mod placeholder;
mod tls;

use std::collections::HashMap;
use std::sync::Arc;

use aegis_wire::bounds::{LLM_HELD_BY_ALL_MAX, LLM_PARSED_MAX};
use aegis_wire::words::InstanceId;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;

use crate::app::App;
use crate::lifecycle::Presence;
use llm::Vendors;
use machine::{HELD_UNIT, Machine};

/// Machines that came or left and were not looked at yet; more wait in their drivers.
pub const MACHINES_WAITING: usize = 64;

/// What all machines have in common.
struct Hatch {
    app: App,
    vendors: Vendors,
    /// Greets servers by TLS, in machines' stead; only where that was asked for.
    tls: Option<TlsConnector>,
    /// Room for the bodies of LLM calls, in units of [`HELD_UNIT`].
    held: Arc<Semaphore>,
    /// Room for what is made of them while they are looked at.
    parsed: Arc<Semaphore>,
}

/// Serves every machine that came, until it left.
pub async fn run(app: App, mut machines: mpsc::Receiver<Presence>) {
    let room = |bytes: usize| Arc::new(Semaphore::new(bytes / HELD_UNIT));
    let (held, parsed) = (room(LLM_HELD_BY_ALL_MAX), room(LLM_PARSED_MAX));
    let tls = app.ctx.config.tls_ca.then(tls::connector);
    let hatch = Arc::new(Hatch { app, vendors: Vendors::new(), tls, held, parsed });
    let mut open: HashMap<InstanceId, Open> = HashMap::new();
    while let Some(presence) = machines.recv().await {
        match presence {
            Presence::Came(id) => {
                let machine = Machine::new(Arc::clone(&hatch), id.clone());
                let task = tokio::spawn(door::serve(machine)).abort_handle();
                // An earlier one is of an earlier boot.
                open.insert(id, Open(task));
            }
            Presence::Left(id) => drop(open.remove(&id)),
        }
    }
}

/// A machine is served until this is dropped.
struct Open(AbortHandle);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.abort();
    }
}
