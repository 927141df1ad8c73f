//! The only file of the daemon that reads a clock.
//!
//! Time goes on monotonically within a run: wall time at the start plus what the boot clock counted
//! since, so that setting the host's clock moves no guest's end (contracts/couch.md 6).

use std::time::{Duration, SystemTime};

use aegis_wire::words::Time;

/// A running clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Time,
    start_boot_ms: i64,
}

impl Clock {
    /// Starts from the host's wall clock.
    pub fn start() -> Clock {
        #[allow(clippy::disallowed_methods, reason = "the clock file")]
        let wall = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX));
        Clock { start: Time(wall), start_boot_ms: boot_ms() }
    }

    /// The time now.
    pub fn now(&self) -> Time {
        Time(self.start.0 + (boot_ms() - self.start_boot_ms))
    }

    /// How long from now until then; zero when it has passed.
    pub fn until(&self, then: Time) -> Duration {
        Duration::from_millis(then.since(self.now()).0)
    }
}

/// Milliseconds since the host booted, sleep included.
fn boot_ms() -> i64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    t.tv_sec * 1000 + t.tv_nsec / 1_000_000
}
