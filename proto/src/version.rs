//! Which formats this build writes and which it still reads.
//!
//! The *ABI* is what an interface and a core have to agree on to work together: the layout of the segment and the
//! frames between them. Each program names a range ([`crate::identity`]). An interface lends its fds only to a core
//! whose range holds the version of the segment, and adopts a segment only if its own range does.
//!
//! ABI 3 is not in the range although it is N−1. In a write buffer of ABI 4 there are 96 KiB between the header and the
//! slots (the lost ranges, and the bitmaps of what was written past the buffer). A segment is sealed, so one of ABI 3
//! has no room for them and cannot get it. Cores of ABI 4 note there what they write past the buffer, also where a
//! volume has no buffer.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Version of the product, as `--version` and `status` print it.
pub const PRODUCT: &str = env!("CARGO_PKG_VERSION");

/// ABI version of the segments and frames this build makes.
pub const ABI: u32 = 4;

/// ABI versions of the segments a program of this build works with (N and N−1; versions 1 to 3 were never released).
pub const ABI_RANGE: VersionRange = VersionRange { min: 4, max: 4 };

/// Version of the write buffers this build makes, see [`crate::buffer`].
pub const BUFFER: u32 = 2;

/// Versions of the write buffer a program of this build works with (version 1 was never released).
pub const BUFFER_RANGE: VersionRange = VersionRange { min: 2, max: BUFFER };

/// An inclusive range of format versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// Oldest version that is understood.
    pub min: u32,
    /// Newest version that is understood.
    pub max: u32,
}

impl VersionRange {
    /// Whether `version` lies in the range.
    pub const fn contains(self, version: u32) -> bool {
        self.min <= version && version <= self.max
    }

    /// Whether a version lies in both.
    pub const fn overlaps(self, other: Self) -> bool {
        self.min <= other.max && other.min <= self.max
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.min, self.max)
    }
}
