//! One operation at a time has a volume.

use std::time::{Duration, Instant};

use everdisk_api::operation::OperationName;
use everdisk_proto::ids::VolumeName;
use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};

/// An operation that has the volume.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Its name.
    pub name: OperationName,
    /// Since when.
    pub since: Instant,
}

/// The operation that has the volume, and what others want of it.
#[derive(Debug, Default)]
pub struct Operations {
    now: Mutex<Now>,
    /// Signalled when an operation ends.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Now {
    running: Option<Running>,
    /// The operator wants the old core back from the upgrade that runs.
    rollback_wanted: bool,
    /// The volume was deleted.
    deleted: bool,
}

impl Operations {
    /// Notes that an operation has the volume.
    pub(super) fn begin(&self, volume: &VolumeName, name: OperationName) -> Result<()> {
        let mut now = self.now.lock();
        if let Some(running) = now.running {
            return Err(Error::Busy {
                volume: volume.to_string(),
                operation: running.name.text(),
                seconds: running.since.elapsed().as_secs(),
            });
        }
        if now.deleted {
            return Err(Error::NotFound(volume.to_string()));
        }
        now.rollback_wanted = false;
        now.running = Some(Running { name, since: Instant::now() });
        Ok(())
    }

    /// Notes that it has ended.
    pub(super) fn end(&self) {
        self.now.lock().running = None;
        self.ended.notify_all();
    }

    /// The operation that has the volume.
    pub fn running(&self) -> Option<Running> {
        self.now.lock().running
    }

    /// Has the upgrade that runs give the gate back to the old core. False when none runs.
    pub fn want_rollback(&self) -> bool {
        let mut now = self.now.lock();
        let upgrades = now.running.is_some_and(|running| running.name == OperationName::Upgrade);
        now.rollback_wanted |= upgrades;
        upgrades
    }

    /// The operator wants the old core back.
    pub fn rollback_wanted(&self) -> bool {
        self.now.lock().rollback_wanted
    }

    /// Waits until the operation `name` has ended.
    pub fn wait_end_of(&self, name: OperationName) {
        let mut now = self.now.lock();
        while now.running.is_some_and(|running| running.name == name) {
            self.ended.wait_for(&mut now, Duration::from_millis(200));
        }
    }

    /// The volume was deleted: no operation begins any more, and its supervisor and its watch end.
    pub fn set_deleted(&self) {
        self.now.lock().deleted = true;
    }

    /// Whether it was deleted.
    pub fn is_deleted(&self) -> bool {
        self.now.lock().deleted
    }
}
