//! What a front end needs of the core: a disk. Errors are errno values, because that is what applications get.

use everdisk_gate::hold::{self, Hold};
use everdisk_sys::file::FileRange;

/// An errno value, positive, of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

/// Why a request was not carried out: the application is told an errno, or the request stays unanswered.
pub type Stopped = hold::Stopped<Errno>;

/// What lies behind a front end. Every call completes on the caller's thread; ranges lie within [`Disk::size`].
pub trait Disk: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// What the application shall see.
    fn read(&self, hold: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Stopped>;

    /// The range as a part of a file that can be sent from (sendfile(2)): what stands there is what a read would give, and lies
    /// in memory. `None`: read it.
    fn in_memory(&self, _offset: u64, _len: u64) -> Option<FileRange<'_>> {
        None
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// What the application shall see; ENOSPC when a storage node is full.
    fn write(&self, hold: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Stopped>;

    /// Makes everything acknowledged durable.
    ///
    /// # Errors
    /// What the application shall see.
    fn flush(&self, hold: &dyn Hold) -> Result<(), Stopped>;

    /// Makes the range read as zeros and gives its space back.
    ///
    /// # Errors
    /// What the application shall see.
    fn discard(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped>;

    /// Makes the range read as zeros.
    ///
    /// # Errors
    /// What the application shall see.
    fn write_zeroes(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped>;

    /// Reserves space for the range; its content stays.
    ///
    /// # Errors
    /// What the application shall see.
    fn allocate(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped>;

    /// The first offset at or after `offset` that holds data, or that holds none.
    ///
    /// # Errors
    /// What the application shall see; ENXIO when there is none.
    fn seek(&self, hold: &dyn Hold, offset: u64, hole: bool) -> Result<u64, Stopped>;

    /// This core has been given the gate under a new generation, and nobody else changes anything any more: it takes over what
    /// outlives cores. Called before the first request, perhaps by several workers at once; the second call waits for the
    /// first and does nothing.
    fn adopt(&self, generation: u64);

    /// Shortly tries whether the storage nodes can be read; the number of blocks read.
    ///
    /// # Errors
    /// That of the first node that cannot.
    fn probe(&self) -> Result<u32, Errno>;

    /// Version of the core, for whoever asks through the front end.
    fn version(&self) -> &str;
}
