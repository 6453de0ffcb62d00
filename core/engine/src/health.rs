//! What is known of a storage node's health: whether the last operation on it failed, and the error in words; and whether one
//! does not end. Costs two uncontended atomic additions per operation while all is well.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use everdisk_store::StoreError;

/// An operation that has not ended after this time has stalled.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// The outcome of the last operation on a node, and of those under way.
#[derive(Debug, Default)]
pub(crate) struct Health {
    failed: AtomicBool,
    error: Mutex<Option<String>>,
    begun: AtomicU64,
    ended: AtomicU64,
    stalled: AtomicBool,
    watched: Mutex<Option<Watched>>,
}

/// The last look at which an operation was under way and another had ended since the one before.
#[derive(Debug)]
struct Watched {
    ended: u64,
    since: Instant,
}

impl Health {
    /// An operation begins.
    #[inline]
    pub(crate) fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// It has ended. Wrong arguments do not count: they say nothing about the node.
    #[inline]
    pub(crate) fn end<T>(&self, outcome: &Result<T, StoreError>) {
        self.ended.fetch_add(1, Ordering::Relaxed);
        if self.stalled.load(Ordering::Relaxed) {
            self.stalled.store(false, Ordering::Relaxed);
        }
        match outcome {
            Ok(_) if !self.failed.load(Ordering::Relaxed) => {}
            Ok(_) => self.set(None),
            Err(e) if e.is_fault() => self.set(Some(e.to_string())),
            Err(_) => {}
        }
    }

    /// Looks whether operations under way end. To be called several times a second.
    pub(crate) fn watch(&self, now: Instant) {
        let (begun, ended) = (self.begun.load(Ordering::Relaxed), self.ended.load(Ordering::Relaxed));
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if begun <= ended {
            *watched = None;
            return;
        }
        match &*watched {
            Some(last) if last.ended == ended => {
                if now.saturating_duration_since(last.since) >= STALLED_AFTER {
                    self.stalled.store(true, Ordering::Relaxed);
                }
            }
            _ => *watched = Some(Watched { ended, since: now }),
        }
    }

    #[cold]
    fn set(&self, error: Option<String>) {
        let mut slot = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        self.failed.store(error.is_some(), Ordering::Relaxed);
        *slot = error;
    }

    /// Whether an operation does not end.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Whether the last operation succeeded and those under way end.
    pub(crate) fn is_good(&self) -> bool {
        !self.is_stalled() && !self.failed.load(Ordering::Relaxed)
    }

    /// The error in words while the last operation failed.
    pub(crate) fn error(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_that_does_not_end_is_seen_and_so_is_its_end() {
        let (health, start) = (Health::default(), Instant::now());
        let later = |ms| start + Duration::from_millis(ms);
        health.begin();
        health.watch(start);
        health.watch(later(900));
        assert!(health.is_good());
        health.watch(later(1100));
        assert!(health.is_stalled() && !health.is_good());
        health.end::<()>(&Ok(()));
        assert!(health.is_good());
        // Busy is not stalled.
        for ms in 0..50 {
            health.begin();
            health.watch(later(2000 + ms * 100));
            health.end::<()>(&Ok(()));
        }
        assert!(health.is_good());
    }
}
