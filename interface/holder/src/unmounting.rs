//! An unmount under way. It runs in a thread of its own, because it waits for the kernel to write mapped pages back,
//! which are requests to the core. Whether the file is still in use elsewhere (through another mount, in another mount
//! namespace) is known only afterwards: the kernel ends the connection with the last mount and the last open file,
//! wherever they are.

use std::{
    io,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::frame::Answer;
use everdisk_sys::{fuse, mounts::Mount};

/// A process that only inspects the file (`df`, a scan of open files) is done within this time.
const USERS_GO_WITHIN: Duration = Duration::from_secs(1);

/// An unmount, and the request that waits for it.
pub(crate) struct Unmounting {
    result: mpsc::Receiver<io::Result<()>>,
    /// Since when the file has not been mounted here.
    unmounted: Option<Instant>,
    /// Remaining users are cut off.
    force: bool,
    pub(crate) peer: u64,
    pub(crate) id: u64,
}

impl Unmounting {
    /// Begins it. Without a mount it is another attempt: an earlier one found the file in use elsewhere, or another
    /// process took the mount out of the tree. The connection shows whether the file still is in use.
    pub(crate) fn begin(mount: io::Result<Option<Mount>>, force: bool, peer: u64, id: u64) -> Self {
        let (sender, result) = mpsc::channel();
        thread::spawn(move || {
            let unmounted = mount.and_then(|mount| mount.map_or(Ok(()), |mount| fuse::unmount(&mount, force)));
            let _ = sender.send(unmounted);
        });
        Self { result, unmounted: None, force, peer, id }
    }

    /// Whether the file is no longer mounted here.
    pub(crate) const fn is_done(&self) -> bool {
        self.unmounted.is_some()
    }

    /// The outcome, once it is known. While the connection is not `dead`, the file has users who would be cut off.
    pub(crate) fn answer(&mut self, dead: bool) -> Option<Answer> {
        if self.unmounted.is_none() {
            match self.result.try_recv().ok()? {
                Ok(()) => self.unmounted = Some(Instant::now()),
                Err(e) => {
                    let busy = e.kind() == io::ErrorKind::ResourceBusy;
                    return Some(Answer::Failed { reason: e.to_string(), busy });
                }
            }
        }
        let since = self.unmounted?;
        if self.force || dead {
            return Some(Answer::Done);
        }
        let reason = "its file was unmounted, and is served on to those who use it elsewhere".to_owned();
        (since.elapsed() >= USERS_GO_WITHIN).then_some(Answer::Failed { reason, busy: true })
    }
}
