//! /dev/fuse: opening, cloning, mounting, and what the kernel tells about a connection.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags},
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
    let fd = open()?;
    let other = if options.allow_other { ",allow_other,default_permissions" } else { "" };
    let data =
        format!("fd={},rootmode=100000,user_id={},group_id={}{other}\0", fd.as_raw_fd(), options.uid, options.gid);
    let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    rustix::mount::mount("everdisk", path, "fuse.everdisk", MountFlags::NOSUID | MountFlags::NODEV, Some(data))?;
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
    let found = text.lines().rev().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let device = left.next()?;
        let target = left.nth(1)?;
        let mut right = right.split(' ');
        let kind = right.next()?;
        let source = right.next()?;
        (target == wanted && (kind == "fuse" || kind.starts_with("fuse."))).then(|| MountedFuse {
            connection: device.split_once(':').and_then(|(_, minor)| minor.parse().ok()).unwrap_or(0),
            source: source.to_owned(),
        })
    });
    Ok(found)
}

/// mountinfo writes space, tab, newline and backslash as octal escapes.
fn escape(path: &Path) -> String {
    let mut text = String::new();
    let lossy = String::from_utf8_lossy(path.as_os_str().as_bytes());
    for c in lossy.chars() {
        match c {
            ' ' => text.push_str("\\040"),
            '\t' => text.push_str("\\011"),
            '\n' => text.push_str("\\012"),
            '\\' => text.push_str("\\134"),
            other => text.push(other),
        }
    }
    text
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
