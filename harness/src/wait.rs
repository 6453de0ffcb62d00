//! Waiting for a condition, never for a time.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Interval between two polls.
const POLL_INTERVAL: Duration = Duration::from_millis(3);

/// What everything that is not limited otherwise may take; generous, for slow machines.
pub const SOON: Duration = Duration::from_secs(20);

/// Polls `look` until it returns a value, and panics after `limit` with what was waited for.
pub fn until_within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain for: {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// [`until_within`] [`SOON`].
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_within(SOON, what, look)
}

/// [`until`] a condition holds.
pub fn until_true(what: &str, mut look: impl FnMut() -> bool) {
    until(what, || look().then_some(()));
}
