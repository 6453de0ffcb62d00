//! The write buffer's memory: the part of the segment behind its fixed fields.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

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
    /// The segment's buffer; `None` when it is of a version that this core does not know.
    pub(crate) fn of(segment: &Arc<SharedSegment>) -> Option<Self> {
        if segment.header.buffer_version.load(Ordering::Relaxed) != BUFFER {
            return None;
        }
        Some(Self { segment: Arc::clone(segment), geometry: segment.geometry() })
    }

    /// Flushes that failed, see [`everdisk_proto::segment::GateArea::flush_errors`].
    pub(crate) fn flush_errors(&self) -> &AtomicU64 {
        &self.segment.gate.flush_errors
    }

    #[inline]
    fn word(&self, word: usize) -> &AtomicU64 {
        self.segment.buffer_word(word).expect("the book knows the buffer's geometry")
    }
}

impl Area for SegmentArea {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[inline]
    fn load(&self, word: usize, order: Ordering) -> u64 {
        self.word(word).load(order)
    }

    #[inline]
    fn store(&self, word: usize, value: u64, order: Ordering) {
        self.word(word).store(value, order);
    }

    fn raise(&self, word: usize, value: u64) {
        self.word(word).fetch_max(value, Ordering::Release);
    }

    #[inline]
    fn set(&self, word: usize, bits: u64) {
        self.word(word).fetch_or(bits, Ordering::SeqCst);
    }

    #[inline]
    fn clear(&self, word: usize, bits: u64) {
        self.word(word).fetch_and(!bits, Ordering::SeqCst);
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        assert!(self.segment.buffer_read(at, into), "the book checks every extent against the ring");
    }

    fn write(&self, at: u64, from: &[u8]) {
        assert!(self.segment.buffer_write(at, from), "the book hands out places in the ring");
    }
}
