//! `shutdown`: everybody ends, the disk is clean.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::GUEST_STOP_GRACE;

use crate::machine::Machine;
use crate::{root, sys};

/// Longest grace that a machine has between SIGTERM and SIGKILL.
const GRACE_MAX: Duration = Duration::from_secs(600);
/// Time for killed processes to be gone: freeing the memory of thousands takes a while.
const KILL_DEADLINE: Duration = GUEST_STOP_GRACE;
/// Killing is repeated: who was being born at the first time is caught at the second.
const KILL_AGAIN: Duration = Duration::from_millis(200);

/// Ends every process but this one, then makes the disk clean. Can be asked for again.
pub async fn end(machine: &Arc<Machine>, grace: Duration) -> io::Result<()> {
    let Some(own) = machine.begin_end() else { return Ok(()) };
    let reaper = &machine.starter.reaper;
    if sys::signal_everybody(libc::SIGTERM) {
        // Who was stopped must hear it too.
        sys::signal_everybody(libc::SIGCONT);
        let _ = tokio::time::timeout(grace.min(GRACE_MAX), reaper.alone()).await;
    }
    if let Some(cage) = &machine.starter.cage {
        cage.close();
    }
    let killing = async {
        while sys::signal_everybody(libc::SIGKILL)
            && tokio::time::timeout(KILL_AGAIN, reaper.alone()).await.is_err()
        {}
    };
    // Who does not go even now waits for the disk; sealing it decides.
    let _ = tokio::time::timeout(KILL_DEADLINE, killing).await;
    machine.workspace.flush().await;
    machine.hands.run(move || root::seal(&own)).await?
}
