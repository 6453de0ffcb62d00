//! The number of unanswered requests of a FUSE connection.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{Mode, OFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

/// The counter of requests that the kernel has and that are not answered, of one connection. Its file shows the number
/// at the first read and can neither seek nor be read at an offset, so the connection's directory is kept open instead.
#[derive(Debug)]
pub struct WaitingCounter(OwnedFd);

impl WaitingCounter {
    /// Opens `/sys/fs/fuse/connections/N`, through a mount of fusectl that is visible to no other process when the
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
