//! Process handles, resource limits and capabilities.

use std::{
    fs, io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, Resource, Rlimit, getrlimit, setrlimit},
};

/// A handle of a process. It refers to this process even when the process id is reused.
///
/// # Errors
/// The operating system's; ESRCH when there is no such process.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Bytes of memory this process may lock; `None`: any number. In a container root may lack the capability.
pub fn lockable_bytes() -> Option<u64> {
    if has_capability(CAP_IPC_LOCK) { None } else { getrlimit(Resource::Memlock).current }
}

/// Descriptors this process may have; `None`: any number.
pub fn descriptors() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// Bytes a file of this process may have; `None`: any number. A write beyond kills the process.
pub fn file_bytes() -> Option<u64> {
    getrlimit(Resource::Fsize).current
}

/// Numbers of capabilities(7).
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_RESOURCE: u32 = 24;

/// Whether this process has a capability, by the effective set in /proc/self/status.
fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & 1 << number != 0)
}

/// Raises the limits that a volume may need, where they are lower than that: up to the hard limit, and beyond it where
/// this process may. Processes that are started later inherit them.
pub fn raise_limits() {
    let may = has_capability(CAP_SYS_RESOURCE);
    for (resource, wanted) in [
        (Resource::Memlock, None),
        (Resource::Fsize, None),
        // More would cost time in programs that iterate over all of them, and the kernel has a ceiling (fs.nr_open).
        (Resource::Nofile, Some(DESCRIPTORS_WANTED)),
    ] {
        let now = getrlimit(resource);
        let least = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let is_less = |a: Option<u64>, b: Option<u64>| a.is_some_and(|a| b.is_none_or(|b| a < b));
        if !is_less(now.current, wanted) {
            continue;
        }
        let raised =
            Rlimit { current: wanted, maximum: if is_less(now.maximum, wanted) { wanted } else { now.maximum } };
        if !may || setrlimit(resource, raised).is_err() {
            let _ = setrlimit(resource, Rlimit { current: least(now.maximum, wanted), maximum: now.maximum });
        }
    }
}

/// An interface or a core with every NBD connection and storage node has less than a quarter of them.
const DESCRIPTORS_WANTED: u64 = 4096;

/// Whether every thread of the process has gone. Only then none of its system calls can be under way.
pub fn is_gone(pidfd: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0)
}

/// When a process was started, in clock ticks after boot: field 22 of /proc/PID/stat. Tells it from a later one with the
/// same process id.
///
/// # Errors
/// The operating system's; `NotFound` when there is no such process.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The program's name is in parentheses and may hold any character; the fields after it are plain.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    fields.split(' ').nth(19).and_then(|field| field.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// How often the calling thread has gone to sleep voluntarily (getrusage(2), `ru_nvcsw`): waiting for a device or
/// another thread, not for a CPU.
pub fn voluntary_switches() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: RUSAGE_THREAD writes one rusage, plain integers, to the pointer, which is to a live one.
    let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    // SAFETY: zeroed, and written by the call or not; every bit pattern of its integers is valid.
    let usage = unsafe { usage.assume_init() };
    assert!(result == 0, "a thread may ask for its own usage");
    u64::try_from(usage.ru_nvcsw).expect("a count")
}

/// Thread id of the caller.
pub fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
}

/// Maps those parts of the program's code and constants that lie in the page cache. A standby that is given the gate
/// executes most of its code for the first time then, and each page would cost a fault. Failures are ignored.
pub fn prefault_program() {
    let (Ok(maps), Ok(program)) = (fs::read_to_string("/proc/self/maps"), fs::read_link("/proc/self/exe")) else {
        return;
    };
    for line in maps.lines().filter(|line| line.ends_with(&*program.to_string_lossy())) {
        let mut fields = line.split(' ');
        let (range, rights) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let Some((from, to)) = range.split_once('-') else { continue };
        let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)) else { continue };
        if rights.starts_with('r') && to > from {
            let address = std::ptr::with_exposed_provenance_mut(from);
            // SAFETY: populating for reading changes no byte and no right of a mapping; one that is gone then is an error.
            let _ = unsafe { rustix::mm::madvise(address, to - from, rustix::mm::Advice::LinuxPopulateRead) };
        }
    }
}

/// Tells the kernel that applications' I/O depends on this process. The out-of-memory killer prefers other processes.
/// The process's own memory allocations neither wait for I/O nor are throttled for dirty pages, which may be waiting
/// for this very process (PR_SET_IO_FLUSHER, prctl(2)). Threads started later inherit it. Needs CAP_SYS_RESOURCE;
/// without it nothing changes. Core dumps are disabled: one would hold users' data, and the process would count as
/// alive until it is complete. A limit of 1 byte prevents a dump to a file and one to a program (`|` in core_pattern),
/// which a limit of 0 does not (core(5), `do_coredump` in fs/coredump.c). An empty filter leaves the memory out where
/// the limit cannot be set.
pub fn serve_io() {
    raise_limits();
    let maximum = getrlimit(Resource::Core).maximum;
    let limit = Rlimit { current: Some(maximum.map_or(1, |maximum| maximum.min(1))), maximum };
    let _ = setrlimit(Resource::Core, limit);
    let _ = fs::write("/proc/self/coredump_filter", "0");
    let _ = fs::write("/proc/self/oom_score_adj", "-900");
    let _ = rustix::process::configure_io_flusher_behavior(true);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_is_counted_and_computing_is_not() {
        let before = voluntary_switches();
        let sum: u64 = (0..100_000).map(std::hint::black_box).sum();
        let computed = voluntary_switches() - before;
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(computed == 0 && sum > 0 && voluntary_switches() > before);
    }

    #[test]
    fn limits_are_raised_and_never_lowered() {
        let all = || [lockable_bytes(), descriptors(), file_bytes()].map(|limit| limit.unwrap_or(u64::MAX));
        let before = all();
        raise_limits();
        assert!(all().iter().zip(before).all(|(now, before)| *now >= before), "{before:?} {:?}", all());
    }

    #[test]
    fn a_process_keeps_its_start_time() {
        let mine = start_time(std::process::id()).unwrap();
        assert_eq!(start_time(std::process::id()).unwrap(), mine);
        assert!(mine >= start_time(1).unwrap());
        assert!(start_time(u32::MAX).is_err());
    }
}
