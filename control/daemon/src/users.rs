//! Finds the users of a mounted file, anywhere on this machine: processes that have it open or mapped, other mounts of it (also in other mount
//! namespaces), loop devices. All of it is read from procfs and sysfs; only root can inspect a process of another user.
//!
//! What holds a file and shows nowhere (a descriptor on its way through a socket, a file registered with io_uring) is left to the
//! interface, which asks the kernel after the unmount whether anything still holds the file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File},
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use everdisk_sys::loop_device;
use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags};

use crate::error::{Doing, Error, Result};

/// Time limit: a process that hangs in the kernel can block the thread that inspects it.
const WITHIN: Duration = Duration::from_secs(10);
/// Most users that are named.
const NAMED: usize = 5;

/// A user of the file; the most telling kinds first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    /// It is mounted at another place too.
    Mount {
        /// Where, as the process sees it.
        at: PathBuf,
        /// A process of another mount namespace that the mount is in.
        within: Option<(u32, String)>,
    },
    /// A loop device.
    Loop(String),
    /// A process has it open or mapped.
    Process {
        /// Its id.
        pid: u32,
        /// Its name.
        command: String,
    },
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, command } => write!(f, "process {pid} ({command}) has it open"),
            Self::Mount { at, within: None } => write!(f, "it is mounted at {} too", at.display()),
            Self::Mount { at, within: Some((pid, command)) } => {
                write!(f, "it is mounted at {} in the mount namespace of process {pid} ({command})", at.display())
            }
            Self::Loop(device) => write!(f, "{device} is on it"),
        }
    }
}

/// The users of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Those that were found.
    pub found: Vec<User>,
    /// Copies of the mount at its own place in other mount namespaces, as every namespace gets that is made while the file is mounted.
    /// No user is cut off as long as no process has the file open there.
    pub copies: usize,
}

/// The users in words; none when there are none.
pub fn in_words(users: &[User]) -> Option<String> {
    let named: Vec<String> = users.iter().take(NAMED).map(ToString::to_string).collect();
    let more = users.len().saturating_sub(NAMED);
    let rest = (more > 0).then(|| format!("and {more} more"));
    (!named.is_empty()).then(|| named.into_iter().chain(rest).collect::<Vec<_>>().join(", "))
}

/// The users of the FUSE mount on `path`, whose connection has this number.
///
/// # Errors
/// It was not found out in time.
pub fn of_mount(connection: u32, path: &Path) -> Result<Users> {
    let (sender, found) = mpsc::channel();
    let path = path.to_owned();
    let looking = thread::Builder::new().spawn(move || sender.send(look(connection, &path)));
    looking.doing(|| "start a thread".to_owned())?;
    found.recv_timeout(WITHIN).map_err(|_| Error::Failed(format!("its users were not found out within {WITHIN:?}")))
}

/// A line of mountinfo.
struct Mounted {
    id: u64,
    minor_of_fuse: Option<u32>,
    target: PathBuf,
}

/// Documentation/filesystems/proc.rst, 3.5. FUSE mounts have no device: their major number is 0.
fn mounted(line: &str) -> Option<Mounted> {
    let mut fields = line.split(' ');
    let id = fields.next()?.parse().ok()?;
    let (major, minor) = fields.nth(1)?.split_once(':')?;
    let target = everdisk_sys::mounts::unescape(fields.nth(1)?.as_bytes());
    Some(Mounted { id, minor_of_fuse: minor.parse().ok().filter(|_| major == "0"), target })
}

/// What procfs does not tell of a process says that it has ended, and uses nothing any more.
fn look(connection: u32, path: &Path) -> Users {
    let own = fs::read_link("/proc/self/ns/mnt").ok();
    let mut mounts: BTreeMap<u64, bool> = BTreeMap::new();
    let mut users = BTreeSet::new();
    let mut targets = Vec::new();
    let mut seen = BTreeSet::new();
    let mut copies = 0;
    let pids: Vec<u32> = processes();
    for pid in &pids {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/mnt")) else { continue };
        if !seen.insert(namespace.clone()) {
            continue;
        }
        let is_own = own.as_ref() == Some(&namespace);
        let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        for mount in text.lines().filter_map(mounted) {
            let ours = mount.minor_of_fuse == Some(connection);
            mounts.insert(mount.id, ours);
            if ours && is_own {
                targets.push(mount.target.clone());
            }
            if ours && mount.target != path {
                let within = (!is_own).then(|| (*pid, command(*pid)));
                users.insert(User::Mount { at: mount.target, within });
            } else if ours && !is_own {
                copies += 1;
            }
        }
    }
    let has_it = |pid: &&u32| has_open(**pid, connection, &mounts) || has_mapped(**pid, connection);
    users.extend(pids.iter().filter(has_it).map(|pid| User::Process { pid: *pid, command: command(*pid) }));
    users.extend(loops(connection, &targets).map(User::Loop));
    Users { found: users.into_iter().collect(), copies }
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn command(pid: u32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    text.trim_end().chars().filter(|c| !c.is_control()).collect()
}

/// Whether the process has a descriptor of the file. By the mount that the descriptor is of; where that is in no namespace any more, by
/// the device of the file, of which no server is asked.
fn has_open(pid: u32, connection: u32, mounts: &BTreeMap<u64, bool>) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    descriptors.map(|entry| entry.file_name()).any(|fd| {
        let fd = fd.to_string_lossy();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse::<u64>().ok());
        match mount.and_then(|id| mounts.get(&id)) {
            Some(ours) => *ours,
            None => device_of(&format!("/proc/{pid}/fd/{fd}")) == Some((0, connection)),
        }
    })
}

/// The device of a file's file system. Nothing else is asked for, and nothing that would have to be asked of a server.
fn device_of(path: &str) -> Option<(u32, u32)> {
    let found = rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::empty()).ok()?;
    Some((found.stx_dev_major, found.stx_dev_minor))
}

/// Whether the process has mapped the file; its descriptor may be closed since.
fn has_mapped(pid: u32, connection: u32) -> bool {
    let text = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    text.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line.get(..line.len().min(100))?).ok()).any(
        |line| {
            let device = line.split(' ').nth(3).and_then(|device| device.split_once(':'));
            let number = |text: &str| u32::from_str_radix(text, 16).ok();
            device.is_some_and(|(major, minor)| number(major) == Some(0) && number(minor) == Some(connection))
        },
    )
}

/// The loop devices on the file. One that may not be opened is told by the path of its file.
fn loops(connection: u32, targets: &[PathBuf]) -> impl Iterator<Item = String> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let backing = fs::read(entry.path().join("loop/backing_file")).ok()?;
        let backing = Path::new(std::ffi::OsStr::from_bytes(backing.strip_suffix(b"\n").unwrap_or(&backing)));
        let device = Path::new("/dev").join(entry.file_name());
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("open(2) takes its flags as an int");
        let opened = File::options().read(true).custom_flags(flags).open(&device);
        let on_it = match opened.and_then(|file| loop_device::backing_device(file.as_fd())) {
            Ok(found) => found == Some((0, connection)),
            Err(_) => targets.iter().any(|target| target == backing),
        };
        on_it.then(|| device.display().to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = "612 30 0:39 / /srv/a\\040b rw,nosuid shared:2 - fuse.everdisk everdisk rw,user_id=0";
        let mount = mounted(line).unwrap();
        assert_eq!((mount.id, mount.minor_of_fuse, mount.target.as_path()), (612, Some(39), Path::new("/srv/a b")));
        assert_eq!(mounted("42 30 8:1 / /srv rw - ext4 /dev/vda rw").unwrap().minor_of_fuse, None);
        assert!(mounted("nonsense").is_none());
    }

    #[test]
    fn users_are_named_and_many_are_counted() {
        let process = |pid| User::Process { pid, command: "dd".to_owned() };
        assert_eq!(in_words(&[]), None);
        assert_eq!(in_words(&[process(7)]).unwrap(), "process 7 (dd) has it open");
        let words = in_words(&(1..=8).map(process).collect::<Vec<_>>()).unwrap();
        assert!(words.ends_with("process 5 (dd) has it open, and 3 more"), "{words}");
    }

    /// A program that runs is mapped, and its file is not open.
    #[test]
    fn a_mapped_file_is_found() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let program = dir.path().join("sleep");
        fs::copy(fs::canonicalize("/bin/sleep").unwrap(), &program).unwrap();
        let (_, minor) = device_of(&program.display().to_string()).unwrap();
        let mut child = crate::programs::spawn(std::process::Command::new(&program).arg("60")).unwrap();
        // The kernel maps the program a moment after the start is reported.
        let deadline = std::time::Instant::now() + WITHIN;
        while !has_mapped(child.id(), minor) && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let (mapped, open) = (has_mapped(child.id(), minor), has_open(child.id(), minor, &BTreeMap::new()));
        let other = has_mapped(child.id(), minor + 1);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((mapped, open, other), (true, false, false));
    }

    /// An open file of this process is found by its mount, and by its device where the mount is not known.
    #[test]
    fn an_open_file_is_found_by_mount_and_by_device() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let pid = std::process::id();
        let (major, minor) = device_of(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
        assert_eq!(major, 0, "a tmpfs has no device");
        assert!(has_open(pid, minor, &BTreeMap::new()));
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts = text.lines().filter_map(mounted).map(|mount| (mount.id, mount.minor_of_fuse == Some(minor)));
        assert!(has_open(pid, minor, &mounts.collect()));
        drop(file);
    }
}
