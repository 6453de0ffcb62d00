//! The file front end: the mount, its channels, and the kernel's state of it.

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
    mounts::{self, Mount},
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
    /// The mount's name in the kernel's table. A front end made before mounts had names of their own has none.
    source: Option<String>,
    channels: Vec<OwnedFd>,
    /// Number of the kernel's connection, where it is known.
    connection: Option<u32>,
    waiting: Option<WaitingCounter>,
    /// A detach has unmounted it, and has found it in use elsewhere.
    served_elsewhere: bool,
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
        let source = attach.source.as_deref().ok_or_else(|| io::Error::other("the mount was given no name"))?;
        let FileAttach { uid, gid, allow_other, target, .. } = *attach;
        let mounted = fuse::mount(&attach.path, MountOptions { uid, gid, allow_other, source, target })?;
        Self::set_up(attach, segment, mounted, alone).inspect_err(|_| {
            let found =
                mounts::from_source(source).and_then(|mount| mount.map_or(Ok(()), |mount| fuse::unmount(&mount, true)));
            if let Err(e) = found {
                tracing::error!(path = %attach.path.display(), "a mount that could not be served stays behind: {e}");
            }
        })
    }

    fn set_up(attach: &FileAttach, segment: &Segment, mounted: OwnedFd, alone: bool) -> io::Result<Self> {
        let mut request = vec![0; REQUEST_BYTES_MAX + 4096];
        let len = fuse::read_within(mounted.as_fd(), &mut request, INIT_DEADLINE)?;
        let max_write = u32::try_from(REQUEST_BYTES_MAX).expect("a request fits into 32 bits");
        let reply = handshake::answer(&request[..len], max_write, alone).map_err(io::Error::other)?;
        rustix::io::write(&mounted, &reply)?;
        let mut channels = vec![mounted];
        while channels.len() < channel_count() {
            let another = fuse::clone_channel(channels[0].as_fd())?;
            channels.push(another);
        }
        let front = &segment.front;
        front.mode.store(attach.mode & 0o777, Relaxed);
        front.uid.store(attach.uid, Relaxed);
        front.gid.store(attach.gid, Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        front.attached_at.store(now, Relaxed);
        let lent = LentFile { path: attach.path.clone(), channels: 0, source: attach.source.clone() };
        Ok(Self::adopt(lent, channels))
    }

    /// Takes up a front end whose descriptors a core gave back.
    pub(crate) fn adopt(lent: LentFile, channels: Vec<OwnedFd>) -> Self {
        let LentFile { path, source, .. } = lent;
        let found = match &source {
            Some(source) => mounts::from_source(source),
            None => mounts::at(&path).map(|mount| mount.filter(|mount| mount.source == "everdisk")),
        };
        let connection = found.ok().flatten().map(|mount| mount.device.1);
        let waiting = connection.and_then(WaitingCounter::open);
        Self { path, source, channels, connection, waiting, served_elsewhere: false }
    }

    /// The mount, wherever it is now; `None` when it is in no mount tree any more, though it may still be in use
    /// elsewhere. While the connection lives its number is unique.
    pub(crate) fn mount_now(&self) -> io::Result<Option<Mount>> {
        // The major number distinguishes it from a file system on a block device, whose minor may be the same
        // (fuseblk).
        let ours = self.connection.map(|connection| (0, connection));
        let is_ours = |mount: &Mount| mount.kind.starts_with("fuse") && Some(mount.device) == ours;
        Ok(mounts::all()?.into_iter().find(is_ours))
    }

    /// Unmounts it.
    pub(crate) fn unmount(&self) -> io::Result<()> {
        self.mount_now()?.map_or(Ok(()), |mount| fuse::unmount(&mount, true))
    }

    /// The description for the cores that it is lent to.
    pub(crate) fn lent(&self) -> LentFile {
        let channels = u8::try_from(self.channels.len()).unwrap_or(u8::MAX);
        LentFile { path: self.path.clone(), channels, source: self.source.clone() }
    }

    /// The channels.
    pub(crate) fn channels(&self) -> Vec<BorrowedFd<'_>> {
        self.channels.iter().map(AsFd::as_fd).collect()
    }

    /// Requests that the kernel has and no core has answered, where the kernel reports it.
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

    /// The file is no longer mounted here. It is still served to processes that use it elsewhere, until it is detached.
    pub(crate) fn serve_elsewhere(&mut self) {
        self.served_elsewhere = true;
    }

    /// Whether another process has ended it.
    pub(crate) fn is_lost(&self) -> bool {
        self.is_dead() && !self.served_elsewhere
    }

    /// Whether the connection has ended: unmounted by another process and no longer open anywhere, or aborted.
    pub(crate) fn is_dead(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.channels.first().is_some_and(|channel| {
            let mut poll = [PollFd::new(channel, PollFlags::empty())];
            rustix::event::poll(&mut poll, Some(&now)).is_ok() && poll[0].revents().contains(PollFlags::ERR)
        })
    }
}
