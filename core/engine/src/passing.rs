//! Ranges that are being written past the buffer. What overlaps one waits: were it buffered and sent meanwhile, the write under
//! way could land on top of it, and readers would see first the one and then the other.

use std::{
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use crate::write_back::lock;

/// The ranges. Looked at and added to under the book's lock, so that nothing is buffered in between.
#[derive(Debug, Default)]
pub(crate) struct Passing {
    ranges: Mutex<Ranges>,
    /// Their number, so that nobody takes the lock for none.
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Ranges {
    /// Tells them apart.
    next: u64,
    list: Vec<(u64, Range<u64>)>,
}

/// A range is being written past the buffer while this lives.
#[derive(Debug)]
#[must_use]
pub(crate) struct Pass<'a> {
    passing: &'a Passing,
    number: u64,
}

impl Passing {
    /// Whether a range that is being written overlaps this one.
    #[inline]
    pub(crate) fn overlaps(&self, range: &Range<u64>) -> bool {
        self.count.load(Relaxed) > 0 && lock(&self.ranges).overlap(range)
    }

    /// This range is written from now on; `None` when it overlaps another.
    pub(crate) fn enter(&self, range: &Range<u64>) -> Option<Pass<'_>> {
        let mut ranges = lock(&self.ranges);
        if ranges.overlap(range) {
            return None;
        }
        ranges.next += 1;
        let number = ranges.next;
        ranges.list.push((number, range.clone()));
        self.count.store(ranges.list.len(), Relaxed);
        Some(Pass { passing: self, number })
    }

    /// Another tenure begins: what an earlier one has under way was abandoned, holds up no request, and is waited for before
    /// anything is sent (the fence).
    pub(crate) fn forget(&self) {
        lock(&self.ranges).list.clear();
        self.count.store(0, Relaxed);
    }
}

impl Ranges {
    fn overlap(&self, range: &Range<u64>) -> bool {
        self.list.iter().any(|(_, other)| other.start < range.end && range.start < other.end)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut ranges = lock(&self.passing.ranges);
        ranges.list.retain(|(number, _)| *number != self.number);
        self.passing.count.store(ranges.list.len(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_overlap_exclude_each_other_as_long_as_they_last() {
        let passing = Passing::default();
        let first = passing.enter(&(10..20)).unwrap();
        let second = passing.enter(&(20..30)).unwrap();
        assert!(passing.enter(&(15..25)).is_none());
        assert!(passing.overlaps(&(0..11)) && !passing.overlaps(&(0..10)) && !passing.overlaps(&(30..40)));
        drop(first);
        assert!(passing.enter(&(15..20)).is_some());
        passing.forget();
        let third = passing.enter(&(20..30)).unwrap();
        drop(second);
        assert!(passing.overlaps(&(20..30)), "that of an earlier tenure took nothing away");
        drop(third);
        assert!(!passing.overlaps(&(0..100)));
    }
}
