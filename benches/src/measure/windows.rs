//! What the application saw: the longest I/O of each slice of time, slices with a switch against those without.
//!
//! fio's log has a clock of its own. It is laid over CLOCK_MONOTONIC as sound is laid over film, by a clapperboard: a
//! suspension of known times at the beginning and at the end shows in the log as the only I/Os of its length.

use std::collections::BTreeMap;

use everdisk_proto::frame::Suspension;
use serde_json::{Value, json};

use crate::{
    Error, Result,
    load::Io,
    stats::{Sorted, ratio},
};

/// Length of a slice, ns.
pub const WINDOW_NS: u64 = 62_000_000;
/// A clap holds I/O this long.
pub const CLAP_NS: u64 = 400_000_000;
/// fio's log has whole milliseconds.
const RESOLUTION_NS: u64 = 1_000_000;
/// The two claps agree about the offset of the clocks within this, ns.
const AGREEMENT_NS: i64 = 3_000_000;

/// What happened in a slice. Of two, the first listed counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Beginning, end, claps and the edges of switches: not judged.
    Left,
    /// The gate passed from one core to another.
    Switch,
    /// A standby was killed and a new one started, and no gate moved: the control.
    Start,
    /// An upgrade was being prepared, or its old core leaving.
    Operation,
    /// Nothing.
    Quiet,
}

impl Kind {
    /// Those that are compared.
    pub const JUDGED: [Self; 4] = [Self::Switch, Self::Start, Self::Operation, Self::Quiet];

    /// For tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Left => "left out",
            Self::Switch => "switch",
            Self::Start => "core start",
            Self::Operation => "operation",
            Self::Quiet => "quiet",
        }
    }
}

/// A time in which something was going on, CLOCK_MONOTONIC ns.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// What.
    pub kind: Kind,
    /// From.
    pub from_ns: u64,
    /// To.
    pub to_ns: u64,
}

/// Longest I/Os by kind of slice, ns.
#[derive(Clone, Debug, Default)]
pub struct Windows(BTreeMap<Kind, Vec<u64>>);

impl Windows {
    /// Adds those of another run.
    pub fn add(&mut self, other: Self) {
        for (kind, mut values) in other.0 {
            self.0.entry(kind).or_default().append(&mut values);
        }
    }

    /// Those of a kind in order.
    pub fn of(&self, kind: Kind) -> Sorted {
        self.0.get(&kind).into_iter().flatten().copied().collect()
    }

    /// Those of every kind but a switch.
    pub fn without_switch(&self) -> Sorted {
        let others = [Kind::Start, Kind::Operation, Kind::Quiet];
        others.iter().filter_map(|kind| self.0.get(kind)).flatten().copied().collect()
    }

    /// Ratio of slices with a switch to others, at `permille`.
    pub fn switch_to(&self, others: &Sorted, permille: usize) -> f64 {
        ratio(self.of(Kind::Switch).at(permille) as f64, others.at(permille) as f64)
    }

    /// For the JSON, raw.
    pub fn json(&self) -> Value {
        Kind::JUDGED
            .into_iter()
            .map(|kind| {
                let raw = self.0.get(&kind).cloned().unwrap_or_default();
                (kind.name().to_owned(), json!({"summary_ns": self.of(kind).summary(), "longest_ns": raw}))
            })
            .collect::<serde_json::Map<_, _>>()
            .into()
    }
}

/// Nanoseconds to add to CLOCK_MONOTONIC to get fio's clock.
///
/// # Errors
/// The claps cannot be told in the log, or contradict each other.
pub fn align(log: &[Io], claps: [Suspension; 2]) -> Result<i64> {
    let lost = |what: &str| Error::Failed(format!("the clocks of fio and the bench cannot be laid together: {what}"));
    let half = log.iter().map(|io| io.end_ns).max().unwrap_or(0) / 2;
    let held = |late: bool| {
        let ends = log.iter().filter(|io| io.latency_ns > CLAP_NS * 3 / 4 && (io.end_ns > half) == late);
        ends.map(|io| io.end_ns).min().ok_or_else(|| {
            let (count, longest) = (log.len(), log.iter().map(|io| io.latency_ns).max().unwrap_or(0));
            let side = if late { "last" } else { "first" };
            lost(&format!("the {side} clap is not in the log of {count} I/Os, the longest {} ms", longest / 1_000_000))
        })
    };
    let opened = claps.map(|clap| clap.closed_ns + clap.opened_us.unwrap_or(0) * 1000);
    let first = held(false)?.cast_signed() - opened[0].cast_signed();
    let second = held(true)?.cast_signed() - opened[1].cast_signed();
    if (first - second).abs() > AGREEMENT_NS {
        return Err(lost(&format!("they differ by {} µs between two claps", (first - second) / 1000)));
    }
    Ok(first.midpoint(second))
}

/// Sorts the slices of `log` between the claps.
pub fn sort(log: &[Io], offset: i64, claps: [Suspension; 2], spans: &[Span]) -> Windows {
    let there = |at_ns: u64| at_ns.saturating_add_signed(offset);
    let index = |at_ns: u64| at_ns / WINDOW_NS;
    let from = index(there(claps[0].closed_ns + claps[0].opened_us.unwrap_or(0) * 1000)) + 8;
    let to = index(there(claps[1].closed_ns)).saturating_sub(2);

    let mut longest: BTreeMap<u64, u64> = BTreeMap::new();
    for io in log {
        // An I/O belongs to every slice in which it was under way.
        for slice in index(io.end_ns.saturating_sub(io.latency_ns))..=index(io.end_ns) {
            let value = longest.entry(slice).or_default();
            *value = io.latency_ns.max(*value);
        }
    }
    let mut kinds: BTreeMap<u64, Kind> = BTreeMap::new();
    let mut mark = |slice: u64, kind: Kind| {
        let is = kinds.entry(slice).or_insert(kind);
        *is = kind.min(*is);
    };
    let mut switched = Vec::new();
    for span in spans {
        let (begin, end) = (there(span.from_ns), there(span.to_ns));
        if span.kind == Kind::Switch {
            // One slice for each switch; where it could also lie in the next one, that one is not judged.
            switched.push(index(begin));
            let around = index(begin.saturating_sub(RESOLUTION_NS))..=index(end + RESOLUTION_NS);
            around.filter(|slice| *slice != index(begin)).for_each(|slice| mark(slice, Kind::Left));
        } else {
            (index(begin)..=index(end)).for_each(|slice| mark(slice, span.kind));
        }
    }
    let mut windows = Windows::default();
    for slice in from..to {
        let kind = if switched.contains(&slice) { Kind::Switch } else { *kinds.get(&slice).unwrap_or(&Kind::Quiet) };
        // No I/O at all: one that is longer than the slice covers it, else none was there to be delayed.
        if let Some(value) = longest.get(&slice) {
            windows.0.entry(kind).or_default().push(*value);
        }
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_laid_together_and_slices_sorted() {
        let mono = 5_000_000_000_000_u64;
        let clap = |at_ms: u64| Suspension {
            closed_ns: mono + at_ms * 1_000_000,
            opened_us: Some(400_000),
            ..Suspension::default()
        };
        let mut log: Vec<Io> = (0..10_000).map(|ms| Io { end_ns: (ms + 7) * 1_000_000, latency_ns: 90_000 }).collect();
        for at in [1_000, 9_000] {
            log.retain(|io| !(at + 7..=at + 406).contains(&(io.end_ns / 1_000_000)));
            log.push(Io { end_ns: (at + 407) * 1_000_000, latency_ns: 400_000_000 });
        }
        log.push(Io { end_ns: 5_008_000_000, latency_ns: 3_000_000 });
        let claps = [clap(1_000), clap(9_000)];
        let offset = align(&log, claps).unwrap();
        assert_eq!(offset, 7_000_000 - mono.cast_signed());
        let at = |ms: u64, kind| Span { kind, from_ns: mono + ms * 1_000_000, to_ns: mono + (ms + 1) * 1_000_000 };
        let windows = sort(&log, offset, claps, &[at(5_000, Kind::Switch), at(7_000, Kind::Start)]);
        assert_eq!(windows.of(Kind::Switch).max(), 3_000_000);
        assert_eq!(windows.of(Kind::Switch).len(), 1);
        assert_eq!((windows.of(Kind::Start).len(), windows.of(Kind::Start).max()), (1, 90_000));
        assert_eq!(windows.of(Kind::Quiet).max(), 90_000);
        assert!(windows.without_switch().len() > 100);
        assert!(align(&log, [clap(1_000), clap(9_010)]).is_err());
    }
}
