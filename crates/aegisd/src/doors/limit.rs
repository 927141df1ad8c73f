//! Rate limit of public routes, per address (contracts/couch.md 9).

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota};

/// Between two clean-ups of addresses that have not come for a while.
const CLEAN_EVERY: u32 = 4096;

/// Counts requests per address.
pub(super) struct RateLimit {
    limiter: Option<DefaultKeyedRateLimiter<IpAddr>>,
    clock: DefaultClock,
    checks: AtomicU32,
    per_second: u32,
    burst: u32,
}

/// A request too many.
pub(super) struct TooMany {
    /// Seconds until one passes again.
    pub(super) retry_after: u64,
    /// Which limit.
    pub(super) allowed: String,
}

impl RateLimit {
    /// `per_second` 0 switches the limit off.
    pub(super) fn new(per_second: u32, burst: u32) -> RateLimit {
        let limiter = NonZeroU32::new(per_second).map(|rate| {
            let burst = NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN);
            DefaultKeyedRateLimiter::keyed(Quota::per_second(rate).allow_burst(burst))
        });
        RateLimit {
            limiter,
            clock: DefaultClock::default(),
            checks: AtomicU32::new(0),
            per_second,
            burst,
        }
    }

    /// Counts one request.
    pub(super) fn check(&self, address: IpAddr) -> Result<(), TooMany> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        if self.checks.fetch_add(1, Ordering::Relaxed) % CLEAN_EVERY == CLEAN_EVERY - 1 {
            limiter.retain_recent();
        }
        limiter.check_key(&address).map_err(|until| {
            let wait = until.wait_time_from(self.clock.now());
            TooMany {
                retry_after: wait.as_secs() + 1,
                allowed: format!(
                    "{} requests per second and address, {} at once",
                    self.per_second, self.burst
                ),
            }
        })
    }
}
