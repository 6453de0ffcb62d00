//! The core as a front end uses it: a disk. Errors are errno values, because applications get those.

use everdisk_gate::hold::{self, Hold};
use everdisk_sys::file::FileRange;

/// An errno value, positive, of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

/// Why a request was not carried out: the application gets an errno, or the request stays unanswered.
pub type Stopped = hold::Stopped<Errno>;

/// The disk behind a front end. Every call completes on the caller's thread. Ranges lie within [`Disk::size`].
pub trait Disk: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// The application's error.
    fn read(&self, hold: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Stopped>;

    /// The range as a part of a file from which it can be sent (sendfile(2)): the bytes are those that a read would
    /// return, and lie in memory. `None`: read it.
    fn in_memory(&self, _offset: u64, _len: u64) -> Option<FileRange<'_>> {
        None
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// The application's error; ENOSPC when a storage node is full.
    fn write(&self, hold: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Stopped>;

    /// Makes everything acknowledged durable.
    ///
    /// # Errors
    /// The application's error.
    fn flush(&self, hold: &dyn Hold) -> Result<(), Stopped>;

    /// Makes the range read as zeros and gives its space back.
    ///
    /// # Errors
    /// The application's error.
    fn discard(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped>;

    /// Makes the range read as zeros.
    ///
    /// # Errors
    /// The application's error.
    fn write_zeroes(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped>;

    /// Reserves space for the range; its content stays.
    ///
    /// # Errors
    /// The application's error.
    fn allocate(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped>;

    /// The first offset at or after `offset` that holds data, or that holds none.
    ///
    /// # Errors
    /// The application's error; ENXIO when there is none.
    fn seek(&self, hold: &dyn Hold, offset: u64, hole: bool) -> Result<u64, Stopped>;

    /// This core has been given the gate under a new generation, and no other core changes anything any more: it adopts
    /// what outlives cores. Called before the first request, perhaps by several workers at the same time. The second
    /// call waits for the first and does nothing.
    fn adopt(&self, generation: u64);

    /// Checks briefly that the storage nodes can be read. Returns the number of blocks read.
    ///
    /// # Errors
    /// The error of the first node that cannot be read.
    fn probe(&self) -> Result<u32, Errno>;

    /// Version of the core, for clients that ask through the front end.
    fn version(&self) -> &str;
}
