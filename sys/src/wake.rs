//! Futexes in shared memory: sleeping on a word that another process changes.

use std::{sync::atomic::AtomicU32, time::Duration};

use rustix::thread::futex::{Flags, Timespec, wait as futex_wait, wake as futex_wake};

/// Sleeps while `word` is `seen`, at most for `limit`. Returns early for no reason at times: look again.
pub fn sleep_while(word: &AtomicU32, seen: u32, limit: Duration) {
    let timeout = Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    // Every error (changed meanwhile, interrupted, timed out) means the same to the caller: look again.
    let _ = futex_wait(word, Flags::empty(), seen, Some(&timeout));
}

/// Wakes everybody who sleeps on `word`.
pub fn wake_all(word: &AtomicU32) {
    let _ = futex_wake(word, Flags::empty(), i32::MAX.unsigned_abs());
}

/// Wakes one who sleeps on `word`.
pub fn wake_one(word: &AtomicU32) {
    let _ = futex_wake(word, Flags::empty(), 1);
}
