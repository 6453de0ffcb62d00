//! What was written past the buffer and is not known to be durable. It cannot be written again, so it is lost where a
//! flush fails. Which parts of the volume that concerns has to be known, also by the next core.
//!
//! ```text
//!  write past the buffer ─► NEW ──── a flush begins ───► FLUSHED ──── it succeeds ─► cleared
//!                                                            └─────── it fails ─────► what is in either is lost
//! ```
//! One bit stands for [`noted_granule`] bytes. A write is noted after it has reached the nodes and before it is
//! acknowledged. So everything that is noted when a flush begins was written before the flush.

use alloc::vec::Vec;
use core::{ops::Range, sync::atomic::Ordering::SeqCst};

use everdisk_proto::{
    buffer::{NOTED_WORDS, noted_granule, word},
    limits::STRIPE_MIN,
};

use crate::area::Area;

/// The smallest stripe unit: a range inside one multiple of it lies on one storage node.
const PART_BYTES: u64 = STRIPE_MIN;

/// First words of the two bitmaps.
const NEW: usize = word::NOTED;
const FLUSHED: usize = word::NOTED + NOTED_WORDS;

/// The bitmaps of a volume.
#[derive(Clone, Copy, Debug)]
pub struct Noted {
    granule: u64,
    words: usize,
    size: u64,
}

impl Noted {
    /// The bitmaps of a volume of `size` bytes.
    ///
    /// # Panics
    /// When a volume is larger than the maximum.
    pub fn new(size: u64) -> Self {
        let granule = noted_granule(size);
        let words = usize::try_from(size.div_ceil(granule).div_ceil(64)).expect("there are few words");
        assert!(words <= NOTED_WORDS, "the granule is large enough for the volume");
        Self { granule, words, size }
    }

    /// A range was written past the buffer.
    #[inline]
    pub fn note(&self, area: &impl Area, range: &Range<u64>) {
        self.words_of(range, |index, mask| {
            if area.load(NEW + index, SeqCst) & mask != mask {
                area.set(NEW + index, mask);
            }
        });
    }

    /// A flush begins: what is noted now was written before it. A death in here leaves each bit in one of the bitmaps,
    /// or in both.
    pub fn begin_flush(&self, area: &impl Area) {
        for index in 0..self.words {
            let bits = area.load(NEW + index, SeqCst);
            if bits != 0 {
                area.set(FLUSHED + index, bits);
                area.clear(NEW + index, bits);
            }
        }
    }

    /// The flush has succeeded.
    pub fn flushed(&self, area: &impl Area) {
        for index in 0..self.words {
            let bits = area.load(FLUSHED + index, SeqCst);
            if bits != 0 {
                area.clear(FLUSHED + index, bits);
            }
        }
    }

    /// The noted ranges, in order, joined where they touch.
    pub fn ranges(&self, area: &impl Area) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for index in 0..self.words {
            let mut bits = area.load(NEW + index, SeqCst) | area.load(FLUSHED + index, SeqCst);
            while bits != 0 {
                let first = bits.trailing_zeros();
                let count = (bits >> first).trailing_ones();
                bits &= !((u64::MAX >> (64 - count)) << first);
                let start = (index as u64 * 64 + u64::from(first)) * self.granule;
                let end = (start + u64::from(count) * self.granule).min(self.size);
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => ranges.push(start..end),
                }
            }
        }
        ranges
    }

    /// As [`Noted::ranges`], in parts that do not cross a multiple of [`PART_BYTES`], unless one bit stands for more
    /// than that.
    pub fn parts(&self, area: &impl Area) -> Vec<Range<u64>> {
        let part = PART_BYTES.max(self.granule);
        let mut parts = Vec::new();
        for range in self.ranges(area) {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min((at / part + 1) * part);
                parts.push(at..end);
                at = end;
            }
        }
        parts
    }

    /// Clears ranges that [`Noted::ranges`] returned, or parts of them.
    pub fn forget(&self, area: &impl Area, ranges: &[Range<u64>]) {
        for range in ranges {
            self.words_of(range, |index, mask| {
                area.clear(NEW + index, mask);
                area.clear(FLUSHED + index, mask);
            });
        }
    }

    /// The words of a bitmap in which a range has bits, with the bits.
    #[inline]
    fn words_of(&self, range: &Range<u64>, mut each: impl FnMut(usize, u64)) {
        let (mut bit, end) = (range.start / self.granule, range.end.div_ceil(self.granule));
        while bit < end {
            let until = end.min((bit / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (until - bit))) << (bit % 64);
            each(usize::try_from(bit / 64).expect("there are few words"), mask);
            bit = until;
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::MortalArea;

    const BLOCK: u64 = 4096;
    const SIZE: u64 = 300 * BLOCK + 100;

    proptest! {
        /// What was noted before a flush that succeeds is cleared, what was noted since is there, and nothing is ever
        /// missing.
        #[test]
        fn what_was_written_since_the_flush_began_is_noted(
            ops in prop::collection::vec((0u8..4, 0..SIZE, 1u64..20 * BLOCK), 1..40),
        ) {
            let area = MortalArea::new(2 << 20);
            let noted = Noted::new(SIZE);
            let blocks = usize::try_from(SIZE.div_ceil(BLOCK)).unwrap();
            let (mut new, mut flushing) = (vec![false; blocks], vec![false; blocks]);
            for (op, start, len) in ops {
                match op {
                    0 => {
                        noted.begin_flush(&area);
                        (0..blocks).for_each(|block| flushing[block] |= std::mem::take(&mut new[block]));
                    }
                    1 => {
                        noted.flushed(&area);
                        flushing.fill(false);
                    }
                    _ => {
                        let range = start..(start + len).min(SIZE);
                        noted.note(&area, &range);
                        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
                            new[usize::try_from(block).unwrap()] = true;
                        }
                    }
                }
                let mut found = vec![false; blocks];
                let mut end = None;
                for range in noted.ranges(&area) {
                    prop_assert!(end.is_none_or(|end| end < range.start) && range.start < range.end);
                    end = Some(range.end);
                    for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
                        found[usize::try_from(block).unwrap()] = true;
                    }
                }
                let expected: Vec<bool> = new.iter().zip(&flushing).map(|(a, b)| *a || *b).collect();
                prop_assert_eq!(found, expected);
            }
        }
    }

    /// A core dies at any point of the beginning of a flush: everything that was noted still is.
    #[test]
    fn a_death_at_the_beginning_of_a_flush_forgets_nothing() {
        let noted = Noted::new(SIZE);
        for stores in 0..12 {
            let area = MortalArea::new(2 << 20);
            for block in [0, 70, 71, 200] {
                noted.note(&area, &(block * BLOCK..(block + 1) * BLOCK));
            }
            area.die_after(stores);
            noted.begin_flush(&area);
            area.revive();
            assert_eq!(noted.ranges(&area), [0..BLOCK, 70 * BLOCK..72 * BLOCK, 200 * BLOCK..201 * BLOCK]);
        }
    }

    #[test]
    fn what_is_forgotten_is_gone_and_the_rest_stays() {
        let (noted, area) = (Noted::new(SIZE), MortalArea::new(2 << 20));
        noted.note(&area, &(0..1));
        noted.begin_flush(&area);
        noted.note(&area, &(1..2));
        noted.note(&area, &(10 * BLOCK..11 * BLOCK));
        noted.forget(&area, std::slice::from_ref(&(0..BLOCK)));
        assert_eq!(noted.ranges(&area), std::slice::from_ref(&(10 * BLOCK..11 * BLOCK)));
    }
}
