//! Why the engine did not do what it was asked: [`IoError`] for an operation, [`OpenError`] for a volume.

use everdisk_proto::volume::BadSpec;
use everdisk_store::{EINVAL, StoreError};

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
}
