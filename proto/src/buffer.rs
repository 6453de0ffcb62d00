//! The write buffer (D5): a log of extents in the segment, which any core can adopt.
//!
//! ```text
//! 0          header   magic, sizes, position of the log                                         (4 KiB)
//! 4 KiB      lost     ranges of the volume whose data is lost, two tables                       (32 KiB)
//! 36 KiB     noted    which parts of the volume were written past the buffer and are not known
//!                     to be durable, two bitmaps                                                (64 KiB)
//! 100 KiB    slots    one descriptor of 64 bytes for each extent: sequence number modulo slots
//! …          data     a ring of `capacity` bytes; an extent lies in it in one piece
//! ```
//! An extent is published by one store to its slot's state word, after its data and the rest of the slot. So it is
//! wholly there or not there, at whatever instant the core dies. Extents are retired in the order of their sequence
//! numbers by raising [`word::TAIL`], once they (or newer data) are durable on the storage nodes: once a flush of the
//! nodes that began after they were written has succeeded.
//!
//! ```text
//!  slot of seq − slots, retired ─► RESERVED(seq) ─► data, fields ─► PUBLISHED(seq) ─► acknowledged ─► tail ≥ seq: retired
//!                                  head := seq      │
//!                                                   death here: never acknowledged, the slot is skipped
//! ```
//! Positions in the data ring are *virtual*: they only grow. The place in the ring is the position modulo `capacity`.
//!
//! Buffer version 2 is as described here. Version 1 (never released) had no bitmaps, 64 lost ranges, and data extents
//! only. A segment without a write buffer has a capacity of 0, but header, lost ranges and bitmaps exist nevertheless.

/// `"EVDBUF\0\0"` little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"EVDBUF\0\0");
/// Bytes of everything before the slots.
pub const HEADER_BYTES: u64 = word::SLOT as u64 * 8;
/// Bytes of a slot.
pub const SLOT_BYTES: u64 = 64;
/// Words of eight bytes in a slot.
pub const SLOT_WORDS: usize = 8;
/// Extents begin at multiples of this in the data ring: a cache line.
pub const DATA_ALIGN: u64 = 64;
/// Fewest slots.
const SLOTS_MIN: u64 = 64;
/// Bytes of data for each slot: an extent of one block, the commonest size.
const BYTES_PER_SLOT: u64 = 4096;
/// Slots reserved for extents without data, so that a discard finds a slot in a buffer that is full of data.
pub const SLOTS_WITHOUT_DATA: u64 = 16;
/// Most lost ranges that are listed separately. Beyond that, those that lie closest are joined.
pub const LOST_MAX: usize = 1024;
/// Words of one bitmap of ranges that were written past the buffer.
pub const NOTED_WORDS: usize = 4096;

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
    /// Highest sequence number retired. It has a cache line of its own, because the sender writes it, not the workers.
    pub const TAIL: usize = 16;
    /// Bytes of unretired extents, for status reports. Not needed to adopt the buffer.
    pub const BYTES: usize = 24;
    /// Number of lost ranges (low half), and which of two tables holds them (high half, 0 or 1).
    pub const LOST: usize = 32;
    /// The two tables of lost ranges: offset and length of each.
    pub const LOST_RANGES: usize = 512;
    /// The two bitmaps of what was written past the buffer: since the last flush began, and before it.
    pub const NOTED: usize = LOST_RANGES + 4 * super::LOST_MAX;
    /// First word of the slots.
    pub const SLOT: usize = NOTED + 2 * super::NOTED_WORDS;
}

/// Number of bytes for which one bit of the bitmaps stands, in a volume of `size` bytes: a power of two, at least 4096
/// (exactly that for volumes of up to 1 GiB).
pub const fn noted_granule(size: u64) -> u64 {
    let granule = size.div_ceil(NOTED_WORDS as u64 * 64).next_power_of_two();
    if granule < 4096 { 4096 } else { granule }
}

/// The words that make zeroed memory an empty buffer of this geometry, by their index, in the order in which they have
/// to be stored: the last with release.
pub const fn empty(geometry: Geometry) -> [(usize, u64); 3] {
    [(word::CAPACITY, geometry.capacity), (word::SLOTS, geometry.slots), (word::MAGIC, MAGIC)]
}

/// The fill of a buffer, from its header: for a process that neither appends to it nor adopts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Whether the next core has nothing to adopt: every extent is retired, and no range is lost.
    pub is_empty: bool,
    /// Bytes of unretired extents.
    pub bytes: u64,
    /// Ranges of the volume that are lost.
    pub lost_ranges: u32,
}

impl Fill {
    /// Reads it by loads (acquire) of words of the header.
    pub fn read(load: impl Fn(usize) -> u64) -> Self {
        // The tail before the head. The head may grow in between; then the buffer counts as not empty.
        let tail = load(word::TAIL);
        let lost_ranges = lost_count(load(word::LOST));
        Self { is_empty: load(word::HEAD) == tail && lost_ranges == 0, bytes: load(word::BYTES), lost_ranges }
    }
}

/// Number of lost ranges in a `LOST` word.
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
pub const fn lost_count(word: u64) -> u32 {
    word as u32
}

/// The offsets in a buffer of a certain capacity.
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
        let for_data = if slots < SLOTS_MIN { SLOTS_MIN } else { slots };
        Self { capacity, slots: for_data + SLOTS_WITHOUT_DATA }
    }

    /// Offset of the data.
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

/// The effect of an extent on its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// The data in the ring.
    Data,
    /// Zeros, and the space is given back. No data in the ring. Since buffer version 2.
    Discard,
    /// Zeros, and the space is kept. No data in the ring. Since buffer version 2.
    Zeroes,
}

impl ExtentKind {
    const fn encode(self) -> u64 {
        match self {
            Self::Data => 1,
            Self::Discard => 2,
            Self::Zeroes => 3,
        }
    }

    const fn decode(word: u64) -> Option<Self> {
        match word {
            1 => Some(Self::Data),
            2 => Some(Self::Discard),
            3 => Some(Self::Zeroes),
            _ => None,
        }
    }
}

/// An extent's slot, without its state word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its effect on the range.
    pub kind: ExtentKind,
    /// Offset in the volume.
    pub offset: u64,
    /// Length in bytes; of data at most [`REQUEST_BYTES_MAX`](crate::limits::REQUEST_BYTES_MAX).
    pub len: u64,
    /// Virtual position of its data.
    pub position: u64,
    /// Generation of the core that wrote it.
    pub generation: u64,
    /// CRC-32C of its data; 0 where it has none.
    pub crc: u32,
}

impl Extent {
    /// Bytes that it takes in the data ring.
    pub const fn stored(&self) -> u64 {
        stored(self.kind, self.len)
    }

    /// Bytes that count as buffered: its data, or its slot where it has none.
    pub const fn buffered(&self) -> u64 {
        match self.kind {
            ExtentKind::Data => self.len,
            ExtentKind::Discard | ExtentKind::Zeroes => SLOT_BYTES,
        }
    }

    /// Offset in the volume of the first byte behind it.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Words 1 to 6 of its slot.
    pub fn encode(&self, seq: u64) -> [u64; 6] {
        let kind = self.kind.encode() | (u64::from(self.crc) << 32);
        let fields = [self.offset, self.len, self.position, self.generation, kind];
        let [a, b, c, d, e] = fields;
        [a, b, c, d, e, check(seq, &fields)]
    }

    /// Reads words 1 to 6 of the slot of a sequence number; `None` when they are damaged.
    pub fn decode(seq: u64, words: &[u64; 6]) -> Option<Self> {
        let [offset, len, position, generation, kind, sum] = *words;
        if sum != check(seq, &[offset, len, position, generation, kind]) {
            return None;
        }
        let crc = u32::try_from(kind >> 32).ok()?;
        let kind = ExtentKind::decode(kind & u64::from(u32::MAX))?;
        Some(Self { kind, offset, len, position, generation, crc })
    }
}

/// Bytes that an extent of this kind and length takes in the data ring.
pub const fn stored(kind: ExtentKind, len: u64) -> u64 {
    match kind {
        ExtentKind::Data => len.next_multiple_of(DATA_ALIGN),
        ExtentKind::Discard | ExtentKind::Zeroes => 0,
    }
}

/// CRC-32C of a slot's sequence number and fields. The seed makes a slot of zeros invalid.
fn check(seq: u64, fields: &[u64; 5]) -> u64 {
    let [a, b, c, d, e] = *fields;
    let mut bytes = [0; 48];
    // Together, for speed: a successor checks every slot of a full buffer while I/O waits.
    bytes.as_chunks_mut().0.iter_mut().zip([seq, a, b, c, d, e]).for_each(|(part, word)| *part = word.to_le_bytes());
    u64::from(crc32c::crc32c_append(0x4556_4442, &bytes))
}

/// The state word of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Its extent is being written.
    Reserved(u64),
    /// Its extent is published.
    Published(u64),
    /// Never used, or no valid state.
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
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXTENT: Extent = Extent {
        kind: ExtentKind::Data,
        offset: 1 << 40,
        len: 4096,
        position: 123_456,
        generation: 7,
        crc: 0xDEAD_BEEF,
    };

    fn is_golden(golden: &str, extent: &Extent) {
        let golden: Vec<u64> = golden.split_whitespace().map(|word| u64::from_str_radix(word, 16).unwrap()).collect();
        let words: Vec<u64> =
            [SlotState::Published(42).encode()].into_iter().chain(extent.encode(42)).chain([0]).collect();
        let shown: Vec<String> = words.iter().map(|word| format!("{word:016x}")).collect();
        assert_eq!(words, golden, "{shown:?}");
        assert_eq!(Extent::decode(42, golden[1..7].try_into().unwrap()), Some(*extent));
        assert_eq!(SlotState::decode(golden[0]), SlotState::Published(42));
    }

    /// The bytes of a slot with data: the same in buffer versions 1 and 2.
    pub(crate) fn golden_slot_of_version_1(golden: &str) {
        is_golden(golden, &EXTENT);
    }

    /// The bytes of a slot without data, since buffer version 2.
    pub(crate) fn golden_slot_of_version_2(golden: &str) {
        let extent = Extent { kind: ExtentKind::Discard, len: 1 << 40, crc: 0, ..EXTENT };
        is_golden(golden, &extent);
    }

    #[test]
    fn a_bit_stands_for_a_block_up_to_a_gibibyte_and_for_more_beyond() {
        assert_eq!(noted_granule(4096), 4096);
        assert_eq!(noted_granule(1 << 30), 4096);
        assert_eq!(noted_granule((1 << 30) + 4096), 8192);
        assert_eq!(noted_granule(1 << 40), 4 << 20);
        let size = crate::limits::VOLUME_SIZE_MAX;
        assert!(size.div_ceil(noted_granule(size)) <= NOTED_WORDS as u64 * 64);
    }

    #[test]
    fn the_parts_do_not_overlap_and_every_slot_has_a_place() {
        for capacity in [2 << 20, 64 << 20, 1 << 30] {
            let geometry = Geometry::new(capacity);
            let last = usize::try_from(geometry.slots - 1).unwrap();
            assert_eq!(geometry.slot_word(geometry.slots + last as u64), word::SLOT + last * SLOT_WORDS);
            assert!((word::SLOT + (last + 1) * SLOT_WORDS) as u64 * 8 <= geometry.data_start());
        }
        assert_eq!(HEADER_BYTES, 100 << 10);
        assert_eq!(Geometry::new(0).capacity, 0);
    }

    #[test]
    fn an_empty_header_is_empty_and_what_was_added_to_it_shows() {
        let header = |changed: &[(usize, u64)]| {
            let mut words = vec![0; word::LOST_RANGES];
            empty(Geometry::new(1 << 20)).iter().chain(changed).for_each(|(index, value)| words[*index] = *value);
            assert_eq!((words[word::MAGIC], words[word::CAPACITY]), (MAGIC, 1 << 20));
            Fill::read(|index| words[index])
        };
        assert_eq!(header(&[]), Fill { is_empty: true, bytes: 0, lost_ranges: 0 });
        let used = header(&[(word::HEAD, 7), (word::TAIL, 6), (word::BYTES, 4096)]);
        assert_eq!(used, Fill { is_empty: false, bytes: 4096, lost_ranges: 0 });
        assert!(header(&[(word::HEAD, 7), (word::TAIL, 7)]).is_empty);
        let lost = header(&[(word::LOST, 1 << 32 | 3)]);
        assert_eq!((lost.is_empty, lost.lost_ranges), (false, 3));
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
