//! What is sent to the storage nodes next, and the outcome.

use alloc::vec::Vec;
use core::ops::Range;

use everdisk_proto::buffer::{Extent, ExtentKind};

use super::{Book, Live};
use crate::index::{Index, Piece};

/// The next batch for the storage nodes.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Failed flushes when it was chosen. After another failure the batch does not count.
    failures: u64,
    /// The extents that will be written once every piece has been sent, in order, with their ranges.
    pub extents: Vec<(u64, Range<u64>)>,
    /// The present content of those ranges, with dirty neighbours; in order, without overlaps.
    pub pieces: Vec<Piece>,
}

/// The cost of an extent in a batch, in bytes of data. An extent without data may have to be written as zeros.
const fn effort(extent: &Extent) -> u64 {
    match extent.kind {
        ExtentKind::Data => extent.len,
        ExtentKind::Discard | ExtentKind::Zeroes => extent.len / 64,
    }
}

impl Book {
    /// Chooses what is sent next: the oldest extents that are not written, at least one if any is published, about
    /// `bytes` of them, none above `through`. Dirty neighbours are joined to the pieces, up to `run` bytes in one run,
    /// so that small writes reach the storage nodes in large ones.
    pub fn batch(&self, bytes: u64, through: u64, run: u64) -> Batch {
        let mut batch = Batch { failures: self.failures, ..Batch::default() };
        let mut taken = 0;
        let begin = usize::try_from(self.written - self.tail).expect("the live extents lie in memory");
        for (seq, live) in (self.written + 1..=through).zip(self.live.range(begin..)) {
            match live {
                Live::Reserved { .. } => break,
                Live::Void => batch.extents.push((seq, 0..0)),
                Live::Published(extent) => {
                    let cost = effort(extent);
                    if taken > 0 && taken + cost > bytes {
                        break;
                    }
                    taken += cost;
                    batch.extents.push((seq, extent.offset..extent.end()));
                }
            }
        }
        let mut pieces = Index::default();
        for (_, range) in &batch.extents {
            for piece in self.index.overlapping(range.clone()).filter(|piece| self.is_dirty(piece)) {
                // The whole piece: its other parts are adjacent.
                pieces.insert(*piece);
            }
        }
        let chosen: Vec<Piece> = pieces.overlapping(0..u64::MAX).copied().collect();
        batch.pieces = self.with_neighbours(chosen, run);
        batch
    }

    pub(super) const fn is_dirty(&self, piece: &Piece) -> bool {
        piece.written != self.epoch
    }

    /// Joins dirty neighbours to the pieces.
    fn with_neighbours(&self, chosen: Vec<Piece>, run: u64) -> Vec<Piece> {
        let mut joined: Vec<Piece> = Vec::with_capacity(chosen.len());
        let mut begun = 0;
        for piece in chosen {
            let touches = joined.last().is_some_and(|last| last.end == piece.start);
            if joined.last().is_some_and(|last| last.end > piece.start) {
                // It was joined already, as a neighbour of the piece before.
                continue;
            }
            if !touches {
                begun = piece.start;
                let mut before = Vec::new();
                let floor = joined.last().map_or(0, |last| last.end);
                while let Some(left) =
                    self.index.ending_at(begun).filter(|left| self.is_dirty(left) && left.start >= floor)
                {
                    if piece.end - left.start > run {
                        break;
                    }
                    begun = left.start;
                    before.push(*left);
                }
                joined.extend(before.into_iter().rev());
            }
            joined.push(piece);
            let mut end = piece.end;
            while let Some(right) = self.index.starting_at(end).filter(|right| self.is_dirty(right)) {
                if right.end - begun > run {
                    break;
                }
                end = right.end;
                joined.push(*right);
            }
        }
        joined
    }

    /// The outcome of a batch: every piece but those in `failed` was written to the storage nodes. Returns whether the
    /// mark `written` moved on. If a flush has failed since the batch was chosen, the batch does not count: the failure
    /// may concern its data.
    pub fn sent(&mut self, batch: &Batch, failed: &[Range<u64>]) -> bool {
        if batch.failures != self.failures {
            return false;
        }
        let misses = |range: &Range<u64>| failed.iter().any(|f| f.start < range.end && range.start < f.end);
        for piece in batch.pieces.iter().filter(|piece| !misses(&piece.span())) {
            self.index.set_written(piece, self.epoch);
        }
        let good = batch.extents.iter().take_while(|(_, range)| !misses(range));
        let Some((written, _)) = good.last() else { return false };
        if *written <= self.written {
            return false;
        }
        self.written = *written;
        self.sent_end = self.position_behind(*written);
        true
    }

    /// Virtual position behind an extent that is not retired, or the end of the retired ones.
    pub(super) fn position_behind(&self, seq: u64) -> u64 {
        let upto = self.place(seq).map_or(0, |place| place + 1).min(self.live.len());
        let behind = self.live.range(..upto).rev().find_map(|live| match live {
            Live::Published(extent) => Some(extent.position + extent.stored()),
            Live::Reserved { end } => Some(*end),
            Live::Void => None,
        });
        behind.unwrap_or(self.freed)
    }
}
