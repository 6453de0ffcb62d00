//! Ranges that are being changed, for servers whose minimum block is larger than a byte.
//!
//! A write of a part of a block reads the block, changes the part, and writes the block. Another change of the same
//! block at that time would be undone. So changes whose blocks overlap go one after another, in the order in which they
//! came.

use std::{collections::VecDeque, ops::Range};

/// A change, and the blocks it touches. At most as many as requests in flight are here, so every search is short.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    held: Vec<(usize, Range<u64>)>,
    waiting: VecDeque<(usize, Range<u64>)>,
}

const fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

impl Ranges {
    /// Whether the task may begin at once. If not, it waits, and [`Self::release`] returns it in its turn.
    pub(crate) fn acquire(&mut self, task: usize, range: Range<u64>) -> bool {
        let is_free = self.held.iter().chain(&self.waiting).all(|(_, other)| !overlap(other, &range));
        if is_free {
            self.held.push((task, range));
        } else {
            self.waiting.push_back((task, range));
        }
        is_free
    }

    /// The task has ended; the tasks that may begin now.
    pub(crate) fn release(&mut self, task: usize) -> Vec<usize> {
        self.held.retain(|(other, _)| *other != task);
        let mut begin = Vec::new();
        let mut still_waiting: VecDeque<(usize, Range<u64>)> = VecDeque::new();
        for (task, range) in std::mem::take(&mut self.waiting) {
            if self.held.iter().chain(&still_waiting).all(|(_, other)| !overlap(other, &range)) {
                self.held.push((task, range));
                begin.push(task);
            } else {
                still_waiting.push_back((task, range));
            }
        }
        self.waiting = still_waiting;
        begin
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.held.clear();
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_one_block_go_one_after_another_in_their_order() {
        let mut ranges = Ranges::default();
        assert!(ranges.acquire(1, 0..4096));
        assert!(!ranges.acquire(2, 0..8192));
        assert!(!ranges.acquire(3, 4096..8192), "it would overtake 2");
        assert!(ranges.acquire(4, 8192..12288));
        assert!(ranges.release(4).is_empty());
        assert_eq!(ranges.release(1), [2]);
        assert_eq!(ranges.release(2), [3]);
        assert!(ranges.release(3).is_empty());
    }
}
