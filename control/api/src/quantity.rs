//! Sizes and durations as people write them: `10G`, `512Ki`, `4096`; `100ms`, `30s`, `2m`.

use std::time::Duration;

use everdisk_proto::limits::{
    BLOCK, BUFFER_MAX, BUFFER_MIN, HANG_LIMIT_MIN, LEASE_DEFAULT, LEASE_MAX, STRIPE_MAX, STRIPE_MIN, VOLUME_SIZE_MAX,
};

/// The text is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a size: write bytes, or a number with K, M, G, T or P (powers of 1024), such as 10G or 512Ki")]
pub struct BadSize(String);

/// The text is no duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a duration: write a number with ms, s, m or h, such as 100ms or 30s")]
pub struct BadDuration(String);

/// Splits `12ab` into 12 and `ab`.
fn split(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit))
}

/// Reads a size in bytes.
///
/// # Errors
/// [`BadSize`], also when it does not fit 64 bits.
pub fn size(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.chars().take(40).collect());
    let (number, unit) = split(text).ok_or_else(bad)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "ki" | "kib" => 10,
        "m" | "mi" | "mib" => 20,
        "g" | "gi" | "gib" => 30,
        "t" | "ti" | "tib" => 40,
        "p" | "pi" | "pib" => 50,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// Reads a duration.
///
/// # Errors
/// [`BadDuration`], also for more than a year, which is surely a mistake.
pub fn duration(text: &str) -> Result<Duration, BadDuration> {
    let bad = || BadDuration(text.chars().take(40).collect());
    let (number, unit) = split(text).ok_or_else(bad)?;
    let ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "" if number == 0 => 0,
        _ => return Err(bad()),
    };
    let total = number.checked_mul(ms).filter(|ms| *ms <= 366 * 24 * 3_600_000).ok_or_else(bad)?;
    Ok(Duration::from_millis(total))
}

/// Reads a size within bounds that is a multiple of `unit`.
fn bounded(text: &str, what: &str, bounds: std::ops::RangeInclusive<u64>, unit: u64) -> Result<u64, String> {
    let bytes = size(text).map_err(|e| e.to_string())?;
    if bounds.contains(&bytes) && bytes.is_multiple_of(unit) {
        return Ok(bytes);
    }
    let (least, most) = (show_size(*bounds.start()), show_size(*bounds.end()));
    Err(format!("{what} is a multiple of {} from {least} to {most}", show_size(unit)))
}

/// Reads the size of a volume.
///
/// # Errors
/// In words: it is no size, or none that a volume can have.
pub fn volume_size(text: &str) -> Result<u64, String> {
    bounded(text, "a volume's size", BLOCK..=VOLUME_SIZE_MAX, BLOCK)
}

/// Reads a stripe unit.
///
/// # Errors
/// In words: it is no size, or none that a stripe unit can have.
pub fn stripe(text: &str) -> Result<u64, String> {
    let bytes = bounded(text, "a stripe unit", STRIPE_MIN..=STRIPE_MAX, STRIPE_MIN)?;
    if bytes.is_power_of_two() { Ok(bytes) } else { Err("a stripe unit is a power of two, such as 4M".to_owned()) }
}

/// Reads the size of a write buffer; 0 is none.
///
/// # Errors
/// In words: it is no size, or none that a write buffer can have.
pub fn buffer(text: &str) -> Result<u64, String> {
    if size(text) == Ok(0) {
        return Ok(0);
    }
    bounded(text, "a write buffer has 0 bytes, or its size", BUFFER_MIN..=BUFFER_MAX, BLOCK)
}

/// Reads the lease of a suspension.
///
/// # Errors
/// In words: it is no duration, or none that a suspension can have.
pub fn lease(text: &str) -> Result<Duration, String> {
    let lease = duration(text).map_err(|e| e.to_string())?;
    if !lease.is_zero() && lease <= LEASE_MAX {
        return Ok(lease);
    }
    Err(format!(
        "a lease is longer than 0 and at most {} s: the kernel warns about tasks that hang for longer",
        LEASE_MAX.as_secs()
    ))
}

/// Reads a pause budget.
///
/// # Errors
/// In words: it is no duration, or none that a hand-over can have.
pub fn pause_budget(text: &str) -> Result<Duration, String> {
    let budget = duration(text).map_err(|e| e.to_string())?;
    check_pause_budget(budget).map(|()| budget)
}

/// Whether a hand-over can have this budget: the interface ends every suspension after [`LEASE_DEFAULT`].
///
/// # Errors
/// In words.
pub fn check_pause_budget(budget: Duration) -> Result<(), String> {
    if !budget.is_zero() && budget <= LEASE_DEFAULT {
        return Ok(());
    }
    Err(format!("a pause budget of {budget:?} is not possible: give more than 0 and at most {LEASE_DEFAULT:?}"))
}

/// Reads a hang limit.
///
/// # Errors
/// In words: it is no duration, or a shorter one than [`HANG_LIMIT_MIN`].
pub fn hang_limit(text: &str) -> Result<Duration, String> {
    let limit = duration(text).map_err(|e| e.to_string())?;
    if limit < HANG_LIMIT_MIN {
        return Err(format!("a hang limit of {limit:?} is not possible: give at least {HANG_LIMIT_MIN:?}"));
    }
    Ok(limit)
}

/// Writes a size for people: the largest unit that loses nothing.
pub fn show_size(bytes: u64) -> String {
    for (shift, unit) in [(50, "P"), (40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(size("10G"), Ok(10 << 30));
        assert_eq!(size("4M"), Ok(4 << 20));
        assert_eq!(size("512Ki"), Ok(512 << 10));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1GiB"), Ok(1 << 30));
        for bad in ["", "G", "-1G", "1.5G", "1X", "99999999P", "1 G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for bad in ["", "5", "s", "-1s", "1d", "99999999999h", "1.5s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_volume_cannot_have_is_refused() {
        assert_eq!(
            (volume_size("1G"), stripe("64K"), buffer("0"), buffer("2M")),
            (Ok(1 << 30), Ok(1 << 16), Ok(0), Ok(2 << 20))
        );
        assert_eq!(lease("100s"), Ok(LEASE_MAX));
        for bad in ["0", "10", "4095", "9000P", "-1", "1.5G"] {
            assert!(volume_size(bad).is_err(), "{bad}");
        }
        for bad in ["1K", "100000", "2G", "96K", "0"] {
            assert!(stripe(bad).is_err(), "{bad}");
        }
        for bad in ["4K", "1M", "2G", "2097153"] {
            assert!(buffer(bad).unwrap_err().contains("from 2M to 1G"), "{bad}");
        }
        for bad in ["0s", "101s", "2h", "5"] {
            assert!(lease(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pause_budget_has_bounds() {
        assert_eq!(pause_budget("5s"), Ok(LEASE_DEFAULT));
        assert_eq!(pause_budget("1ms"), Ok(Duration::from_millis(1)));
        for bad in ["0", "0ms", "5001ms", "1h", "soon"] {
            assert!(pause_budget(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn shown_sizes_read_back(bytes in any::<u64>()) {
            prop_assert_eq!(size(&show_size(bytes)), Ok(bytes));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,40}") {
            let _ = size(&text);
            let _ = duration(&text);
        }
    }
}
