//! Names and numbers that are valid by construction.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::limits;

/// A volume's name: 1 to 64 characters of `A-Z a-z 0-9 . _ -`, the first a letter or digit. So it can be used unchanged
/// in a path, a unit name and a metric label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

impl VolumeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let first = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        let rest = text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if first && rest && text.len() <= 64 {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadName(text.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for VolumeName {
    type Error = BadName;
    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> Self {
        name.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is no volume name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no volume name: use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")]
pub struct BadName(String);

/// The number of the gate's owner. A request is executed only by the core that bears the gate's generation. It has 48
/// bits in the gate word: at one hand-over a millisecond they last for 8,900 years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Generation(pub u64);

impl Generation {
    /// Largest value the gate word can hold.
    pub const MAX: Self = Self((1 << 48) - 1);

    /// The generation after this one.
    ///
    /// # Panics
    /// After the last one.
    pub const fn next(self) -> Self {
        assert!(
            self.0 < Self::MAX.0,
            "2^32 hand-overs of one interface are out of reach, and what a segment says was checked"
        );
        Self(self.0 + 1)
    }

    /// Whether 2^32 generations after this one fit into the gate word. A word that names a later one is damaged.
    pub const fn can_have_come(self) -> bool {
        self.0 <= Self::MAX.0 - (1 << 32)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The place of a core in the segment, `0..CORES_MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Slot(u8);

impl Slot {
    /// Slot 0.
    pub const FIRST: Self = Self(0);

    /// The slot with this number, or `None` when there is no such slot.
    pub fn new(index: usize) -> Option<Self> {
        u8::try_from(index).ok().filter(|_| index < limits::CORES_MAX).map(Self)
    }

    /// The number, below [`limits::CORES_MAX`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Every slot in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..limits::CORES_MAX).filter_map(Self::new)
    }
}

impl TryFrom<u8> for Slot {
    type Error = String;
    fn try_from(index: u8) -> Result<Self, String> {
        Self::new(usize::from(index)).ok_or_else(|| format!("there is no core slot {index}"))
    }
}

impl From<Slot> for u8 {
    fn from(slot: Slot) -> Self {
        slot.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "-x", "a b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        assert_eq!("db-1.data_x".parse::<VolumeName>().unwrap().as_str(), "db-1.data_x");
    }

    #[test]
    fn slots_are_bounded() {
        assert!(Slot::new(limits::CORES_MAX).is_none());
        assert_eq!(Slot::all().count(), limits::CORES_MAX);
    }
}
