//! How much one machine may ask. Each machine has its own counts, so that no machine's flood is
//! another one's trouble; the ledger's syncs are what is scarce.

use std::num::NonZeroU32;

use governor::{DefaultDirectRateLimiter, Quota};

use super::call::Weight;

/// Calls of any kind per second, and at once.
const CALLS: (u32, u32) = (200, 400);
/// Calls that write per second, and at once: each costs a sync of the ledger.
const ACTS: (u32, u32) = (20, 60);
/// Refusals that are audited per second, and at once: beyond that a machine is only told to wait.
const DENIALS: (u32, u32) = (5, 50);

/// One machine's counts.
pub(super) struct Rates {
    calls: DefaultDirectRateLimiter,
    acts: DefaultDirectRateLimiter,
    denials: DefaultDirectRateLimiter,
}

fn limiter((per_second, burst): (u32, u32)) -> DefaultDirectRateLimiter {
    let one = NonZeroU32::MIN;
    let rate = NonZeroU32::new(per_second).unwrap_or(one);
    let burst = NonZeroU32::new(burst).unwrap_or(one);
    DefaultDirectRateLimiter::direct(Quota::per_second(rate).allow_burst(burst))
}

impl Rates {
    /// Nothing was asked yet.
    pub(super) fn new() -> Rates {
        Rates { calls: limiter(CALLS), acts: limiter(ACTS), denials: limiter(DENIALS) }
    }

    /// Counts a call; says which rate it is over.
    pub(super) fn call(&self, weight: Weight) -> Result<(), (u32, u32)> {
        self.calls.check().map_err(|_| CALLS)?;
        match weight {
            Weight::Look => Ok(()),
            Weight::Act => self.acts.check().map_err(|_| ACTS),
        }
    }

    /// Counts a refusal; says whether it is over its rate.
    pub(super) fn denial(&self) -> Result<(), (u32, u32)> {
        self.denials.check().map_err(|_| DENIALS)
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
