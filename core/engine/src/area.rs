//! The write buffer's memory: the part of the segment behind its fixed fields.

use std::sync::{Arc, atomic::Ordering};

use everdisk_buffer::area::Area;
use everdisk_proto::{buffer::Geometry, version::BUFFER};
use everdisk_sys::memory::SharedSegment;

/// The buffer in a segment.
#[derive(Clone, Debug)]
pub(crate) struct SegmentArea {
    segment: Arc<SharedSegment>,
    geometry: Geometry,
}

impl SegmentArea {
    /// The segment's buffer; `None` when it has none, or one of a version that this core does not know. The interface gives such a
    /// core the gate only when nothing is in it.
    pub(crate) fn of(segment: &Arc<SharedSegment>) -> Option<Self> {
        let geometry = segment.buffer()?;
        if segment.header.buffer_version.load(Ordering::Relaxed) != BUFFER {
            return None;
        }
        Some(Self { segment: Arc::clone(segment), geometry })
    }
}

impl Area for SegmentArea {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[inline]
    fn load(&self, word: usize, order: Ordering) -> u64 {
        self.segment.buffer_word(word).map_or(0, |word| word.load(order))
    }

    #[inline]
    fn store(&self, word: usize, value: u64, order: Ordering) {
        if let Some(word) = self.segment.buffer_word(word) {
            word.store(value, order);
        }
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        if !self.segment.buffer_read(at, into) {
            into.fill(0);
        }
    }

    fn write(&self, at: u64, from: &[u8]) {
        // What does not lie in the ring is not written; its checksum will tell.
        let _ = self.segment.buffer_write(at, from);
    }
}
