//! The index: which extent holds which byte of the volume. Pieces do not overlap. Where extents overlap, the one with
//! the higher sequence number has the byte, whatever the order of insertion.

use alloc::{collections::BTreeMap, vec::Vec};
use core::ops::Range;

use everdisk_proto::buffer::ExtentKind;

/// A piece of an extent that no newer extent covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the volume.
    pub start: u64,
    /// Offset of the first byte behind it.
    pub end: u64,
    /// Sequence number of its extent.
    pub seq: u64,
    /// Virtual position of its first byte, where it has data.
    pub position: u64,
    /// The kind of its extent.
    pub kind: ExtentKind,
    /// The epoch in which it was written to the storage nodes; 0: it is not written.
    pub written: u32,
}

impl Piece {
    /// The part of the piece inside a range. Meaningful only where they overlap.
    pub fn within(&self, range: &Range<u64>) -> Self {
        let start = self.start.max(range.start);
        Self { start, end: self.end.min(range.end), position: self.position + (start - self.start), ..*self }
    }

    /// Its range of the volume.
    pub const fn span(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Bytes.
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it has no bytes. No piece of an index is empty.
    pub const fn is_empty(&self) -> bool {
        self.end <= self.start
    }
}

/// The pieces by their offset.
#[derive(Clone, Debug, Default)]
pub struct Index {
    pieces: BTreeMap<u64, Piece>,
}

impl Index {
    /// Whether nothing is buffered.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The pieces that overlap a range, whole, in order.
    pub fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = &Piece> {
        // In most cases there are none, and this check costs half the searching.
        let hit = self.overlaps(range.clone()).then(|| {
            let before = self.pieces.range(..range.start).next_back().map(|(_, piece)| piece);
            let before = before.filter(|piece| piece.end > range.start);
            before.into_iter().chain(self.pieces.range(range).map(|(_, piece)| piece))
        });
        hit.into_iter().flatten()
    }

    /// Whether anything of a range is buffered.
    pub fn overlaps(&self, range: Range<u64>) -> bool {
        // Of the pieces that begin before the range's end, the last one reaches furthest.
        let last = self.pieces.range(..range.end).next_back();
        range.start < range.end && last.is_some_and(|(_, piece)| piece.end > range.start)
    }

    /// The piece that ends where `start` is.
    pub fn ending_at(&self, start: u64) -> Option<&Piece> {
        self.pieces.range(..start).next_back().map(|(_, piece)| piece).filter(|piece| piece.end == start)
    }

    /// The piece that begins at `start`.
    pub fn starting_at(&self, start: u64) -> Option<&Piece> {
        self.pieces.get(&start)
    }

    /// The first byte at or after `at` that is buffered.
    pub fn next_at(&self, at: u64) -> Option<u64> {
        self.overlapping(at..at.saturating_add(1))
            .next()
            .map_or_else(|| self.pieces.range(at..).next().map(|(start, _)| *start), |_| Some(at))
    }

    /// The first byte at or after `at` that is not buffered.
    pub fn next_gap(&self, at: u64) -> u64 {
        let mut at = at;
        while let Some(piece) = self.overlapping(at..at.saturating_add(1)).next() {
            at = piece.end;
        }
        at
    }

    /// Inserts a piece, which is not written yet: it takes the bytes of its range that no newer piece has.
    pub fn insert(&mut self, new: Piece) {
        let (seq, range) = (new.seq, new.span());
        if range.is_empty() {
            return;
        }
        let hit: Vec<Piece> = self.overlapping(range.clone()).copied().collect();
        if hit.is_empty() {
            self.pieces.insert(new.start, new);
            return;
        }
        let mut at = range.start;
        for old in hit {
            if old.seq > seq {
                let gap = at..old.start;
                if gap.start < gap.end {
                    self.put(new.within(&gap));
                }
                at = old.end;
            } else {
                self.carve(&old, &range);
            }
        }
        if at < range.end {
            let rest = at..range.end;
            // The rest behind the last newer piece. Older pieces in it were carved out above.
            self.put(new.within(&rest));
        }
    }

    /// Removes a range from every piece, of whichever extent.
    pub fn remove(&mut self, range: Range<u64>) {
        let hit: Vec<Piece> = self.overlapping(range.clone()).copied().collect();
        for old in hit {
            self.carve(&old, &range);
        }
    }

    /// Removes the pieces of one extent from its range.
    pub fn remove_of(&mut self, seq: u64, range: Range<u64>) {
        let hit: Vec<Piece> = self.overlapping(range).filter(|piece| piece.seq == seq).copied().collect();
        for old in hit {
            self.pieces.remove(&old.start);
        }
    }

    /// Notes that these bytes of one extent were written to the storage nodes in this epoch; 0: that they are no longer
    /// there.
    pub fn set_written(&mut self, sent: &Piece, epoch: u32) {
        let hit: Vec<Piece> =
            self.overlapping(sent.start..sent.end).filter(|piece| piece.seq == sent.seq).copied().collect();
        for old in hit {
            // Only a piece that was sent whole. One that has grown does not exist: pieces only shrink.
            if old.start >= sent.start && old.end <= sent.end {
                self.pieces.get_mut(&old.start).expect("it was found just now").written = epoch;
            }
        }
    }

    fn put(&mut self, piece: Piece) {
        self.pieces.insert(piece.start, piece);
    }

    /// Keeps of a piece what lies outside of the range.
    fn carve(&mut self, old: &Piece, range: &Range<u64>) {
        self.pieces.remove(&old.start);
        let (left, right) = (old.start..range.start, range.end..old.end);
        if left.start < left.end {
            self.put(old.within(&left));
        }
        if right.start < right.end {
            self.put(old.within(&right));
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 200;

    fn piece(seq: u64, range: Range<u64>, position: u64) -> Piece {
        Piece { start: range.start, end: range.end, seq, position, kind: ExtentKind::Data, written: 0 }
    }

    /// For each byte: sequence number and virtual position.
    type Model = Vec<Option<(u64, u64)>>;

    fn agrees(index: &Index, model: &Model) {
        let mut seen = vec![None; model.len()];
        let mut end = 0;
        for piece in index.overlapping(0..SIZE) {
            assert!(piece.start >= end && piece.start < piece.end, "{index:?}");
            end = piece.end;
            for (byte, place) in (piece.start..piece.end).zip(piece.position..) {
                seen[usize::try_from(byte).unwrap()] = Some((piece.seq, place));
            }
        }
        assert_eq!(&seen, model);
        for at in 0..SIZE {
            let first = |wanted: bool| (at..SIZE).find(|b| model[usize::try_from(*b).unwrap()].is_some() == wanted);
            assert_eq!(index.next_at(at), first(true));
            assert_eq!(index.next_gap(at), first(false).unwrap_or(SIZE));
            assert_eq!(index.overlaps(at..at + 1), model[usize::try_from(at).unwrap()].is_some());
        }
        assert!(!index.overlaps(5..5));
    }

    proptest! {
        /// Extents in any order, and removals of ranges and of extents, against a byte-wise model.
        #[test]
        fn the_highest_sequence_number_has_the_byte(
            ops in prop::collection::vec((0u8..4, 0..SIZE, 1u64..60, 1u64..1000), 1..60),
        ) {
            let mut index = Index::default();
            let mut model: Model = vec![None; usize::try_from(SIZE).unwrap()];
            let mut used = std::collections::HashMap::new();
            for (op, start, len, seq) in ops {
                let range = start..(start + len).min(SIZE);
                let bytes = || range.clone().map(|b| usize::try_from(b).unwrap());
                match op {
                    0 | 1 if !used.contains_key(&seq) => {
                        used.insert(seq, range.clone());
                        index.insert(piece(seq, range.clone(), seq * 1000));
                        for (byte, place) in bytes().zip(seq * 1000..) {
                            if model[byte].is_none_or(|(other, _)| other < seq) {
                                model[byte] = Some((seq, place));
                            }
                        }
                    }
                    2 => {
                        index.remove(range.clone());
                        bytes().for_each(|byte| model[byte] = None);
                    }
                    3 => {
                        if let Some(range) = used.get(&seq) {
                            index.remove_of(seq, range.clone());
                            for byte in range.clone().map(|b| usize::try_from(b).unwrap()) {
                                model[byte] = model[byte].filter(|(other, _)| *other != seq);
                            }
                        }
                    }
                    _ => {}
                }
                agrees(&index, &model);
            }
        }
    }

    #[test]
    fn only_what_was_sent_and_not_overwritten_is_written() {
        let mut index = Index::default();
        index.insert(piece(1, 0..100, 0));
        let sent = *index.overlapping(0..100).next().unwrap();
        index.insert(piece(2, 40..60, 500));
        index.set_written(&sent, 7);
        let written: Vec<(u64, u32)> = index.overlapping(0..100).map(|piece| (piece.start, piece.written)).collect();
        assert_eq!(written, [(0, 7), (40, 0), (60, 7)]);
    }
}
