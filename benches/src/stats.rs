//! Order statistics, and times in words.

use serde_json::{Value, json};

/// Values in ascending order.
#[derive(Clone, Debug, Default)]
pub struct Sorted(Vec<u64>);

impl FromIterator<u64> for Sorted {
    fn from_iter<I: IntoIterator<Item = u64>>(values: I) -> Self {
        let mut values: Vec<u64> = values.into_iter().collect();
        values.sort_unstable();
        Self(values)
    }
}

impl Sorted {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value below or at which `permille` of all lie (nearest rank); 0 when there are none.
    pub fn at(&self, permille: usize) -> u64 {
        let rank = (self.0.len() * permille).div_ceil(1000).max(1);
        self.0.get(rank - 1).copied().unwrap_or(0)
    }

    /// The middle one.
    pub fn median(&self) -> u64 {
        self.at(500)
    }

    /// The largest.
    pub fn max(&self) -> u64 {
        self.at(1000)
    }

    /// Count and percentiles.
    pub fn summary(&self) -> Value {
        json!({"count": self.len(), "p50": self.median(), "p90": self.at(900), "p99": self.at(990), "max": self.max()})
    }
}

/// Median of real numbers; 0 when there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match (values.len() / 2, values.len() % 2) {
        (_, _) if values.is_empty() => 0.0,
        (middle, 1) => values.get(middle).copied().unwrap_or(0.0),
        (middle, _) => values.iter().skip(middle - 1).take(2).sum::<f64>() / 2.0,
    }
}

/// `a / b`, 0 when b is 0.
pub fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// A time of `ns` nanoseconds with three digits or so.
pub fn time(ns: u64) -> String {
    let value = ns as f64;
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..10_000 => format!("{:.1} µs", value / 1e3),
        10_000..1_000_000 => format!("{:.0} µs", value / 1e3),
        1_000_000..10_000_000 => format!("{:.2} ms", value / 1e6),
        10_000_000..100_000_000 => format!("{:.1} ms", value / 1e6),
        100_000_000..1_000_000_000 => format!("{:.0} ms", value / 1e6),
        _ => format!("{:.2} s", value / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let sorted: Sorted = (1..=100).rev().collect();
        assert_eq!([sorted.median(), sorted.at(900), sorted.at(990), sorted.max()], [50, 90, 99, 100]);
        assert_eq!(Sorted::default().median(), 0);
        assert_eq!([7].into_iter().collect::<Sorted>().at(990), 7);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn times_are_readable() {
        let shown = [85, 8_500, 118_000, 1_240_000, 31_000_000, 310_000_000, 2_000_000_000].map(time);
        assert_eq!(shown, ["85 ns", "8.5 µs", "118 µs", "1.24 ms", "31.0 ms", "310 ms", "2.00 s"]);
    }
}
