//! Why the engine did not do what it was asked: [`IoError`] for an operation, [`OpenError`] for a volume.

use everdisk_proto::volume::{BadSpec, NodeUrl};
use everdisk_store::{EINVAL, EIO, StoreError};

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The range is not inside the volume.
    #[error("{len} bytes at {offset} are not inside the volume's {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the volume.
        size: u64,
    },
    /// Buffered data that the operation waited for could not be sent to a storage node. It stays buffered.
    #[error(
        "buffered data cannot be sent: {reason}. It is kept in the write buffer and sent when the node works again"
    )]
    Unsent {
        /// As of the storage node's error.
        errno: i32,
        /// The storage node's error.
        reason: String,
    },
    /// A storage node did not do what the operation waited for.
    #[error("{what} did not happen within {limit_s} s; see the state of the storage nodes")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long, in seconds.
        limit_s: u64,
    },
    /// Acknowledged data of the range was found damaged in the write buffer.
    #[error(
        "buffered data was found damaged ({ranges} ranges of the volume): what was acknowledged there is lost until it is \
         written anew"
    )]
    DataLost {
        /// How many ranges of the volume are concerned.
        ranges: usize,
    },
    /// This core may not write.
    #[error("this core does not have the gate")]
    NoGate,
    /// A storage node failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl IoError {
    /// The `errno` an application is given: EINVAL for a range outside, ENOSPC when a storage node is full,
    /// EOPNOTSUPP when one cannot do such a thing, else EIO.
    pub fn errno(&self) -> i32 {
        match self {
            Self::OutOfRange { .. } => EINVAL,
            Self::Unsent { errno, .. } => *errno,
            Self::Late { .. } | Self::DataLost { .. } | Self::NoGate => EIO,
            Self::Store(e) => e.errno(),
        }
    }
}

/// Why a volume cannot be opened, created, resized or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The description is wrong in itself.
    #[error("{0}")]
    Spec(#[from] BadSpec),
    /// A storage node refuses.
    #[error(transparent)]
    Node(#[from] everdisk_store::OpenError),
    /// A volume only grows.
    #[error("the volume has {size} bytes already and cannot shrink to {new_size}. Give a larger size")]
    Shrink {
        /// Bytes now.
        size: u64,
        /// Bytes asked for.
        new_size: u64,
    },
    /// Two nodes of a volume that is being made are one directory.
    #[error("{0}: another storage node of this volume is the same directory. Give each a directory of its own")]
    SameNode(NodeUrl),
    /// A resize failed on one node and could not be undone on another.
    #[error("{refused}. Nor could the resize be undone: {stuck}")]
    HalfResized {
        /// Why it failed.
        refused: Box<everdisk_store::OpenError>,
        /// Why it could not be undone.
        stuck: Box<everdisk_store::OpenError>,
    },
}
