//! The file front end: the mount, its channels, and what the kernel tells about it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use everdisk_proto::{
    frame::{FileAttach, LentFile},
    limits::{CHANNELS_MAX, REQUEST_BYTES_MAX},
    segment::Segment,
};
use everdisk_sys::{
    fuse::{self, MountOptions, WaitingCounter},
    process::lockable_bytes,
};
use everdisk_transport::fuse::{abi, handshake, serve::Buffers};
use rustix::event::{PollFd, PollFlags, Timespec};
use zerocopy::IntoBytes;

/// The kernel sends INIT as soon as the mount stands.
const INIT_DEADLINE: Duration = Duration::from_secs(5);

/// A mounted file and its channels.
#[derive(Debug)]
pub(crate) struct FileFront {
    path: PathBuf,
    channels: Vec<OwnedFd>,
    /// Number of the kernel's connection, where it could be found out.
    connection: Option<u32>,
    waiting: Option<WaitingCounter>,
}

/// Number of channels, which is the number of workers of each core: one for each CPU, at least two (one reader alone
/// leaves the second CPU idle at low depth), no more than four (more only contend for the queue), and no more than
/// have room for their buffers in what this user may lock.
fn channel_count() -> usize {
    let cpus = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, CHANNELS_MAX);
    let room = lockable_bytes().map_or(u64::MAX, |bytes| bytes / Buffers::BYTES as u64);
    cpus.min(usize::try_from(room).unwrap_or(usize::MAX)).max(1)
}

impl FileFront {
    /// Mounts, agrees with the kernel and makes the channels. On failure nothing is left mounted. `alone`: the volume gets no other front
    /// end as long as this one is there.
    pub(crate) fn mount(attach: &FileAttach, segment: &Segment, alone: bool) -> io::Result<Self> {
        let options = MountOptions { uid: attach.uid, gid: attach.gid, allow_other: attach.allow_other };
        let mounted = fuse::mount(&attach.path, options)?;
        Self::set_up(attach, segment, mounted, alone).inspect_err(|_| {
            if let Err(e) = fuse::unmount(&attach.path, true) {
                tracing::error!(path = %attach.path.display(), "a mount that could not be served stays behind: {e}");
            }
        })
    }

    fn set_up(attach: &FileAttach, segment: &Segment, mounted: OwnedFd, alone: bool) -> io::Result<Self> {
        let mut request = vec![0; REQUEST_BYTES_MAX + 4096];
        let len = fuse::read_within(mounted.as_fd(), &mut request, INIT_DEADLINE)?;
        let max_write = u32::try_from(REQUEST_BYTES_MAX).unwrap_or(u32::MAX);
        let (agreed, reply) =
            handshake::answer(request.get(..len).unwrap_or_default(), max_write, alone).map_err(io::Error::other)?;
        rustix::io::write(&mounted, &reply)?;
        let mut channels = vec![mounted];
        while channels.len() < channel_count() {
            let another = fuse::clone_channel(channels[0].as_fd())?;
            channels.push(another);
        }
        let front = &segment.front;
        front.fuse_minor.store(agreed.minor, Relaxed);
        front.fuse_flags.store(agreed.flags, Relaxed);
        front.fuse_max_write.store(agreed.max_write, Relaxed);
        front.channels.store(u32::try_from(channels.len()).unwrap_or(0), Relaxed);
        front.mode.store(attach.mode & 0o777, Relaxed);
        front.uid.store(attach.uid, Relaxed);
        front.gid.store(attach.gid, Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        front.attached_at.store(now, Relaxed);
        Ok(Self::adopt(attach.path.clone(), channels))
    }

    /// Takes up a front end whose descriptors a core gave back.
    pub(crate) fn adopt(path: PathBuf, channels: Vec<OwnedFd>) -> Self {
        let connection = fuse::find_mount(&path).ok().flatten().map(|mount| mount.connection);
        Self { path, channels, connection, waiting: connection.and_then(WaitingCounter::open) }
    }

    /// Where it is mounted now.
    pub(crate) fn mounted_at(&self) -> PathBuf {
        let found = self.connection.and_then(|connection| fuse::find_path(connection).ok().flatten());
        found.unwrap_or_else(|| self.path.clone())
    }

    /// How it is described to the cores it is lent to.
    pub(crate) fn lent(&self) -> LentFile {
        LentFile { path: self.path.clone(), channels: u8::try_from(self.channels.len()).unwrap_or(u8::MAX) }
    }

    /// The channels.
    pub(crate) fn channels(&self) -> Vec<BorrowedFd<'_>> {
        self.channels.iter().map(AsFd::as_fd).collect()
    }

    /// Requests the kernel has and nobody has answered, where it tells.
    pub(crate) fn waiting(&self) -> Option<u64> {
        self.waiting.as_ref().and_then(WaitingCounter::read)
    }

    /// Has the kernel give out again everything that was read and not answered (D3). Only when no core can still be
    /// executing any of it.
    pub(crate) fn resend(&self) {
        for channel in self.channels.iter().take(1) {
            if let Err(errno) = rustix::io::write(channel, abi::resend_notification().as_bytes()) {
                tracing::error!(%errno, "the kernel does not give unanswered requests out again");
            }
        }
    }

    /// Whether the connection has ended: unmounted by somebody else and no longer open anywhere, or aborted.
    pub(crate) fn is_dead(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.channels.first().is_some_and(|channel| {
            let mut poll = [PollFd::new(channel, PollFlags::empty())];
            rustix::event::poll(&mut poll, Some(&now)).is_ok() && poll[0].revents().contains(PollFlags::ERR)
        })
    }
}
