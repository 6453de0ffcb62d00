//! The record of an export: what it was when a node was made of it. 4096 bytes, little-endian, fixed:
//!
//! ```text
//!   0  magic "EVERDEXP"          16  volume UUID
//!   8  format version            32  node UUID
//!  12  crc32c of all 4096 bytes  48  bytes of the export
//!      (this field as 0)         56  zeros
//! ```

use everdisk_proto::superblock::SUPERBLOCK_BYTES;
use uuid::Uuid;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

/// Bytes of a record: those of a superblock, so that both are found at the same boundaries.
pub(super) const BYTES: usize = SUPERBLOCK_BYTES;
const MAGIC: [u8; 8] = *b"EVERDEXP";
const FORMAT: u32 = 1;

/// What an export was when a node was made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The volume that the node belongs to.
    pub(super) volume: Uuid,
    /// The node's identity.
    pub(super) node: Uuid,
    /// Bytes of the export.
    pub(super) size: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    format: U32,
    crc: U32,
    volume: [u8; 16],
    node: [u8; 16],
    size: U64,
    zeros: [u8; BYTES - 56],
}

impl Record {
    /// The bytes of the record.
    pub(super) fn encode(&self) -> [u8; BYTES] {
        let mut raw = Raw::new_zeroed();
        raw.magic = MAGIC;
        raw.format = FORMAT.into();
        raw.volume = *self.volume.as_bytes();
        raw.node = *self.node.as_bytes();
        raw.size = self.size.into();
        raw.crc = crc32c::crc32c(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// The record in these bytes; `None` where they are none that this build can use.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (raw, _) = Raw::read_from_prefix(bytes).ok()?;
        let (magic, format, crc) = (raw.magic, raw.format.get(), raw.crc.get());
        let (volume, node, size) = (Uuid::from_bytes(raw.volume), Uuid::from_bytes(raw.node), raw.size.get());
        let is_sound =
            magic == MAGIC && format == FORMAT && crc == crc32c::crc32c(Raw { crc: 0.into(), ..raw }.as_bytes());
        is_sound.then_some(Self { volume, node, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Record {
        let volume = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        let node = Uuid::from_u128(0xfedc_ba98_7654_3210_fedc_ba98_7654_3210);
        Record { volume, node, size: (5 << 30) + 512 }
    }

    /// The golden bytes of format 1: the first 56, the rest are zeros.
    #[test]
    fn m2_the_record_of_an_export_has_its_golden_bytes() {
        let bytes = sample().encode();
        let hex: String = bytes[..56].iter().map(|byte| format!("{byte:02x}")).collect();
        let golden = concat!(
            "4556455244455850",
            "01000000",
            "6c11c795",
            "0123456789abcdef0123456789abcdef",
            "fedcba9876543210fedcba9876543210",
            "0002004001000000"
        );
        assert_eq!(hex, golden);
        assert!(bytes[56..].iter().all(|byte| *byte == 0));
        assert_eq!(Record::decode(&bytes), Some(sample()));
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        for at in 0..BYTES {
            let mut bytes = sample().encode();
            bytes[at] ^= 0x10;
            assert_eq!(Record::decode(&bytes), None, "byte {at}");
        }
        assert_eq!(Record::decode(&sample().encode()[..BYTES - 1]), None);
    }
}
