//! A storage node as the core sees it (M7): the contract [`Store`], the stores that fulfil it, and the suite that tests
//! each of them.
//!
//! An operation is data ([`Op`]). It is done at once, waited for, or begun. Offsets are the node's own: the engine maps
//! the volume's bytes to nodes. Predecessor and successor of a hand-over have a node open at the same time, so no store takes a
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
pub mod nbd;
mod op;
pub mod pool;
mod refusal;
pub mod room;
pub mod superblock;

use std::{sync::Arc, time::Duration};

use everdisk_proto::{superblock::Superblock, volume::NodeUrl};
use everdisk_sys::file::FileRange;
use uuid::Uuid;

pub use everdisk_store_nbd::Keeper;

pub use crate::error::{EINVAL, EIO, ErrorKind, StoreError};
pub use crate::op::{Completion, Lent, Op, Outcome, Owned, Pending, Sought, pending};
pub use crate::refusal::{OpenError, Place};

/// What is known of a node that is open.
#[derive(Clone, Debug)]
pub struct About {
    /// The node's address.
    pub url: NodeUrl,
    /// The node's identity.
    pub uuid: Uuid,
    /// Bytes of the volume that the node holds.
    pub size: u64,
}

/// One storage node. Every operation may be called from many threads at once.
///
/// An operation needs a range inside the node, else it is refused with [`StoreError::OutOfRange`]. A range of no bytes
/// is valid, and nothing happens. Bytes never written read as zero. What was written survives the death of this process
/// once the write has ended (the write buffer forgets it then). It is durable once a flush that began later has
/// succeeded. Operations that are under way at the same time have no order.
///
/// There are three ways to have an operation done. They do the same:
///
/// | | [`attempt`](Store::attempt) | [`perform`](Store::perform) | [`begin`](Store::begin) |
/// |---|---|---|---|
/// | ends | now, or has not begun | when it returns | later |
/// | memory | the caller's | the caller's | its own |
/// | for | what is expected not to wait | threads that may wait | everything else |
pub trait Store: Send + Sync + 'static {
    /// What is known of it.
    fn about(&self) -> &About;

    /// Does the operation on the caller's thread, if that is expected not to wait. `None` when it would, or when that is
    /// unknown: then nothing has happened, and memory to read into has an undefined content.
    fn attempt(&self, offset: u64, op: Lent<'_>) -> Option<Outcome>;

    /// Does the operation and waits for its end.
    fn perform(&self, offset: u64, op: Lent<'_>) -> Outcome;

    /// Begins the operation, without waiting. `completion` is used when it has ended, on any thread, this one included.
    fn begin(self: Arc<Self>, offset: u64, op: Owned, completion: Completion);

    /// Before the first operation of a core that serves: connects to a node that is reached over a network, and checks that it bears the
    /// format. `keeper`: what keeps the connections beyond the death of this process; `None` where no other process takes over. Where the
    /// server is out of reach, that is logged, it is tried again, and operations wait.
    ///
    /// # Errors
    /// [`OpenError`] says what was found instead.
    fn serve(self: Arc<Self>, _keeper: Option<Arc<dyn Keeper>>) -> Result<(), OpenError> {
        Ok(())
    }

    /// The bytes as a part of a file, if they are one range there and lie in memory. Then they can be sent from it
    /// (sendfile(2)) without a copy, and without reading from the node. `None`: read them.
    fn in_memory(&self, _offset: u64, _len: u64) -> Option<FileRange<'_>> {
        None
    }

    /// Whether the node can lose acknowledged data that is not durable while this machine keeps running, and reports the loss only to
    /// the core that wrote the data. The engine makes a write past the buffer durable on such a node before it acknowledges the write.
    fn may_forget(&self) -> bool {
        false
    }

    /// From now on a flush does not report an error that another opening of the node has been told of already.
    /// It does report one that no opening was told of. (Linux keeps one error for each file and reports it once to each
    /// opening. An opening made after the error was reported to another does not get it: lib/errseq.c.)
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    fn forget_errors(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Operations that end before they return.
impl dyn Store {
    /// The node's address.
    pub fn url(&self) -> &NodeUrl {
        &self.about().url
    }

    /// The node's identity.
    pub fn uuid(&self) -> Uuid {
        self.about().uuid
    }

    /// Bytes of the volume that the node holds.
    pub fn size(&self) -> u64 {
        self.about().size
    }

    /// [`Op::Identify`].
    ///
    /// # Errors
    /// [`StoreError::Changed`].
    pub fn recheck(&self) -> Result<(), StoreError> {
        self.perform(0, Op::Identify).map(drop)
    }

    /// [`Op::Read`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.perform(offset, Op::Read(buf)).map(drop)
    }

    /// [`Op::Write`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.perform(offset, Op::Write(data)).map(drop)
    }

    /// [`Op::Flush`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn flush(&self) -> Result<(), StoreError> {
        self.perform(0, Op::Flush).map(drop)
    }

    /// [`Op::Discard`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.perform(offset, Op::Discard(len)).map(drop)
    }

    /// [`Op::WriteZeroes`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.perform(offset, Op::WriteZeroes(len)).map(drop)
    }

    /// [`Op::Allocate`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn allocate(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.perform(offset, Op::Allocate(len)).map(drop)
    }

    /// [`Op::Seek`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn next(&self, offset: u64, sought: Sought) -> Result<Option<u64>, StoreError> {
        self.perform(offset, Op::Seek(sought))
    }
}

/// The identity and the length of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFormat {
    /// Its identity, and how the volume lies on it.
    pub superblock: Superblock,
    /// Bytes of the volume on this node.
    pub len: u64,
}

/// What the operator has said about a node that is to be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Creation {
    /// Whatever an export holds is overwritten, unless it is a storage node. A directory has to be empty in any case.
    pub force: bool,
}

/// A node that was made. That is undone on drop, unless [`Created::confirm`] was called. What was overwritten by force stays so.
#[derive(Debug)]
#[must_use = "what was created is removed again unless it is confirmed"]
pub enum Created {
    /// In a directory.
    Dir(dir::Created),
    /// On an export.
    Nbd(nbd::Created),
}

impl Created {
    /// Whether the node's directory was made for it.
    pub const fn made_directory(&self) -> bool {
        match self {
            Self::Dir(created) => created.made_directory(),
            Self::Nbd(_) => false,
        }
    }

    /// Keeps what was created.
    pub fn confirm(self) {
        match self {
            Self::Dir(created) => created.confirm(),
            Self::Nbd(created) => created.confirm(),
        }
    }
}

/// Makes a node ready, with nothing but its superblock and bytes that read as zero. It is undone unless the caller
/// confirms.
///
/// # Errors
/// [`OpenError`]; then the node is as it was before.
pub fn create(url: &NodeUrl, format: &NodeFormat, how: Creation) -> Result<Created, OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::create(path, format).map(Created::Dir),
        NodeUrl::Nbd(export) => nbd::create(export, format, how).map(Created::Nbd),
    }
}

/// Opens a node that bears exactly this format. One that is reached over a network is connected to by [`Store::serve`].
/// `unavailable_after`: how long a node that is reached over a network may be out of reach
/// before operations on it fail; zero: for ever.
///
/// # Errors
/// [`OpenError`] says what was found instead.
pub fn open(url: &NodeUrl, format: &NodeFormat, unavailable_after: Duration) -> Result<Arc<dyn Store>, OpenError> {
    match url {
        NodeUrl::Dir(path) => Ok(Arc::new(dir::DirStore::open(path, format)?)),
        NodeUrl::Nbd(export) => Ok(Arc::new(nbd::LateStore::new(export, format, unavailable_after))),
    }
}

/// Checks that [`resize`] would succeed, as far as that can be known. Changes nothing.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_resize(url: &NodeUrl, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_resize(path, old, new),
        NodeUrl::Nbd(export) => nbd::check_resize(export, old, new),
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
        NodeUrl::Nbd(export) => nbd::resize(export, old, new),
    }
}

/// Checks that a core could serve from the node. Changes nothing, and closes everything it opened.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_open(url: &NodeUrl, format: &NodeFormat) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_open(path, format),
        NodeUrl::Nbd(export) => nbd::check_open(export, format),
    }
}

/// Checks that the node is there, is this one and may be removed. Changes nothing.
///
/// # Errors
/// [`OpenError`] says what is in the way.
pub fn check_destroy(url: &NodeUrl, volume: Uuid, node: Uuid) -> Result<(), OpenError> {
    match url {
        NodeUrl::Dir(path) => dir::check_destroy(path, volume, node),
        NodeUrl::Nbd(export) => nbd::check_destroy(export, volume, node),
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
        NodeUrl::Nbd(export) => nbd::destroy(export, volume, node),
    }
}
