//! How long operations of one kind usually take on a node. It decides whether other requests should go on during such
//! an operation.
//!
//! To pass the work on to another thread costs about as much as a wake, some tens of microseconds. An operation that
//! takes much longer is slow; any other is quick. While a node is quick only every eighth operation is timed, because
//! reading the clock has a cost as well. The time it takes to copy the bytes is subtracted: a large operation is no
//! slower for the node than a small one.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Above this average an operation counts as slow.
const SLOW: Duration = Duration::from_micros(200);
/// Below this average it counts as quick again.
const QUICK: Duration = Duration::from_micros(100);
/// A longer sample is clamped to this, so that one interruption does not decide.
const MOST: Duration = Duration::from_millis(1);
/// Upper bound of the copy time per byte in nanoseconds, even for new memory and a shared CPU: 1 GB/s.
const COPY_NS: u64 = 1;
/// While the node is quick, one operation in this many is timed.
const SAMPLE_EVERY: u32 = 8;
/// Weight of the average: a new sample counts for one part in this many.
const WEIGHT: u64 = 8;

/// What has been measured.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    usual_ns: AtomicU64,
    is_slow: AtomicBool,
    turn: AtomicU32,
}

impl Pace {
    /// Whether the operation usually takes long.
    #[inline]
    pub(crate) fn is_slow(&self) -> bool {
        self.is_slow.load(Relaxed)
    }

    /// Whether the operation has been measured as quick.
    #[inline]
    pub(crate) fn is_quick(&self) -> bool {
        !self.is_slow() && self.usual_ns.load(Relaxed) > 0
    }

    /// Runs an operation that copies `len` bytes, and times it if it is its turn.
    #[inline]
    pub(crate) fn time<T>(&self, len: usize, operation: impl FnOnce() -> T) -> T {
        if !self.is_slow() && !self.turn.fetch_add(1, Relaxed).is_multiple_of(SAMPLE_EVERY) {
            return operation();
        }
        let begin = Instant::now();
        let done = operation();
        self.note(len, begin.elapsed());
        done
    }

    /// An operation that copied `len` bytes took this long.
    fn note(&self, len: usize, took: Duration) {
        let took = took.saturating_sub(Duration::from_nanos(len as u64 * COPY_NS));
        let took = u64::try_from(took.min(MOST).as_nanos()).expect("a millisecond");
        let usual = self.usual_ns.load(Relaxed);
        let usual = usual - usual / WEIGHT + took / WEIGHT;
        self.usual_ns.store(usual, Relaxed);
        let bound = if self.is_slow() { QUICK } else { SLOW };
        self.is_slow.store(u128::from(usual) > bound.as_nanos(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_usually_takes_long_is_slow_and_one_interruption_is_not() {
        let pace = Pace::default();
        pace.note(0, Duration::from_secs(1));
        assert!(!pace.is_slow());
        for _ in 0..100 {
            pace.note(0, Duration::from_micros(5));
        }
        for _ in 0..3 {
            pace.note(0, Duration::from_millis(1));
        }
        assert!(pace.is_slow());
        for _ in 0..8 {
            pace.note(0, Duration::from_micros(150));
        }
        assert!(pace.is_slow(), "not yet quick");
        for _ in 0..20 {
            pace.note(0, Duration::from_micros(5));
        }
        assert!(!pace.is_slow());
    }

    #[test]
    fn quick_ones_are_looked_at_now_and_then_and_slow_ones_always() {
        let pace = Pace::default();
        let slow = || std::thread::sleep(Duration::from_millis(1));
        let mut runs = 0;
        while !pace.is_slow() {
            pace.time(0, slow);
            runs += 1;
            assert!(runs < 100);
        }
        assert!(runs > 1);
        let before = pace.turn.load(Relaxed);
        pace.time(0, slow);
        assert_eq!(pace.turn.load(Relaxed), before);
        (0..50).for_each(|_| pace.time(100 << 20, slow));
        assert!(!pace.is_slow(), "the time is that of the copy");
    }
}
