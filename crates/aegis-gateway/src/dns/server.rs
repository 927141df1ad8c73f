//! What the resolver does with a question.

use std::net::IpAddr;

use aegis_wire::egress::{Denied, HostName, never, rule};

use super::Asker;
use super::message::{Answer, Outcome, Question, parse};
use super::query::{Look, Query, TRIES};
use crate::doors;
use crate::engine::{Engine, Target, Who};

/// The longest question that is taken, bytes.
const QUESTION_MAX: usize = 4096;
/// The guest knows itself; no resolver is to be asked (RFC 6761, 6.3).
const LOCALHOST: &str = "localhost";
/// Questions of one stream that wait for their answer.
const STREAM_OPEN_MAX: usize = 16;

impl Engine {
    /// A question, as its bytes came.
    pub(crate) fn asked(&mut self, asker: Asker, bytes: &[u8]) {
        if bytes.len() > QUESTION_MAX || !self.dns.bucket.take(self.now) {
            return self.ignore(asker);
        }
        self.shared.counters.asked();
        match parse(bytes) {
            Ok(question) => {
                if let Some(answer) = self.consider(asker, &question) {
                    self.give(asker, &question, answer);
                }
            }
            Err(Some(answer)) => self.say(asker, &answer),
            Err(None) => self.ignore(asker),
        }
    }

    /// Gives no answer: what is lost among datagrams ends a stream.
    fn ignore(&mut self, asker: Asker) {
        if let Asker::Stream(slot, serial) = asker
            && let Some(flow) = self.flows.get_mut(slot).filter(|flow| flow.serial == serial)
            && let Target::Dns(stream) = &mut flow.target
        {
            stream.broken = true;
        }
    }

    /// Judges a question: an answer that can be given at once, or it is on its way.
    fn consider(&mut self, asker: Asker, question: &Question) -> Option<Answer> {
        // Bytes that are no name are no host's.
        let Some(host) = question.host.clone() else { return Some(Answer::no_name()) };
        if host.as_str() == LOCALHOST || host.is_below(LOCALHOST) {
            return Some(Answer::no_name());
        }
        let denied = if host.as_str() == doors::ZONE || host.is_below(doors::ZONE) {
            match self.doors.resolve(&host, &self.policy) {
                Ok(Some(address)) if question.is_v4() => {
                    return Some(question.own_address(address));
                }
                Ok(Some(_)) => return Some(Answer::nothing()),
                Ok(None) => return Some(Answer::no_name()),
                Err(denied) => denied,
            }
        } else {
            match self.policy.ask(&host) {
                Ok(()) => return self.forward(asker, question),
                Err(denied) => denied,
            }
        };
        self.deny(denied);
        Some(Answer::no_name())
    }

    /// Sends a question that may be asked on its way, if it is one for outside.
    fn forward(&mut self, asker: Asker, question: &Question) -> Option<Answer> {
        if !question.is_served() {
            return Some(Answer::nothing());
        }
        // How the host's own network names itself is nobody's business.
        if let Some(address) = question.reverse()
            && never(address, self.own.at(self.now)).is_some()
        {
            return Some(Answer::no_name());
        }
        self.query(asker, question.clone(), question.clone())
    }

    /// Asks the first resolver.
    fn query(&mut self, asker: Asker, question: Question, asked: Question) -> Option<Answer> {
        if self.dns.queries.len() >= self.config.budgets.dns_in_flight {
            return Some(Answer::failure());
        }
        let Some(resolver) = self.config.resolvers.first() else { return Some(Answer::failure()) };
        let slot = self.dns.queries.vacant_key();
        let until = self.now + self.config.budgets.dns;
        let way = (self.poll.registry(), Who::Query(slot).token());
        match Query::new(asker, question, asked, *resolver, way, until) {
            Ok(mut query) => {
                query.plan_try(self.now);
                self.dns.queries.insert(query);
                if self.send_query(slot) {
                    return None;
                }
                self.dns.queries.remove(slot);
            }
            Err(error) => tracing::debug!(%error, "a question can't be sent"),
        }
        Some(if self.meter.is_exhausted() { Answer::refused() } else { Answer::failure() })
    }

    /// Pays for and sends a query's question; false if it can't be.
    fn send_query(&mut self, slot: usize) -> bool {
        let query = &mut self.dns.queries[slot];
        let Some(bytes) = query.bytes() else { return false };
        let left = self.meter.left() >= bytes.len();
        let paid = if left { self.meter.take(bytes.len()) } else { 0 };
        if paid < bytes.len() {
            self.meter.give_back(paid);
            self.meter.tell_empty(&self.teller);
            if self.meter.is_exhausted() {
                let name = query.question.host.as_ref().map_or("", HostName::as_str).to_owned();
                self.deny(Denied::new(rule::LIMIT, name, "nothing more"));
                self.exhaust();
            }
            return false;
        }
        if let Err(error) = query.send(&bytes) {
            tracing::debug!(%error, "a question can't be sent");
            self.meter.give_back(bytes.len());
            return false;
        }
        self.timers.arm(Who::Query(slot), query.try_until);
        true
    }

    /// Something came for a query.
    pub(crate) fn query_woken(&mut self, slot: usize) {
        let Some(query) = self.dns.queries.get_mut(slot) else { return };
        match query.look(&mut self.scratch) {
            Look::Wait => {}
            Look::Truncated => self.retry(slot, true),
            Look::Failed => self.retry(slot, false),
            Look::Answer(message) => {
                let query = self.dns.queries.remove(slot);
                self.timers.disarm(Who::Query(slot));
                let own = self.own.at(self.now);
                let outcome = query.asked.clean(message, |address| never(address, own).is_some());
                self.conclude(query, outcome);
            }
        }
    }

    pub(crate) fn query_due(&mut self, slot: usize) {
        let Some(query) = self.dns.queries.get(slot) else { return };
        if query.try_until <= self.now {
            self.retry(slot, false);
        } else {
            self.timers.arm(Who::Query(slot), query.try_until);
        }
    }

    /// Asks the next resolver, or the same one over TCP; gives up where there was enough of it.
    fn retry(&mut self, slot: usize, over_tcp: bool) {
        let now = self.now;
        let query = &mut self.dns.queries[slot];
        if !over_tcp {
            query.tries += 1;
        }
        let resolvers = &self.config.resolvers;
        let at = (query.tries as usize - 1) % resolvers.len().max(1);
        let spent = query.tries > TRIES || query.until <= now;
        if let (false, Some(resolver)) = (spent, resolvers.get(at)) {
            let way = (self.poll.registry(), Who::Query(slot).token());
            if query.again(*resolver, way, over_tcp).is_ok() {
                query.plan_try(now);
                if self.send_query(slot) {
                    // What is connected already says nothing any more.
                    return self.query_woken_once(slot);
                }
            }
        }
        let query = self.dns.queries.remove(slot);
        self.timers.disarm(Who::Query(slot));
        self.give(query.asker, &query.question, Answer::failure());
    }

    /// A look that can't lead to another try at once.
    fn query_woken_once(&mut self, slot: usize) {
        let query = &mut self.dns.queries[slot];
        if let Look::Failed = query.look(&mut self.scratch) {
            query.try_until = self.now;
            self.timers.arm(Who::Query(slot), self.now);
        }
    }

    /// A resolver's word, as far as it may be passed on.
    fn conclude(&mut self, query: Query, outcome: Outcome) {
        let Query { asker, question, asked, .. } = query;
        let Some(host) = question.host.clone() else { return };
        if outcome.rebinding {
            self.deny(Denied::new(rule::REBINDING, &host, "names that lead to public addresses"));
        }
        for (address, ttl) in &outcome.addresses {
            self.dns.names.remember(aegis_wire::egress::plain(*address), &host, *ttl, self.now);
        }
        let for_v4 = question.is_v4();
        if for_v4 && !asked.is_v4() {
            // Only its IPv6 addresses are known; one of them gets a stand-in.
            let v6 = outcome.addresses.iter().find_map(|(address, _)| match address {
                IpAddr::V6(v6) => Some(*v6),
                IpAddr::V4(_) => None,
            });
            let answer = match v6 {
                Some(v6) => question.own_address(self.dns.stand_ins.give(v6)),
                None => Answer::nothing(),
            };
            return self.give(asker, &question, answer);
        }
        if for_v4 && outcome.nothing {
            let answer = self.query(asker, question.clone(), question.for_v6());
            if answer.is_none() {
                return;
            }
        }
        self.give(asker, &question, outcome.answer);
    }

    fn give(&mut self, asker: Asker, question: &Question, answer: Answer) {
        let datagram = matches!(asker, Asker::Datagram(_));
        if let Some(bytes) = question.answer(answer, datagram) {
            self.say(asker, &bytes);
        }
    }

    fn say(&mut self, asker: Asker, bytes: &[u8]) {
        match asker {
            Asker::Datagram(ends) => {
                crate::reply::datagram(ends, bytes, &mut self.outgoing);
            }
            Asker::Stream(slot, serial) => {
                let Some(flow) = self.flows.get_mut(slot).filter(|f| f.serial == serial) else {
                    return;
                };
                let (Target::Dns(stream), Some(stack)) = (&mut flow.target, &mut flow.stack) else {
                    return;
                };
                stream.open = stream.open.saturating_sub(1);
                let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
                let mut framed = length.to_be_bytes().to_vec();
                framed.extend_from_slice(bytes);
                let sent = stack.socket().send_slice(&framed).unwrap_or(0);
                stream.broken |= sent < framed.len();
                self.queue(slot);
            }
        }
    }

    /// Takes the questions that a stream brought.
    pub(crate) fn answer_stream(&mut self, slot: usize) {
        let mut questions: Vec<Vec<u8>> = Vec::new();
        let Some(flow) = self.flows.get_mut(slot) else { return };
        let (Target::Dns(stream), Some(stack)) = (&mut flow.target, &mut flow.stack) else {
            return;
        };
        let serial = flow.serial;
        let socket = stack.socket();
        while socket.can_recv() && stream.received.len() <= QUESTION_MAX {
            let taken = socket.recv(|bytes| {
                let taken = bytes.len().min(2 + QUESTION_MAX);
                stream.received.extend_from_slice(&bytes[..taken]);
                (taken, ())
            });
            if taken.is_err() {
                break;
            }
        }
        let mut rest = &stream.received[..];
        while stream.open + questions.len() < STREAM_OPEN_MAX
            && let Some((length, after)) = rest.split_first_chunk()
        {
            let length = usize::from(u16::from_be_bytes(*length));
            if length > QUESTION_MAX {
                stream.broken = true;
                break;
            }
            let Some(question) = after.get(..length) else { break };
            questions.push(question.to_vec());
            rest = &after[length..];
        }
        stream.received = rest.to_vec();
        stream.open += questions.len();
        if !questions.is_empty() {
            flow.last_used = self.now;
        }
        for question in questions {
            self.asked(Asker::Stream(slot, serial), &question);
        }
        self.end_stream(slot);
    }

    /// Ends a stream that was answered, or that broke.
    fn end_stream(&mut self, slot: usize) {
        let Some(flow) = self.flows.get_mut(slot) else { return };
        let (Target::Dns(stream), Some(stack)) = (&flow.target, &mut flow.stack) else { return };
        let socket = stack.socket();
        if stream.broken {
            socket.abort();
        } else if !socket.may_recv() && stream.open == 0 {
            // All that it asked is said.
            (flow.guest_ended, flow.passed_on, flow.other_ended) = (true, true, true);
            socket.close();
        }
    }

    pub(crate) fn drop_queries(&mut self) {
        let slots: Vec<usize> = self.dns.queries.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.dns.queries.remove(slot);
            self.timers.disarm(Who::Query(slot));
        }
    }

    /// Ends questions that may not be asked any more.
    pub(crate) fn drop_denied_queries(&mut self) {
        let policy = &self.policy;
        let refused = |query: &Query| {
            query.question.host.as_ref().is_none_or(|host| policy.ask(host).is_err())
        };
        let slots: Vec<usize> = self
            .dns
            .queries
            .iter()
            .filter(|(_, query)| refused(query))
            .map(|(slot, _)| slot)
            .collect();
        for slot in slots {
            let query = self.dns.queries.remove(slot);
            self.timers.disarm(Who::Query(slot));
            self.give(query.asker, &query.question, Answer::no_name());
        }
    }
}
