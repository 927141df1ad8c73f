//! A vendor's stream on its way to the machine: its output is counted as it passes, its end is settled
//! before it is passed on, and what outruns its reservation is cut.

use aegis_wire::bounds::LLM_ANSWER_MAX;
use bytes::Bytes;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use serde_json::Value;
use tokio::time::Instant;

use super::super::answer::{Body, Broken};
use super::draft::Api;
use super::problem::{Kind, Problem};
use super::reservation::Reservation;
use super::sse::Events;
use super::{chat, messages, responses};

/// A token stands for more text than this nearly nowhere: longer runs are blanks and lines.
const BYTES_PER_TOKEN: u64 = 8;
/// Pieces that are shorter than this together are no token each: some stream letter by letter.
const BYTES_PER_PIECE: u64 = 3;

/// Counts output by what is seen of it: a piece is a token or more, but for very short ones, and no
/// token is much longer than [`BYTES_PER_TOKEN`]. So it stays near the truth, and mostly below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Output {
    pieces: u64,
    bytes: u64,
    /// Pieces of something else than text.
    others: u64,
}

impl Output {
    /// A piece of text, if there is some.
    pub(super) fn text(&mut self, text: Option<&str>) {
        if let Some(text) = text.filter(|t| !t.is_empty()) {
            self.pieces += 1;
            self.bytes += text.len() as u64;
        }
    }

    /// A piece of something else.
    pub(super) fn piece(&mut self) {
        self.others += 1;
    }

    /// Tokens at the least.
    pub(super) fn tokens(self) -> u64 {
        let pieces = self.pieces.min(self.bytes.div_ceil(BYTES_PER_PIECE));
        self.others + pieces.max(self.bytes.div_ceil(BYTES_PER_TOKEN))
    }
}

/// What was seen of a stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// What was put out.
    pub(super) output: Output,
    /// What the vendor says at the end.
    pub(super) usage: Option<u64>,
    /// The highest that was told of input, and of output.
    pub(super) told_input: Option<u64>,
    pub(super) told_output: Option<u64>,
}

/// What becomes of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is passed on.
    Pass,
    /// It is for the door only.
    Hide,
    /// It is passed on as the last one.
    End,
}

/// What is known of a stream before it begins.
pub(super) struct Plan {
    pub(super) api: Api,
    /// Output that was reserved, of all choices, tokens.
    pub(super) output: u64,
    /// Whether the client wants to see what the vendor says of usage.
    pub(super) shows_usage: bool,
    /// When it ends at the latest.
    pub(super) until: Instant,
}

struct Running {
    plan: Plan,
    upstream: Incoming,
    events: Events,
    seen: Seen,
    /// Until it is settled.
    reservation: Option<Reservation>,
}

/// The stream as the machine gets it. Whoever drops it ends the call.
pub(super) fn pass(plan: Plan, upstream: Incoming, reservation: Reservation) -> Body {
    let running = Running {
        plan,
        upstream,
        events: Events::default(),
        seen: Seen::default(),
        reservation: Some(reservation),
    };
    let pieces = futures_util::stream::unfold(running, |mut running| async move {
        let piece = running.next().await?;
        Some((piece.map(Frame::data), running))
    });
    StreamBody::new(pieces).boxed_unsync()
}

impl Running {
    /// The next piece for the machine; `None` after the last one.
    async fn next(&mut self) -> Option<Result<Bytes, Broken>> {
        // Settled: that was the last one.
        self.reservation.as_ref()?;
        loop {
            while let Some(event) = self.events.next() {
                let verdict = self.look(&event.data);
                if self.seen.output.tokens() > self.plan.output {
                    return Some(self.cut().await);
                }
                match verdict {
                    Verdict::Pass => return Some(Ok(event.raw)),
                    Verdict::Hide => {}
                    Verdict::End => {
                        self.settle(self.seen.usage, "ok").await;
                        return Some(Ok(event.raw));
                    }
                }
            }
            if self.events.held() > LLM_ANSWER_MAX {
                self.settle(None, "broken").await;
                return Some(Err("the vendor's event is too long".into()));
            }
            match tokio::time::timeout_at(self.plan.until, self.upstream.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.events.push(&data);
                    }
                }
                Ok(Some(Err(error))) => {
                    self.settle(None, "broken").await;
                    return Some(Err(error.into()));
                }
                Ok(None) => {
                    // Not all vendors say that they are done; who told what it used was.
                    let told = self.seen.usage.filter(|_| self.plan.api == Api::Chat);
                    self.settle(told, if told.is_some() { "ok" } else { "broken" }).await;
                    let rest = self.events.rest();
                    return (!rest.is_empty()).then_some(Ok(rest));
                }
                Err(_) => {
                    self.settle(None, "late").await;
                    let late = Problem::new(Kind::Late, "aegis: the call took too long");
                    return Some(Ok(self.last_words(&late)));
                }
            }
        }
    }

    fn look(&mut self, data: &str) -> Verdict {
        if data.trim() == "[DONE]" {
            return Verdict::End;
        }
        // What is no JSON counts for nothing, and is not for us to judge.
        let Ok(data) = serde_json::from_str::<Value>(data) else { return Verdict::Pass };
        match self.plan.api {
            Api::Chat => chat::event(&data, &mut self.seen, self.plan.shows_usage),
            Api::Responses => responses::event(&data, &mut self.seen),
            Api::Messages => messages::event(&data, &mut self.seen),
        }
    }

    async fn cut(&mut self) -> Result<Bytes, Broken> {
        self.settle(None, "cut").await;
        let message =
            "aegis: the answer was cut, as it outran the tokens that were reserved for it";
        Ok(self.last_words(&Problem::new(Kind::Exhausted, message)))
    }

    fn last_words(&self, problem: &Problem) -> Bytes {
        let api = self.plan.api;
        problem.event(api.vendor(), api == Api::Responses).into()
    }

    async fn settle(&mut self, reported: Option<u64>, end: &'static str) {
        if let Some(reservation) = self.reservation.take() {
            reservation.settle(reported, end).await;
        }
    }
}
