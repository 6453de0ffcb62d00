//! An unmount under way. It is done in a thread of its own, because it waits for the kernel to write mapped pages back, which are
//! requests to the core. Whether somebody still uses the file elsewhere (through another mount, in another mount namespace), the kernel
//! tells afterwards: it ends the connection with the last mount and the last open file, wherever they are.

use std::{
    io,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::frame::Answer;
use everdisk_sys::{fuse, mounts::Mount};

/// Whoever only looks at the file (`df`, a scan of open files) has gone within this time.
const USERS_GO_WITHIN: Duration = Duration::from_secs(1);

/// An unmount, and who waits for it.
pub(crate) struct Unmounting {
    result: mpsc::Receiver<io::Result<()>>,
    /// Since when the file is not mounted here any more.
    unmounted: Option<Instant>,
    /// Whoever still uses it is cut off.
    force: bool,
    pub(crate) peer: u64,
    pub(crate) id: u64,
}

impl Unmounting {
    /// Begins it. Without a mount it is another attempt, after one that found the file in use elsewhere, or somebody else took the mount
    /// out of the tree: the connection tells whether it is in use still.
    pub(crate) fn begin(mount: io::Result<Option<Mount>>, force: bool, peer: u64, id: u64) -> Self {
        let (sender, result) = mpsc::channel();
        thread::spawn(move || {
            let unmounted = mount.and_then(|mount| mount.map_or(Ok(()), |mount| fuse::unmount(&mount, force)));
            let _ = sender.send(unmounted);
        });
        Self { result, unmounted: None, force, peer, id }
    }

    /// Whether the file is not mounted here any more.
    pub(crate) const fn is_done(&self) -> bool {
        self.unmounted.is_some()
    }

    /// How it ended, once that is known. While the connection is not `dead`, somebody uses the file who would be cut off.
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
