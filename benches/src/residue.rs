//! What could be left behind: processes that bear our directories in their command line, and mounts below them.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use everdisk_sys::fuse;
use rustix::process::{Pid, Signal, kill_process};

/// A process that was killed has gone within this time.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Processes, other than this one, whose command line names a path below one of `directories`: (id, name).
pub fn processes(directories: &[PathBuf]) -> Vec<(u32, String)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let ours = |line: &str| directories.iter().any(|dir| line.contains(&*dir.to_string_lossy()));
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            (pid != std::process::id() && ours(&String::from_utf8_lossy(&line))).then_some(())?;
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            Some((pid, name.trim_end().to_owned()))
        })
        .collect()
}

/// Mount points at or below one of `directories`.
pub fn mounts(directories: &[PathBuf]) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.map(PathBuf::from).filter(|point| directories.iter().any(|dir| point.starts_with(dir))).collect()
}

/// Kills every process of ours and unmounts what is mounted; returns what had to be ended by force.
pub fn remove(directories: &[PathBuf]) -> Vec<String> {
    let mut forced = Vec::new();
    let deadline = Instant::now() + GONE_WITHIN;
    loop {
        let left = processes(directories);
        if left.is_empty() || Instant::now() > deadline {
            break;
        }
        for (pid, name) in left {
            let label = format!("process {name} ({pid})");
            if kill(pid, Signal::KILL) && !forced.contains(&label) {
                forced.push(label);
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    for point in mounts(directories) {
        forced.push(format!("mount {}", point.display()));
        if let Ok(Some(mount)) = everdisk_sys::mounts::at(&point) {
            let _ = fuse::unmount(&mount, true);
        }
    }
    forced
}

/// What is there now, in words.
pub fn list(directories: &[PathBuf]) -> Vec<String> {
    let processes = processes(directories).into_iter().map(|(pid, name)| format!("process {name} ({pid})"));
    let mounts = mounts(directories).into_iter().map(|point| format!("mount {}", point.display()));
    let files = directories.iter().filter(|dir| Path::exists(dir)).map(|dir| format!("directory {}", dir.display()));
    processes.chain(mounts).chain(files).collect()
}

/// Sends a signal to a process of ours; false when it has gone.
pub fn kill(pid: u32, signal: Signal) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
}
