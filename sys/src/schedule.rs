//! How soon a thread that wakes gets a CPU.
//!
//! The scheduler (EEVDF) lets a thread use up its slice before one that has just woken, and checks at its tick: with the
//! usual slice of 0.7 to 3 ms and a tick of 4 ms, a thread that wakes beside a busy one waits for milliseconds. One with a shorter
//! slice goes first (`PREEMPT_SHORT` in kernel/sched/features.h). A slice changes when a thread runs, and not how
//! much: its share of the CPU is that of its nice value. Nobody needs a privilege for it. Since Linux 6.12; earlier kernels ignore the slice.

use std::io;

/// The shortest slice that the kernel grants, ns.
pub const PROMPT_NS: u64 = 100_000;

/// Whether the calling thread, and threads that it starts from now on, have the shortest slice. For work of less than that which others
/// wait for. Without effect where the kernel refuses, and for a thread of another scheduling policy than the usual ones.
pub fn set_prompt(is_prompt: bool) {
    let Ok(mut attributes) = attributes(0) else { return };
    if !is_fair(&attributes) {
        return;
    }
    // 0: the usual slice.
    attributes.sched_runtime = if is_prompt { PROMPT_NS } else { 0 };
    // A kernel that refuses leaves the usual slice: the thread is slower to wake, and works.
    // SAFETY: the kernel reads as many bytes as the structure's own `size` says, which it has set itself; process 0 is
    // the calling thread.
    let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

/// The slice of a thread in ns; `None` where the kernel tells none.
///
/// # Errors
/// The operating system's; ESRCH when there is no such thread.
pub fn slice_ns(tid: u32) -> io::Result<Option<u64>> {
    let attributes = attributes(tid)?;
    Ok(Some(attributes.sched_runtime).filter(|ns| is_fair(&attributes) && *ns > 0))
}

const fn is_fair(attributes: &libc::sched_attr) -> bool {
    matches!(attributes.sched_policy.cast_signed(), libc::SCHED_OTHER | libc::SCHED_BATCH)
}

/// The scheduling attributes of a thread; 0 is the calling one.
fn attributes(tid: u32) -> io::Result<libc::sched_attr> {
    // SAFETY: plain integers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: the kernel writes at most `size` bytes to the structure, which is that long and lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, size, 0) };
    if result == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::thread_id;

    /// D14: a thread's slice becomes the shortest and the usual one again, and a thread that it starts inherits it. Policy and nice value stay.
    #[test]
    fn a_slice_is_shortened_and_restored_and_nothing_else_changes() {
        std::thread::spawn(|| {
            let tid = thread_id();
            let before = attributes(0).unwrap();
            let Some(usual) = slice_ns(tid).unwrap() else { return };
            set_prompt(true);
            assert_eq!(slice_ns(tid).unwrap(), Some(PROMPT_NS));
            let inherited = std::thread::spawn(|| slice_ns(thread_id()).unwrap()).join().unwrap();
            assert_eq!(inherited, Some(PROMPT_NS));
            set_prompt(false);
            assert_eq!(slice_ns(tid).unwrap(), Some(usual));
            let after = attributes(0).unwrap();
            assert_eq!((after.sched_policy, after.sched_nice), (before.sched_policy, before.sched_nice));
            assert!(usual > PROMPT_NS && slice_ns(u32::MAX >> 1).is_err());
        })
        .join()
        .unwrap();
    }
}
