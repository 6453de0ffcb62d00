//! Which bytes of a READ have arrived. Parts come in any order, and none may come twice.

use std::collections::BTreeMap;

/// Most parts that lie apart from each other at one time. A server that sends more wants to use up memory.
pub(crate) const SCATTERED_MAX: usize = 1 << 14;

/// The bytes that have arrived: all those before `prefix`, and the ranges behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Coverage {
    prefix: u64,
    /// Start → end; no two touch.
    beyond: BTreeMap<u64, u64>,
}

/// Why a range cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Some of it has arrived already.
    Overlap,
    /// There are too many parts.
    Scattered,
}

impl Coverage {
    /// Adds `start..end`, which is not empty.
    pub(crate) fn add(&mut self, start: u64, end: u64) -> Result<(), Refused> {
        let next = self.beyond.range(start..).next().map(|(start, end)| (*start, *end));
        let before = self.beyond.range(..start).next_back().map(|(start, end)| (*start, *end));
        let overlaps = start < self.prefix
            || next.is_some_and(|(next, _)| next < end)
            || before.is_some_and(|(_, before)| before > start);
        if overlaps {
            return Err(Refused::Overlap);
        }
        let end = match next {
            Some((next, its_end)) if next == end => {
                self.beyond.remove(&next);
                its_end
            }
            _ => end,
        };
        match before {
            _ if start == self.prefix => self.prefix = end,
            Some((before, its_end)) if its_end == start => {
                self.beyond.insert(before, end);
            }
            _ if self.beyond.len() >= SCATTERED_MAX => return Err(Refused::Scattered),
            _ => {
                self.beyond.insert(start, end);
            }
        }
        Ok(())
    }

    /// Bytes that have arrived.
    pub(crate) fn bytes(&self) -> u64 {
        self.prefix + self.beyond.iter().map(|(start, end)| end - start).sum::<u64>()
    }
}
