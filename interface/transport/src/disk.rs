//! What a front end needs of the core: a disk. Errors are errno values, because that is what applications get.

/// An errno value, positive, of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

/// What lies behind a front end. Every call completes on the caller's thread; ranges lie within [`Disk::size`].
pub trait Disk: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// What the application shall see.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno>;

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// What the application shall see; ENOSPC when a storage node is full.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Makes everything acknowledged durable.
    ///
    /// # Errors
    /// What the application shall see.
    fn flush(&self) -> Result<(), Errno>;

    /// Makes the range read as zeros and gives its space back.
    ///
    /// # Errors
    /// What the application shall see.
    fn discard(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Makes the range read as zeros.
    ///
    /// # Errors
    /// What the application shall see.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Reserves space for the range; its content stays.
    ///
    /// # Errors
    /// What the application shall see.
    fn allocate(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// The first offset at or after `offset` that holds data, or that holds none.
    ///
    /// # Errors
    /// What the application shall see; ENXIO when there is none.
    fn seek(&self, offset: u64, hole: bool) -> Result<u64, Errno>;

    /// Shortly tries whether the storage nodes can be read; the number of blocks read.
    ///
    /// # Errors
    /// That of the first node that cannot.
    fn probe(&self) -> Result<u32, Errno>;

    /// Version of the core, for whoever asks through the front end.
    fn version(&self) -> &str;
}
