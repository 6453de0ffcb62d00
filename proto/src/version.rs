//! Which formats this build writes and which it still reads.
//!
//! The *ABI* is what an interface and a core have to agree on to work together: the layout of the segment and the
//! frames between them. A core names a range; an interface lends its fds only to a core whose range holds the
//! version of the segment the interface made.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Version of the product, as `--version` and `status` print it.
pub const PRODUCT: &str = env!("CARGO_PKG_VERSION");

/// ABI version of the segments and frames this build makes.
pub const ABI: u32 = 4;

/// ABI versions a core of this build can serve (N and N−1; versions 1 to 3 were never released).
pub const ABI_RANGE: VersionRange = VersionRange { min: 4, max: 4 };

/// Version of the write buffers this build makes, see [`crate::buffer`].
pub const BUFFER: u32 = 2;

/// Versions of the write buffer a core of this build can adopt (version 1 was never released).
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
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.min, self.max)
    }
}

/// What `everdisk-core --version` prints: `everdisk-core VERSION (abi MIN..MAX, buffer MIN..MAX)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreIdentity {
    /// Version of the core program.
    pub version: String,
    /// ABI versions it can serve.
    pub abi: VersionRange,
    /// Write-buffer versions it can adopt.
    pub buffer: VersionRange,
}

impl CoreIdentity {
    /// The identity of a core built from this source.
    pub fn current() -> Self {
        Self { version: PRODUCT.to_owned(), abi: ABI_RANGE, buffer: BUFFER_RANGE }
    }

    /// Reads the line that `everdisk-core --version` prints.
    ///
    /// # Errors
    /// [`BadIdentity`] when the line does not have that form.
    pub fn parse(line: &str) -> Result<Self, BadIdentity> {
        let bad = || BadIdentity(line.chars().take(80).collect());
        let rest = line.trim_end().strip_prefix("everdisk-core ").ok_or_else(bad)?;
        let (version, rest) = rest.split_once(" (abi ").ok_or_else(bad)?;
        let (abi, buffer) = rest.strip_suffix(')').and_then(|r| r.split_once(", buffer ")).ok_or_else(bad)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-+".contains(c);
        if version.is_empty() || version.len() > 64 || !version.chars().all(plain) {
            return Err(bad());
        }
        let range = |text: &str| -> Option<VersionRange> {
            let (min, max) = text.split_once("..")?;
            let range = VersionRange { min: min.parse().ok()?, max: max.parse().ok()? };
            (range.min <= range.max).then_some(range)
        };
        Ok(Self {
            version: version.to_owned(),
            abi: range(abi).ok_or_else(bad)?,
            buffer: range(buffer).ok_or_else(bad)?,
        })
    }
}

impl fmt::Display for CoreIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "everdisk-core {} (abi {}, buffer {})", self.version, self.abi, self.buffer)
    }
}

/// The file's `--version` line is not that of a core.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not the version line of an everdisk-core: {0:?}")]
pub struct BadIdentity(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_round_trips_and_refuses_garbage() {
        let line = "everdisk-core 0.1.0 (abi 1..2, buffer 0..1)";
        let identity = CoreIdentity::parse(line).unwrap();
        assert_eq!(identity.to_string(), line);
        for bad in ["", "everdisk-core", "everdisk-core 1 (abi 2..1, buffer 0..0)", "bash 5.2 (abi 1..1, buffer 0..0)"]
        {
            assert!(CoreIdentity::parse(bad).is_err(), "{bad}");
        }
    }
}
