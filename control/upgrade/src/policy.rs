//! What happens to buffered data at a hand-over (D5).

use std::fmt;

use everdisk_proto::identity::Identity;
use serde::{Deserialize, Serialize};

/// A hand-over policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Handover {
    /// It is sent to the storage nodes before the suspension (M2). Until then writes go through to the nodes (M3).
    #[default]
    Flush,
    /// The next core takes the write buffer over as it is: the pause depends neither on how much is buffered nor on the
    /// storage nodes.
    Carry,
}

impl Handover {
    /// As in the JSON and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flush => "flush",
            Self::Carry => "carry",
        }
    }
}

impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A volume's write buffer, and the core that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its version.
    pub version: u32,
    /// Acknowledged bytes in it that are not on the storage nodes yet.
    pub bytes: u64,
    /// The core that serves.
    pub holder: Identity,
}

impl Buffer {
    /// Why it cannot be carried over to the core `to`, and back if need be; none when it can.
    pub fn obstacle(&self, to: &Identity) -> Option<String> {
        let stranger = [to, &self.holder].into_iter().find(|core| !core.buffer.contains(self.version))?;
        Some(format!(
            "the volume's write buffer has version {} and everdisk-core {} adopts {}",
            self.version, stranger.version, stranger.buffer
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_cores_have_to_know_the_version() {
        let core = |buffer: &str| Identity::parse(&format!("everdisk-core {buffer} (abi 1..1, buffer {buffer})"));
        let obstacle = |holder: &str, to: &str| {
            Buffer { version: 1, bytes: 0, holder: core(holder).unwrap() }.obstacle(&core(to).unwrap())
        };
        assert_eq!(obstacle("0..1", "1..2"), None);
        let told = obstacle("0..1", "2..3").unwrap();
        assert_eq!(told, "the volume's write buffer has version 1 and everdisk-core 2..3 adopts 2..3");
        assert!(obstacle("0..0", "1..2").unwrap().contains("adopts 0..0"));
    }
}
