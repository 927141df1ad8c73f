//! Points and lengths of time, in milliseconds.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A point in time: milliseconds since 1970-01-01T00:00:00Z. Its text form is RFC 3339 UTC with
/// milliseconds (contracts/couch.md 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub i64);

impl Time {
    /// This point plus a length, saturating at the end of time.
    pub fn plus(self, length: DurationMs) -> Time {
        Time(self.0.saturating_add(i64::try_from(length.0).unwrap_or(i64::MAX)))
    }

    /// How long after `earlier` this is; zero when it is not after it.
    pub fn since(self, earlier: Time) -> DurationMs {
        DurationMs(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(t) => write!(f, "{t:.3}"),
            // Outside of years -9999..9999 there is no RFC 3339 form.
            Err(_) => write!(f, "9999-12-30T22:00:00.000Z"),
        }
    }
}

impl std::str::FromStr for Time {
    type Err = super::BadWord;
    fn from_str(s: &str) -> Result<Time, super::BadWord> {
        let t: jiff::Timestamp =
            s.parse().map_err(|_| super::BadWord::new("time", "an RFC 3339 time"))?;
        Ok(Time(t.as_millisecond()))
    }
}

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Time, D::Error> {
        let s = String::deserialize(d)?;
        s.parse().map_err(serde::de::Error::custom)
    }
}

/// A length of time in milliseconds.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct DurationMs(pub u64);

impl DurationMs {
    /// Milliseconds in an hour.
    pub const HOUR: u64 = 3_600_000;

    /// In hours, with fractions.
    pub fn hours(self) -> f64 {
        self.0 as f64 / Self::HOUR as f64
    }

    /// In seconds, with fractions.
    pub fn seconds(self) -> f64 {
        self.0 as f64 / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_has_one_text_form() {
        let t = Time(1_771_372_800_000);
        assert_eq!(t.to_string(), "2026-02-18T00:00:00.000Z");
        assert_eq!("2026-02-18T00:00:00Z".parse::<Time>().unwrap(), t);
        assert_eq!(Time(5).since(Time(9)), DurationMs(0));
    }
}
