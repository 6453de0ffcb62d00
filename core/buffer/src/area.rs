//! The shared memory that a buffer lies in.

use std::sync::atomic::Ordering;

use everdisk_proto::buffer::{Geometry, MAGIC, word};

/// Words and data that several processes see. Indices and positions outside of it read as zero and are written nowhere.
pub trait Area {
    /// Where everything lies.
    fn geometry(&self) -> Geometry;
    /// Loads a word of header or slots.
    fn load(&self, word: usize, order: Ordering) -> u64;
    /// Stores one.
    fn store(&self, word: usize, value: u64, order: Ordering);
    /// Copies data out of the ring, from a place in it.
    fn read(&self, at: u64, into: &mut [u8]);
    /// Copies data into the ring.
    fn write(&self, at: u64, from: &[u8]);
}

/// Makes zeroed memory an empty buffer.
pub fn format(area: &impl Area) {
    let geometry = area.geometry();
    area.store(word::CAPACITY, geometry.capacity, Ordering::Relaxed);
    area.store(word::SLOTS, geometry.slots, Ordering::Relaxed);
    area.store(word::MAGIC, MAGIC, Ordering::Release);
}
