//! A storage node as the core sees it (M7): the contract [`Store`], the stores that fulfil it, and the suite that tests
//! each of them.
//!
//! Every operation completes inline on the caller's thread. Offsets are the node's own: the engine maps the volume's
//! bytes to nodes. Predecessor and successor of a hand-over have a node open at the same time, so no store takes a
//! lock. The gate ensures that only one of them writes.
#![forbid(unsafe_code)]
#![cfg_attr(
    any(test, feature = "conformance"),
    expect(clippy::disallowed_methods, reason = "a test is no core: its threads need no word")
)]

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod dir;
mod error;
pub mod room;

use everdisk_proto::{superblock::Superblock, volume::NodeUrl};
use everdisk_sys::file::FileRange;
use uuid::Uuid;

pub use crate::dir::Created;
pub use crate::error::{EINVAL, EIO, OpenError, StoreError};

/// What [`Store::next`] searches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    /// A byte that may be other than zero.
    Data,
    /// A byte that takes no space and reads as zero. The end of the node counts as one.
    Hole,
}

/// One storage node. Every operation may be called from many threads at once.
///
/// An operation needs a range inside the node, else it is refused with [`StoreError::OutOfRange`]. A range of no bytes
/// is valid, and nothing happens. Bytes never written read as zero. What was written survives the death of this process
/// once the write has returned (the write buffer forgets it then). It is durable once a later [`Store::flush`] has
/// returned.
pub trait Store: Send + Sync {
    /// The node's address.
    fn url(&self) -> &NodeUrl;

    /// The node's identity.
    fn uuid(&self) -> Uuid;

    /// Bytes of the volume that the node holds.
    fn size(&self) -> u64;

    /// Reads the identity from the node anew and compares it with what was opened (D11).
    ///
    /// # Errors
    /// [`StoreError::Changed`].
    fn recheck(&self) -> Result<(), StoreError>;

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError>;

    /// As [`Store::read_at`], if that does not wait. False when it would, or when that is unknown: then the content of
    /// `buf` is undefined.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read_at_once(&self, _offset: u64, _buf: &mut [u8]) -> Result<bool, StoreError> {
        Ok(false)
    }

    /// The bytes as a part of a file, if they are one range there and lie in memory. Then they can be sent from it
    /// (sendfile(2)) without a copy, and without reading from the node. `None`: read them.
    fn in_memory(&self, _offset: u64, _len: u64) -> Option<FileRange<'_>> {
        None
    }

    /// Writes `data` at `offset`. After an error any part of the range may hold the old or the new bytes.
    ///
    /// # Errors
    /// [`StoreError`].
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// [`StoreError`]; then it is unknown what has become durable since the last flush that succeeded.
    fn flush(&self) -> Result<(), StoreError>;

    /// From now on [`Store::flush`] does not report an error that another opening of the node has been told of already.
    /// It does report one that no opening was told of. (Linux keeps one error for each file and reports it once to each
    /// opening. An opening made after the error was reported to another does not get it: lib/errseq.c.)
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    fn forget_errors(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Makes the range read as zero and gives its space back.
    ///
    /// # Errors
    /// [`StoreError`]; EOPNOTSUPP where the node cannot give space back.
    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError>;

    /// Makes the range read as zero and keeps its space where the node can.
    ///
    /// # Errors
    /// [`StoreError`].
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), StoreError>;

    /// Reserves space for the range, so that writes into it do not run out of it. No byte changes.
    ///
    /// # Errors
    /// [`StoreError`]; EOPNOTSUPP where the node cannot reserve.
    fn allocate(&self, offset: u64, len: u64) -> Result<(), StoreError>;

    /// Offset of the next data or hole at or after `offset`; `None` when there is none before the node's end. From
    /// inside the node a hole is always found, because the node's end counts as one.
    ///
    /// # Errors
    /// [`StoreError`].
    fn next(&self, offset: u64, sought: Sought) -> Result<Option<u64>, StoreError>;
}

/// The identity and the length of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFormat {
    /// Its identity, and how the volume lies on it.
    pub superblock: Superblock,
    /// Bytes of the volume on this node.
    pub len: u64,
}

/// Makes a node ready, with nothing but its superblock and bytes that read as zero. It is undone unless the caller
/// confirms.
///
/// # Errors
/// [`OpenError`]; then the node is as it was before.
pub fn create(url: &NodeUrl, format: &NodeFormat) -> Result<Created, OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::create(path, format),
    }
}

/// Opens a node that bears exactly this format.
///
/// # Errors
/// [`OpenError`] says what was found instead.
pub fn open(url: &NodeUrl, format: &NodeFormat) -> Result<Box<dyn Store>, OpenError> {
    match url {
        NodeUrl::Dir(path) => Ok(Box::new(dir::DirStore::open(path, format)?)),
    }
}

/// Checks that [`resize`] would succeed, as far as that can be known. Changes nothing.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_resize(url: &NodeUrl, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_resize(path, old, new),
    }
}

/// Brings a node that no core has open from `old` to `new`, which is not smaller. After an interruption it may be
/// repeated with any other `new`; with `old` as `new` it is undone.
///
/// # Errors
/// [`OpenError`]; then the node has the old format or one in between.
pub fn resize(url: &NodeUrl, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::resize(path, old, new),
    }
}

/// Checks that a core could serve from the node. Changes nothing, and closes everything it opened.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_open(url: &NodeUrl, format: &NodeFormat) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_open(path, format),
    }
}

/// Checks that the node is there, is this one and may be removed. Changes nothing.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_destroy(url: &NodeUrl, volume: Uuid, node: Uuid) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_destroy(path, volume, node),
    }
}

/// Removes what [`create`] made, data included, except for directories, and nothing else. A node of which nothing is
/// left is no error, so that an interrupted removal can be repeated: then it is false.
///
/// # Errors
/// [`OpenError`] when the node belongs to another volume, or when the operating system fails.
pub fn destroy(url: &NodeUrl, volume: Uuid, node: Uuid) -> Result<bool, OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::destroy(path, volume, node),
    }
}
