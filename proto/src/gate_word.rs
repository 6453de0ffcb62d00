//! The gate's word: mode, core slot and generation in one `u64`, so that one atomic load tells a worker everything.
//!
//! ```text
//!  63            16 15      8 7      0
//! ┌────────────────┬─────────┬────────┐
//! │ generation (48)│ slot (8)│ mode(8)│     mode 0 is no mode: a zeroed word admits no core
//! └────────────────┴─────────┴────────┘
//! ```

use crate::ids::{Generation, Slot};

/// The mode: which core the gate admits, and to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mode {
    /// The slot's core executes requests.
    Open = 1,
    /// As `Open`, and writes go through to the storage nodes before they are acknowledged.
    Synchronous = 2,
    /// No core executes anything; requests that are read stay unanswered (suspended).
    Closed = 3,
    /// The slot's core checks whether it can read its stores. If so, it opens the gate itself.
    Probe = 4,
}

/// The decoded gate word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GateWord {
    /// The mode.
    pub mode: Mode,
    /// The core that has the gate, or had it last.
    pub slot: Slot,
    /// The generation in force.
    pub generation: Generation,
}

impl GateWord {
    /// The word as it stands in the segment.
    pub const fn encode(self) -> u64 {
        (self.generation.0 << 16) | ((self.slot.index() as u64) << 8) | self.mode as u64
    }

    /// Reads a word; `None` when its mode or slot is not valid (a zeroed segment, say).
    pub fn decode(word: u64) -> Option<Self> {
        let mode = match word & 0xff {
            1 => Mode::Open,
            2 => Mode::Synchronous,
            3 => Mode::Closed,
            4 => Mode::Probe,
            _ => return None,
        };
        let slot = Slot::new(((word >> 8) & 0xff) as usize)?;
        Some(Self { mode, slot, generation: Generation(word >> 16) })
    }

    /// The same core and generation in another mode.
    pub const fn with(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// Whether requests are executed under this word.
    pub const fn serves(self) -> bool {
        matches!(self.mode, Mode::Open | Mode::Synchronous)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zero_and_garbage_admit_nobody() {
        assert_eq!(GateWord::decode(0), None);
        assert_eq!(GateWord::decode(5), None);
        assert_eq!(GateWord::decode(0xff01), None);
    }

    proptest! {
        #[test]
        fn words_round_trip(mode in 1u64..5, slot in 0u64..8, generation in 0u64..=Generation::MAX.0) {
            let word = (generation << 16) | (slot << 8) | mode;
            prop_assert_eq!(GateWord::decode(word).unwrap().encode(), word);
        }
    }
}
