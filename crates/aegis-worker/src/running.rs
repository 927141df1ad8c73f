//! A machine that runs: until something ends it, and how it is ended.

use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::{GUEST_STOP_GRACE, HOST_STOP_DEADLINE, RPC_DEADLINE, USAGE_EVERY};
use aegis_wire::channel::{Health, ProcessExit, Shutdown, method};
use aegis_wire::worker::EndReason;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::life::{Books, Live, Shared};
use crate::machine::alive;
use crate::relay::Relay;

/// What a graceful end takes beyond the grace itself: sync, unmount, and the way there and back.
const STOP_MARGIN: Duration =
    Duration::from_secs(HOST_STOP_DEADLINE.as_secs() - GUEST_STOP_GRACE.as_secs());
/// Longest grace that is granted.
const GRACE_MAX: Duration = Duration::from_secs(600);
/// How long the log waits for the last output of a primary process that exited.
const DRAIN_DEADLINE: Duration = Duration::from_millis(500);

/// How a life ended, before its remains are removed.
pub struct End {
    /// The kind of end.
    pub reason: EndReason,
    /// How the primary process ended, if it did.
    pub exit: Option<ProcessExit>,
    /// For people.
    pub message: String,
}

/// User code may run in it.
pub struct Running {
    shared: Arc<Shared>,
    books: Arc<Books>,
    live: Arc<Live>,
    drained: watch::Receiver<bool>,
}

impl Running {
    /// One whose primary process was started; `drained` says when all of its output is in the log.
    pub fn new(
        shared: Arc<Shared>,
        books: Arc<Books>,
        live: Arc<Live>,
        drained: watch::Receiver<bool>,
    ) -> Running {
        Running { shared, books, live, drained }
    }

    /// Lives until something ends it.
    pub async fn until_end(self) -> End {
        let mut stop = self.shared.stop.subscribe();
        let mut exited = self.live.relay.exited.clone();
        let mut dead = self.live.relay.dead.clone();
        tokio::spawn(watch_for_missed_exit(self.live.relay.clone(), self.shared.exit.clone()));
        let mut missed = self.shared.exit.subscribe();
        let mut ticks = tokio::time::interval(USAGE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                () = self.live.died() => return self.crashed(),
                Some(grace_ms) = told(&mut stop) => {
                    return self.stopped(Duration::from_millis(grace_ms).min(GRACE_MAX)).await;
                }
                Some(_) = told(&mut exited) => return self.exited().await,
                Ok(_) = missed.wait_for(|gone| *gone) => return self.exited().await,
                Some(why) = told(&mut dead) => {
                    // A VMM that dies takes the channel with it: then its death is the cause.
                    tokio::select! {
                        () = self.live.died() => return self.crashed(),
                        () = tokio::time::sleep(DRAIN_DEADLINE) => {}
                    }
                    return End { reason: EndReason::Crashed, exit: self.exit(), message: why };
                }
                _ = ticks.tick() => {
                    self.shared.usage.send_replace(self.books.sample());
                }
            }
        }
    }

    fn exit(&self) -> Option<ProcessExit> {
        *self.live.relay.exited.borrow()
    }

    fn crashed(&self) -> End {
        let message = if self.books.record().group.out_of_memory() {
            "the VMM took more memory than the host's limit for it".to_owned()
        } else {
            "the VMM died".to_owned()
        };
        End { reason: EndReason::Crashed, exit: self.exit(), message }
    }

    async fn exited(mut self) -> End {
        let exit = self.exit();
        self.drain().await;
        let code = exit.map_or_else(|| "unknown".to_owned(), |exit| exit.code.to_string());
        self.live.log.system(&format!("process exited (code={code})")).await;
        self.shut_down(GUEST_STOP_GRACE).await;
        let message = format!("the primary process exited with code {code}");
        End { reason: EndReason::Exited, exit, message }
    }

    async fn stopped(mut self, grace: Duration) -> End {
        // Nobody inside can end in order while the clock stands still.
        let thawed = self.live.let_go(&self.shared).await;
        let message = if thawed.is_ok() && self.shut_down(grace).await {
            self.drain().await;
            "the host stopped it".to_owned()
        } else {
            "the host stopped it by force: it did not end in order in time".to_owned()
        };
        End { reason: EndReason::Stopped, exit: self.exit(), message }
    }

    /// Ends everything inside; true when the disk is clean.
    async fn shut_down(&self, grace: Duration) -> bool {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let ask = Shutdown { grace_ms };
        let deadline = grace + STOP_MARGIN;
        let work = async {
            let session = self.live.relay.session().await?;
            let _: Value = session.peer.call(method::SHUTDOWN, &ask, deadline).await?;
            anyhow::Ok(())
        };
        let done = tokio::time::timeout(deadline, alive(self.live.died(), work)).await;
        match done {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::warn!(error = format!("{error:#}"), "no orderly end");
                false
            }
            Err(_) => false,
        }
    }

    async fn drain(&mut self) {
        let _ = tokio::time::timeout(DRAIN_DEADLINE, self.drained.wait_for(|d| *d)).await;
    }
}

/// Waits for the value of a level that is told once.
async fn told<T: Clone>(level: &mut watch::Receiver<Option<T>>) -> Option<T> {
    match level.wait_for(Option::is_some).await {
        Ok(value) => value.clone(),
        // Nobody is there any more to tell it.
        Err(_) => None,
    }
}

/// A session that was lost may have taken the news of the exit with it.
async fn watch_for_missed_exit(relay: Relay, gone: watch::Sender<bool>) {
    let mut sessions = relay.session.clone();
    sessions.mark_unchanged();
    while sessions.changed().await.is_ok() {
        let Ok(session) = relay.session().await else { return };
        sessions.mark_unchanged();
        let health = session.peer.call::<_, Health>(method::HEALTH, &Value::Null, RPC_DEADLINE);
        if health.await.is_ok_and(|health| !health.primary_running) {
            gone.send_replace(true);
            return;
        }
    }
}
