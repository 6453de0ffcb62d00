//! A storage node's superblock (D11): the identity of the node, and how the volume lies on it. 4096 bytes,
//! little-endian, fixed:
//!
//! ```text
//!   0  magic "EVERDISK"          48  volume size in bytes
//!   8  format version            56  stripe unit in bytes
//!  12  crc32c of all 4096 bytes  64  this node's place in the layout
//!      (this field as 0)         68  number of nodes
//!  16  volume UUID               72  zeros
//!  32  node UUID
//! ```

use uuid::Uuid;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

/// Format version this build writes, and the only one it reads.
pub const FORMAT: u32 = 1;
/// The file of a directory node that holds its bytes. Its lock (flock(2)) means that a process serves, grows or deletes
/// the node. It is never replaced by another file.
pub const DATA_FILE: &str = "data";
/// Bytes of a superblock.
pub const SUPERBLOCK_BYTES: usize = 4096;
const MAGIC: [u8; 8] = *b"EVERDISK";

/// The content of a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The volume the node belongs to.
    pub volume: Uuid,
    /// The node's own identity.
    pub node: Uuid,
    /// Volume size in bytes.
    pub size: u64,
    /// Stripe unit in bytes.
    pub stripe: u64,
    /// The node's place, from 0.
    pub index: u32,
    /// Number of nodes.
    pub nodes: u32,
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
    stripe: U64,
    index: U32,
    nodes: U32,
    zeros: [u8; SUPERBLOCK_BYTES - 72],
}

/// The bytes are not a superblock that this build can use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadSuperblock {
    /// Shorter than a superblock.
    #[error("the superblock has {0} bytes instead of {SUPERBLOCK_BYTES}")]
    Short(usize),
    /// Not a superblock.
    #[error("there is no Everdisk superblock")]
    Magic,
    /// Another format.
    #[error("the superblock has format {0}, this program reads {FORMAT}")]
    Format(u32),
    /// Damaged.
    #[error("the superblock is damaged: its checksum is {found:08x}, its bytes give {computed:08x}")]
    Checksum {
        /// In the superblock.
        found: u32,
        /// Of its bytes.
        computed: u32,
    },
}

impl Superblock {
    /// The bytes of this superblock.
    pub fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        let mut raw = Raw::new_zeroed();
        raw.magic = MAGIC;
        raw.format = FORMAT.into();
        raw.volume = *self.volume.as_bytes();
        raw.node = *self.node.as_bytes();
        raw.size = self.size.into();
        raw.stripe = self.stripe.into();
        raw.index = self.index.into();
        raw.nodes = self.nodes.into();
        raw.crc = crc32c::crc32c(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a superblock.
    ///
    /// # Errors
    /// [`BadSuperblock`] says what was found instead.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadSuperblock> {
        let (raw, _) = Raw::read_from_prefix(bytes).map_err(|_| BadSuperblock::Short(bytes.len()))?;
        if raw.magic != MAGIC {
            return Err(BadSuperblock::Magic);
        }
        if raw.format.get() != FORMAT {
            return Err(BadSuperblock::Format(raw.format.get()));
        }
        let found = raw.crc.get();
        let computed = crc32c::crc32c(Raw { crc: 0.into(), ..raw }.as_bytes());
        if found != computed {
            return Err(BadSuperblock::Checksum { found, computed });
        }
        Ok(Self {
            volume: Uuid::from_bytes(raw.volume),
            node: Uuid::from_bytes(raw.node),
            size: raw.size.get(),
            stripe: raw.stripe.get(),
            index: raw.index.get(),
            nodes: raw.nodes.get(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Superblock {
        Superblock {
            volume: Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            node: Uuid::from_u128(0xfedc_ba98_7654_3210_fedc_ba98_7654_3210),
            size: 1 << 30,
            stripe: 4 << 20,
            index: 1,
            nodes: 3,
        }
    }

    /// The golden bytes of format 1: the first 72, the rest are zeros.
    pub(crate) fn golden_superblock_of_format_1(golden: &str) {
        let bytes = sample().encode();
        let hex: String = bytes[..72].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, golden.trim_end());
        assert!(bytes[72..].iter().all(|b| *b == 0));
        assert_eq!(Superblock::decode(&bytes), Ok(sample()));
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(at in 0usize..SUPERBLOCK_BYTES, flip in 1u8..) {
            let mut bytes = sample().encode();
            bytes[at] ^= flip;
            prop_assert!(Superblock::decode(&bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let _ = Superblock::decode(&bytes);
        }
    }
}
