//! A block that says which write made it.
//!
//! ```text
//! 0   magic      8 bytes
//! 8   block      its number within the volume
//! 16  write      number of the write, from 1
//! 24  checksum   crc32c of everything else
//! 32  payload    noise derived from block and write
//! ```

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"EVDBLOCK");
const HEAD: usize = 32;
const CHECKSUM_AT: usize = 24;

/// A generator of noise (SplitMix64): any state is a good one.
#[derive(Clone, Debug)]
pub struct Noise(pub u64);

impl Noise {
    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.word() % limit
    }
}

/// What is wrong with a block that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// Zeros where a write was acknowledged.
    #[error("zeros instead of write {0}")]
    Empty(u64),
    /// Something where nothing was written.
    #[error("data where nothing was ever written")]
    Unwritten,
    /// Neither one write nor another.
    #[error("damaged: the checksum does not fit")]
    Damaged,
    /// A sound block, but not this one.
    #[error("write {write} of block {block} instead of write {expected}")]
    Other {
        /// Found.
        block: u64,
        /// Found.
        write: u64,
        /// Acknowledged last.
        expected: u64,
    },
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|w| w.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let (head, payload) = (bytes.get(..CHECKSUM_AT).unwrap_or_default(), bytes.get(HEAD..).unwrap_or_default());
    u64::from(crc32c::crc32c_append(crc32c::crc32c(head), payload))
}

/// Makes `bytes` the content of write number `write` of `block`.
pub fn fill(bytes: &mut [u8], block: u64, write: u64) {
    let mut noise = Noise(block.rotate_left(32) ^ write);
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&noise.word().to_le_bytes());
    }
    put(bytes, 0, MAGIC);
    put(bytes, 8, block);
    put(bytes, 16, write);
    put(bytes, CHECKSUM_AT, checksum(bytes));
}

/// Checks that `bytes` are write number `expected` of `block`; 0: it was never written and is zeros.
///
/// # Errors
/// [`Wrong`].
pub fn check(bytes: &[u8], block: u64, expected: u64) -> Result<(), Wrong> {
    if word(bytes, 0) == 0 && bytes.iter().all(|&byte| byte == 0) {
        return if expected == 0 { Ok(()) } else { Err(Wrong::Empty(expected)) };
    }
    if expected == 0 {
        return Err(Wrong::Unwritten);
    }
    if word(bytes, 0) != MAGIC || word(bytes, CHECKSUM_AT) != checksum(bytes) {
        return Err(Wrong::Damaged);
    }
    let found = (word(bytes, 8), word(bytes, 16));
    if found == (block, expected) {
        return Ok(());
    }
    Err(Wrong::Other { block: found.0, write: found.1, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_known_and_everything_else_is_not() {
        let mut bytes = vec![0; BLOCK_BYTES];
        assert_eq!(check(&bytes, 5, 0), Ok(()));
        assert_eq!(check(&bytes, 5, 1), Err(Wrong::Empty(1)));
        fill(&mut bytes, 5, 3);
        assert_eq!(check(&bytes, 5, 3), Ok(()));
        assert_eq!(check(&bytes, 5, 0), Err(Wrong::Unwritten));
        assert_eq!(check(&bytes, 5, 4), Err(Wrong::Other { block: 5, write: 3, expected: 4 }));
        assert_eq!(check(&bytes, 6, 3), Err(Wrong::Other { block: 5, write: 3, expected: 3 }));
        let mut torn = vec![0; BLOCK_BYTES];
        fill(&mut torn, 5, 4);
        torn[2048..].copy_from_slice(&bytes[2048..]);
        assert_eq!(check(&torn, 5, 4), Err(Wrong::Damaged));
    }
}
