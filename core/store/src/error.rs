//! Errors of a storage node: [`StoreError`] while it serves, [`OpenError`] before.

use std::{io, path::PathBuf};

use everdisk_proto::{superblock::BadSuperblock, volume::NodeUrl};
use everdisk_sys::lock::Holders;
use rustix::io::Errno;
use uuid::Uuid;

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
}

impl StoreError {
    /// The `errno` for the application: EINVAL for invalid arguments, ENOSPC when the node (or its quota) is full,
    /// EOPNOTSUPP when the node does not support the operation, else EIO.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::OutOfRange { .. } => Errno::INVAL,
            Self::Io { source, .. } => match Errno::from_io_error(source) {
                Some(Errno::NOSPC | Errno::DQUOT) => Errno::NOSPC,
                Some(Errno::OPNOTSUPP) => Errno::OPNOTSUPP,
                _ => Errno::IO,
            },
            Self::Truncated { .. } | Self::Changed { .. } => Errno::IO,
        };
        errno.raw_os_error()
    }

    /// Whether the node is at fault. Invalid arguments and unsupported operations say nothing about its health.
    pub fn is_fault(&self) -> bool {
        let errno = self.errno();
        errno != EINVAL && errno != Errno::OPNOTSUPP.raw_os_error()
    }
}

/// Why a storage node cannot be created, opened, resized or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path.
    #[error("{path}: there is no such directory. Mount the disk it is on, or correct the storage node's address")]
    Missing {
        /// The node's directory.
        path: PathBuf,
    },
    /// There is no directory for a node that is to be made.
    #[error(
        "{path}: there is no such directory. Mount the disk it is on, correct the storage node's address, or have it made with --create-dir"
    )]
    NoDirectory {
        /// The node's directory.
        path: PathBuf,
    },
    /// The path is not a directory.
    #[error("{path}: it is no directory. Give a directory as the storage node")]
    NotDirectory {
        /// The path.
        path: PathBuf,
    },
    /// A directory without superblock.
    #[error(
        "{path}: it holds no superblock, so it is no storage node. Mount the disk it is on, or correct the address"
    )]
    NoSuperblock {
        /// The node's directory.
        path: PathBuf,
    },
    /// The superblock is damaged or of another format.
    #[error("{path}: {source}. Restore this file from a backup")]
    BadSuperblock {
        /// The superblock.
        path: PathBuf,
        /// What is wrong with it.
        source: BadSuperblock,
    },
    /// The node belongs to another volume.
    #[error("{path}: it belongs to volume {found}, not {expected}. Correct the storage node's address")]
    OtherVolume {
        /// The node's directory.
        path: PathBuf,
        /// The one in the superblock.
        found: Uuid,
        /// The volume asked for.
        expected: Uuid,
    },
    /// Another node of the same volume.
    #[error("{path}: it is storage node {found} of this volume, not {expected}. Correct the storage node's address")]
    OtherNode {
        /// The node's directory.
        path: PathBuf,
        /// The one in the superblock.
        found: Uuid,
        /// The expected node.
        expected: Uuid,
    },
    /// The layout on the node differs from the volume's.
    #[error("{path}: its superblock says {what} {found}, the volume has {expected}. {advice}")]
    OtherLayout {
        /// The node's directory.
        path: PathBuf,
        /// Which property.
        what: &'static str,
        /// The one in the superblock.
        found: u64,
        /// The one in the volume's description.
        expected: u64,
        /// What to do.
        advice: &'static str,
    },
    /// The data file is not there.
    #[error("{path}: the file is missing, the volume's data on this storage node are lost. Restore it from a backup")]
    NoData {
        /// The data file.
        path: PathBuf,
    },
    /// The data file has been cut off or extended.
    #[error("{path}: it has {found} bytes, the volume needs {expected}. {advice}")]
    DataLength {
        /// The data file.
        path: PathBuf,
        /// Its bytes.
        found: u64,
        /// The bytes it should have.
        expected: u64,
        /// What to do.
        advice: &'static str,
    },
    /// There is data above the end of the volume, which a resize would cut off.
    #[error(
        "{path}: it holds data above its first {len} bytes, where the volume would end. The volume was larger when they were written: resize \
         it to that size, or restore the volume's description of that time"
    )]
    Beyond {
        /// The data file.
        path: PathBuf,
        /// The bytes it should have.
        len: u64,
    },
    /// A superblock or data file is not a regular file.
    #[error("{path}: it is no regular file. Restore it from a backup")]
    NotFile {
        /// Superblock or data file.
        path: PathBuf,
    },
    /// The node may not be written (or not even read).
    #[error("{path}: this user may not read and write it ({source}). Mount it read-write and give both permissions")]
    ReadOnly {
        /// What may not be accessed.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// Another process serves the node, or changes it.
    #[error("{path}: it is in use by {holders}. Detach the volume there, or end that process")]
    Held {
        /// The node's directory.
        path: PathBuf,
        /// The processes that hold the lock.
        holders: Holders,
    },
    /// The node cannot be locked against other processes.
    #[error(
        "{path}: its file system gives no locks ({source}). Mount it with locks (NFS: the server's lock service, or \
         local_lock=flock where one computing node alone uses it)"
    )]
    NoLocks {
        /// The node's directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// Another file system hides the file.
    #[error("{path}: something is mounted over it. Unmount that: a storage node's files are its own")]
    Covered {
        /// Superblock or data file.
        path: PathBuf,
    },
    /// The directory is a node already.
    #[error("{path}: it is a storage node of volume {volume} already. Choose another directory")]
    InUse {
        /// The node's directory.
        path: PathBuf,
        /// The volume it belongs to.
        volume: Uuid,
    },
    /// The directory holds other files.
    #[error("{path}: it is not empty, it holds {entry:?}. Choose an empty directory")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One entry of it.
        entry: String,
    },
    /// The file system's largest file is shorter than the node.
    #[error("{path}: its file system cannot hold a file of {len} bytes. Use more storage nodes or a smaller volume")]
    TooLarge {
        /// The data file.
        path: PathBuf,
        /// The bytes it should have.
        len: u64,
    },
    /// The operating system reported an error.
    #[error("{path}: cannot {action}: {source}. See that its file system is sound and has space, then try again")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}
