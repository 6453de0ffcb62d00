//! Errors of a storage node that is being made, opened, changed or removed.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use everdisk_proto::{superblock::BadSuperblock, volume::NodeUrl};
use everdisk_store_nbd as nbd;
use everdisk_sys::lock::Holders;
use uuid::Uuid;

/// Where a storage node is, as errors say it: a path, or the address of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The node's directory, or a file in it.
    Path(PathBuf),
    /// The address of an export.
    Export(String),
}

impl Place {
    const fn advice(&self, path: &'static str, export: &'static str) -> &'static str {
        match self {
            Self::Path(_) => path,
            Self::Export(_) => export,
        }
    }
}

impl From<&Path> for Place {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<PathBuf> for Place {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&NodeUrl> for Place {
    fn from(url: &NodeUrl) -> Self {
        match url {
            NodeUrl::Dir(path) => Self::Path(path.clone()),
            NodeUrl::Nbd(export) => Self::Export(export.to_string()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Export(url) => f.write_str(url),
        }
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
    /// A place without superblock.
    #[error(
        "{place}: it holds no superblock, so it is no storage node. {}",
        .place.advice(
            "Mount the disk it is on, or correct the address",
            "Correct the address; if the export had another size when the node was made, restore that size",
        )
    )]
    NoSuperblock {
        /// The node.
        place: Place,
    },
    /// The superblock is damaged or of another format.
    #[error(
        "{place}: {source}. {}",
        .place.advice("Restore this file from a backup", "Restore the last MiB of the export from a backup")
    )]
    BadSuperblock {
        /// The superblock's file, or the node.
        place: Place,
        /// What is wrong with it.
        source: BadSuperblock,
    },
    /// The node belongs to another volume.
    #[error("{place}: it belongs to volume {found}, not {expected}. Correct the storage node's address")]
    OtherVolume {
        /// The node.
        place: Place,
        /// The one in the superblock.
        found: Uuid,
        /// The volume asked for.
        expected: Uuid,
    },
    /// Another node of the same volume.
    #[error("{place}: it is storage node {found} of this volume, not {expected}. Correct the storage node's address")]
    OtherNode {
        /// The node.
        place: Place,
        /// The one in the superblock.
        found: Uuid,
        /// The expected node.
        expected: Uuid,
    },
    /// The layout on the node differs from the volume's.
    #[error("{place}: its superblock says {what} {found}, the volume has {expected}. {advice}")]
    OtherLayout {
        /// The node.
        place: Place,
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
        "{place}: it holds data above its first {len} bytes, where the volume would end. The volume was larger when they were written: resize \
         it to that size, or restore the volume's description of that time"
    )]
    Beyond {
        /// The data file, or the node.
        place: Place,
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
    /// The place is a node already.
    #[error(
        "{place}: it is a storage node of volume {volume} already. {}",
        .place.advice(
            "Choose another directory",
            "Choose another export; if that volume is no longer wanted, delete it, or write zeros over the last MiB of the export",
        )
    )]
    InUse {
        /// The node.
        place: Place,
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
    /// No connection to the NBD server, or it does not agree to what is needed.
    #[error("{place}: cannot connect: {}. Start the server, or correct the storage node's address", .source.reason())]
    Unreachable {
        /// The node.
        place: Place,
        /// The client's error.
        source: nbd::Error,
    },
    /// The NBD server failed, or the connection to it.
    #[error("{place}: cannot {action}: {}. See that its server is sound and has space, then try again", .source.reason())]
    Nbd {
        /// The node.
        place: Place,
        /// What was tried.
        action: &'static str,
        /// The client's error.
        source: nbd::Error,
    },
    /// The export may only be read.
    #[error("{place}: its server offers it for reading only. Have it exported for writing")]
    ReadOnlyExport {
        /// The node.
        place: Place,
    },
    /// Nothing that is written to the export would be known to be durable.
    #[error(
        "{place}: its server offers no flush, so nothing that is written there is known to be durable. Have it exported with flush \
         (nbd-server: flush = true)"
    )]
    NoFlush {
        /// The node.
        place: Place,
    },
    /// The export cannot hold the node.
    #[error(
        "{place}: it has {found} bytes, the storage node needs {needed}: the volume's share, and 1 MiB of its own. Enlarge the export, use \
         more storage nodes or a smaller volume"
    )]
    TooSmall {
        /// The node.
        place: Place,
        /// Bytes of the export.
        found: u64,
        /// Bytes it should have at least.
        needed: u64,
    },
    /// The export has been cut off or extended.
    #[error("{place}: the export has {found} bytes and had {had}: restore its size")]
    ExportSize {
        /// The node.
        place: Place,
        /// Its bytes.
        found: u64,
        /// Its bytes when the node was made.
        had: u64,
    },
    /// The export bears something else.
    #[error(
        "{place}: it is not empty, the byte at {offset} is {byte:#04x}. Choose an empty export, or have everything on this one \
         overwritten with --force"
    )]
    UsedExport {
        /// The node.
        place: Place,
        /// The first byte that is not zero.
        offset: u64,
        /// That byte.
        byte: u8,
    },
}
