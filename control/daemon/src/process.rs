//! Processes that are remembered beyond the life of this one: a process id with its start time, so that a recycled id
//! is never taken for the process, let alone killed.

use std::{
    ffi::OsStr,
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use everdisk_sys::{link::wait_readable, process, signal};
use serde::{Deserialize, Serialize};

/// After SIGKILL a process has gone within this time, unless it hangs in the kernel.
const KILLED_WITHIN: Duration = Duration::from_secs(5);

/// A process of this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks after boot, field 22 of /proc/PID/stat.
    pub started: u64,
}

impl ProcessId {
    /// The process that has `pid` now.
    pub fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, started: start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)? })
    }

    /// A handle, if the process still exists.
    pub fn open(self) -> Option<OwnedFd> {
        let handle = process::pidfd(self.pid).ok()?;
        // Looked at after the handle was made: what has this start time now is what the handle holds.
        (Self::of(self.pid)? == self).then_some(handle)
    }

    /// Whether it runs; a zombie does not.
    pub fn alive(self) -> bool {
        self.open().is_some_and(|handle| !process::is_gone(handle.as_fd()))
    }

    /// Waits until it has gone; kills it after `grace`. True when it has gone.
    pub fn end(self, grace: Duration) -> bool {
        let Some(handle) = self.open() else { return true };
        let gone_within = |limit| wait_readable(handle.as_fd(), limit).unwrap_or(false);
        if gone_within(grace) {
            return true;
        }
        let _ = signal::kill(handle.as_fd());
        gone_within(KILLED_WITHIN)
    }
}

/// Field 22; the second field is the program's name in parentheses and may contain anything.
fn start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The processes of which one argument is `argument`, with what they were started as. Finds what a control module
/// started and did not live to write down.
pub fn with_argument(argument: &Path) -> Vec<(ProcessId, PathBuf)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let found = pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut arguments = line.split(|byte| *byte == 0).map(|text| Path::new(OsStr::from_bytes(text)));
        let program = arguments.next()?.to_owned();
        arguments.any(|found| found == argument).then_some(())?;
        Some((ProcessId::of(pid)?, program))
    });
    found.collect()
}

/// Identity of this boot of the machine.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|text| text.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        assert_eq!(start_time(&format!("1 (a) b) {}", fields.join(" "))), Some(22));
        assert_eq!(start_time("garbage"), None);
    }

    #[test]
    fn a_process_is_found_by_its_argument() {
        let dir = tempfile::tempdir().unwrap();
        let argument = dir.path().join("spec");
        let mut child =
            Command::new("tail").arg("-F").arg(&argument).stderr(std::process::Stdio::null()).spawn().unwrap();
        let found = with_argument(&argument);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.iter().map(|(id, _)| id.pid).collect::<Vec<_>>(), [child.id()]);
        assert_eq!(found[0].1, Path::new("tail"));
    }

    #[test]
    fn another_start_time_is_another_process() {
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.alive());
        let recycled = ProcessId { started: own.started + 1, ..own };
        assert!(!recycled.alive());
        assert!(recycled.end(Duration::ZERO), "gone, and we were not killed");
    }

    #[test]
    fn a_process_that_does_not_go_is_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(id.alive());
        assert!(id.end(Duration::from_millis(10)));
        assert!(!id.alive(), "a zombie is not alive");
        child.wait().unwrap();
    }
}
