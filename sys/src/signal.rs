//! The signal that evicts a worker from a blocking read, and a daemon's disposition of the others.

use std::io;

use rustix::process::{Pid, Signal};

/// The eviction signal: SIGUSR1. Its handler does nothing and is installed without SA_RESTART, so that read(2) ends
/// with EINTR.
pub const EVICT: i32 = libc::SIGUSR1;

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the handler of [`EVICT`] for the whole process.
///
/// # Errors
/// The operating system's.
pub fn install_evict() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags (no SA_RESTART above all), an empty mask, no restorer.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as *const () as libc::sighandler_t;
    // SAFETY: `action` lives through the call, its handler is async-signal-safe (it does nothing) and the old action
    // is not asked for.
    let result = unsafe { libc::sigaction(EVICT, &raw const action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends [`EVICT`] to one thread of a process. A thread or process that is gone is no error.
pub fn evict(pid: u32, tid: u32) {
    let (Ok(pid), Ok(tid)) = (libc::pid_t::try_from(pid), libc::pid_t::try_from(tid)) else { return };
    if pid <= 1 || tid <= 1 {
        return;
    }
    // SAFETY: tgkill takes three integers and touches no memory of ours.
    let _ = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, EVICT) };
}

/// Sends SIGKILL to a process by its handle, so that a recycled process id is never hit.
///
/// # Errors
/// The operating system's; ESRCH when it is gone.
pub fn kill(pidfd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::process::pidfd_send_signal(pidfd, Signal::KILL)?)
}

/// Whether a process with this id exists (a zombie counts as existing).
pub fn exists(pid: u32) -> bool {
    i32::try_from(pid).ok().and_then(Pid::from_raw).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}
