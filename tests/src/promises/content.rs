//! What a block says of itself: its seed, its number, the write it comes from, and a checksum over all of it.

/// Words of the header: magic, seed, block, write.
const HEADER: usize = 4;
const MAGIC: u64 = u64::from_le_bytes(*b"promises");

/// What a block turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeros: never written, zeroed or discarded.
    Zero,
    /// This block, as this write left it.
    Write(u64),
    /// A whole block, but one that belongs elsewhere.
    Elsewhere {
        /// The load it comes from.
        seed: u64,
        /// The block it was written to.
        block: u64,
    },
    /// No whole block: parts of several writes, or something that was never written.
    Torn,
}

/// Fills a block (a multiple of 8 bytes, at least 64).
pub fn fill(seed: u64, block: u64, write: u64, bytes: &mut [u8]) {
    let mut sum = mix(MAGIC ^ seed);
    let words = bytes.len() / 8;
    for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        let word = match index {
            0 => MAGIC,
            1 => seed,
            2 => block,
            3 => write,
            last if last == words - 1 => sum,
            _ => mix(seed ^ block.rotate_left(20) ^ write.rotate_left(40) ^ index as u64),
        };
        sum = mix(sum ^ word);
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

/// Reads a block that stands where block `block` of the load `seed` should be.
pub fn read(seed: u64, block: u64, bytes: &[u8]) -> Content {
    if bytes.iter().all(|byte| *byte == 0) {
        return Content::Zero;
    }
    let mut words = bytes.as_chunks().0.iter().take(HEADER).map(|word| u64::from_le_bytes(*word));
    let (Some(_), Some(own_seed), Some(own_block), Some(write)) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Content::Torn;
    };
    // Everything in a block follows from its header; so it is whole when it is what the header makes of it.
    let mut whole = vec![0; bytes.len()];
    fill(own_seed, own_block, write, &mut whole);
    if whole != bytes {
        Content::Torn
    } else if (own_seed, own_block) == (seed, block) {
        Content::Write(write)
    } else {
        Content::Elsewhere { seed: own_seed, block: own_block }
    }
}

fn mix(word: u64) -> u64 {
    crate::bytes::Random::new(word).next()
}
