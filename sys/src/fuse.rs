//! /dev/fuse: opening, cloning, mounting, and what the kernel tells about a connection.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags},
};

use crate::{link::wait_readable, packet};

/// Opens /dev/fuse.
///
/// # Errors
/// The operating system's.
pub fn open() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes another channel of a mounted connection (FUSE_DEV_IOC_CLONE). Requests read from a channel are ended with
/// ECONNABORTED when the channel is closed by its last holder, so whoever outlives the cores makes them.
///
/// # Errors
/// The operating system's.
pub fn clone_channel(mounted: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // linux/fuse.h: _IOR(229, 0, uint32_t)
    const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;
    let channel = open()?;
    let mut raw = mounted.as_raw_fd().cast_unsigned();
    // SAFETY: the ioctl reads a u32 from the pointer, which points to a live one.
    let result = unsafe { libc::ioctl(channel.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw mut raw) };
    if result == 0 { Ok(channel) } else { Err(io::Error::last_os_error()) }
}

/// Options of a mount.
#[derive(Clone, Copy, Debug)]
pub struct MountOptions {
    /// Owner of the mount.
    pub uid: u32,
    /// Group of the mount.
    pub gid: u32,
    /// Let other users in (the kernel then checks the file's mode).
    pub allow_other: bool,
}

/// Mounts a connection whose root is a regular file on the regular file `path`: by mount(2) as root, else through
/// fusermount3. Returns the connection's fd; the INIT request waits in it.
///
/// # Errors
/// The operating system's, or what fusermount3 said.
pub fn mount(path: &Path, options: MountOptions) -> io::Result<OwnedFd> {
    if rustix::process::geteuid().is_root() { mount_as_root(path, options) } else { mount_by_helper(path, options) }
}

fn mount_as_root(path: &Path, options: MountOptions) -> io::Result<OwnedFd> {
    // The file is pinned first: between a look at the path and the mount, somebody else could put a link there.
    let target = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"));
    }
    let target = format!("/proc/self/fd/{}", target.as_raw_fd());
    let fd = open()?;
    let other = if options.allow_other { ",allow_other,default_permissions" } else { "" };
    let data =
        format!("fd={},rootmode=100000,user_id={},group_id={}{other}\0", fd.as_raw_fd(), options.uid, options.gid);
    let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    rustix::mount::mount("everdisk", target, "fuse.everdisk", MountFlags::NOSUID | MountFlags::NODEV, Some(data))?;
    Ok(fd)
}

fn mount_by_helper(path: &Path, options: MountOptions) -> io::Result<OwnedFd> {
    const HELPER_DEADLINE: Duration = Duration::from_secs(10);
    let (ours, theirs) = helper_socket()?;
    let other = if options.allow_other { ",allow_other,default_permissions" } else { "" };
    let mut child = Command::new("fusermount3")
        .args(["-o", &format!("fsname=everdisk,subtype=everdisk,nosuid,nodev{other}"), "--"])
        .arg(path)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("cannot start fusermount3 (Debian package fuse3): {e}")))?;
    let came = wait_readable(ours.as_fd(), HELPER_DEADLINE)?;
    if !came {
        let _ = child.kill();
    }
    let received = if came { packet::recv(ours.as_fd()).ok().flatten() } else { None };
    let output = child.wait_with_output()?;
    match received.and_then(|mut packet| packet.fds.pop()) {
        Some(fd) if output.status.success() => Ok(fd),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(io::Error::other(format!("fusermount3 did not mount {}: {said}", path.display())))
        }
    }
}

/// fusermount3 sends the fd on a stream socket given to it as descriptor 0.
fn helper_socket() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Unmounts. `lazy`: take the mount out of the tree at once although somebody uses it.
///
/// # Errors
/// `ResourceBusy` when the file is in use and `lazy` is not asked, else the operating system's.
pub fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        let flags = UnmountFlags::NOFOLLOW | if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        return Ok(rustix::mount::unmount(path, flags)?);
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(path);
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let kind = if said.contains("busy") { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    Err(io::Error::new(kind, said))
}

/// A mount as /proc/self/mountinfo shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountedFuse {
    /// Number of the FUSE connection: the minor number of the mount's device.
    pub connection: u32,
    /// Source, `everdisk` for ours.
    pub source: String,
}

/// The topmost FUSE mount on `path`, if there is one. Asks nobody but procfs, so a dead server does not block it.
///
/// # Errors
/// When /proc/self/mountinfo cannot be read.
pub fn find_mount(path: &Path) -> io::Result<Option<MountedFuse>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let wanted = escape(path);
    let found = text.lines().rev().filter_map(fuse_mount).find(|(target, _)| *target == wanted);
    Ok(found.map(|(_, mount)| mount))
}

/// Where a connection is mounted now: a directory above it may have been renamed since.
///
/// # Errors
/// When /proc/self/mountinfo cannot be read.
pub fn find_path(connection: u32) -> io::Result<Option<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let found = text.lines().filter_map(fuse_mount).find(|(_, mount)| mount.connection == connection);
    Ok(found.map(|(target, _)| unescape(target)))
}

/// Target, as it is written there, and mount of a line of mountinfo (Documentation/filesystems/proc.rst, 3.5).
fn fuse_mount(line: &str) -> Option<(&str, MountedFuse)> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let device = left.next()?;
    let target = left.nth(1)?;
    let mut right = right.split(' ');
    let kind = right.next()?;
    let source = right.next()?.to_owned();
    let connection = device.split_once(':').and_then(|(_, minor)| minor.parse().ok())?;
    (kind == "fuse" || kind.starts_with("fuse.")).then_some((target, MountedFuse { connection, source }))
}

const ESCAPES: [(char, &str); 4] = [(' ', "\\040"), ('\t', "\\011"), ('\n', "\\012"), ('\\', "\\134")];

/// mountinfo writes space, tab, newline and backslash as octal escapes.
fn escape(path: &Path) -> String {
    let mut text = String::new();
    for c in String::from_utf8_lossy(path.as_os_str().as_bytes()).chars() {
        match ESCAPES.iter().find(|(plain, _)| *plain == c) {
            Some((_, escaped)) => text.push_str(escaped),
            None => text.push(c),
        }
    }
    text
}

/// The path that mountinfo writes with escapes.
pub fn unescape(target: &str) -> PathBuf {
    // The backslash last: what it yields is no escape.
    ESCAPES.iter().fold(target.to_owned(), |text, (plain, escaped)| text.replace(escaped, &plain.to_string())).into()
}

/// The counter of requests that the kernel has and nobody has answered, of one connection. Its file shows the number at
/// the first read and can neither seek nor be read at an offset, so what is kept is the connection's directory.
#[derive(Debug)]
pub struct WaitingCounter(OwnedFd);

impl WaitingCounter {
    /// Opens `/sys/fs/fuse/connections/N`, through a mount of fusectl that is visible to nobody else when the
    /// administrator has none. `None` where that is not permitted.
    pub fn open(connection: u32) -> Option<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if let Ok(fd) = rustix::fs::open(format!("/sys/fs/fuse/connections/{connection}"), flags, Mode::empty()) {
            return Some(Self(fd));
        }
        let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
        rustix::mount::fsconfig_create(context.as_fd()).ok()?;
        let root =
            rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).ok()?;
        rustix::fs::openat(root, connection.to_string(), flags, Mode::empty()).ok().map(Self)
    }

    /// The counter now.
    pub fn read(&self) -> Option<u64> {
        let file = rustix::fs::openat(&self.0, "waiting", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut text = [0; 24];
        let n = rustix::io::read(&file, &mut text).ok()?;
        std::str::from_utf8(text.get(..n)?).ok()?.trim().parse().ok()
    }
}

/// Waits for a request and reads it.
///
/// # Errors
/// `TimedOut`, or the operating system's.
pub fn read_within(channel: BorrowedFd<'_>, buffer: &mut [u8], limit: Duration) -> io::Result<usize> {
    let deadline = Instant::now() + limit;
    loop {
        if !wait_readable(channel, deadline.saturating_duration_since(Instant::now()))? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match rustix::io::read(channel, &mut *buffer) {
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_gives_connection_and_path() {
        let line = "42 30 0:39 / /srv/a\\040b rw,nosuid - fuse.everdisk everdisk rw,user_id=0";
        let (target, mount) = fuse_mount(line).unwrap();
        assert_eq!((mount.connection, mount.source.as_str()), (39, "everdisk"));
        assert_eq!(unescape(target), Path::new("/srv/a b"));
        assert_eq!(escape(Path::new("/srv/a b")), target);
        assert!(fuse_mount("42 30 0:39 / /srv rw - ext4 /dev/vda rw").is_none());
    }
}
