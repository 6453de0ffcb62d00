//! What is known of a storage node's health: whether the last operation of a kind failed, with the error in words, and
//! whether an operation does not end. Costs two uncontended atomic additions per operation while all is well.
//!
//! Reads, writes and flushes are judged apart: a full node still reads well, which does not make it healthy.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use everdisk_store::StoreError;
use parking_lot::Mutex;

/// An operation that has not ended after this time has stalled.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// What an operation does to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Changes nothing.
    Read,
    /// Writes, discards or allocates.
    Write,
    /// Makes durable what was written.
    Flush,
}

impl Kind {
    /// Number of kinds.
    pub(crate) const COUNT: usize = Self::Flush as usize + 1;
}

/// The outcome of the last operation of a kind.
#[derive(Debug, Default)]
struct Last {
    failed: AtomicBool,
    error: Mutex<Option<String>>,
}

/// The outcome of the last operations on a node, and of those under way.
#[derive(Debug, Default)]
pub(crate) struct Health {
    reads: Last,
    writes: Last,
    flushes: Last,
    /// A write has ended well.
    written: AtomicBool,
    begun: AtomicU64,
    ended: AtomicU64,
    stalled: AtomicBool,
    watched: Mutex<Option<Watched>>,
}

/// The last sample at which an operation was under way and another had ended since the sample before.
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

    /// The operation has ended. Invalid arguments do not count: they say nothing about the node.
    #[inline]
    pub(crate) fn end<T>(&self, kind: Kind, outcome: &Result<T, StoreError>) {
        self.ended.fetch_add(1, Ordering::Relaxed);
        if self.stalled.load(Ordering::Relaxed) {
            self.stalled.store(false, Ordering::Relaxed);
        }
        let last = match kind {
            Kind::Read => &self.reads,
            Kind::Write => &self.writes,
            Kind::Flush => &self.flushes,
        };
        match outcome {
            Ok(_) => {
                if kind == Kind::Write && !self.written.load(Ordering::Relaxed) {
                    self.written.store(true, Ordering::Relaxed);
                }
                if last.failed.load(Ordering::Relaxed) {
                    last.set(None);
                }
            }
            Err(e) if e.is_fault() => last.set(Some(e.to_string())),
            Err(_) => {}
        }
    }

    /// Checks whether operations under way end. To be called several times a second.
    pub(crate) fn watch(&self, now: Instant) {
        let (begun, ended) = (self.begun.load(Ordering::Relaxed), self.ended.load(Ordering::Relaxed));
        let mut watched = self.watched.lock();
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

    /// Whether an operation does not end.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Whether the last operation of each kind succeeded and those under way end.
    pub(crate) fn is_good(&self) -> bool {
        let failed = |last: &Last| last.failed.load(Ordering::Relaxed);
        !self.is_stalled() && ![&self.reads, &self.writes, &self.flushes].into_iter().any(failed)
    }

    /// The error in words while the last operation of a kind failed.
    pub(crate) fn error(&self) -> Option<String> {
        [&self.writes, &self.flushes, &self.reads].into_iter().find_map(Last::error)
    }

    /// Whether a write has succeeded since the core was started. Until then the core does not know what its predecessor
    /// knew.
    pub(crate) fn has_written(&self) -> bool {
        self.written.load(Ordering::Relaxed)
    }
}

impl Last {
    #[cold]
    fn set(&self, error: Option<String>) {
        let mut slot = self.error.lock();
        self.failed.store(error.is_some(), Ordering::Relaxed);
        *slot = error;
    }

    fn error(&self) -> Option<String> {
        self.error.lock().clone()
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
        health.end::<()>(Kind::Write, &Ok(()));
        assert!(health.is_good());
        // Busy is not stalled.
        for ms in 0..50 {
            health.begin();
            health.watch(later(2000 + ms * 100));
            health.end::<()>(Kind::Write, &Ok(()));
        }
        assert!(health.is_good());
    }

    /// A full node reads well. It counts as failed until a change of it succeeds.
    #[test]
    fn a_read_does_not_make_a_node_good_that_takes_no_writes() {
        let health = Health::default();
        let full = || {
            Err(StoreError::Io {
                node: "dir:/a".parse().unwrap(),
                action: "write",
                source: std::io::Error::from_raw_os_error(28),
            })
        };
        let run = |kind, outcome: Result<(), StoreError>| {
            health.begin();
            health.end(kind, &outcome);
        };
        run(Kind::Write, full());
        run(Kind::Read, Ok(()));
        assert!(!health.is_good() && !health.has_written() && health.error().is_some());
        run(Kind::Write, Ok(()));
        assert!(health.is_good() && health.has_written() && health.error().is_none());
        run(Kind::Flush, full());
        run(Kind::Write, Ok(()));
        assert!(!health.is_good(), "nor does a write where a flush failed");
    }
}
