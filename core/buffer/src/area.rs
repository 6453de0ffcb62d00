//! The shared memory that a buffer lies in.

use core::sync::atomic::Ordering;

use everdisk_proto::buffer::{self, Geometry};

/// Words and data that several processes see. An index or position outside of it is a fault of ours, and panics.
pub trait Area {
    /// Where everything lies.
    fn geometry(&self) -> Geometry;
    /// Loads a word of header or slots.
    fn load(&self, word: usize, order: Ordering) -> u64;
    /// Stores one.
    fn store(&self, word: usize, value: u64, order: Ordering);
    /// Makes one the larger of what it is and `value`, in one step (release).
    fn raise(&self, word: usize, value: u64);
    /// Sets bits of one, in one step (sequentially consistent).
    fn set(&self, word: usize, bits: u64);
    /// Clears bits of one, in one step (sequentially consistent).
    fn clear(&self, word: usize, bits: u64);
    /// Copies data out of the ring, from a place in it.
    fn read(&self, at: u64, into: &mut [u8]);
    /// Copies data into the ring.
    fn write(&self, at: u64, from: &[u8]);
}

/// Makes zeroed memory an empty buffer.
pub fn format(area: &impl Area) {
    for (word, value) in buffer::empty(area.geometry()) {
        area.store(word, value, Ordering::Release);
    }
}
