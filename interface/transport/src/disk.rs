//! What a front end needs of the core: a disk. Errors are errno values, because that is what applications get.

use std::os::fd::BorrowedFd;

/// An errno value, positive, of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

/// Why a request was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The application is told this.
    Errno(Errno),
    /// The gate was closed while the request waited: it stays unanswered, and whoever has the gate next carries it out.
    Abandoned,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// The right to carry out one request, as long as it lasts. While the holder waits for a storage node it goes away: nobody
/// waits for it then, and it has to come back before it changes or answers anything.
pub trait Hold {
    /// Whether writes have to go through to the storage nodes before they are acknowledged (M3), as of now.
    fn synchronous(&self) -> bool;

    /// From here on nothing is changed or answered.
    fn away(&self);

    /// From here on nothing is answered, and what is written to a storage node may as well be written again by another core.
    fn writing(&self);

    /// After [`Hold::away`] or [`Hold::writing`]: whether the request may go on. If not, return [`Failure::Abandoned`].
    #[must_use]
    fn back(&self) -> bool;

    /// What the holder waits for now usually takes long: whoever else is there may go on meanwhile.
    fn waits(&self) {}

    /// Of how many failed flushes the client was told; `None`: it is nobody who has to be told.
    fn errors_told(&self) -> Option<u64> {
        None
    }

    /// The answer to this request tells the client of so many. It counts once the answer is given.
    fn tells_errors(&self, _errors: u64) {}
}

/// A part of a file.
#[derive(Clone, Copy, Debug)]
pub struct FileRange<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where the part begins.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What lies behind a front end. Every call completes on the caller's thread; ranges lie within [`Disk::size`].
pub trait Disk: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// What the application shall see.
    fn read(&self, hold: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Failure>;

    /// The range as a part of a file that can be sent from (sendfile(2)): what stands there is what a read would give, and lies
    /// in memory. `None`: read it.
    fn in_memory(&self, _offset: u64, _len: u64) -> Option<FileRange<'_>> {
        None
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// What the application shall see; ENOSPC when a storage node is full.
    fn write(&self, hold: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Failure>;

    /// Makes everything acknowledged durable.
    ///
    /// # Errors
    /// What the application shall see.
    fn flush(&self, hold: &dyn Hold) -> Result<(), Failure>;

    /// Makes the range read as zeros and gives its space back.
    ///
    /// # Errors
    /// What the application shall see.
    fn discard(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Failure>;

    /// Makes the range read as zeros.
    ///
    /// # Errors
    /// What the application shall see.
    fn write_zeroes(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Failure>;

    /// Reserves space for the range; its content stays.
    ///
    /// # Errors
    /// What the application shall see.
    fn allocate(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Failure>;

    /// The first offset at or after `offset` that holds data, or that holds none.
    ///
    /// # Errors
    /// What the application shall see; ENXIO when there is none.
    fn seek(&self, hold: &dyn Hold, offset: u64, hole: bool) -> Result<u64, Failure>;

    /// This core has been given the gate under a new generation, and nobody else changes anything any more: it takes over what
    /// outlives cores. Called before the first request, perhaps by several workers at once; the second call waits for the
    /// first and does nothing.
    fn take_over(&self, generation: u64);

    /// Shortly tries whether the storage nodes can be read; the number of blocks read.
    ///
    /// # Errors
    /// That of the first node that cannot.
    fn probe(&self) -> Result<u32, Errno>;

    /// Version of the core, for whoever asks through the front end.
    fn version(&self) -> &str;
}
