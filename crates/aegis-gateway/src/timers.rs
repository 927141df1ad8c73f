//! Deadlines: one per thing that has any.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Instant;

/// The next deadline of each of many things.
pub(crate) struct Timers<T> {
    order: BTreeSet<(Instant, T)>,
    armed: HashMap<T, Instant>,
}

impl<T: Copy + Ord + Hash> Timers<T> {
    pub fn new() -> Timers<T> {
        Timers { order: BTreeSet::new(), armed: HashMap::new() }
    }

    /// Wakes `thing` at `at`, or earlier if it is armed so: whoever wakes looks anyway.
    pub fn arm(&mut self, thing: T, at: Instant) {
        match self.armed.get(&thing) {
            Some(armed) if *armed <= at => {}
            armed => {
                if let Some(armed) = armed {
                    self.order.remove(&(*armed, thing));
                }
                self.order.insert((at, thing));
                self.armed.insert(thing, at);
            }
        }
    }

    pub fn disarm(&mut self, thing: T) {
        if let Some(armed) = self.armed.remove(&thing) {
            self.order.remove(&(armed, thing));
        }
    }

    /// When the first is due.
    pub fn next(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes one that is due.
    pub fn due(&mut self, now: Instant) -> Option<T> {
        let (at, thing) = *self.order.first()?;
        if at > now {
            return None;
        }
        self.disarm(thing);
        Some(thing)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_earliest_of_each_counts() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut timers = Timers::new();
        timers.arm('a', at(5));
        timers.arm('a', at(9));
        timers.arm('b', at(3));
        timers.arm('c', at(1));
        timers.arm('a', at(2));
        timers.disarm('c');
        assert_eq!(timers.next(), Some(at(2)));
        assert_eq!(timers.due(at(1)), None);
        assert_eq!(
            (timers.due(at(4)), timers.due(at(4)), timers.due(at(9))),
            (Some('a'), Some('b'), None)
        );
    }
}
