//! The description of a volume: its size, layout and storage nodes, as the control module keeps it and a core reads it.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::node_url::{BadUrl, NbdExport, NodeUrl};

use crate::{
    ids::VolumeName,
    limits::{BLOCK, BUFFER_MAX, BUFFER_MIN, NODES_MAX, STRIPE_MAX, STRIPE_MIN, TIMEOUT_MS, VOLUME_SIZE_MAX},
};

/// Version of the JSON form of [`VolumeSpec`]. Version 1 had no `buffer`; its volumes are always synchronous.
pub const SPEC_VERSION: u32 = 2;

/// A volume as it was created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// [`SPEC_VERSION`].
    pub spec_version: u32,
    /// Its name on this host.
    pub name: VolumeName,
    /// Its identity, which every storage node bears in its superblock.
    pub uuid: Uuid,
    /// Bytes; a multiple of [`BLOCK`].
    pub size: u64,
    /// Stripe unit in bytes; a power of two.
    pub stripe: u64,
    /// Bytes of the write buffer; 0: every write goes through to the storage nodes before it is acknowledged.
    #[serde(default)]
    pub buffer: u64,
    /// Whether writes may bypass the write buffer although there is room in it.
    #[serde(default, skip_serializing_if = "Bypass::is_auto")]
    pub bypass: Bypass,
    /// How long requests wait for storage nodes.
    #[serde(default, skip_serializing_if = "Timeouts::are_usual")]
    pub timeouts: Timeouts,
    /// The storage nodes in the order of the layout.
    pub nodes: Vec<NodeSpec>,
}

/// Whether writes may bypass the write buffer. A bypass cannot be written again when a storage node fails to make it
/// durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bypass {
    /// Where the storage nodes are as quick as the buffer.
    #[default]
    Auto,
    /// Never. Where a write has to go through (synchronous mode), it is durable before it is acknowledged. For storage
    /// nodes whose errors come late or not at all: thin disks, NFS.
    Never,
}

impl Bypass {
    /// Whether it is the default.
    pub const fn is_auto(&self) -> bool {
        matches!(self, Self::Auto)
    }
}

/// How long requests wait for storage nodes before they fail, in milliseconds. A build that does not know a field waits for the
/// usual time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timeouts {
    /// A write that finds no room in the write buffer fails when nothing has become durable for this time. So does a write past
    /// the buffer that waits for the last write of the core before.
    pub room_ms: u64,
    /// The same while a storage node reports that it is full: waiting longer rarely helps.
    pub full_node_ms: u64,
    /// A flush fails when it has not ended after this time.
    pub flush_ms: u64,
    /// A read, or a write past the buffer, fails with EIO when its storage node has been out of reach for this time.
    pub io_ms: u64,
}

impl Default for Timeouts {
    /// 60 s is below the kernel's warning about hung tasks (120 s). The restart of a server's machine may take 120 s.
    fn default() -> Self {
        Self { room_ms: 60_000, full_node_ms: 2_000, flush_ms: 60_000, io_ms: 120_000 }
    }
}

impl Timeouts {
    /// Whether they are the default.
    pub fn are_usual(&self) -> bool {
        *self == Self::default()
    }

    /// [`Timeouts::room_ms`].
    pub const fn room(&self) -> Duration {
        Duration::from_millis(self.room_ms)
    }

    /// [`Timeouts::full_node_ms`].
    pub const fn full_node(&self) -> Duration {
        Duration::from_millis(self.full_node_ms)
    }

    /// [`Timeouts::flush_ms`].
    pub const fn flush(&self) -> Duration {
        Duration::from_millis(self.flush_ms)
    }

    /// [`Timeouts::io_ms`].
    pub const fn io(&self) -> Duration {
        Duration::from_millis(self.io_ms)
    }
}

/// One storage node of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Its address.
    pub url: NodeUrl,
    /// Its identity.
    pub uuid: Uuid,
}

impl VolumeSpec {
    /// Checks what the types cannot: sizes, alignment, counts.
    ///
    /// # Errors
    /// [`BadSpec`] names the first thing that is wrong.
    pub fn validate(&self) -> Result<(), BadSpec> {
        if !(1..=SPEC_VERSION).contains(&self.spec_version) {
            return Err(BadSpec::Version(self.spec_version));
        }
        if self.size == 0 || !self.size.is_multiple_of(BLOCK) || self.size > VOLUME_SIZE_MAX {
            return Err(BadSpec::Size(self.size));
        }
        if !self.stripe.is_power_of_two() || !(STRIPE_MIN..=STRIPE_MAX).contains(&self.stripe) {
            return Err(BadSpec::Stripe(self.stripe));
        }
        if self.buffer != 0 && (!self.buffer.is_multiple_of(BLOCK) || !(BUFFER_MIN..=BUFFER_MAX).contains(&self.buffer))
        {
            return Err(BadSpec::Buffer(self.buffer));
        }
        let Timeouts { room_ms, full_node_ms, flush_ms, io_ms } = self.timeouts;
        if let Some(ms) = [room_ms, full_node_ms, flush_ms, io_ms].into_iter().find(|ms| !TIMEOUT_MS.contains(ms)) {
            return Err(BadSpec::Timeout(ms));
        }
        if self.nodes.is_empty() || self.nodes.len() > NODES_MAX {
            return Err(BadSpec::Nodes(self.nodes.len()));
        }
        for (i, node) in self.nodes.iter().enumerate() {
            if self.nodes.iter().take(i).any(|other| other.url == node.url || other.uuid == node.uuid) {
                return Err(BadSpec::Twice(node.url.clone()));
            }
        }
        Ok(())
    }
}

/// Why a [`VolumeSpec`] is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadSpec {
    /// Written by a newer program.
    #[error("the volume's description has version {0}, this program reads {SPEC_VERSION}")]
    Version(u32),
    /// Size out of range or not aligned.
    #[error("{0} bytes is no volume size: give a multiple of {BLOCK} from {BLOCK} to {VOLUME_SIZE_MAX}")]
    Size(u64),
    /// Stripe unit out of range or no power of two.
    #[error("{0} bytes is no stripe unit: give a power of two from {STRIPE_MIN} to {STRIPE_MAX}")]
    Stripe(u64),
    /// Buffer size out of range or not aligned.
    #[error(
        "{0} bytes is no write buffer: give 0 for none, or a multiple of {BLOCK} from {BUFFER_MIN} to {BUFFER_MAX}"
    )]
    Buffer(u64),
    /// A timeout out of range.
    #[error("{0} ms is no timeout: give {min} ms to {max} s", min = TIMEOUT_MS.start(), max = TIMEOUT_MS.end() / 1000)]
    Timeout(u64),
    /// Too many or no nodes.
    #[error("{0} storage nodes: a volume has 1 to {NODES_MAX}")]
    Nodes(usize),
    /// The same node twice.
    #[error("storage node {0} is named twice")]
    Twice(NodeUrl),
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn spec() -> VolumeSpec {
        let node = |n: u128| NodeSpec { url: NodeUrl::Dir(format!("/srv/{n}").into()), uuid: Uuid::from_u128(n) };
        VolumeSpec {
            spec_version: SPEC_VERSION,
            name: "v".parse().unwrap(),
            uuid: Uuid::from_u128(9),
            size: 1 << 30,
            stripe: 4 << 20,
            buffer: 64 << 20,
            bypass: Bypass::Auto,
            timeouts: Timeouts::default(),
            nodes: vec![node(1), node(2)],
        }
    }

    #[test]
    fn a_sound_spec_passes_and_each_fault_is_named() {
        assert_eq!(spec().validate(), Ok(()));
        let fault = |change: fn(&mut VolumeSpec)| {
            let mut s = spec();
            change(&mut s);
            s.validate().unwrap_err()
        };
        assert_eq!(fault(|s| s.size = 4095), BadSpec::Size(4095));
        assert_eq!(fault(|s| s.size = 0), BadSpec::Size(0));
        assert_eq!(fault(|s| s.stripe = 100_000), BadSpec::Stripe(100_000));
        assert_eq!(fault(|s| s.buffer = 4096), BadSpec::Buffer(4096));
        assert_eq!(fault(|s| s.buffer = (2 << 20) + 1), BadSpec::Buffer((2 << 20) + 1));
        assert_eq!(fault(|s| s.spec_version = 3), BadSpec::Version(3));
        assert_eq!(fault(|s| s.timeouts.room_ms = 99), BadSpec::Timeout(99));
        assert_eq!(fault(|s| s.timeouts.full_node_ms = 0), BadSpec::Timeout(0));
        assert_eq!(fault(|s| s.timeouts.flush_ms = 3_600_001), BadSpec::Timeout(3_600_001));
        assert_eq!(fault(|s| s.timeouts.io_ms = 99), BadSpec::Timeout(99));
        assert_eq!(fault(|s| s.nodes.clear()), BadSpec::Nodes(0));
        assert!(matches!(fault(|s| s.nodes[1] = s.nodes[0].clone()), BadSpec::Twice(_)));
    }

    #[test]
    fn timeouts_are_written_where_they_are_unusual_and_a_missing_one_is_the_usual() {
        let unusual = Timeouts { room_ms: 500, ..Timeouts::default() };
        let text = serde_json::to_string(&VolumeSpec { timeouts: unusual, ..spec() }).unwrap();
        assert!(
            text.contains(r#""timeouts":{"room_ms":500,"full_node_ms":2000,"flush_ms":60000,"io_ms":120000}"#),
            "{text}"
        );
        // As a build wrote it that knows room_ms alone.
        assert_eq!(serde_json::from_str::<Timeouts>(r#"{"room_ms":500}"#).unwrap(), unusual);
        assert!(!serde_json::to_string(&spec()).unwrap().contains("timeouts"));
    }

    pub(crate) fn golden_json_of_version_1_still_reads_as_a_volume_without_a_buffer(golden: &str) {
        let read: VolumeSpec = serde_json::from_str(golden).unwrap();
        assert_eq!(read, VolumeSpec { spec_version: 1, buffer: 0, ..spec() });
        assert_eq!(read.validate(), Ok(()));
    }

    pub(crate) fn golden_json_of_version_2_reads_and_writes_the_same_bytes(golden: &str) {
        let read: VolumeSpec = serde_json::from_str(golden).unwrap();
        assert_eq!(read, spec());
        assert_eq!(serde_json::to_string_pretty(&read).unwrap(), golden.trim_end());
    }
}
