//! Locking a file by an exclusive flock(2), and finding the processes that hold the lock.
//!
//! The lock belongs to the open file description. It lasts as long as any process has a descriptor of it: the one that
//! took it, or one that was sent a copy. It ends with the last of them, however they end. Where another process has the
//! lock, procfs names it.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    os::{fd::BorrowedFd, unix::fs::MetadataExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::FlockOperation,
    io::{Errno, retry_on_intr},
};

use crate::mounts;

/// A holder that is ending may take this long until the kernel has closed its files.
const ENDING: Duration = Duration::from_millis(500);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Longest part of a command line that is shown.
const LINE_CHARS_MAX: usize = 300;

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("it is in use by {0}")]
    Held(Holders),
    /// The file system has no locks, or its lock service does not answer.
    #[error("its file system gives no locks ({0})")]
    Unsupported(io::Error),
    /// The operating system's error.
    #[error("cannot lock it: {0}")]
    Io(#[from] io::Error),
}

/// The processes that have a lock, as far as they are visible.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders(pub Vec<Holder>);

/// A process that has a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Its command line.
    pub line: String,
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.0.first() else {
            return f.write_str(
                "a process that cannot be seen from here: of another user, of another container, or of another \
                 computing node",
            );
        };
        write!(f, "process {} ({})", first.pid, first.line)?;
        match self.0.get(1..).unwrap_or_default() {
            [] => Ok(()),
            others => {
                let pids: Vec<String> = others.iter().map(|holder| holder.pid.to_string()).collect();
                write!(f, " and process {}", pids.join(", "))
            }
        }
    }
}

/// Takes the lock of an open file for as long as any process has this descriptor or a copy of it.
///
/// # Errors
/// [`LockError`]; it names who has the lock.
pub fn exclusive(file: BorrowedFd<'_>) -> Result<(), LockError> {
    let deadline = Instant::now() + ENDING;
    loop {
        match retry_on_intr(|| rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive)) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(POLL_INTERVAL),
            Err(Errno::WOULDBLOCK) => return Err(LockError::Held(holders(file).unwrap_or_default())),
            Err(errno) => return Err(refusal(errno)),
        }
    }
}

fn refusal(errno: Errno) -> LockError {
    match errno {
        Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS => LockError::Unsupported(errno.into()),
        other => LockError::Io(other.into()),
    }
}

/// Whether `path` still leads to the open file: a lock on a file that was replaced protects nothing.
///
/// # Errors
/// The operating system's.
pub fn is_at(file: BorrowedFd<'_>, path: &Path) -> io::Result<bool> {
    let open = rustix::fs::fstat(file)?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (open.st_dev, open.st_ino)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// The processes that have a lock of this file. Those that this user may not inspect are left out, unless the kernel
/// names them as the one that took the lock.
fn holders(file: BorrowedFd<'_>) -> io::Result<Holders> {
    let key = key(file)?;
    let mut pids = BTreeSet::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if has_lock(pid, &key) {
            pids.insert(pid);
        }
    }
    if pids.is_empty() {
        // The process that took the lock may have handed it over and ended. Its number may belong to another process
        // now, or to none.
        let locks = fs::read_to_string("/proc/locks")?;
        let takers =
            locks.lines().filter(|line| is_lock_of(line, &key)).filter_map(|line| line.split_whitespace().nth(4));
        pids.extend(
            takers.filter_map(|pid| pid.parse::<u32>().ok()).filter(|pid| Path::new(&format!("/proc/{pid}")).exists()),
        );
    }
    let mut holders: Vec<Holder> = pids.into_iter().map(|pid| Holder { pid, line: line(pid) }).collect();
    // The interface is more informative than its cores.
    holders.sort_by_key(|holder| !holder.line.contains("everdisk-interface"));
    Ok(Holders(holders))
}

/// The file as lines about locks name it: `major:minor:inode` of its file system.
fn key(file: BorrowedFd<'_>) -> io::Result<String> {
    let id = mounts::mount_id(file)?;
    let mount = mounts::all()?.into_iter().find(|mount| mount.id == id).ok_or(io::ErrorKind::NotFound)?;
    let inode = rustix::fs::fstat(file)?.st_ino;
    Ok(format!("{:02x}:{:02x}:{inode}", mount.device.0, mount.device.1))
}

/// Whether a line of /proc/locks, or of fdinfo behind `lock:`, is of a flock of the file.
fn is_lock_of(line: &str, key: &str) -> bool {
    let mut fields = line.split_whitespace().skip(1);
    fields.next() == Some("FLOCK") && fields.nth(3) == Some(key)
}

/// A process whose first thread has ended may still have one that hangs, with the files.
fn has_lock(pid: u32, key: &str) -> bool {
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let mut any = false;
        for entry in fs::read_dir(task.path().join("fdinfo")).into_iter().flatten().flatten() {
            any = true;
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            if text.lines().filter_map(|line| line.strip_prefix("lock:")).any(|line| is_lock_of(line, key)) {
                return true;
            }
        }
        if any {
            break;
        }
    }
    false
}

fn line(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lines = tasks.filter_map(|task| fs::read(task.path().join("cmdline")).ok()).find(|line| !line.is_empty());
    let text = match lines {
        Some(line) => String::from_utf8_lossy(&line).replace('\0', " "),
        None => fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default(),
    };
    let shown: String =
        text.trim().chars().take(LINE_CHARS_MAX).map(|c| if c.is_control() { '?' } else { c }).collect();
    if shown.is_empty() { "it is ending".to_owned() } else { shown }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{BufRead, BufReader},
        os::fd::AsFd,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn a_lock_is_taken_once_and_goes_with_the_last_copy_of_the_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let first = File::create(&path).unwrap();
        exclusive(first.as_fd()).unwrap();
        let copy = first.try_clone().unwrap();
        drop(first);
        let second = File::open(&path).unwrap();
        let refused = exclusive(second.as_fd()).unwrap_err();
        let LockError::Held(holders) = &refused else { panic!("{refused:?}") };
        assert_eq!(holders.0.iter().map(|holder| holder.pid).collect::<Vec<_>>(), [std::process::id()]);
        drop(copy);
        exclusive(second.as_fd()).unwrap();
    }

    /// The kernel's list names the process that took the lock. What counts is which process has it now.
    #[test]
    fn the_holder_is_named_when_the_one_that_took_the_lock_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let file = File::create(&path).unwrap();
        // The shell takes the lock by flock(1), which ends; a child of the shell keeps the descriptor.
        let mut keeper = Command::new("sh")
            .args(["-c", "exec 9<\"$0\"; flock -x 9; echo locked; exec sleep 60"])
            .arg(&path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut said).unwrap();
        let refused = exclusive(file.as_fd());
        keeper.kill().unwrap();
        let pid = keeper.id();
        keeper.wait().unwrap();
        let text = refused.unwrap_err().to_string();
        assert!(text.contains(&format!("process {pid} (sleep 60)")), "{text}");
        exclusive(file.as_fd()).unwrap();
    }

    #[test]
    fn a_file_system_without_locks_and_an_unseen_holder_are_told_apart() {
        for errno in [Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS] {
            assert!(matches!(refusal(errno), LockError::Unsupported(_)));
        }
        assert!(matches!(refusal(Errno::BADF), LockError::Io(_)));
        assert!(LockError::Held(Holders::default()).to_string().contains("another computing node"));
        let line = "1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF";
        assert!(is_lock_of(line, "00:13:11691") && !is_lock_of(line, "00:13:1169"));
        assert!(!is_lock_of(&line.replace("FLOCK", "POSIX"), "00:13:11691"));
    }

    #[test]
    fn a_file_that_was_replaced_is_not_the_one_that_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let file = File::create(&path).unwrap();
        assert!(is_at(file.as_fd(), &path).unwrap());
        fs::rename(&path, dir.path().join("old")).unwrap();
        assert!(!is_at(file.as_fd(), &path).unwrap());
        File::create(&path).unwrap();
        assert!(!is_at(file.as_fd(), &path).unwrap());
    }
}
