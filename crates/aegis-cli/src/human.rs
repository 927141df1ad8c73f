//! Sizes, lengths of time and points in time as people write and read them.

use jiff::Timestamp;

/// Bytes, for reading: `195 MB`, with units of 1000 as disks and limits have them.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.95 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Seconds, for reading: `12s`, `3m 5s`, `2h 10m`, `4d 3h`.
pub fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    if seconds < 1.0 {
        return format!("{:.0}ms", seconds * 1000.0);
    }
    let whole = seconds as u64;
    let (days, hours, minutes, rest) =
        (whole / 86_400, whole / 3600 % 24, whole / 60 % 60, whole % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m {rest}s"),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// An RFC 3339 time as seen from `now`: `3m 5s ago`, `in 71h…`; other text stays as it is.
pub fn relative(time: &str, now: Timestamp) -> String {
    let Ok(then) = time.parse::<Timestamp>() else { return time.to_owned() };
    let distance = now.duration_since(then).as_secs_f64();
    if distance >= 0.0 {
        format!("{} ago", seconds(distance))
    } else {
        format!("in {}", seconds(-distance))
    }
}

/// Reads `90s`, `15m`, `2h`, `1.5h`, `7d`, `250ms`; a bare number is seconds.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return Err(format!("unknown unit '{unit}': use ms, s, m, h or d")),
    };
    let value: f64 =
        number.trim().parse().map_err(|_| "not a length of time like 90s, 15m, 2h or 7d")?;
    if value.is_finite() && value >= 0.0 {
        Ok(value * factor)
    } else {
        Err("a length of time can't be negative".into())
    }
}

/// Reads an amount in MiB: `512`, `512M`, `2G`.
pub fn parse_memory_mb(text: &str) -> Result<u32, String> {
    let lower = text.trim().to_ascii_lowercase();
    let lower = lower.strip_suffix("ib").or(lower.strip_suffix('b')).unwrap_or(&lower);
    let (number, factor) = match lower.strip_suffix('g') {
        Some(number) => (number, 1024.0),
        None => (lower.strip_suffix('m').unwrap_or(lower), 1.0),
    };
    let value: f64 =
        number.trim().parse().map_err(|_| "not an amount of memory like 512, 512M or 2G")?;
    let mb = value * factor;
    if mb.is_finite() && mb >= 1.0 && mb <= f64::from(u32::MAX) {
        Ok(mb.round() as u32)
    } else {
        Err("not an amount of memory like 512, 512M or 2G".into())
    }
}

/// Reads an amount in GB of 10^9 bytes: `20`, `20G`, `500M`, `1T`.
pub fn parse_gb(text: &str) -> Result<f64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let (number, factor) = if let Some(number) = lower.strip_suffix('t') {
        (number, 1000.0)
    } else if let Some(number) = lower.strip_suffix('m') {
        (number, 0.001)
    } else {
        (lower.strip_suffix('g').unwrap_or(lower), 1.0)
    };
    let value: f64 = number.trim().parse().map_err(|_| "not a size like 20, 20G or 500M")?;
    if value.is_finite() && value > 0.0 {
        Ok(value * factor)
    } else {
        Err("a size must be more than zero".into())
    }
}

/// Reads a point in time: RFC 3339, or a length of time before `now` such as `15m`.
pub fn parse_since(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let back = parse_seconds(text)
        .map_err(|_| "neither a time like 2026-01-31T12:00:00Z nor a length of time like 15m")?;
    let back = jiff::SignedDuration::try_from_secs_f64(back).map_err(|e| e.to_string())?;
    now.checked_sub(back).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_lengths_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(4096), "4.1 kB");
        assert_eq!(bytes(207_896_576), "208 MB");
        assert_eq!(bytes(20_000_000_000), "20.0 GB");
        assert_eq!(seconds(0.25), "250ms");
        assert_eq!(seconds(59.9), "59s");
        assert_eq!(seconds(185.0), "3m 5s");
        assert_eq!(seconds(7_800.0), "2h 10m");
        assert_eq!(seconds(356_400.0), "4d 3h");
        assert_eq!(seconds(f64::NAN), "-");
    }

    #[test]
    fn lengths_of_time_are_read() {
        assert_eq!(parse_seconds("90"), Ok(90.0));
        assert_eq!(parse_seconds("1.5h"), Ok(5400.0));
        assert_eq!(parse_seconds("250ms"), Ok(0.25));
        assert_eq!(parse_seconds("7d"), Ok(604_800.0));
        for bad in ["", "h", "-1s", "5 weeks", "NaN", "inf", "1h30m"] {
            assert!(parse_seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn amounts_are_read() {
        assert_eq!(parse_memory_mb("512"), Ok(512));
        assert_eq!(parse_memory_mb("512M"), Ok(512));
        assert_eq!(parse_memory_mb("1.5GiB"), Ok(1536));
        assert!(parse_memory_mb("0").is_err());
        assert!(parse_memory_mb("many").is_err());
        assert_eq!(parse_gb("20"), Ok(20.0));
        assert_eq!(parse_gb("500MB"), Ok(0.5));
        assert_eq!(parse_gb("1T"), Ok(1000.0));
        assert!(parse_gb("0").is_err());
    }

    #[test]
    fn since_takes_both_forms() {
        let now: Timestamp = "2026-03-01T12:00:00Z".parse().unwrap();
        assert_eq!(parse_since("15m", now).unwrap().to_string(), "2026-03-01T11:45:00Z");
        assert_eq!(
            parse_since("2026-01-31T00:00:00Z", now).unwrap().to_string(),
            "2026-01-31T00:00:00Z"
        );
        assert!(parse_since("yesterday", now).is_err());
        assert_eq!(relative("2026-03-01T11:56:55Z", now), "3m 5s ago");
        assert_eq!(relative("2026-03-01T12:00:30.000Z", now), "in 30s");
        assert_eq!(relative("never", now), "never");
    }
}
