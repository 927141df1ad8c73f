//! How much one machine may ask. Each machine has its own counts, so that no machine's flood is
//! another one's trouble; the ledger's syncs are what is scarce.

use std::num::NonZeroU32;

use governor::{DefaultDirectRateLimiter, Quota};

use super::call::Weight;

/// How often something may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    /// So often in each of these.
    pub(super) count: u32,
    /// `second` or `hour`.
    pub(super) per: &'static str,
    /// So often at once.
    pub(super) burst: u32,
}

/// Calls of any kind.
const CALLS: Rate = Rate { count: 200, per: "second", burst: 400 };
/// Calls that write: each costs a sync of the ledger.
const ACTS: Rate = Rate { count: 20, per: "second", burst: 60 };
/// The same in the long run: each leaves rows that nobody may remove.
const ACTS_LONG: Rate = Rate { count: 1800, per: "hour", burst: 1800 };
/// Refusals that are audited: beyond that a machine is only told to wait.
const DENIALS: Rate = Rate { count: 5, per: "second", burst: 50 };
/// The same in the long run.
const DENIALS_LONG: Rate = Rate { count: 600, per: "hour", burst: 600 };

/// One machine's counts.
pub(super) struct Rates {
    calls: DefaultDirectRateLimiter,
    acts: [(DefaultDirectRateLimiter, Rate); 2],
    denials: [(DefaultDirectRateLimiter, Rate); 2],
}

fn limiter(rate: Rate) -> DefaultDirectRateLimiter {
    let some = |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
    let quota = match rate.per {
        "hour" => Quota::per_hour(some(rate.count)),
        _ => Quota::per_second(some(rate.count)),
    };
    DefaultDirectRateLimiter::direct(quota.allow_burst(some(rate.burst)))
}

fn check(limits: &[(DefaultDirectRateLimiter, Rate)]) -> Result<(), Rate> {
    limits.iter().try_for_each(|(limiter, rate)| limiter.check().map_err(|_| *rate))
}

impl Rates {
    /// Nothing was asked yet.
    pub(super) fn new() -> Rates {
        Rates {
            calls: limiter(CALLS),
            acts: [ACTS, ACTS_LONG].map(|rate| (limiter(rate), rate)),
            denials: [DENIALS, DENIALS_LONG].map(|rate| (limiter(rate), rate)),
        }
    }

    /// Counts a call; says which rate it is over.
    pub(super) fn call(&self, weight: Weight) -> Result<(), Rate> {
        self.calls.check().map_err(|_| CALLS)?;
        match weight {
            Weight::Look => Ok(()),
            Weight::Act => check(&self.acts),
        }
    }

    /// Counts a refusal; says whether it is over its rate.
    pub(super) fn denial(&self) -> Result<(), Rate> {
        check(&self.denials)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_looking_goes_on() {
        let rates = Rates::new();
        let passed = (0..1000).filter(|_| rates.call(Weight::Act).is_ok()).count();
        assert!(passed < 100, "{passed} writes at once");
        let rates = Rates::new();
        let passed = (0..200).filter(|_| rates.call(Weight::Look).is_ok()).count();
        assert_eq!(passed, 200);
        assert!((0..100).any(|_| rates.denial().is_err()), "audited refusals have an end");
    }
}
