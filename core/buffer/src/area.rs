//! The shared memory that holds a buffer.

use core::sync::atomic::Ordering;

use everdisk_proto::buffer::{self, Geometry};

/// Words and data shared by several processes. An index or position outside of it is a bug, and panics.
pub trait Area {
    /// The sizes from which every offset follows.
    fn geometry(&self) -> Geometry;
    /// Loads a word of header or slots.
    fn load(&self, word: usize, order: Ordering) -> u64;
    /// Stores a word.
    fn store(&self, word: usize, value: u64, order: Ordering);
    /// Raises a word to `value` if it is lower, atomically (release).
    fn raise(&self, word: usize, value: u64);
    /// Sets bits of a word, atomically (sequentially consistent).
    fn set(&self, word: usize, bits: u64);
    /// Clears bits of a word, atomically (sequentially consistent).
    fn clear(&self, word: usize, bits: u64);
    /// Copies data out of the ring, from a position in it.
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
