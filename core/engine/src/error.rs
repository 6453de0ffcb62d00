//! Why the engine did not do what it was asked: [`IoError`] for an operation, [`OpenError`] for a volume.

use std::time::Duration;

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
        /// The storage node's errno.
        errno: i32,
        /// The storage node's error.
        reason: String,
    },
    /// A storage node did not do what the operation waited for.
    #[error("{what} did not happen within {limit:?}; see the state of the storage nodes")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// A storage node could not make durable what was written to it.
    #[error(
        "a storage node could not make what was written durable: {reason}. What is in the write buffer is written again{}",
        lost_sentence(*.lost_bytes)
    )]
    NotDurable {
        /// The storage node's errno.
        errno: i32,
        /// The storage node's error.
        reason: String,
        /// Bytes of the volume that had been written past the buffer and may be gone.
        lost_bytes: u64,
    },
    /// This flush succeeded, but an earlier one failed and this client has not been told of that yet.
    #[error("a flush has failed since this client was last answered one; everything written so far is durable now")]
    FailedBefore,
    /// The number of lost ranges is at its limit, so none of them can be split in two.
    #[error(
        "too many separate ranges of the volume are lost for a part of one to be written anew: write the whole of a lost \
         range, or begin where it begins"
    )]
    ManyLost,
    /// Acknowledged data of the range is lost: found damaged in the write buffer, or written past it before a flush failed.
    #[error(
        "acknowledged data is lost ({ranges} ranges of the volume): it was damaged in memory, or a storage node could not \
         make it durable. Reading there fails, and every flush, until it is written anew"
    )]
    DataLost {
        /// How many ranges of the volume are concerned.
        ranges: usize,
    },
    /// A server of a storage node may have lost what a core that is dead had written and not flushed.
    #[error(
        "the server of a storage node ended the connection of a core that has died: what was written to it and not flushed may be lost"
    )]
    Unflushed,
    /// This core may not write.
    #[error("this core does not have the gate")]
    NoGate,
    /// A storage node failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl IoError {
    /// The `errno` for the application: EINVAL for a range outside the volume, ENOSPC when a storage node is full,
    /// EOPNOTSUPP when a node does not support the operation, else EIO.
    pub fn errno(&self) -> i32 {
        match self {
            Self::OutOfRange { .. } => EINVAL,
            Self::Unsent { errno, .. } | Self::NotDurable { errno, .. } => *errno,
            Self::Late { .. }
            | Self::FailedBefore
            | Self::ManyLost
            | Self::DataLost { .. }
            | Self::Unflushed
            | Self::NoGate => EIO,
            Self::Store(e) => e.errno(),
        }
    }
}

fn lost_sentence(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        bytes => format!(
            "; {bytes} bytes had been written past it and may be gone: reads there fail until they are written anew"
        ),
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
    /// Two nodes of a volume that is being made are one directory, or one export.
    #[error(
        "{0}: another storage node of this volume is the same {kind}. Give each {article} {kind} of its own",
        kind = if .0.as_directory().is_some() { "directory" } else { "export" },
        article = if .0.as_directory().is_some() { "a" } else { "an" },
    )]
    SameNode(NodeUrl),
    /// No thread could be started to open a storage node.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// A resize failed on one node and could not be undone on another.
    #[error("{refused}. Nor could the resize be undone: {stuck}")]
    HalfResized {
        /// Why it failed.
        refused: Box<everdisk_store::OpenError>,
        /// Why it could not be undone.
        stuck: Box<everdisk_store::OpenError>,
    },
}
