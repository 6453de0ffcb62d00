//! Processes and mounts, told by the directories they name: nothing is ever chosen by a program's name alone.

use std::{fs, os::fd::AsFd, path::Path, time::Duration};

use everdisk_sys::{
    link::wait_readable,
    process::{is_gone, pidfd},
};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait::{SOON, until_true};

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
    let directory = directory.to_str().expect("a path in UTF-8");
    let own = std::process::id();
    let pids = fs::read_dir("/proc").expect("read /proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).filter(|pid| *pid != own);
    pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let named = line.contains(directory) || exe.starts_with(directory);
        named.then_some(Process { pid, line })
    })
    .collect()
}

/// Whether the process runs (a zombie does not).
pub fn is_alive(pid: u32) -> bool {
    pidfd(pid).is_ok_and(|handle| !is_gone(handle.as_fd()))
}

fn signal(pid: u32, signal: Signal) {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    let _ = kill_process(raw, signal);
}

/// kill -9, and waits until every thread has gone.
pub fn kill(pid: u32) {
    let handle = pidfd(pid);
    signal(pid, Signal::KILL);
    if let Ok(handle) = handle {
        assert!(wait_readable(handle.as_fd(), SOON).unwrap_or(true), "process {pid} does not end by SIGKILL");
    }
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
    let Ok(handle) = pidfd(pid) else { return true };
    signal(pid, Signal::TERM);
    wait_readable(handle.as_fd(), limit).unwrap_or(true)
}

/// A process that is stopped where it stands; it goes on when this is dropped. A test that fails meanwhile would
/// otherwise wait for ever for what the process holds.
#[derive(Debug)]
#[must_use]
pub struct Frozen(u32);

/// Stops a process, and waits until every thread of it stands.
pub fn freeze(pid: u32) -> Frozen {
    signal(pid, Signal::STOP);
    let frozen = Frozen(pid);
    until_true("a process stands", || {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let mut states = threads.filter_map(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat")).ok()?;
            // The name may hold anything, a parenthesis too; the state follows the last one.
            stat.rsplit_once(')')?.1.trim_start().chars().next()
        });
        states.all(|state| "TtZX".contains(state))
    });
    frozen
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

/// The mount points in `directory`, the topmost first.
pub fn mounts_in(directory: &Path) -> Vec<String> {
    mount_lines().into_iter().rev().filter_map(|line| target(&line, directory)).collect()
}

/// The line of mountinfo of the topmost mount on `path`.
pub fn mount_line(path: &Path) -> Option<String> {
    let wanted = path.to_str().expect("a path in UTF-8");
    mount_lines().into_iter().rev().find(|line| line.split(' ').nth(4) == Some(wanted))
}

fn mount_lines() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
    text.lines().map(str::to_owned).collect()
}

fn target(line: &str, directory: &Path) -> Option<String> {
    let target = line.split(' ').nth(4)?;
    Path::new(target).starts_with(directory).then(|| target.to_owned())
}
