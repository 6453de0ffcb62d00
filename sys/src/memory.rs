//! Shared memory and locked buffers.

use std::{
    io,
    ops::{Deref, DerefMut},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::atomic::Ordering,
};

use everdisk_proto::segment::{MAGIC, SEGMENT_BYTES, Segment};
use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{MapFlags, MlockFlags, ProtFlags},
};

/// A mapping of `len` bytes that is unmapped on drop.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that belongs to this value; nothing about it is bound to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared access happens only through the owners below, which hand out either `&Segment` (all atomics) or
// slices under Rust's borrow rules.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are those of a mapping this value made, and every borrow of it has ended.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The segment of a volume (D4), mapped.
#[derive(Debug)]
pub struct SharedSegment {
    mapping: Mapping,
    fd: OwnedFd,
}

impl SharedSegment {
    /// Makes a new, zeroed segment: a memfd that can neither shrink nor grow.
    ///
    /// # Errors
    /// The operating system's.
    pub fn create() -> io::Result<Self> {
        let fd = rustix::fs::memfd_create("everdisk-segment", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, SEGMENT_BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(fd)
    }

    /// Maps a segment that another process lent, after checking that it is one: its length, that it is sealed (a
    /// peer that shrinks it would have us killed by SIGBUS) and its magic.
    ///
    /// # Errors
    /// `InvalidData` when it is none, else the operating system's.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let bad = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let len = rustix::fs::fstat(&fd)?.st_size;
        if usize::try_from(len) != Ok(SEGMENT_BYTES) {
            return bad("the segment has another length than this program's");
        }
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return bad("the segment is not sealed");
        }
        let segment = Self::map(fd)?;
        if segment.header.magic.load(Ordering::Acquire) != MAGIC {
            return bad("the segment has no magic");
        }
        Ok(segment)
    }

    fn map(fd: OwnedFd) -> io::Result<Self> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a fresh mapping at an address the kernel chooses; it aliases nothing of ours.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), SEGMENT_BYTES, ProtFlags::READ | ProtFlags::WRITE, flags, &fd, 0)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { mapping: Mapping { base, len: SEGMENT_BYTES }, fd })
    }
}

impl Deref for SharedSegment {
    type Target = Segment;
    fn deref(&self) -> &Segment {
        const { assert!(align_of::<Segment>() <= 4096) };
        // SAFETY: the mapping is page-aligned, SEGMENT_BYTES long (sealed, so it stays so) and lives as long as self;
        // every field of Segment is an atomic valid for all bit patterns, so other processes may change it meanwhile.
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
