//! Amounts with their units.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! amount {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// Sum, `None` when it does not fit.
            pub fn checked_add(self, other: Self) -> Option<Self> {
                self.0.checked_add(other.0).map(Self)
            }

            /// Difference, `None` when `other` is more than this.
            pub fn checked_sub(self, other: Self) -> Option<Self> {
                self.0.checked_sub(other.0).map(Self)
            }
        }
    };
}

amount! {
    /// CPU, in thousandths of one core.
    CpuMillis(u32)
}
amount! {
    /// Machine memory, in MiB.
    MemoryMb(u32)
}
amount! {
    /// Writable disk, in bytes.
    DiskBytes(u64)
}
amount! {
    /// Payload sent to outside addresses, in bytes.
    EgressBytes(u64)
}
amount! {
    /// LLM tokens, input and output together.
    LlmTokens(u64)
}

/// A part of a whole, in thousandths: from a tenth to all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Share(u16);

impl Share {
    /// All of it.
    pub const ALL: Share = Share(1000);
    /// Half of it.
    pub const HALF: Share = Share(500);

    /// From a number from 0.1 to 1.
    pub fn new(part: f64) -> Option<Share> {
        (0.1..=1.0).contains(&part).then(|| Share((part * 1000.0).round() as u16))
    }

    /// As a number from 0.1 to 1.
    pub fn part(self) -> f64 {
        f64::from(self.0) / 1000.0
    }

    /// This part of an amount, rounded down.
    pub fn of(self, amount: u64) -> u64 {
        u64::try_from(u128::from(amount) * u128::from(self.0) / 1000).unwrap_or(amount)
    }
}

impl TryFrom<u16> for Share {
    type Error = super::BadWord;
    fn try_from(thousandths: u16) -> Result<Share, super::BadWord> {
        if (100..=1000).contains(&thousandths) {
            Ok(Share(thousandths))
        } else {
            Err(super::BadWord::new("share", "from 100 to 1000 thousandths"))
        }
    }
}

impl From<Share> for u16 {
    fn from(share: Share) -> u16 {
        share.0
    }
}

impl CpuMillis {
    /// In cores, with fractions.
    pub fn cores(self) -> f64 {
        f64::from(self.0) / 1000.0
    }

    /// Virtual CPUs that a machine with this quota gets: the quota rounded up.
    pub fn vcpus(self) -> u32 {
        self.0.div_ceil(1000).max(1)
    }
}

impl MemoryMb {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0) << 20
    }
}

impl DiskBytes {
    /// The smallest disk of a machine: 0.02 GB in whole blocks.
    pub const LEAST: DiskBytes = DiskBytes(20_000_000 / 4096 * 4096);

    /// In GB of 10^9 bytes.
    pub fn gb(self) -> f64 {
        self.0 as f64 / 1e9
    }
}

impl EgressBytes {
    /// In GB of 10^9 bytes.
    pub fn gb(self) -> f64 {
        self.0 as f64 / 1e9
    }
}

/// A number as people write it: whole numbers without a point, others with at most four decimals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Number(pub f64);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounded = (self.0 * 10_000.0).round() / 10_000.0;
        write!(f, "{rounded}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_like_the_seeds_violations() {
        assert_eq!(Number(5.0).to_string(), "5");
        assert_eq!(Number(1.5).to_string(), "1.5");
        assert_eq!(Number(1.0 / 3.0).to_string(), "0.3333");
        assert_eq!(CpuMillis(1500).vcpus(), 2);
        assert_eq!(CpuMillis(100).vcpus(), 1);
    }
}
