//! How long operations of one kind usually take on a node: whether they are worth it that others go on meanwhile.
//!
//! To pass the work on to another thread costs about as much as a wake, some tens of microseconds. What takes much longer is slow;
//! what takes less is quick, and only every eighth time looked at, because to look costs something as well. The time that it takes to
//! copy the bytes does not count: large operations are no slower for the node than small ones.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Usually more than this: slow from now on.
const SLOW: Duration = Duration::from_micros(200);
/// Usually less than this: quick again.
const QUICK: Duration = Duration::from_micros(100);
/// A time counts as this at most, so that one interruption says nothing.
const MOST: Duration = Duration::from_millis(1);
/// What a copy takes at most for each byte, even where the memory is new and the CPU is shared: 1 GB/s.
const COPY_NS: u64 = 1;
/// While it is quick, one time of so many is looked at.
const SAMPLE_EVERY: u32 = 8;
/// A new time counts as much as this part of what was seen before.
const WEIGHT: u64 = 8;

/// What is known of the times.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    usual_ns: AtomicU64,
    is_slow: AtomicBool,
    turn: AtomicU32,
}

impl Pace {
    /// Whether it usually takes long.
    #[inline]
    pub(crate) fn is_slow(&self) -> bool {
        self.is_slow.load(Relaxed)
    }

    /// Whether it was seen to be quick.
    #[inline]
    pub(crate) fn is_quick(&self) -> bool {
        !self.is_slow() && self.usual_ns.load(Relaxed) > 0
    }

    /// Runs an operation that copies `len` bytes, and perhaps looks how long it takes.
    #[inline]
    pub(crate) fn time<T>(&self, len: usize, operation: impl FnOnce() -> T) -> T {
        if !self.is_slow() && !self.turn.fetch_add(1, Relaxed).is_multiple_of(SAMPLE_EVERY) {
            return operation();
        }
        let begin = Instant::now();
        let done = operation();
        self.note(begin.elapsed().saturating_sub(Duration::from_nanos(len as u64 * COPY_NS)));
        done
    }

    fn note(&self, took: Duration) {
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
        pace.note(Duration::from_secs(1));
        assert!(!pace.is_slow());
        for _ in 0..100 {
            pace.note(Duration::from_micros(5));
        }
        for _ in 0..3 {
            pace.note(Duration::from_millis(1));
        }
        assert!(pace.is_slow());
        for _ in 0..8 {
            pace.note(Duration::from_micros(150));
        }
        assert!(pace.is_slow(), "not yet quick");
        for _ in 0..20 {
            pace.note(Duration::from_micros(5));
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
        assert!(!pace.is_slow(), "so many bytes take that long");
    }
}
