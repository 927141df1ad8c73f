//! Which calls are open, and over which line each of them went. Pure.

use std::collections::HashMap;

/// Open calls, each with whoever waits for its answer.
pub struct Book<T> {
    next: u64,
    open: HashMap<u64, (u64, T)>,
}

impl<T> Default for Book<T> {
    fn default() -> Book<T> {
        Book { next: 0, open: HashMap::new() }
    }
}

impl<T> Book<T> {
    /// A number that was never drawn before: for a call, or for a line.
    pub fn draw(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A call is about to be handed to a line.
    pub fn open(&mut self, id: u64, line: u64, asker: T) {
        self.open.insert(id, (line, asker));
    }

    /// Nobody waits for it any more.
    pub fn close(&mut self, id: u64) {
        self.open.remove(&id);
    }

    /// Who waits for this answer; nobody, unless it came over the line that the call went over.
    pub fn answered(&mut self, line: u64, id: u64) -> Option<T> {
        match self.open.get(&id) {
            Some((its, _)) if *its == line => self.open.remove(&id).map(|(_, asker)| asker),
            _ => None,
        }
    }

    /// A line has ended: who waited for its answers is let go.
    pub fn lose(&mut self, line: u64) {
        self.open.retain(|_, (its, _)| *its != line);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_answer_counts_once_and_only_on_its_own_line() {
        let mut book = Book::default();
        let (a, b) = (book.draw(), book.draw());
        book.open(a, 100, "a");
        book.open(b, 200, "b");
        assert_eq!(book.answered(200, a), None, "another line's answer");
        assert_eq!(book.answered(100, 99), None, "an answer to nothing");
        assert_eq!(book.answered(100, a), Some("a"));
        assert_eq!(book.answered(100, a), None, "twice");
        book.lose(100);
        assert_eq!(book.answered(200, b), Some("b"));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Open { line: u64 },
        Close(usize),
        Answer { line: u64, nth: usize },
        Lose(u64),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let one = prop_oneof![
            (0..3u64).prop_map(|line| Event::Open { line }),
            any::<usize>().prop_map(Event::Close),
            (0..3u64, any::<usize>()).prop_map(|(line, nth)| Event::Answer { line, nth }),
            (0..3u64).prop_map(Event::Lose),
        ];
        proptest::collection::vec(one, 0..60)
    }

    proptest! {
        #[test]
        fn every_call_is_answered_at_most_once_and_none_is_kept(events in events()) {
            let mut book = Book::default();
            let mut model: BTreeMap<u64, u64> = BTreeMap::new();
            let mut drawn = Vec::new();
            for event in events {
                match event {
                    Event::Open { line } => {
                        let id = book.draw();
                        prop_assert!(!drawn.contains(&id));
                        drawn.push(id);
                        book.open(id, line, id);
                        model.insert(id, line);
                    }
                    Event::Close(nth) if !drawn.is_empty() => {
                        let id = drawn[nth % drawn.len()];
                        book.close(id);
                        model.remove(&id);
                    }
                    Event::Answer { line, nth } if !drawn.is_empty() => {
                        let id = drawn[nth % drawn.len()];
                        let due = model.get(&id) == Some(&line);
                        prop_assert_eq!(book.answered(line, id), due.then_some(id));
                        if due {
                            model.remove(&id);
                        }
                    }
                    Event::Lose(line) => {
                        book.lose(line);
                        model.retain(|_, its| *its != line);
                    }
                    _ => {}
                }
                prop_assert_eq!(book.open.len(), model.len());
            }
        }
    }
}
