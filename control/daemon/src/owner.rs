//! One control module for each directory: a lock on a file in it that lasts as long as the process. The file names the holder.
//!
//! The run directory has the sockets, the state directory the volumes. Two control modules with one state directory would each believe
//! that the volumes are theirs, whatever their run directories; so both directories are locked.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use everdisk_api::directories::Directories;
use everdisk_sys::lock::{self, Holders, LockError};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::error::{Doing, Error, Result};

/// A record is no longer than this.
const RECORD_BYTES_MAX: u64 = 16 << 10;

/// The directories of this control module, until the process ends, however it does.
#[derive(Debug)]
#[must_use = "the directories are given up when it is dropped"]
pub struct Owned(#[expect(dead_code, reason = "held, not read")] [File; 2]);

/// What the holder of a lock wrote beside it. It may be of one that has gone; the lock itself never is.
#[derive(Debug, Serialize, Deserialize)]
struct OwnerRecord {
    pid: u32,
    host: String,
    run_dir: PathBuf,
    state_dir: PathBuf,
}

/// Takes both directories.
///
/// # Errors
/// Another control module has one of them; the error names it.
pub fn own(directories: &Directories) -> Result<Owned> {
    let record = OwnerRecord {
        pid: std::process::id(),
        host: host(),
        run_dir: directories.run.clone(),
        state_dir: directories.state.clone(),
    };
    let state = take(&directories.state.join("owner.lock"), "state directory", "--state-dir", &record)?;
    let run = take(&directories.run.join("everdiskd.lock"), "run directory", "--run-dir", &record)?;
    Ok(Owned([state, run]))
}

fn take(path: &Path, what: &str, option: &str, record: &OwnerRecord) -> Result<File> {
    // Kept for reading only: who keeps a file open for writing keeps its file system from being mounted read-only anew.
    let open = || File::options().create(true).truncate(false).write(true).open(path).and_then(|_| File::open(path));
    let mut file = open().doing(|| format!("open {}", path.display()))?;
    match lock::exclusive(file.as_fd()) {
        Ok(()) => {}
        Err(LockError::Held(holders)) => {
            return Err(Error::State(format!(
                "another everdiskd runs with this {what} ({} is locked): {}; stop it first, or give another {option}",
                path.display(),
                holder(&mut file, &holders)
            )));
        }
        Err(LockError::Unsupported(source)) => {
            return Err(Error::State(format!(
                "the file system of {} gives no locks ({source}), so nothing would keep a second everdiskd off this {what}: \
                 give a {option} on another file system",
                path.display()
            )));
        }
        Err(LockError::Io(source)) => return Err(Error::Io { doing: format!("lock {}", path.display()), source }),
    }
    // It only helps a process that is refused: a full disk is no reason not to start.
    if let Err(e) = File::options().write(true).open(path).and_then(|mut file| write(&mut file, record)) {
        warn!("cannot write the holder into {}: {e}", path.display());
    }
    Ok(file)
}

fn write(file: &mut File, record: &OwnerRecord) -> std::io::Result<()> {
    let text = serde_json::to_vec(record)?;
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&text)
}

/// The holder of the lock. The record counts when it names a process that has the lock now, or when no holder is visible.
fn holder(file: &mut File, holders: &Holders) -> String {
    let mut text = String::new();
    let read = file.take(RECORD_BYTES_MAX).read_to_string(&mut text);
    let record = read.ok().and_then(|_| serde_json::from_str::<OwnerRecord>(&text).ok());
    match record {
        Some(record) if holders.0.iter().any(|holder| holder.pid == record.pid) && record.host == host() => format!(
            "process {}, run directory {}, state directory {}",
            record.pid,
            record.run_dir.display(),
            record.state_dir.display()
        ),
        Some(record) if holders.0.is_empty() => format!(
            "it cannot be seen from here; the last that took it was process {} on {}, run directory {}",
            record.pid,
            record.host,
            record.run_dir.display()
        ),
        _ => holders.to_string(),
    }
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use everdisk_sys::lock::Holder;

    use super::*;

    fn directories(root: &Path, run: &str, state: &str) -> Directories {
        let directories = Directories { run: root.join(run), state: root.join(state) };
        for path in [&directories.run, &directories.state] {
            fs::create_dir_all(path).unwrap();
        }
        directories
    }

    #[test]
    fn a_directory_has_one_control_module_and_the_refusal_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = own(&directories(dir.path(), "run", "state")).unwrap();
        let why = |run: &str, state: &str| own(&directories(dir.path(), run, state)).unwrap_err().to_string();
        let (pid, run) = (format!("process {}", std::process::id()), dir.path().join("run").display().to_string());
        for (refused, option) in [(why("run2", "state"), "--state-dir"), (why("run", "state2"), "--run-dir")] {
            assert!(refused.contains("another everdiskd runs") && refused.contains(option), "{refused}");
            assert!(refused.contains(&pid) && refused.contains(&run), "{refused}");
        }
        drop(first);
        own(&directories(dir.path(), "run2", "state")).map(drop).unwrap();
        own(&directories(dir.path(), "one", "one")).map(drop).expect("one directory for both");
    }

    #[test]
    fn a_record_of_one_that_has_gone_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = File::options().create_new(true).read(true).write(true).open(dir.path().join("l")).unwrap();
        let record = OwnerRecord { pid: 7, host: host(), run_dir: "/old".into(), state_dir: "/s".into() };
        write(&mut file, &record).unwrap();
        let mut told = |pids: &[u32]| {
            file.seek(SeekFrom::Start(0)).unwrap();
            let holders = pids.iter().map(|pid| Holder { pid: *pid, line: "everdiskd".to_owned() }).collect();
            holder(&mut file, &Holders(holders))
        };
        assert_eq!(told(&[7]), "process 7, run directory /old, state directory /s");
        assert_eq!(told(&[8]), "process 8 (everdiskd)");
        assert!(told(&[]).contains("cannot be seen") && told(&[]).contains("the last that took it was process 7"));
    }
}
