//! Memory for tests: one whose owner may die between any two stores, and one for loom.

#[cfg(not(loom))]
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use everdisk_proto::buffer::{Geometry, word};

use crate::area::Area;

/// Memory that outlives the core that writes it. After a number of stores the core is dead, and its later stores have
/// no effect. A death in the middle of copying data leaves half of it.
#[cfg(not(loom))]
#[derive(Debug)]
pub struct MortalArea {
    geometry: Geometry,
    words: core::cell::RefCell<Vec<u64>>,
    data: core::cell::RefCell<Vec<u8>>,
    stores_left: core::cell::Cell<Option<usize>>,
}

#[cfg(not(loom))]
impl MortalArea {
    /// An empty buffer of this capacity.
    pub fn new(capacity: u64) -> Self {
        Self::with(Geometry::new(capacity))
    }

    /// An empty buffer of any geometry.
    pub fn with(geometry: Geometry) -> Self {
        let words = usize::try_from(geometry.data_start() / 8).unwrap_or(0);
        let area = Self {
            geometry,
            words: vec![0; words].into(),
            data: vec![0; usize::try_from(geometry.capacity).unwrap_or(0)].into(),
            stores_left: None.into(),
        };
        crate::area::format(&area);
        area
    }

    /// The core dies after this many further stores.
    pub fn die_after(&self, stores: usize) {
        self.stores_left.set(Some(stores));
    }

    /// Another core lives. Returns whether the one before had died.
    pub fn revive(&self) -> bool {
        self.stores_left.take() == Some(0)
    }

    /// Header and slots.
    pub fn words(&self) -> core::cell::RefMut<'_, Vec<u64>> {
        self.words.borrow_mut()
    }

    /// The ring.
    pub fn data(&self) -> core::cell::RefMut<'_, Vec<u8>> {
        self.data.borrow_mut()
    }

    /// Whether the core lives on after this store.
    fn lives(&self) -> bool {
        let left = self.stores_left.get();
        self.stores_left.set(left.map(|left| left.saturating_sub(1)));
        left != Some(0)
    }
}

#[cfg(not(loom))]
impl Area for MortalArea {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn load(&self, word: usize, _: Ordering) -> u64 {
        self.words.borrow()[word]
    }
    fn store(&self, word: usize, value: u64, _: Ordering) {
        // The byte count is only informative: a death at it is the same as one after it.
        if word == word::BYTES || self.lives() {
            self.words.borrow_mut()[word] = value;
        }
    }
    fn raise(&self, word: usize, value: u64) {
        if self.lives() {
            let mut words = self.words.borrow_mut();
            words[word] = words[word].max(value);
        }
    }
    fn set(&self, word: usize, bits: u64) {
        if self.lives() {
            self.words.borrow_mut()[word] |= bits;
        }
    }
    fn clear(&self, word: usize, bits: u64) {
        if self.lives() {
            self.words.borrow_mut()[word] &= !bits;
        }
    }
    fn read(&self, at: u64, into: &mut [u8]) {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        into.copy_from_slice(&self.data.borrow()[at..at + into.len()]);
    }
    fn write(&self, at: u64, from: &[u8]) {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let dying = self.stores_left.get() == Some(1);
        if self.lives() {
            let len = if dying { from.len() / 2 } else { from.len() };
            self.data.borrow_mut()[at..at + len].copy_from_slice(&from[..len]);
        }
    }
}

/// Memory of loom's atomics: the words that are used, and eight bytes of data at every 64.
#[cfg(loom)]
pub(crate) struct LoomArea {
    geometry: Geometry,
    words: Vec<loom::sync::atomic::AtomicU64>,
    data: Vec<loom::sync::atomic::AtomicU64>,
}

#[cfg(loom)]
impl LoomArea {
    pub(crate) fn new(slots: u64) -> Self {
        let geometry = Geometry { capacity: slots * 64, slots };
        let some = |n: u64| (0..n).map(|_| loom::sync::atomic::AtomicU64::new(0)).collect();
        Self { geometry, words: some(4 + slots * 8), data: some(slots) }
    }

    fn word(&self, word: usize) -> &loom::sync::atomic::AtomicU64 {
        let index = match word {
            word::HEAD => 0,
            word::TAIL => 1,
            word::BYTES => 2,
            word::LOST => 3,
            slot => 4 + slot - word::SLOT,
        };
        &self.words[index]
    }
}

#[cfg(loom)]
impl Area for LoomArea {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn load(&self, word: usize, order: Ordering) -> u64 {
        self.word(word).load(order)
    }
    fn store(&self, word: usize, value: u64, order: Ordering) {
        self.word(word).store(value, order);
    }
    fn raise(&self, word: usize, value: u64) {
        self.word(word).fetch_max(value, Ordering::Release);
    }
    fn set(&self, word: usize, bits: u64) {
        self.word(word).fetch_or(bits, Ordering::SeqCst);
    }
    fn clear(&self, word: usize, bits: u64) {
        self.word(word).fetch_and(!bits, Ordering::SeqCst);
    }
    fn read(&self, at: u64, into: &mut [u8]) {
        let value = self.data[usize::try_from(at / 64).unwrap()].load(Ordering::Relaxed);
        into.copy_from_slice(&value.to_le_bytes());
    }
    fn write(&self, at: u64, from: &[u8]) {
        let value = u64::from_le_bytes(from.try_into().unwrap());
        self.data[usize::try_from(at / 64).unwrap()].store(value, Ordering::Relaxed);
    }
}
