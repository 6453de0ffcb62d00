//! Errors of a storage node that serves. Before it does, they are [`OpenError`].

use std::io;

use everdisk_proto::volume::NodeUrl;
use everdisk_store_nbd as nbd;
use rustix::io::Errno;

use crate::OpenError;

/// `errno` of an operation with invalid arguments.
pub const EINVAL: i32 = Errno::INVAL.raw_os_error();

/// `errno` of an operation that failed.
pub const EIO: i32 = Errno::IO.raw_os_error();

/// Why an operation on a storage node failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The range is not inside the node.
    #[error("{node}: {len} bytes at {offset} are not inside its {size} bytes")]
    OutOfRange {
        /// The node.
        node: NodeUrl,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes the node holds.
        size: u64,
    },
    /// The operating system reported an error.
    #[error("{node}: cannot {action}: {source}")]
    Io {
        /// The node.
        node: NodeUrl,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The node holds fewer bytes than when it was opened.
    #[error("{node}: its data end at {at}; something has cut them off. Detach the volume and restore the node")]
    Truncated {
        /// The node.
        node: NodeUrl,
        /// Where no more bytes came.
        at: u64,
    },
    /// The node has been replaced since it was opened.
    #[error("{node}: it is no longer what was opened: {source}")]
    Changed {
        /// The node.
        node: NodeUrl,
        /// What was found instead.
        source: Box<OpenError>,
    },
    /// The NBD server reported an error, or was not there.
    #[error("{node}: {}", .source.reason())]
    Nbd {
        /// The node.
        node: NodeUrl,
        /// The client's error.
        source: everdisk_store_nbd::Error,
    },
}

/// What the caller of an operation that failed may conclude.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The node (or its quota) is full. With more space the same operation may succeed.
    Full,
    /// The node cannot do this, neither now nor later. It says nothing about the node's health.
    Unsupported,
    /// The node is out of reach. Whether the operation was done is unknown.
    Unavailable,
    /// This core may no longer write to the node: another one has taken over.
    Fenced,
    /// The node is not what was opened: cut off, replaced, of another size.
    Damaged,
    /// Of a flush: the node works, and may have lost what it had acknowledged and not made durable. What was written since the
    /// last flush that succeeded is to be written again.
    Unflushed,
    /// The node failed.
    Fault,
    /// The arguments are invalid. It says nothing about the node's health.
    Invalid,
}

impl StoreError {
    /// What the caller may conclude.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::OutOfRange { .. } => ErrorKind::Invalid,
            Self::Io { source, .. } => match Errno::from_io_error(source) {
                Some(Errno::NOSPC | Errno::DQUOT) => ErrorKind::Full,
                Some(Errno::OPNOTSUPP) => ErrorKind::Unsupported,
                _ => ErrorKind::Fault,
            },
            Self::Truncated { .. } | Self::Changed { .. } => ErrorKind::Damaged,
            Self::Nbd { source, .. } => match source.kind() {
                nbd::Kind::Full => ErrorKind::Full,
                nbd::Kind::Unsupported => ErrorKind::Unsupported,
                nbd::Kind::Unavailable => ErrorKind::Unavailable,
                nbd::Kind::Changed => ErrorKind::Damaged,
                // The store has checked the arguments, so a server that finds them invalid is at fault.
                nbd::Kind::Invalid | nbd::Kind::Fault(_) => ErrorKind::Fault,
                nbd::Kind::Unflushed => ErrorKind::Unflushed,
            },
        }
    }

    /// The `errno` for the application: EINVAL for invalid arguments, ENOSPC when the node (or its quota) is full,
    /// EOPNOTSUPP when the node does not support the operation, else EIO.
    pub fn errno(&self) -> i32 {
        let errno = match self.kind() {
            ErrorKind::Invalid => Errno::INVAL,
            ErrorKind::Full => Errno::NOSPC,
            ErrorKind::Unsupported => Errno::OPNOTSUPP,
            ErrorKind::Unavailable
            | ErrorKind::Fenced
            | ErrorKind::Damaged
            | ErrorKind::Unflushed
            | ErrorKind::Fault => Errno::IO,
        };
        errno.raw_os_error()
    }

    /// Whether the node is at fault. Invalid arguments and unsupported operations say nothing about its health.
    pub fn is_fault(&self) -> bool {
        !matches!(self.kind(), ErrorKind::Invalid | ErrorKind::Unsupported)
    }
}
