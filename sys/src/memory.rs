//! Shared memory and locked buffers.

use std::{
    io,
    ops::{Deref, DerefMut},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use everdisk_proto::{
    buffer::Geometry,
    limits::BUFFER_MAX,
    segment::{MAGIC, SEGMENT_BYTES, Segment},
};
use rustix::{
    fs::{FallocateFlags, MemfdFlags, SealFlags},
    mm::{MapFlags, MlockFlags, ProtFlags},
};

/// A mapping of `len` bytes that is unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) base: NonNull<u8>,
    pub(crate) len: usize,
}

// SAFETY: the mapping is plain memory that belongs to this value; nothing about it is bound to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared access happens only through the owners below, which hand out either `&Segment` (all atomics) or
// slices under Rust's borrow rules, and [`crate::in_flight`], which does the same.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are those of a mapping this value made, and every borrow of it has ended.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The segment of a volume (D4), mapped, with the write buffer behind it. The buffer has no bytes where the volume has
/// none.
#[derive(Debug)]
pub struct SharedSegment {
    mapping: Mapping,
    fd: OwnedFd,
    geometry: Geometry,
}

impl SharedSegment {
    /// Makes a new, zeroed segment with a write buffer for this many bytes of data (0: none): a memfd that can neither
    /// shrink nor grow, with its memory reserved.
    ///
    /// # Errors
    /// The operating system's; `InvalidInput` for a buffer of more than [`BUFFER_MAX`] bytes.
    pub fn create(buffer: u64) -> io::Result<Self> {
        if buffer > BUFFER_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let geometry = Geometry::new(buffer);
        let len = SEGMENT_BYTES as u64 + geometry.bytes();
        let fd = rustix::fs::memfd_create("everdisk-segment", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, len)?;
        // Reserved now: later, a process that touches a page without memory would be killed.
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let segment = Self::map(fd, len, geometry)?;
        segment.header.bytes.store(len, Ordering::Relaxed);
        segment.header.buffer_capacity.store(buffer, Ordering::Relaxed);
        Ok(segment)
    }

    /// Maps a segment that another process lent, after checking it: that it is sealed (a peer that shrinks it would
    /// have us killed by SIGBUS), its magic, and that its length is the one in its header.
    ///
    /// # Errors
    /// `InvalidData` when it is none, else the operating system's.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let bad = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let Ok(len) = u64::try_from(rustix::fs::fstat(&fd)?.st_size) else { return bad("the segment has no length") };
        let shortest = SEGMENT_BYTES as u64 + Geometry::new(0).bytes();
        let longest = SEGMENT_BYTES as u64 + Geometry::new(BUFFER_MAX).bytes();
        if !(shortest..=longest).contains(&len) {
            return bad("the segment has another length than this program's");
        }
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return bad("the segment is not sealed");
        }
        let mut segment = Self::map(fd, len, Geometry::new(0))?;
        if segment.header.magic.load(Ordering::Acquire) != MAGIC {
            return bad("the segment has no magic");
        }
        let capacity = segment.header.buffer_capacity.load(Ordering::Relaxed);
        if capacity > BUFFER_MAX || len != SEGMENT_BYTES as u64 + Geometry::new(capacity).bytes() {
            return bad("the segment has another length than its header says");
        }
        segment.geometry = Geometry::new(capacity);
        Ok(segment)
    }

    fn map(fd: OwnedFd, len: u64, geometry: Geometry) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a fresh mapping at an address the kernel chooses; it aliases nothing of ours.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, &fd, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { mapping: Mapping { base, len }, fd, geometry })
    }

    /// The write buffer's geometry; its capacity is 0 when the volume has none.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// A word of the write buffer's header or slots; `None` when there is no such index.
    pub fn buffer_word(&self, index: usize) -> Option<&AtomicU64> {
        if index as u64 >= self.geometry.data_start() / 8 {
            return None;
        }
        // SAFETY: below data_start, so inside the mapping, whose length `create` and `adopt` have checked.
        let word = unsafe { self.mapping.base.add(SEGMENT_BYTES + index * 8) };
        // SAFETY: aligned (the mapping to a page, SEGMENT_BYTES and the index to eight bytes), alive as long as self, and
        // touched by every process as an atomic only.
        Some(unsafe { word.cast::<AtomicU64>().as_ref() })
    }

    /// The part of the mapping that holds these bytes of the buffer's data ring; `None` when they are not in it.
    fn buffer_data(&self, at: u64, len: usize) -> Option<NonNull<u8>> {
        let geometry = self.geometry;
        let end = at.checked_add(len as u64)?;
        let start = usize::try_from(geometry.data_start() + at).ok()?;
        // SAFETY: the range ends at or before the ring does, and the ring is inside the mapping.
        (end <= geometry.capacity).then(|| unsafe { self.mapping.base.add(SEGMENT_BYTES + start) })
    }

    /// Copies bytes out of the write buffer's data ring. False when they are not inside it. Bytes that another process
    /// writes there at the same time may come out in any mixture: a reader that is not certain that they stand still
    /// verifies them afterwards.
    #[must_use]
    pub fn buffer_read(&self, at: u64, into: &mut [u8]) -> bool {
        let Some(from) = self.buffer_data(at, into.len()) else { return false };
        // SAFETY: source and target are valid for the length, and do not overlap: the target is a borrow of other memory.
        // The source is shared memory that no Rust reference covers.
        unsafe { from.as_ptr().copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies bytes into the write buffer's data ring. False when they would not lie inside it.
    #[must_use]
    pub fn buffer_write(&self, at: u64, from: &[u8]) -> bool {
        let Some(into) = self.buffer_data(at, from.len()) else { return false };
        // SAFETY: as in `buffer_read`, the other way round.
        unsafe { into.as_ptr().copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        true
    }
}

impl Deref for SharedSegment {
    type Target = Segment;
    fn deref(&self) -> &Segment {
        const { assert!(align_of::<Segment>() <= 4096) };
        // SAFETY: the mapping is page-aligned, at least SEGMENT_BYTES long (sealed, so it stays so) and lives as long as self;
        // every field of Segment is an atomic valid for all bit patterns, so other processes may change it at any time.
        unsafe { self.mapping.base.cast::<Segment>().as_ref() }
    }
}

impl AsFd for SharedSegment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A page-aligned buffer whose pages are resident and locked.
///
/// The kernel copies a request into it while the core may be killed; a page that is not resident then gives the
/// *application* EIO, because the copy cannot fault a page in for a dying process.
#[derive(Debug)]
pub struct LockedBuffer {
    mapping: Mapping,
}

impl LockedBuffer {
    /// A zeroed buffer of `len` bytes (rounded up to pages).
    ///
    /// # Errors
    /// The operating system's; `OutOfMemory` with advice when RLIMIT_MEMLOCK is too small.
    pub fn new(len: usize) -> io::Result<Self> {
        let len = len.next_multiple_of(4096);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh anonymous mapping at an address the kernel chooses; it aliases nothing of ours.
        let base = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE | MapFlags::POPULATE)
        }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Mapping { base, len };
        // SAFETY: the range is exactly the mapping just made.
        unsafe { rustix::mm::mlock_with(mapping.base.as_ptr().cast(), len, MlockFlags::empty()) }.map_err(|e| {
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("cannot lock {len} bytes of memory ({e}): raise RLIMIT_MEMLOCK (ulimit -l) or run as root"),
            )
        })?;
        Ok(Self { mapping })
    }
}

impl Deref for LockedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: base and len are those of a live, initialised (zeroed by the kernel) private mapping that only self owns.
        unsafe { slice::from_raw_parts(self.mapping.base.as_ptr(), self.mapping.len) }
    }
}

impl DerefMut for LockedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes this the only borrow.
        unsafe { slice::from_raw_parts_mut(self.mapping.base.as_ptr(), self.mapping.len) }
    }
}
