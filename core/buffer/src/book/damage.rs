//! Lost ranges: how the book accounts for damage that this core or another one has found.

use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;

use everdisk_proto::buffer::{Extent, word};

use super::{Book, Live, SEQ_KNOWN_MAX};
use crate::{area::Area, index::Piece, log, lost::Lost};

impl Book {
    /// The data of a piece does not have its checksum: every byte that its extent still holds is lost. [`Book::settle`]
    /// has to follow.
    pub fn damaged(&mut self, seq: u64) {
        // Since then it may have been retired, or found damaged by another thread.
        let Some(extent) = self.extent(seq).copied() else { return };
        let range = extent.offset..extent.end();
        let hit: Vec<Piece> = self.index.overlapping(range.clone()).filter(|piece| piece.seq == seq).copied().collect();
        for piece in hit {
            self.lost.add(piece.span());
            self.is_unsaved = true;
        }
        self.index.remove_of(seq, range);
    }

    /// The extent with this sequence number, if it is published and not retired.
    pub fn extent(&self, seq: u64) -> Option<&Extent> {
        match self.live.get(self.place(seq)?)? {
            Live::Published(extent) => Some(extent),
            Live::Reserved { .. } | Live::Void => None,
        }
    }

    /// Computes the lost ranges, for the core that has the gate: those its predecessor knew, and those it has found
    /// itself since. Data that was written after the damage is in the log behind it, and is not lost.
    pub(super) fn settle_lost(&mut self, area: &impl Area) {
        self.lost = Lost::load(area);
        // Where there are many lost ranges, some were joined across data that is not lost. A sound extent of the buffer
        // is taken out of them. Where there is no room to record that, the index still holds the bytes.
        for range in self.lost.ranges().to_vec() {
            let hit: Vec<Piece> = self.index.overlapping(range.clone()).copied().collect();
            for piece in hit {
                let span = piece.within(&range).span();
                if self.extent(piece.seq).is_some_and(|extent| log::data_is_sound(area, extent)) {
                    self.is_unsaved |= self.lost.remove(&span);
                } else {
                    self.index.remove(span);
                }
            }
        }
        self.is_unsaved |= !self.found.is_empty();
        for (seq, range) in core::mem::take(&mut self.found) {
            self.lost.add(range.clone());
            for newer in self.index.overlapping(range.clone()).filter(|piece| piece.seq > seq) {
                self.lost.remove(&newer.within(&range).span());
            }
        }
        if core::mem::take(&mut self.is_unsaved) {
            self.lost.save(area);
        }
    }

    /// Forgets everything: what was read is void.
    pub fn forget_all(&mut self) {
        let (epoch, failures) = (self.epoch + 1, self.failures + 1);
        *self = Self { epoch, failures, ..Self::new(self.geometry, self.size) };
    }

    /// Begins anew above every sequence number that may be known. Nothing older is certain.
    pub(super) fn begin_anew(&mut self, area: &impl Area, tail: u64, head: u64) {
        let known = [tail, head, self.head()].into_iter().filter(|seq| *seq <= SEQ_KNOWN_MAX).max();
        let seq = known.unwrap_or(0) + self.geometry.slots;
        let (epoch, failures) = (self.epoch + 1, self.failures + 1);
        *self = Self { tail: seq, written: seq, epoch, failures, ..Self::new(self.geometry, self.size) };
        log::reset(area, seq);
        self.lost.add(0..self.size);
        self.lost.save(area);
        area.store(word::BYTES, 0, Relaxed);
    }
}
