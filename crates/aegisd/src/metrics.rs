//! Counts of what this daemon did and that no row remembers: boots and requests. Values, not
//! globals: whoever counts was given them. What a scrape shows of the rows is read from the rows
//! (`app/metrics.rs`).

use std::time::Duration;

use prometheus::core::Collector as _;
use prometheus::proto::MetricFamily;
use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts};

/// Upper ends of what is usual for a boot, seconds: from a spare's to a cold one in emulation.
const BOOT_SECONDS: [f64; 13] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 240.0];

/// How a boot went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    /// The machine answered, this long after its launch began.
    Ran(Duration),
    /// It did not.
    Failed,
}

/// Counts since this daemon started.
pub struct Metrics {
    boots: IntCounterVec,
    boot_seconds: Histogram,
    requests: IntCounterVec,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let boots = Opts::new("aegis_boots_total", "Launches of machines, by how they went.");
        let boots = IntCounterVec::new(boots, &["outcome"]).expect("good names");
        for outcome in ["running", "failed"] {
            boots.with_label_values(&[outcome]);
        }
        let seconds = "From the launch of a machine until it answers.";
        let seconds =
            HistogramOpts::new("aegis_boot_seconds", seconds).buckets(BOOT_SECONDS.into());
        let requests = Opts::new("aegis_http_requests_total", "Requests that were answered.");
        Metrics {
            boots,
            boot_seconds: Histogram::with_opts(seconds).expect("a good name"),
            requests: IntCounterVec::new(requests, &["method", "route", "status"])
                .expect("good names"),
        }
    }
}

impl Metrics {
    /// Counts a boot.
    pub fn boot(&self, boot: Boot) {
        match boot {
            Boot::Ran(after) => {
                self.boots.with_label_values(&["running"]).inc();
                self.boot_seconds.observe(after.as_secs_f64());
            }
            Boot::Failed => self.boots.with_label_values(&["failed"]).inc(),
        }
    }

    /// Counts a request. `method` and `route` are words and patterns of this program, never what
    /// somebody wrote: there are as many series as we have routes.
    pub fn request(&self, method: &'static str, route: &str, status: u16) {
        self.requests.with_label_values(&[method, route, &status.to_string()]).inc();
    }

    /// All counts.
    pub fn families(&self) -> Vec<MetricFamily> {
        [self.boots.collect(), self.boot_seconds.collect(), self.requests.collect()].concat()
    }
}
