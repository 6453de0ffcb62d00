//! What a flush of the storage nodes makes durable, and what is lost when one fails.

use alloc::vec::Vec;
use core::{ops::Range, sync::atomic::Ordering::Relaxed};

use everdisk_proto::buffer::word;

use super::Book;
use crate::{area::Area, index::Piece, log};

/// How far a flush reaches that begins now.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    failures: u64,
    written: u64,
    /// What was noted has been set aside, so that it can be cleared.
    set_aside: bool,
}

impl Book {
    /// A range was written to the storage nodes past the buffer: it is noted, and no longer lost.
    pub fn written_through(&mut self, area: &impl Area, range: &Range<u64>) {
        // What was noted before a failure is cleared first.
        self.settle(area);
        self.noted.note(area, range);
        if self.lost.remove(range) {
            self.is_unsaved = true;
            self.settle(area);
        }
    }

    /// Puts the lost ranges into the segment. Only for the core that has the gate, and while no other core can be given
    /// it.
    pub fn settle(&mut self, area: &impl Area) {
        if core::mem::take(&mut self.is_unsaved) {
            self.lost.save(area);
        }
        // After the save, so that a death in between loses no information.
        self.noted.forget(area, &core::mem::take(&mut self.lost_noted));
    }

    /// Whether there is nothing for [`Book::settle`] to do.
    pub const fn is_settled(&self) -> bool {
        !self.is_unsaved && self.lost_noted.is_empty()
    }

    /// A flush of the storage nodes begins. Returns what it will make durable. `area`: only where the caller may change
    /// the segment.
    pub fn begin_flush(&self, area: Option<&impl Area>) -> Mark {
        if let Some(area) = area.filter(|_| self.is_settled()) {
            self.noted.begin_flush(area);
        }
        Mark { failures: self.failures, written: self.written, set_aside: area.is_some() && self.is_settled() }
    }

    /// The flush has succeeded: retires what it made durable. `may_change`: whether the segment may be changed, apart
    /// from the tail, which may be raised at any time. Returns whether anything was retired.
    pub fn flushed(&mut self, area: &impl Area, mark: &Mark, may_change: bool) -> bool {
        if mark.failures != self.failures {
            return false;
        }
        let before = self.tail;
        log::retire(area, mark.written);
        self.retire_to(mark.written);
        if may_change {
            area.store(word::BYTES, self.bytes, Relaxed);
            if mark.set_aside {
                self.noted.flushed(area);
            }
        }
        before < self.tail
    }

    /// A flush has failed on the nodes that `touches` selects: what was written to them since the last flush that
    /// succeeded may be gone. What is buffered counts as not written; what was written past the buffer is lost.
    /// [`Book::settle`] has to follow. Returns the number of bytes of the volume that are lost by it.
    pub fn flush_failed(&mut self, area: &impl Area, touches: impl Fn(&Range<u64>) -> bool + Copy) -> u64 {
        self.failures += 1;
        self.written = self.tail;
        self.sent_end = self.freed;
        let all: Vec<Piece> = self.index.overlapping(0..u64::MAX).copied().collect();
        for piece in all.iter().filter(|piece| piece.written == self.epoch && touches(&piece.span())) {
            self.index.set_written(piece, 0);
        }
        let noted: Vec<Range<u64>> = self.noted.parts(area).into_iter().filter(touches).collect();
        // Buffered data in a noted range is newer, and is written again.
        let gone: Vec<Range<u64>> = noted.iter().flat_map(|range| self.gaps(range)).collect();
        self.lost.add_all(gone.iter().cloned());
        self.is_unsaved |= !gone.is_empty();
        self.lost_noted = noted;
        gone.iter().map(|range| range.end - range.start).sum()
    }

    /// The parts of a range that are not buffered.
    fn gaps(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for piece in self.index.overlapping(range.clone()) {
            if at < piece.start {
                gaps.push(at..piece.start);
            }
            at = piece.end;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }
}
