//! Processes that are remembered beyond the life of this one: a process id with its start time, so that a recycled id
//! is never taken for the process, let alone killed.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use everdisk_sys::{link::wait_readable, process, signal};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Doing, Result};

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
        Some(Self { pid, started: process::start_time(pid).ok()? })
    }

    /// A handle; none when the process has gone.
    ///
    /// # Errors
    /// The operating system's (no descriptor, no memory): whether it has gone is not known then.
    fn open(self) -> io::Result<Option<OwnedFd>> {
        let handle = process::pidfd(self.pid);
        // Looked at after the handle was made: what has this start time now is what the handle holds.
        match process::start_time(self.pid) {
            Ok(started) if started == self.started => handle.map(Some),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound || is_gone(&e) => Ok(None),
            Err(_) if handle.as_ref().is_err_and(is_gone) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether it runs, or this is unknown. A zombie does not run.
    pub fn alive(self) -> bool {
        self.open().map_or(true, |found| found.is_some_and(|handle| !process::is_gone(handle.as_fd())))
    }

    /// Waits until it has gone; kills it after `grace`. True when it has gone, false when it has not or this is unknown.
    pub fn end(self, grace: Duration) -> bool {
        if self.gone_within(grace) {
            return true;
        }
        if let Ok(Some(handle)) = self.open() {
            // One that has gone by now needs no signal; whether it has is asked next.
            let _ = signal::kill(handle.as_fd());
        }
        self.gone_within(KILLED_WITHIN)
    }

    /// Waits until it has gone. False when it has not, or this is unknown.
    pub fn gone_within(self, limit: Duration) -> bool {
        match self.open() {
            Ok(Some(handle)) => wait_readable(handle.as_fd(), limit).unwrap_or(false),
            Ok(None) => true,
            Err(_) => false,
        }
    }
}

/// Whether the operating system says that there is no such process.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// The interfaces and cores of a volume, told by its description `spec` among their arguments, with what they were
/// started as. Also finds what a control module started and died before it wrote down. Any other program with that argument (an
/// editor, a pager) is left out: a process of ours runs a program of that name, or one that lies in `cores`.
///
/// # Errors
/// They cannot be looked for (no descriptor, no memory): that is not to be taken for there being none.
pub fn of_volume(spec: &Path, cores: &Path) -> Result<Vec<(ProcessId, PathBuf)>> {
    search(spec, cores).doing(|| format!("look for the processes that run with {}", spec.display()))
}

fn search(spec: &Path, cores: &Path) -> io::Result<Vec<(ProcessId, PathBuf)>> {
    let own = rustix::process::geteuid().as_raw();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // What cannot be examined has gone, or is not ours.
        if !entry.metadata().is_ok_and(|found| found.uid() == own)
            || !fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| is_ours(&exe, cores))
        {
            continue;
        }
        match started_as(pid, spec) {
            Ok(process) => found.extend(process),
            Err(e) if e.kind() == io::ErrorKind::NotFound || is_gone(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// The process and the program it was started as, where its arguments have `spec`.
fn started_as(pid: u32, spec: &Path) -> io::Result<Option<(ProcessId, PathBuf)>> {
    let line = fs::read(format!("/proc/{pid}/cmdline"))?;
    let started = process::start_time(pid)?;
    let mut arguments = line.split(|byte| *byte == 0).map(|text| Path::new(OsStr::from_bytes(text)));
    let program = arguments.next().expect("even an empty line has a first part").to_owned();
    Ok(arguments.any(|argument| argument == spec).then_some((ProcessId { pid, started }, program)))
}

fn is_ours(exe: &Path, cores: &Path) -> bool {
    let ours = |name: &OsStr| {
        ["everdisk-core", "everdisk-interface"].iter().any(|ours| name.as_bytes().starts_with(ours.as_bytes()))
    };
    exe.file_name().is_some_and(ours) || exe.starts_with(cores)
}

/// Reads the identity of this boot of the machine, once: what was attached must not count as of another boot because no descriptor was
/// left to read it with.
///
/// # Errors
/// The operating system's.
pub fn read_boot_id() -> io::Result<&'static str> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(known) = BOOT_ID.get() {
        return Ok(known);
    }
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT_ID.get_or_init(|| text.trim().to_owned()))
}

/// Identity of this boot of the machine.
pub fn boot_id() -> String {
    read_boot_id().expect("the control module has read it at its start").to_owned()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_found_by_its_argument_and_its_program() {
        let dir = tempfile::tempdir().unwrap();
        let spec = dir.path().join("spec");
        let cores = dir.path().join("cores");
        fs::create_dir(&cores).unwrap();
        let tail = fs::canonicalize("/usr/bin/tail").unwrap();
        let programs = [dir.path().join("everdisk-core-9"), cores.join("any"), dir.path().join("pager")];
        let mut children = programs.each_ref().map(|program| {
            fs::copy(&tail, program).unwrap();
            let mut command = Command::new(program);
            command.arg("-F").arg(&spec).stderr(std::process::Stdio::null());
            crate::programs::spawn(&mut command).unwrap()
        });
        let mut found = of_volume(&spec, &cores).unwrap();
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        found.sort_unstable_by_key(|(id, _)| id.pid);
        let mut expected = [(children[0].id(), &programs[0]), (children[1].id(), &programs[1])];
        expected.sort_unstable();
        assert_eq!(found.iter().map(|(id, program)| (id.pid, program)).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn only_the_word_that_there_is_no_such_process_means_gone() {
        assert!(is_gone(&Errno::SRCH.into()));
        for other in [Errno::MFILE, Errno::NOMEM, Errno::INVAL] {
            assert!(!is_gone(&other.into()));
        }
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.open().unwrap().is_some());
        assert!(ProcessId { pid: u32::MAX, ..own }.open().unwrap().is_none());
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
