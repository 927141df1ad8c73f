//! The guest API inside: what processes ask over HTTP becomes calls of the control channel
//! (contracts/aegis.md 4 and 5).
//!
//! ```text
//! process ── HTTP ──▶ http ─▶ route ─▶ Guest::call, token attached ──▶ host
//!                      ◀── body ◀── tickets ◀── streams that the host opens
//! ```
//! Nothing is checked here but sizes: who may do what is the host's to say.

mod answer;
mod body;
mod files;
mod http;
mod patience;
mod route;
#[cfg(test)]
mod tests;
mod tickets;
mod token;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aegis_wire::bounds::{
    BROKER_WAIT, GUEST_CALL_DEADLINE, GUEST_PARAMS_MAX, RPC_IN_FLIGHT_MAX, TICKET_DEADLINE,
};
use aegis_wire::channel::guest::{Streamed, StreamedFile};
use aegis_wire::pipe::mux::Stream;
use aegis_wire::pipe::peer::{CallError, Peer};
use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use answer::Refusal;
pub use http::Doors;
use tickets::Tickets;
use token::Token;

/// What the guest API works with.
pub struct Guest {
    token: Mutex<Option<Token>>,
    host: watch::Sender<Option<Host>>,
    sessions: AtomicU64,
    calls: Arc<Semaphore>,
    tickets: Tickets,
}

/// What a call brought.
pub enum Answer {
    /// A body.
    Whole(Value),
    /// The stream that brings the body, or takes it; what is known of a file that it brings.
    Stream(Stream, Option<StreamedFile>),
}

/// Who answers.
#[derive(Clone)]
struct Host {
    session: u64,
    peer: Peer,
}

/// A session with the host, as long as this lives.
pub struct Session {
    guest: Arc<Guest>,
    number: u64,
}

impl Drop for Session {
    fn drop(&mut self) {
        // A later session may have begun already.
        self.guest.host.send_if_modified(|now| {
            let mine = now.as_ref().is_some_and(|host| host.session == self.number);
            if mine {
                *now = None;
            }
            mine
        });
    }
}

impl Guest {
    /// Without a token and without a session.
    pub fn new() -> Guest {
        Guest {
            token: Mutex::default(),
            host: watch::Sender::new(None),
            sessions: AtomicU64::default(),
            calls: Arc::new(Semaphore::new(RPC_IN_FLIGHT_MAX)),
            tickets: Tickets::default(),
        }
    }

    /// Holds this token from now on; the one before is forgotten.
    pub fn hold(&self, token: Option<String>) {
        *self.lock() = token.map(Token::new);
    }

    /// Asks this session's host from now on.
    pub fn session(self: &Arc<Guest>, peer: Peer) -> Session {
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        self.host.send_replace(Some(Host { session: number, peer }));
        Session { guest: Arc::clone(self), number }
    }

    /// Takes a stream until the answer that names it.
    pub fn arrived(self: &Arc<Guest>, ticket: String, stream: Stream) {
        let Some(place) = self.tickets.put(ticket, stream) else { return };
        let guest = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(TICKET_DEADLINE).await;
            guest.tickets.forget(&place);
        });
    }

    /// Calls the host. What was asked goes on when the asker leaves: it may have been done already,
    /// and the host counts it. `held` is kept as long.
    async fn call(
        self: &Arc<Guest>,
        method: &'static str,
        mut params: Map<String, Value>,
        streamed: bool,
        held: Option<OwnedSemaphorePermit>,
    ) -> Result<Answer, Refusal> {
        let slot = Arc::clone(&self.calls).try_acquire_owned();
        let slot = slot.map_err(|_| Refusal::crowded())?;
        {
            let token = self.lock();
            let token = token.as_ref().ok_or_else(Refusal::not_ready)?;
            params.insert("token".to_owned(), Value::String(token.reveal().to_owned()));
        }
        let params = Value::Object(params);
        if answer::json_length(&params) > GUEST_PARAMS_MAX {
            return Err(Refusal::too_large());
        }
        let (tell, told) = oneshot::channel();
        let guest = Arc::clone(self);
        tokio::spawn(async move {
            let done = guest.carry(method, params, streamed).await;
            drop((slot, held));
            let _ = tell.send(done);
        });
        told.await.unwrap_or_else(|_| Err(Refusal::lost()))
    }

    async fn carry(
        &self,
        method: &'static str,
        params: Value,
        streamed: bool,
    ) -> Result<Answer, Refusal> {
        let mut host = self.host.subscribe();
        let found = tokio::time::timeout(BROKER_WAIT, host.wait_for(Option::is_some)).await;
        let found = found.ok().and_then(|found| found.ok()?.clone());
        let Host { peer, .. } = found.ok_or_else(Refusal::no_session)?;
        // The host's own deadline comes first, and says more.
        let deadline = GUEST_CALL_DEADLINE + 2 * BROKER_WAIT;
        let value = match peer.call::<_, Value>(method, &params, deadline).await {
            Ok(value) => value,
            Err(CallError::Refused { error, .. }) => return Err(Refusal::by_host(error)),
            Err(CallError::Closed { .. } | CallError::Deadline { .. }) => {
                return Err(Refusal::lost());
            }
            Err(CallError::Shape { .. }) => return Err(Refusal::misunderstood()),
        };
        if !streamed {
            return Ok(Answer::Whole(value));
        }
        let Ok(Streamed { ticket, file }) = serde_json::from_value(value) else {
            return Err(Refusal::misunderstood());
        };
        let claimed = tokio::time::timeout(TICKET_DEADLINE, self.tickets.claim(&ticket)).await;
        claimed.map(|stream| Answer::Stream(stream, file)).map_err(|_| Refusal::lost())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Token>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
