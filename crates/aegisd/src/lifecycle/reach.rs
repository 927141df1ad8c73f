//! Reaching a port of a machine from outside: one that is on its way is waited for, one that sleeps
//! is woken (contracts/aegis.md 2).

use std::sync::Arc;
use std::time::Duration;

use aegis_rules::capacity::{self, Need};
use aegis_rules::instance::{Asked, InstanceState, Verb, Wanted, ask};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::channel::rpc::CODE_CONFLICT;
use aegis_wire::words::InstanceId;

use super::Lifecycle;
use super::worker::{self, Connection, WorkerError};
use crate::ledger::{self, WriteError};

/// A connection waits this long for its machine.
const WAIT: Duration = Duration::from_secs(120);

/// Why a port is not reached.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// Its instance does not wake.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Its machine does not answer.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// It did not come up in time.
    #[error("the machine did not run within {}s", WAIT.as_secs())]
    Deadline,
}

impl From<ledger::Error> for ReachError {
    fn from(error: ledger::Error) -> ReachError {
        ReachError::Write(error.into())
    }
}

impl Lifecycle {
    /// Opens a TCP port of a machine; what follows on the connection are its bytes.
    pub async fn reach_port(&self, id: &InstanceId, port: u16) -> Result<Connection, ReachError> {
        match tokio::time::timeout(WAIT, self.reach(id, port)).await {
            Ok(reached) => reached,
            Err(_) => Err(ReachError::Deadline),
        }
    }

    async fn reach(&self, id: &InstanceId, port: u16) -> Result<Connection, ReachError> {
        let ctx = &self.inner.ctx;
        let mut commits = ctx.ledger.commits();
        loop {
            let gone = || Refusal::new(Code::InstanceNotFound, "instance not found");
            let now =
                ctx.ledger.read(|f| f.instance(id))?.ok_or_else(gone).map_err(WriteError::from)?;
            match (now.wanted, now.state) {
                (Wanted::Running, InstanceState::Running) => {
                    match worker::open_port(ctx, id, port).await {
                        // It was about to be paused, or is being thawed: that is recorded soon.
                        Err(WorkerError::Refused(e)) if e.code == CODE_CONFLICT => {}
                        other => return Ok(other?),
                    }
                }
                (Wanted::Running, _) => {}
                _ => self.wake(id).await?,
            }
            if commits.changed().await.is_err() {
                return Err(ledger::Error::Closed.into());
            }
        }
    }

    async fn wake(&self, id: &InstanceId) -> Result<(), WriteError> {
        let ctx = Arc::clone(&self.inner.ctx);
        let (copy, now) = (id.clone(), ctx.now());
        let lent = ctx.config.capacity;
        ctx.ledger
            .write("connection", move |facts| {
                let gone = || Refusal::new(Code::InstanceNotFound, "instance not found");
                let instance = facts.instance(&copy)?.ok_or_else(gone)?;
                let guest = facts.guest_of(&instance)?;
                let family = facts.family(&instance.tree)?;
                match ask(&instance, guest.as_ref(), &family, Verb::Wake, now)? {
                    Asked::Already => Ok((vec![], ())),
                    Asked::Yes(changes) => {
                        if instance.state == InstanceState::Stopped {
                            let need = Need::again(&instance.spec);
                            capacity::admit(&lent, &facts.held()?, &need)?;
                        }
                        Ok((changes, ()))
                    }
                }
            })
            .await?;
        self.knock(id);
        Ok(())
    }
}
