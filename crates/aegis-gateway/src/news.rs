//! What the gateway has to tell, and how little of it when a guest provokes much.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aegis_wire::egress::Denied;
use tokio::sync::mpsc;

use crate::meter::Counters;

/// News that wait for their reader.
const WAITING_MAX: usize = 128;
/// Of which denials leave this many to what matters more.
const NOT_FOR_DENIALS: usize = 16;
/// The same denial again within this is counted, not told.
const WINDOW: Duration = Duration::from_secs(10);
/// Different denials that are counted at a time; others are neither told nor lost from the counts.
const DISTINCT_MAX: usize = 64;

/// What the gateway tells its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Less than half of the last allowance is left, or somebody wants to send and nothing is: ask
    /// for more.
    Low,
    /// Somebody wants to send, and what was allowed is used up for good.
    Exhausted,
    /// A flow or a question was refused.
    Denied {
        /// By what, and what would have passed.
        denied: Denied,
        /// How many times, since it was told last.
        count: u64,
    },
}

/// The telling end.
pub(crate) struct Teller(mpsc::Sender<News>);

impl Teller {
    pub fn new() -> (Teller, mpsc::Receiver<News>) {
        let (tell, heard) = mpsc::channel(WAITING_MAX);
        (Teller(tell), heard)
    }

    /// Tells; false if there was no room.
    pub fn tell(&self, news: News) -> bool {
        let room = !matches!(news, News::Denied { .. }) || self.0.capacity() > NOT_FOR_DENIALS;
        room && self.0.try_send(news).is_ok()
    }
}

/// Denials: the first of its kind is told at once, more of it are told as one.
pub(crate) struct Denials {
    counters: Arc<Counters>,
    seen: HashMap<Denied, Seen>,
}

struct Seen {
    /// Since it was told last.
    count: u64,
    until: Instant,
}

impl Denials {
    pub fn new(counters: Arc<Counters>) -> Denials {
        Denials { counters, seen: HashMap::new() }
    }

    pub fn add(&mut self, denied: Denied, teller: &Teller, now: Instant) {
        self.counters.denied();
        if let Some(seen) = self.seen.get_mut(&denied) {
            seen.count += 1;
        } else if self.seen.len() < DISTINCT_MAX {
            let told = teller.tell(News::Denied { denied: denied.clone(), count: 1 });
            let count = if told { 0 } else { 1 };
            self.seen.insert(denied, Seen { count, until: now + WINDOW });
        }
    }

    /// Tells of what came again. Returns when to call next.
    pub fn tell(&mut self, teller: &Teller, now: Instant) -> Option<Instant> {
        self.seen.retain(|denied, seen| {
            if seen.until > now {
                return true;
            }
            if seen.count == 0 {
                return false;
            }
            // It goes on: the next are counted from here.
            let news = News::Denied { denied: denied.clone(), count: seen.count };
            if teller.tell(news) {
                seen.count = 0;
            }
            seen.until = now + WINDOW;
            true
        });
        self.next()
    }

    /// When there may be something to tell.
    pub fn next(&self) -> Option<Instant> {
        self.seen.values().map(|seen| seen.until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_denials_is_a_few_news() {
        let (teller, mut heard) = Teller::new();
        let counters = Arc::new(Counters::default());
        let mut denials = Denials::new(counters.clone());
        let start = Instant::now();
        let denied = |n: usize| Denied::new("egress_allow", format!("{n}.example"), "nothing");
        for n in 0..10_000 {
            denials.add(denied(n % 1000), &teller, start);
        }
        let mut told = 0;
        while heard.try_recv().is_ok() {
            told += 1;
        }
        assert_eq!(told, DISTINCT_MAX);
        assert_eq!(denials.tell(&teller, start), Some(start + WINDOW));
        assert!(heard.try_recv().is_err());
        let later = start + WINDOW;
        assert_eq!(denials.tell(&teller, later), Some(later + WINDOW));
        assert!(matches!(heard.try_recv(), Ok(News::Denied { count: 9, .. })));
        // Quiet for a window: forgotten.
        assert_eq!(denials.tell(&teller, later + WINDOW), None);
        assert_eq!(counters.read().denied, 10_000);
    }
}
