//! Writes past the buffer that are under way.
//!
//! A request that overlaps one waits. Were it buffered and sent during that write, the write under way could land on
//! top of it, and readers would see first the new data and then the old. When this core has lost the gate and been
//! given it again, its earlier bypasses were abandoned. They have to be over before anything newer is sent (the fence).

use std::{
    ops::Range,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// The writes under way. Read and changed under the book's lock, so that nothing is buffered in between.
#[derive(Debug, Default)]
pub(crate) struct Bypasses {
    /// A lock of std for the same reason as the book's: see `Buffer::book`.
    writes: Mutex<Writes>,
    /// How many belong to this tenure: zero is known without the lock.
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Writes {
    /// Tells them apart.
    next: u64,
    now: Vec<(u64, Range<u64>)>,
    /// Those of earlier tenures.
    before: Vec<u64>,
}

/// A range is being written past the buffer while this lives.
#[derive(Debug)]
#[must_use]
pub(crate) struct Bypassing<'a> {
    bypasses: &'a Bypasses,
    number: u64,
    /// How many writes were under way when this one began, it among them.
    pub(crate) beside: usize,
}

impl Bypassing<'_> {
    /// Whether it was taken in an earlier tenure: its request was abandoned.
    pub(crate) fn is_past(&self) -> bool {
        self.bypasses.writes().before.contains(&self.number)
    }
}

impl Bypasses {
    fn writes(&self) -> MutexGuard<'_, Writes> {
        self.writes.lock().expect("a panic ends the process")
    }

    /// Whether a write under way overlaps this range.
    #[inline]
    pub(crate) fn overlaps(&self, range: &Range<u64>) -> bool {
        self.count.load(Relaxed) > 0 && self.writes().overlap(range)
    }

    /// This range is written from now on; `None` when a write under way overlaps it.
    pub(crate) fn enter(&self, range: &Range<u64>) -> Option<Bypassing<'_>> {
        let mut writes = self.writes();
        (!writes.overlap(range)).then(|| self.add(&mut writes, range))
    }

    /// As [`Bypasses::enter`], but regardless of overlaps: where nothing is buffered, or no byte changes.
    pub(crate) fn enter_beside(&self, range: &Range<u64>) -> Bypassing<'_> {
        self.add(&mut self.writes(), range)
    }

    fn add(&self, writes: &mut Writes, range: &Range<u64>) -> Bypassing<'_> {
        writes.next += 1;
        writes.now.push((writes.next, range.clone()));
        self.count.store(writes.now.len(), Relaxed);
        Bypassing { bypasses: self, number: writes.next, beside: writes.now.len() }
    }

    /// A tenure begins: the writes under way were abandoned and hold up no request.
    pub(crate) fn begin_tenure(&self) {
        let mut writes = self.writes();
        let numbers: Vec<u64> = writes.now.drain(..).map(|(number, _)| number).collect();
        writes.before.extend(numbers);
        self.count.store(0, Relaxed);
    }

    /// Whether what was under way in earlier tenures is over.
    pub(crate) fn are_past_over(&self) -> bool {
        self.writes().before.is_empty()
    }
}

impl Writes {
    fn overlap(&self, range: &Range<u64>) -> bool {
        self.now.iter().any(|(_, other)| other.start < range.end && range.start < other.end)
    }
}

impl Drop for Bypassing<'_> {
    fn drop(&mut self) {
        let mut writes = self.bypasses.writes();
        writes.now.retain(|(number, _)| *number != self.number);
        writes.before.retain(|number| *number != self.number);
        self.bypasses.count.store(writes.now.len(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_overlap_exclude_each_other_as_long_as_they_last() {
        let bypasses = Bypasses::default();
        let first = bypasses.enter(&(10..20)).unwrap();
        let second = bypasses.enter(&(20..30)).unwrap();
        assert_eq!((first.beside, second.beside), (1, 2));
        assert!(bypasses.enter(&(15..25)).is_none());
        assert!(bypasses.overlaps(&(0..11)) && !bypasses.overlaps(&(0..10)) && !bypasses.overlaps(&(30..40)));
        drop(first);
        assert!(bypasses.enter(&(15..20)).is_some());
        bypasses.begin_tenure();
        assert!(!bypasses.are_past_over());
        let third = bypasses.enter(&(20..30)).unwrap();
        drop(second);
        assert!(bypasses.overlaps(&(20..30)), "that of an earlier tenure took nothing away");
        assert!(bypasses.are_past_over());
        drop(third);
        assert!(!bypasses.overlaps(&(0..100)));
    }
}
