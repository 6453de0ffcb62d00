//! Processes and mounts, identified by the directories they name: nothing is ever chosen by a program's name alone.

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

use everdisk_sys::{
    link::wait_readable,
    process::{is_gone, pidfd},
};
use procfs::process::{self, MountInfo};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    Error, Result,
    wait::{SOON, until_true},
};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its command line.
    pub line: String,
}

/// Every other process whose command line or program lies in, or names, `directory`. Zombies do not count.
pub fn naming(directory: &Path) -> Vec<Process> {
    let (own, name) = (std::process::id(), directory.to_string_lossy());
    let all = process::all_processes().expect("read /proc").flatten();
    all.filter_map(|process| {
        let pid = u32::try_from(process.pid).ok().filter(|pid| *pid != own)?;
        let line = process.cmdline().ok()?.join(" ");
        // A kernel's thread has none, and a program of another user's may not be asked for.
        let lies_there = process.exe().is_ok_and(|program| program.starts_with(directory));
        (line.contains(&*name) || lies_there).then_some(Process { pid, line })
    })
    .collect()
}

/// Whether the process runs (a zombie does not).
pub fn is_alive(pid: u32) -> bool {
    pidfd(pid).is_ok_and(|handle| !is_gone(handle.as_fd()))
}

/// Sends a signal; false when the process has gone.
pub fn signal(pid: u32, signal: Signal) -> bool {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(raw, signal).is_ok()
}

/// Sends a signal that ends a process and waits until every thread has gone; whether it did.
pub fn end(pid: u32, by: Signal, limit: Duration) -> bool {
    let Ok(handle) = pidfd(pid) else { return true };
    signal(pid, by);
    wait_readable(handle.as_fd(), limit).unwrap_or(true)
}

/// kill -9, and waits until every thread has gone.
pub fn kill(pid: u32) {
    assert!(end(pid, Signal::KILL, SOON), "process {pid} does not end by SIGKILL");
}

/// kill -9 of several at once: every signal is sent before the first end is awaited.
pub fn kill_together(pids: &[u32]) {
    for pid in pids {
        signal(*pid, Signal::KILL);
    }
    for pid in pids {
        kill(*pid);
    }
}

/// Asks a process to end; whether it did.
pub fn terminate(pid: u32, limit: Duration) -> bool {
    end(pid, Signal::TERM, limit)
}

/// Ends a child politely, then not; whether politely was enough.
pub fn end_child(child: &mut Child, limit: Duration) -> bool {
    // One that has ended already and was not waited for is a zombie, which has no signals to obey.
    let politely = terminate(child.id(), limit);
    if !politely {
        let _ = child.kill();
    }
    let _ = child.wait();
    politely
}

/// A process that is stopped where it stands; it goes on when this is dropped. A test that fails would
/// otherwise wait for ever for what the process holds.
#[derive(Debug)]
#[must_use]
pub struct Frozen(u32);

/// Stops a process, and waits until every thread of it is stopped.
pub fn freeze(pid: u32) -> Frozen {
    signal(pid, Signal::STOP);
    let frozen = Frozen(pid);
    until_true("a process stands", || {
        let threads = of(pid).and_then(|process| process.tasks());
        let mut states = threads.into_iter().flatten().flatten().filter_map(|thread| Some(thread.stat().ok()?.state));
        states.all(|state| "TtZX".contains(state))
    });
    frozen
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

/// A process in /proc.
pub(crate) fn of(pid: u32) -> procfs::ProcResult<process::Process> {
    process::Process::new(i32::try_from(pid).expect("a process id"))
}

/// CPU time that a process used so far, all its threads together, the kernel's work for it among it.
///
/// # Errors
/// It has gone.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = of(pid).and_then(|process| process.stat()).map_err(|e| lost(pid, &e))?;
    Ok(Duration::from_secs_f64((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64))
}

fn lost(pid: u32, why: &procfs::ProcError) -> Error {
    Error::Failed(format!("cannot inspect process {pid}: {why}"))
}

/// Memory of a process, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident.
    pub rss: u64,
    /// Resident, pages that others share counted in part.
    pub pss: u64,
    /// Resident and of this process alone.
    pub private: u64,
    /// Locked.
    pub locked: u64,
}

impl Memory {
    /// Of the process `pid`.
    ///
    /// # Errors
    /// It has gone, or belongs to another user.
    pub fn of(pid: u32) -> Result<Self> {
        let process = of(pid).map_err(|e| lost(pid, &e))?;
        let rollup = process.smaps_rollup().map_err(|e| lost(pid, &e))?.memory_map_rollup;
        let status = process.status().map_err(|e| lost(pid, &e))?;
        let bytes = |name: &str| rollup.0.iter().filter_map(|map| map.extension.map.get(name)).sum::<u64>();
        Ok(Self {
            rss: bytes("Rss") / 1024,
            pss: bytes("Pss") / 1024,
            private: (bytes("Private_Clean") + bytes("Private_Dirty")) / 1024,
            locked: status.vmlck.unwrap_or(0),
        })
    }
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Its number. The kernel gives it to another mount when this one has gone.
    pub id: i32,
    /// The file system, major and minor number.
    pub device: String,
    /// Where.
    pub path: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// What it was mounted from.
    pub source: Option<String>,
}

impl From<MountInfo> for Mounted {
    fn from(info: MountInfo) -> Self {
        let MountInfo { mnt_id, majmin, mount_point, fs_type, mount_source, .. } = info;
        Self { id: mnt_id, device: majmin, path: mount_point, kind: fs_type, source: mount_source }
    }
}

/// Every mount, the topmost first.
fn mounts() -> impl Iterator<Item = Mounted> {
    let mounts = process::Process::myself().and_then(|process| process.mountinfo()).expect("read mountinfo");
    mounts.0.into_iter().rev().map(Mounted::from)
}

/// The mount points in `directory`, the topmost first.
pub fn mounts_in(directory: &Path) -> Vec<PathBuf> {
    mounts().map(|mount| mount.path).filter(|path| path.starts_with(directory)).collect()
}

/// The topmost mount on `path`.
pub fn mount_on(path: &Path) -> Option<Mounted> {
    mounts().find(|mount| mount.path == path)
}

/// Takes the topmost mount on `path` out of the tree, even if it is in use.
pub fn unmount(path: &Path) {
    if let Ok(Some(mount)) = everdisk_sys::mounts::at(path) {
        let _ = everdisk_sys::fuse::unmount(&mount, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_goes_on_with_work() {
        let before = cpu_time(std::process::id()).unwrap();
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_secs(5) && cpu_time(std::process::id()).unwrap() == before {}
        let used = cpu_time(std::process::id()).unwrap() - before;
        assert!(!used.is_zero() && used < Duration::from_secs(5), "{used:?}");
    }

    #[test]
    fn memory_is_told_in_kib() {
        let memory = Memory::of(std::process::id()).unwrap();
        assert!(memory.rss > 500 && memory.rss < 1 << 20 && memory.private <= memory.rss, "{memory:?}");
    }
}
