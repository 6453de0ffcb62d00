//! What of a file lies in memory.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    ptr::NonNull,
};

use rustix::mm::{MapFlags, ProtFlags};

/// The page cache's unit.
const PAGE: u64 = 4096;
/// The most that is asked about at once.
const PAGES_MAX: usize = 512;

/// File systems whose splice_read takes no lock that a writer holds while it waits for the device (fs/ext4/file.c, fs/btrfs/file.c,
/// mm/shmem.c; XFS takes one), by the magic numbers of statfs(2).
const PLAIN: [u64; 3] = [0xEF53, 0x9123_683E, 0x0102_1994];

/// A file of which it can be known what of it lies in memory, and that can be sent from there (sendfile(2)) without the device
/// being waited for.
#[derive(Debug)]
pub struct CachedFile {
    file: std::fs::File,
    base: NonNull<u8>,
    len: u64,
}

// SAFETY: the mapping is never read or written, only asked about by its address, which is bound to no thread.
unsafe impl Send for CachedFile {}
// SAFETY: as above.
unsafe impl Sync for CachedFile {}

impl CachedFile {
    /// Opens the file behind a descriptor anew, so that reading it leaves no access time behind, and maps it without access.
    ///
    /// # Errors
    /// The operating system's; `Unsupported` on a file system that might wait for the device all the same.
    pub fn open(file: BorrowedFd<'_>, len: u64) -> io::Result<Self> {
        let kind = rustix::fs::fstatfs(file)?.f_type;
        if !u64::try_from(kind).is_ok_and(|kind| PLAIN.contains(&kind)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        use std::os::{fd::AsRawFd, unix::fs::OpenOptionsExt};
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = std::fs::File::options().read(true).custom_flags(libc::O_NOATIME | libc::O_CLOEXEC).open(path)?;
        let bytes = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let (prot, flags) = (ProtFlags::empty(), MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a fresh mapping without access at an address the kernel chooses; it aliases nothing of ours, and a file that is cut
        // short does no harm, for it is never touched.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, flags, &file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, base, len })
    }

    /// The file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether every page of the range is in the page cache and up to date: nobody waits for the device for it.
    pub fn holds(&self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.len && len > 0) else { return false };
        let first = offset / PAGE * PAGE;
        let (Ok(at), Ok(bytes)) = (usize::try_from(first), usize::try_from(end - first)) else { return false };
        let pages = bytes.div_ceil(4096);
        let mut found = [0_u8; PAGES_MAX];
        if pages > PAGES_MAX {
            return false;
        }
        // SAFETY: first lies below the mapping's length.
        let start = unsafe { self.base.add(at) };
        // SAFETY: the range ends in the last page of the mapping; mincore writes one byte for each of its pages, of which there are
        // at most PAGES_MAX, and touches nothing else.
        let done = unsafe { libc::mincore(start.as_ptr().cast(), bytes, found.as_mut_ptr()) };
        done == 0 && found.iter().take(pages).all(|page| page & 1 == 1)
    }
}

impl Drop for CachedFile {
    fn drop(&mut self) {
        let len = usize::try_from(self.len).unwrap_or(0);
        // SAFETY: base and len are those of the mapping that `open` made, and nobody has a reference into it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), len) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_written_is_held_and_a_hole_is_not() {
        let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        let cached = CachedFile::open(file.as_fd(), 1 << 20).unwrap();
        assert!(cached.holds(0, 4096) && cached.holds(4000, 6000));
        assert!(!cached.holds(8192, 8192) && !cached.holds(0, 0));
        assert!(!cached.holds(1 << 20, 1) && !cached.holds(u64::MAX, 2), "outside");
    }

    #[test]
    fn a_file_system_that_may_wait_is_refused() {
        let file = std::fs::File::open("/proc/self/status").unwrap();
        assert_eq!(CachedFile::open(file.as_fd(), 4096).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }
}
