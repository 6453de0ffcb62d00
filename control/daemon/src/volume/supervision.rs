//! How the supervisor of a volume and everything else keep out of each other's way.

use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

/// The supervisor's hands, and what wakes it.
#[derive(Debug, Default)]
pub struct Supervision {
    hands: Mutex<()>,
    kicked: Mutex<bool>,
    kick: Condvar,
}

impl Supervision {
    /// Held by the supervisor for each of its passes, and by every operation that must not run beside a pass.
    pub fn hands(&self) -> MutexGuard<'_, ()> {
        self.hands.lock()
    }

    /// Has the supervisor make its next pass at once.
    pub fn kick(&self) {
        *self.kicked.lock() = true;
        self.kick.notify_all();
    }

    /// The supervisor waits here.
    pub fn wait_kick(&self, limit: Duration) {
        let mut kicked = self.kicked.lock();
        self.kick.wait_while_for(&mut kicked, |kicked| !*kicked, limit);
        *kicked = false;
    }
}
