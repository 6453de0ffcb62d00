//! What of a file lies in memory.

use std::os::fd::{AsRawFd, BorrowedFd};

/// cachestat(2), Linux 6.5; new system calls have the same number on every architecture. Not in libc yet.
const CACHESTAT: libc::c_long = 451;
const PAGE: u64 = 4096;

#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

#[derive(Default)]
#[repr(C)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether every page of the range is in the page cache. False also where the kernel does not tell.
pub fn is_cached(file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
    let (range, mut stat) = (Range { offset, len }, Stat::default());
    // SAFETY: the kernel reads a Range and writes a Stat, plain integers in its layout (include/uapi/linux/mman.h); both live on
    // the stack beyond the call.
    let done = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0) };
    let pages = (offset + len).div_ceil(PAGE) - offset / PAGE;
    done == 0 && len > 0 && stat.cached >= pages
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use super::*;

    #[test]
    fn what_was_written_is_cached_and_a_hole_is_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        if !is_cached(file.as_fd(), 0, 4096) {
            // A kernel before 6.5.
            return;
        }
        assert!(is_cached(file.as_fd(), 4000, 6000));
        assert!(!is_cached(file.as_fd(), 8192, 8192) && !is_cached(file.as_fd(), 0, 0));
    }
}
