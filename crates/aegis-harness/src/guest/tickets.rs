//! Streams that the host opened, until the answers that name them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aegis_wire::bounds::{TICKET_MAX, TICKETS_MAX};
use aegis_wire::pipe::mux::Stream;
use tokio::sync::Notify;

/// Streams by ticket.
#[derive(Default)]
pub struct Tickets {
    waiting: Mutex<Waiting>,
    news: Notify,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    streams: HashMap<String, (u64, Stream)>,
}

/// One stream's place.
pub struct Place {
    ticket: String,
    number: u64,
}

impl Tickets {
    /// Keeps a stream; `None` when it is dropped for want of room, or for an impossible ticket.
    pub fn put(&self, ticket: String, stream: Stream) -> Option<Place> {
        let mut waiting = self.lock();
        let full = waiting.streams.len() >= TICKETS_MAX;
        if full || ticket.len() > TICKET_MAX || waiting.streams.contains_key(&ticket) {
            return None;
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.streams.insert(ticket.clone(), (number, stream));
        drop(waiting);
        self.news.notify_waiters();
        Some(Place { ticket, number })
    }

    /// Drops a stream that nobody claimed.
    pub fn forget(&self, place: &Place) {
        let mut waiting = self.lock();
        if waiting.streams.get(&place.ticket).is_some_and(|(number, _)| *number == place.number) {
            waiting.streams.remove(&place.ticket);
        }
    }

    /// Waits for the stream of a ticket; the caller bounds the time.
    pub async fn claim(&self, ticket: &str) -> Stream {
        loop {
            // Before the look, so that nothing arrives unseen between look and wait.
            let news = self.news.notified();
            if let Some((_, stream)) = self.lock().streams.remove(ticket) {
                return stream;
            }
            news.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
