//! /dev/fuse: opening, cloning, reading; mounting and unmounting; the kernel's state of a connection.

mod mounting;
mod waiting;

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::fs::{Mode, OFlags};

pub use self::{
    mounting::{MountOptions, mount, unmount},
    waiting::WaitingCounter,
};
use crate::link::wait_readable;

/// Opens /dev/fuse.
///
/// # Errors
/// The operating system's.
pub fn open() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes another channel of a mounted connection (FUSE_DEV_IOC_CLONE). When the last holder closes a channel, the
/// requests that were read from it end with ECONNABORTED. So the channels are made by the process that outlives the
/// cores.
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
