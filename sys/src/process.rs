//! Handles of processes and of what protects them.

use std::{
    fs, io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};

/// A handle of a process that stays its own even when the process id is used again.
///
/// # Errors
/// The operating system's; ESRCH when there is no such process.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether every thread of the process has gone: only then can none of its system calls still be under way.
pub fn is_gone(pidfd: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0)
}

/// Thread id of the caller.
pub fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
}

/// Tells the kernel that applications' I/O hangs on this process: the out-of-memory killer looks elsewhere first, and
/// its own memory allocations neither wait for I/O nor are throttled for dirty pages, which may be waiting for this
/// very process (PR_SET_IO_FLUSHER, prctl(2)). Threads started later inherit it. Needs CAP_SYS_RESOURCE; without it
/// nothing changes.
pub fn serve_io() {
    let _ = fs::write("/proc/self/oom_score_adj", "-900");
    let _ = rustix::process::configure_io_flusher_behavior(true);
}
