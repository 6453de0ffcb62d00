//! Which parts of a file lie in memory, so that they can be sent from there without waiting for its disk.

use std::{fs::File, io, os::fd::AsFd, ptr::NonNull};

use rustix::{
    fs::Advice,
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

const PAGE: u64 = 4096;
/// Pages per query.
const PAGES: usize = 512;
/// A file system with fewer free blocks counts as full: some are kept for metadata.
const FULL_BLOCKS: u64 = 64;
/// File systems on which a read from memory does not wait (include/uapi/linux/magic.h): ext4, Btrfs, tmpfs. Others take
/// a lock that a writer holds (XFS), or ask a server whether the file has changed (NFS).
const SURE: [u64; 3] = [0xef53, 0x9123_683e, 0x0102_1994];

/// A file whose pages in memory are known.
#[derive(Debug)]
pub struct Resident {
    file: File,
    /// The whole file, mapped without access.
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is never accessed; it belongs to this value, and nothing about it is bound to a thread.
unsafe impl Send for Resident {}
// SAFETY: as above.
unsafe impl Sync for Resident {}

impl Resident {
    /// Takes a file whose open description has no other user. It should have been opened with `O_NOATIME`, because
    /// updating the access time waits for the disk as well.
    ///
    /// # Errors
    /// `Unsupported` on a file system that does not report it; the operating system's, where the file is too large to
    /// be mapped.
    pub fn new(file: File) -> io::Result<Self> {
        let kind = u64::try_from(rustix::fs::fstatfs(&file)?.f_type).unwrap_or(0);
        if !SURE.contains(&kind) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Without read-ahead, which waits when the disk's queue is full.
        rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address the kernel chooses, which nobody can access.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::empty(), flags, &file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, base, len })
    }

    /// The file.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Whether the range is not empty and lies in memory, already read in. (cachestat(2) does not tell that from a read
    /// under way.)
    pub fn has(&self, offset: u64, len: u64) -> bool {
        let begin = offset / PAGE * PAGE;
        let range = offset.checked_add(len).map(|end| (usize::try_from(begin), usize::try_from(end)));
        let Some((Ok(mut at), Ok(end))) = range else { return false };
        if len == 0 || end > self.len {
            return false;
        }
        let mut resident = [0_u8; PAGES];
        while at < end {
            let part = (end - at).min(PAGES * 4096);
            // SAFETY: at <= len, so this is inside the mapping or its end.
            let address = unsafe { self.base.add(at) };
            // SAFETY: [at, at + part) lies in the mapping, `at` at a page's beginning, and the kernel writes a byte for each page of it,
            // PAGES at most.
            let done = unsafe { libc::mincore(address.as_ptr().cast(), part, resident.as_mut_ptr()) };
            let pages = part.div_ceil(4096);
            if done != 0 || !resident.iter().take(pages).all(|page| page & 1 == 1) {
                return false;
            }
            at += part;
        }
        true
    }
}

/// Reserves space on a file system that cannot do so by fallocate(2): makes the pages of the range writable, as before
/// a store to them. No byte changes, even if other processes write at the same time. The range must lie inside the
/// file.
///
/// # Errors
/// `NOSPC` where there is no more space, `IO` where it fails otherwise, and the operating system's; `INVAL` before Linux 5.14.
pub fn reserve(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    let begin = offset / PAGE * PAGE;
    let len = offset.checked_add(len).and_then(|end| usize::try_from(end - begin).ok()).ok_or(Errno::INVAL)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address the kernel chooses, which nobody but the kernel accesses.
    let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, file, begin) }?;
    // SAFETY: the range is the whole mapping; populating it changes no byte, and fails where a store would.
    let reserved = unsafe { rustix::mm::madvise(base, len, rustix::mm::Advice::LinuxPopulateWrite) };
    // SAFETY: base and length are those of the mapping, and nobody has a reference into it.
    unsafe { rustix::mm::munmap(base, len) }?;
    match reserved {
        // A store would raise SIGBUS. The reason is not reported.
        Err(Errno::FAULT) if rustix::fs::fstatvfs(file)?.f_bavail < FULL_BLOCKS => Err(Errno::NOSPC),
        Err(Errno::FAULT) => Err(Errno::IO),
        done => done,
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping this value made, and nobody has a reference into it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl AsFd for Resident {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_written_is_in_memory_and_a_hole_is_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        let Ok(resident) = Resident::new(file.try_clone().unwrap()) else { return };
        file.write_all(&[1; 10_000]).unwrap();
        assert!(resident.has(0, 4096) && resident.has(4000, 6000));
        assert!(!resident.has(8192, 8192) && !resident.has(0, 0));
        assert!(!resident.has(u64::MAX, 1) && !resident.has(4 << 20, 1));
        file.write_all(&vec![1; (4 << 20) - 10_000]).unwrap();
        assert!(resident.has(0, 4 << 20) && resident.has(1, (4 << 20) - 1) && !resident.has(1, 4 << 20));
    }
}
