//! What was sent and received, and how much more may be.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::news::{News, Teller};

/// What one gateway counted since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Payload bytes to outside: never less than were sent.
    pub egress_bytes: u64,
    /// Payload bytes from outside that were passed on.
    pub ingress_bytes: u64,
    /// DNS questions asked inside.
    pub dns_queries: u64,
    /// TCP and UDP flows that were let through.
    pub flows: u64,
    /// Flows and questions that were refused.
    pub denied: u64,
}

/// The counters themselves: written by the gateway's thread only.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    egress_bytes: AtomicU64,
    ingress_bytes: AtomicU64,
    dns_queries: AtomicU64,
    flows: AtomicU64,
    denied: AtomicU64,
}

impl Counters {
    pub fn read(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            egress_bytes: read(&self.egress_bytes),
            ingress_bytes: read(&self.ingress_bytes),
            dns_queries: read(&self.dns_queries),
            flows: read(&self.flows),
            denied: read(&self.denied),
        }
    }

    pub fn received(&self, bytes: usize) {
        self.ingress_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn asked(&self) {
        self.dns_queries.fetch_add(1, Ordering::Relaxed);
    }

    pub fn opened(&self) {
        self.flows.fetch_add(1, Ordering::Relaxed);
    }

    pub fn denied(&self) {
        self.denied.fetch_add(1, Ordering::Relaxed);
    }
}

/// Payload bytes to outside: taken before they are sent.
pub(crate) struct Meter {
    counters: Arc<Counters>,
    /// Where what is sent is written before, so that it outlives this process.
    book: Option<File>,
    sent: u64,
    /// What the book says: never less than was sent.
    booked: u64,
    ceiling: u64,
    /// No more than this will ever be allowed.
    last: bool,
    /// From here on it is time to ask for more.
    half: u64,
    told_half: bool,
    told_empty: bool,
}

impl Meter {
    pub fn new(counters: Arc<Counters>, book: Option<File>) -> Meter {
        Meter {
            counters,
            sent: 0,
            ceiling: 0,
            last: false,
            half: 0,
            told_half: true,
            told_empty: false,
            book,
            booked: 0,
        }
    }

    /// A new ceiling, or the old one again: whoever needs more says so again.
    pub fn set(&mut self, ceiling: u64, last: bool) {
        let more = ceiling.saturating_sub(self.ceiling.max(self.sent));
        if more > 0 {
            self.half = ceiling - more / 2;
        }
        (self.ceiling, self.last) = (ceiling, last);
        (self.told_half, self.told_empty) = (last, false);
    }

    /// Takes back what may be sent and was not. Returns what was sent.
    pub fn trim(&mut self) -> u64 {
        (self.ceiling, self.last) = (self.sent, false);
        // Nobody asked for less than there is now.
        (self.told_half, self.told_empty) = (true, false);
        self.sent
    }

    /// Bytes that may be sent now.
    pub fn left(&self) -> usize {
        usize::try_from(self.ceiling.saturating_sub(self.sent)).unwrap_or(usize::MAX)
    }

    /// Whether nothing more may be sent, for good.
    pub fn is_exhausted(&self) -> bool {
        self.last && self.sent >= self.ceiling
    }

    /// Takes at most so many bytes, before they are sent. Returns how many may be.
    pub fn take(&mut self, bytes: usize) -> usize {
        let bytes = bytes.min(self.left());
        let sent = self.sent + bytes as u64;
        if sent > self.booked
            && let Some(book) = &self.book
            && let Err(error) = book.write_all_at(&sent.to_le_bytes(), 0)
        {
            // What can't be counted is not sent.
            tracing::error!(%error, "egress can't be booked");
            return 0;
        }
        self.booked = self.booked.max(sent);
        self.sent = sent;
        self.counters.egress_bytes.store(sent, Ordering::Relaxed);
        bytes
    }

    /// Gives back what was taken and not sent.
    pub fn give_back(&mut self, bytes: usize) {
        self.sent -= bytes as u64;
        self.counters.egress_bytes.store(self.sent, Ordering::Relaxed);
    }

    /// Tells that the allowance runs low, once per allowance.
    pub fn tell(&mut self, teller: &Teller) {
        if !self.told_half && self.sent >= self.half {
            self.told_half = teller.tell(News::Low);
        }
    }

    /// Somebody wants to send, and nothing is left.
    pub fn tell_empty(&mut self, teller: &Teller) {
        if !self.told_empty {
            let news = if self.last { News::Exhausted } else { News::Low };
            self.told_empty = teller.tell(news);
            self.told_half |= self.told_empty;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter() -> Meter {
        Meter::new(Arc::default(), None)
    }

    #[test]
    fn low_is_told_once_per_allowance() {
        let (teller, mut heard) = Teller::new();
        let mut meter = meter();
        meter.tell_empty(&teller);
        assert_eq!(heard.try_recv(), Ok(News::Low));
        meter.tell_empty(&teller);
        meter.set(100, false);
        meter.take(49);
        meter.tell(&teller);
        assert!(heard.try_recv().is_err());
        meter.take(1);
        meter.tell(&teller);
        assert_eq!(heard.try_recv(), Ok(News::Low));
        meter.take(10);
        meter.tell(&teller);
        assert!(heard.try_recv().is_err());
        // The same again is no answer.
        meter.set(100, false);
        meter.tell(&teller);
        assert_eq!(heard.try_recv(), Ok(News::Low));
        assert_eq!(meter.take(50), 40);
        meter.tell_empty(&teller);
        assert_eq!(heard.try_recv(), Ok(News::Low));
        // The last allowance is not asked for more.
        meter.set(200, true);
        meter.take(90);
        meter.tell(&teller);
        assert!(heard.try_recv().is_err() && !meter.is_exhausted());
        meter.take(10);
        meter.tell_empty(&teller);
        assert_eq!(heard.try_recv(), Ok(News::Exhausted));
        assert!(meter.is_exhausted() && meter.left() == 0);
    }

    #[test]
    fn a_ceiling_below_what_was_sent_leaves_nothing() {
        let mut meter = meter();
        meter.set(100, false);
        meter.take(80);
        meter.give_back(10);
        meter.set(50, false);
        assert_eq!((meter.left(), meter.take(5)), (0, 0));
        meter.set(75, true);
        assert_eq!(meter.left(), 5);
        assert_eq!((meter.trim(), meter.left(), meter.is_exhausted()), (70, 0, false));
    }

    #[test]
    fn the_book_never_says_less_than_was_sent() {
        let file = tempfile::tempfile().unwrap();
        let read = || {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, 0).unwrap();
            u64::from_le_bytes(bytes)
        };
        let mut meter = Meter::new(Arc::default(), Some(file.try_clone().unwrap()));
        meter.set(1 << 40, false);
        meter.take(1000);
        meter.give_back(600);
        assert_eq!(read(), 1000);
        meter.take(500);
        assert_eq!(read(), 1000);
        meter.take(101);
        assert_eq!(read(), 1001);
        assert_eq!(meter.trim(), 1001);
        // A book that can't be written lets nothing out.
        let unwritable = File::open("/dev/null").unwrap();
        let mut meter = Meter::new(Arc::default(), Some(unwritable));
        meter.set(100, false);
        assert_eq!(meter.take(10), 0);
    }
}
