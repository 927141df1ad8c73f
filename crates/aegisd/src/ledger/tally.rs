//! Counts of what this daemon wrote, for whoever watches it. They begin at 0 with the daemon and
//! count only what is durable; what holds is in the rows, not here.

use aegis_rules::change::Change;
use aegis_rules::guest::{Guest, GuestStatus};
use aegis_rules::instance::Instance;
use aegis_rules::refusal::Code;
use aegis_wire::words::Usage;
use prometheus::core::Collector as _;
use prometheus::proto::MetricFamily;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts};

/// Upper ends of what is usual for a kill, seconds.
const KILL_SECONDS: [f64; 11] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Counts since the ledger was opened.
pub struct Tally {
    kills: IntCounter,
    kill_seconds: Histogram,
    denials: IntCounterVec,
    egress: IntCounter,
    tokens: IntCounter,
}

impl Default for Tally {
    fn default() -> Tally {
        let counter = |name, help| IntCounter::new(name, help).expect("a good name");
        let denials = Opts::new("aegis_denials_total", "Requests of machines that were refused.");
        let seconds = "From the wish to end a guest to the proof that its machines are gone.";
        let seconds = HistogramOpts::new("aegis_kill_seconds", seconds);
        Tally {
            kills: counter("aegis_kills_total", "Guests that were killed."),
            kill_seconds: Histogram::with_opts(seconds.buckets(KILL_SECONDS.to_vec()))
                .expect("a good name"),
            denials: IntCounterVec::new(denials, &["code", "rule"]).expect("good names"),
            egress: counter(
                "aegis_egress_bytes_total",
                "Payload that machines sent to outside addresses.",
            ),
            tokens: counter("aegis_llm_tokens_total", "LLM tokens, input and output."),
        }
    }
}

impl Tally {
    /// All counts.
    pub fn families(&self) -> Vec<MetricFamily> {
        let Tally { kills, kill_seconds, denials, egress, tokens } = self;
        [
            kills.collect(),
            kill_seconds.collect(),
            denials.collect(),
            egress.collect(),
            tokens.collect(),
        ]
        .concat()
    }

    /// Counts what was written, now that it is durable.
    pub(super) fn count(&self, written: &Written) {
        self.kills.inc_by(written.kills);
        written.kill_seconds.iter().for_each(|s| self.kill_seconds.observe(*s));
        for (code, rule, count) in &written.denials {
            self.denials.with_label_values(&[code, rule]).inc_by(*count);
        }
        self.egress.inc_by(written.egress);
        self.tokens.inc_by(written.tokens);
    }
}

/// What one write adds to the counts.
#[derive(Debug, Default)]
pub(super) struct Written {
    kills: u64,
    kill_seconds: Vec<f64>,
    /// Words of this program, never of a machine: there are few.
    denials: Vec<(&'static str, &'static str, u64)>,
    egress: u64,
    tokens: u64,
}

impl Written {
    /// Notes a change.
    pub(super) fn note(&mut self, change: &Change) {
        match change {
            Change::GuestMoved { to: GuestStatus::Revoked, .. } => self.kills += 1,
            Change::KillVerified { receipt, .. } => {
                self.kill_seconds.push(receipt.elapsed.seconds());
            }
            Change::GuestDenied { code, rule, .. } => {
                self.denials.push((code.word(), rule.unwrap_or_default(), 1));
            }
            Change::EgressDenied { denied, count, .. } => {
                self.denials.push((Code::CapabilityDenied.word(), denied.rule, *count));
            }
            _ => {}
        }
    }

    /// Notes what a machine used meanwhile. What it takes over of another was counted there.
    pub(super) fn note_machine(&mut self, before: &Instance, after: &Instance) {
        self.spent(before.usage(), after.usage());
    }

    /// Notes what was reported of a guest whose machine is not this host's to measure.
    pub(super) fn note_guest(&mut self, before: &Guest, after: &Guest) {
        if after.instance.is_none() {
            self.spent(before.reported, after.reported);
        }
    }

    fn spent(&mut self, before: Usage, after: Usage) {
        self.egress += after.egress.0.saturating_sub(before.egress.0);
        self.tokens += after.tokens.0.saturating_sub(before.tokens.0);
    }
}
