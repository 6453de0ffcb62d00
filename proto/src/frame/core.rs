//! Between the control module and a core.

use serde::{Deserialize, Serialize};

use super::{Body, is_false};
use crate::node::NodeState;

/// A request of the control module to a core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CoreRequest {
    /// Make everything acknowledged durable on every storage node (M8), or do as much of it as this time allows.
    Flush {
        /// The request times out after this, unless a storage node hangs.
        limit_ms: u64,
    },
    /// To a core that does not have the gate: follow the write buffer as far as it goes, checksums included, and stay
    /// close behind, because a hand-over is near. It reads from the storage nodes ahead of its probe as well.
    Follow,
    /// Read this many blocks spread over the volume, and every node's superblock, and report whether all could be read.
    Verify {
        /// Number of blocks.
        blocks: u32,
    },
    /// Report the state of the stores.
    Status,
}

impl Body for CoreRequest {
    fn fds(&self) -> usize {
        0
    }
}

/// A core's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CoreAnswer {
    /// Durable.
    Flushed,
    /// Not yet; ask again.
    Flushing {
        /// Bytes that are still buffered.
        buffered_bytes: u64,
    },
    /// To `Follow`.
    Following {
        /// Bytes of the write buffer that are known now.
        buffered_bytes: u64,
    },
    /// All could be read.
    Verified {
        /// Blocks read.
        blocks: u32,
    },
    /// The stores.
    Status {
        /// One for each node, in the order of the layout.
        nodes: Vec<NodeStatus>,
    },
    /// Not done.
    Failed {
        /// What is wrong.
        reason: String,
    },
}

impl Body for CoreAnswer {
    fn fds(&self) -> usize {
        0
    }
}

/// A storage node as the core sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its address.
    pub url: String,
    /// Its identity.
    pub uuid: uuid::Uuid,
    /// Its state.
    pub state: NodeState,
    /// The last error, in words.
    pub error: Option<String>,
    /// Whether a write to the node has succeeded since this core was started.
    #[serde(default, skip_serializing_if = "is_false")]
    pub written: bool,
}
