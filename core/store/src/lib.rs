//! A storage node as the core sees it (M7): the contract [`Store`], the stores that fulfil it, and the suite that
//! proves it of each.
//!
//! Every operation completes inline on the caller's thread. Offsets are the node's own: where a byte of the volume lies
//! on which node is the engine's business. Predecessor and successor of a hand-over have a node open at once, so no
//! store takes a lock; the gate sees to it that only one of them writes.
#![forbid(unsafe_code)]

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

/// What [`Store::next`] looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    /// A byte that may hold something else than zero.
    Data,
    /// A byte that takes no space and reads as zero; the end of the node counts as one.
    Hole,
}

/// One storage node. Every operation may be called from many threads at once.
///
/// An operation is given a range inside the node, else it is refused with [`StoreError::OutOfRange`]. A range of no
/// bytes is valid and nothing happens. Bytes never written read as zero. What was written survives the death of this process
/// once the write has returned (the write buffer forgets it then), and is durable once a later [`Store::flush`] has returned.
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

    /// As [`Store::read_at`], if that waits for nothing; false when it would, or nobody knows. Anything may stand in `buf` then.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read_at_once(&self, _offset: u64, _buf: &mut [u8]) -> Result<bool, StoreError> {
        Ok(false)
    }

    /// The bytes as a part of a file, where they are one and lie in memory, so that they can be sent from it (sendfile(2))
    /// without a copy, and without the node being read. `None`: read them.
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
    /// [`StoreError`]; then nothing is known of what was written since the last flush that succeeded.
    fn flush(&self) -> Result<(), StoreError>;

    /// From now on [`Store::flush`] tells of no error that another opening of the node has been told of already; of one that
    /// nobody was told of it tells. (Linux keeps one error for each file and tells each opening of it once; an opening made after it was
    /// told to any is not told: lib/errseq.c.)
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
    /// inside the node a hole is always found, the node's end at the latest.
    ///
    /// # Errors
    /// [`StoreError`].
    fn next(&self, offset: u64, sought: Sought) -> Result<Option<u64>, StoreError>;
}

/// What a node bears and holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFormat {
    /// Whose it is and how the volume lies on it.
    pub superblock: Superblock,
    /// Bytes of the volume on this node.
    pub len: u64,
}

/// Makes a node ready: nothing but its superblock and bytes that read as zero. It is undone unless the caller confirms.
///
/// # Errors
/// [`OpenError`]; then the node is as it was before.
pub fn create(url: &NodeUrl, format: &NodeFormat) -> Result<Created, OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::create(path, format),
    }
}

/// Opens a node that bears just this format.
///
/// # Errors
/// [`OpenError`] says what it is instead.
pub fn open(url: &NodeUrl, format: &NodeFormat) -> Result<Box<dyn Store>, OpenError> {
    match url {
        NodeUrl::Dir(path) => Ok(Box::new(dir::DirStore::open(path, format)?)),
    }
}

/// Whether [`resize`] would succeed, as far as that can be known; changes nothing.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_resize(url: &NodeUrl, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_resize(path, old, new),
    }
}

/// Brings a node that no core has open from `old` to `new`, which is not smaller. After an interruption it may be repeated, with any other
/// `new`; with `old` in its place it is undone.
///
/// # Errors
/// [`OpenError`]; then the node has the old format or one in between.
pub fn resize(url: &NodeUrl, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::resize(path, old, new),
    }
}

/// Whether a core could serve from the node; changes nothing and opens nothing for longer than the look.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_open(url: &NodeUrl, format: &NodeFormat) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_open(path, format),
    }
}

/// Whether the node is there, is this one and may be removed; changes nothing.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_destroy(url: &NodeUrl, volume: Uuid, node: Uuid) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_destroy(path, volume, node),
    }
}

/// Removes what [`create`] made, data included, but for directories, and nothing else. A node where nothing is left is no
/// error, so that an interrupted removal can be repeated: then it is false.
///
/// # Errors
/// [`OpenError`] when the node belongs to another volume, or the operating system's word.
pub fn destroy(url: &NodeUrl, volume: Uuid, node: Uuid) -> Result<bool, OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::destroy(path, volume, node),
    }
}
