//! The write buffer (D5): a log of extents in the segment, which any core can take over.
//!
//! ```text
//! 0          header   magic, sizes, how far the log goes, ranges whose data is lost            (4 KiB)
//! 4 KiB      slots    one descriptor of 64 bytes for each extent: sequence number modulo slots
//! …          data     a ring of `capacity` bytes; an extent lies in it in one piece
//! ```
//! An extent is published by one store to its slot's state word, after its data and the rest of the slot: it is wholly there
//! or not there, at whatever instant the core dies. Extents are retired in the order of their sequence numbers by one store to
//! [`word::TAIL`], when a storage node has them (or newer data).
//!
//! ```text
//!  slot of seq − slots, retired ─► RESERVED(seq) ─► data, fields ─► PUBLISHED(seq) ─► acknowledged ─► tail ≥ seq: retired
//!                                  head := seq      │
//!                                                   death here: never acknowledged, the slot is passed over
//! ```
//! Positions in the data ring are *virtual*: they only grow, and lie at their value modulo `capacity`. Buffer version 1: all of this.

/// `"EVDBUF\0\0"` little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"EVDBUF\0\0");
/// Bytes of the header.
pub const HEADER_BYTES: u64 = 4096;
/// Bytes of a slot.
pub const SLOT_BYTES: u64 = 64;
/// Words of eight bytes in a slot.
pub const SLOT_WORDS: usize = 8;
/// Extents begin at multiples of this in the data ring: a cache line.
pub const DATA_ALIGN: u64 = 64;
/// Fewest slots.
const SLOTS_MIN: u64 = 64;
/// One slot for so many bytes of data: an extent of one block, the commonest size.
const BYTES_PER_SLOT: u64 = 4096;
/// Lost ranges that are told apart; more are kept as one that covers them.
pub const LOST_MAX: usize = 64;

/// Words of the header, by their index.
pub mod word {
    /// [`super::MAGIC`], stored last.
    pub const MAGIC: usize = 0;
    /// Bytes of data.
    pub const CAPACITY: usize = 1;
    /// Number of slots.
    pub const SLOTS: usize = 2;
    /// Highest sequence number reserved; sequence numbers begin at 1.
    pub const HEAD: usize = 8;
    /// Highest sequence number retired. On a cache line of its own: the sender writes it, not the workers.
    pub const TAIL: usize = 16;
    /// Bytes of unretired extents, for whoever wants to know; not needed to take the buffer over.
    pub const BYTES: usize = 24;
    /// Number of lost ranges (low half), and which of two tables holds them (high half, 0 or 1).
    pub const LOST: usize = 32;
    /// The two tables of lost ranges: offset and length of each.
    pub const LOST_RANGES: usize = 33;
    /// First word of the slots.
    pub const SLOT: usize = 512;
}

/// Number of lost ranges that a word `LOST` counts.
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
pub const fn lost_count(word: u64) -> u32 {
    word as u32
}

/// Where everything lies in a buffer of a certain capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of data.
    pub capacity: u64,
    /// Number of slots.
    pub slots: u64,
}

impl Geometry {
    /// The geometry for this many bytes of data.
    pub const fn new(capacity: u64) -> Self {
        let slots = capacity / BYTES_PER_SLOT;
        Self { capacity, slots: if slots < SLOTS_MIN { SLOTS_MIN } else { slots } }
    }

    /// Where the data begins.
    pub const fn data_start(self) -> u64 {
        (HEADER_BYTES + self.slots * SLOT_BYTES).next_multiple_of(4096)
    }

    /// Bytes of header, slots and data.
    pub const fn bytes(self) -> u64 {
        self.data_start() + self.capacity
    }

    /// First word of the slot of a sequence number.
    pub const fn slot_word(self, seq: u64) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "below slots, which lie in memory")]
        let slot = (seq % self.slots) as usize;
        word::SLOT + slot * SLOT_WORDS
    }
}

/// The kind of an extent that holds data; there is no other yet.
const DATA: u64 = 1;

/// An extent's slot, but for its state word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the volume.
    pub offset: u64,
    /// Length in bytes, at most [`REQUEST_BYTES_MAX`](crate::limits::REQUEST_BYTES_MAX).
    pub len: u64,
    /// Virtual position of its data.
    pub position: u64,
    /// Generation of the core that wrote it.
    pub generation: u64,
    /// CRC-32C of its data.
    pub crc: u32,
}

impl Extent {
    /// Bytes that it takes in the data ring.
    pub const fn stored(&self) -> u64 {
        self.len.next_multiple_of(DATA_ALIGN)
    }

    /// Offset in the volume of the first byte behind it.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Words 1 to 6 of its slot.
    pub fn encode(&self, seq: u64) -> [u64; 6] {
        let kind = DATA | (u64::from(self.crc) << 32);
        let fields = [self.offset, self.len, self.position, self.generation, kind];
        let [a, b, c, d, e] = fields;
        [a, b, c, d, e, check(seq, &fields)]
    }

    /// Reads words 1 to 6 of the slot of a sequence number; `None` when they are not what was written.
    pub fn decode(seq: u64, words: &[u64; 6]) -> Option<Self> {
        let [offset, len, position, generation, kind, sum] = *words;
        if sum != check(seq, &[offset, len, position, generation, kind]) {
            return None;
        }
        let crc = u32::try_from(kind >> 32).ok()?;
        (kind & u64::from(u32::MAX) == DATA).then_some(Self { offset, len, position, generation, crc })
    }
}

/// CRC-32C of a slot's sequence number and fields. The seed keeps a slot of zeros from being one.
fn check(seq: u64, fields: &[u64; 5]) -> u64 {
    let [a, b, c, d, e] = *fields;
    let mut bytes = [0; 48];
    // At once: a successor checks every slot of a full buffer while I/O waits.
    bytes.as_chunks_mut().0.iter_mut().zip([seq, a, b, c, d, e]).for_each(|(part, word)| *part = word.to_le_bytes());
    u64::from(crc32c::crc32c_append(0x4556_4442, &bytes))
}

/// The state word of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Its extent is being written.
    Reserved(u64),
    /// Its extent is there.
    Published(u64),
    /// Never used, or no state at all.
    Other,
}

impl SlotState {
    /// The word. `Other` is 0.
    pub const fn encode(self) -> u64 {
        match self {
            Self::Reserved(seq) => (seq << 2) | 1,
            Self::Published(seq) => (seq << 2) | 2,
            Self::Other => 0,
        }
    }

    /// Reads the word.
    pub const fn decode(word: u64) -> Self {
        match word & 3 {
            1 => Self::Reserved(word >> 2),
            2 => Self::Published(word >> 2),
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXTENT: Extent = Extent { offset: 1 << 40, len: 4096, position: 123_456, generation: 7, crc: 0xDEAD_BEEF };

    /// The bytes of a slot of buffer version 1.
    #[test]
    fn golden_slot_of_version_1() {
        let golden: Vec<u64> = include_str!("../golden/slot-v1.hex")
            .split_whitespace()
            .map(|word| u64::from_str_radix(word, 16).unwrap())
            .collect();
        let words: Vec<u64> =
            [SlotState::Published(42).encode()].into_iter().chain(EXTENT.encode(42)).chain([0]).collect();
        assert_eq!(words, golden);
        assert_eq!(Extent::decode(42, golden[1..7].try_into().unwrap()), Some(EXTENT));
        assert_eq!(SlotState::decode(golden[0]), SlotState::Published(42));
    }

    #[test]
    fn the_parts_do_not_overlap_and_every_slot_has_a_place() {
        for capacity in [2 << 20, 64 << 20, 1 << 30] {
            let geometry = Geometry::new(capacity);
            let last = usize::try_from(geometry.slots - 1).unwrap();
            assert_eq!(geometry.slot_word(geometry.slots + last as u64), word::SLOT + last * SLOT_WORDS);
            assert!((word::SLOT + (last + 1) * SLOT_WORDS) as u64 * 8 <= geometry.data_start());
        }
        const { assert!(word::LOST_RANGES + 4 * LOST_MAX <= word::SLOT) };
        assert_eq!(word::SLOT as u64 * 8, HEADER_BYTES);
    }

    proptest! {
        #[test]
        fn one_flipped_bit_is_noticed(word in 0usize..6, bit in 0u32..64, seq in 1u64..1 << 60) {
            let mut words = EXTENT.encode(seq);
            prop_assert_eq!(Extent::decode(seq, &words), Some(EXTENT));
            prop_assert_eq!(Extent::decode(seq + 1, &words), None);
            words[word] ^= 1 << bit;
            prop_assert_eq!(Extent::decode(seq, &words), None);
        }

        #[test]
        fn arbitrary_words_never_panic(seq in any::<u64>(), words in any::<[u64; 6]>(), state in any::<u64>()) {
            let _ = Extent::decode(seq, &words);
            let _ = SlotState::decode(state);
        }
    }
}
