//! A storage node of an open volume: its store, its health, and how long its operations usually take.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use everdisk_store::{Completion, Lent, Op, Owned, Pending, Store, pending};
use parking_lot::Mutex;

use crate::{
    IoError,
    health::{Health, Kind},
    pace::Pace,
};

/// A storage node.
pub(crate) struct Node {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) health: Health,
    reads: Pace,
    changes: Pace,
    flushes: Pace,
    /// When a probe last succeeded.
    probed: Mutex<Option<Instant>>,
}

/// What an operation does to a node, and the bytes that it copies.
#[inline]
fn judged<R: AsRef<[u8]>, W: AsRef<[u8]>>(op: &Op<R, W>) -> (Kind, usize) {
    match op {
        Op::Read(memory) => (Kind::Read, memory.as_ref().len()),
        Op::Write(data) => (Kind::Write, data.as_ref().len()),
        Op::Seek(_) | Op::Identify => (Kind::Read, 0),
        Op::Flush => (Kind::Flush, 0),
        Op::Discard(_) | Op::WriteZeroes(_) | Op::Allocate(_) => (Kind::Write, 0),
    }
}

/// What an operation does to a node.
pub(crate) fn kind(op: &Lent<'_>) -> Kind {
    judged(op).0
}

impl Node {
    pub(crate) fn new(store: Arc<dyn Store>) -> Self {
        let (reads, changes, flushes) = (Pace::default(), Pace::default(), Pace::default());
        Self { store, health: Health::default(), reads, changes, flushes, probed: Mutex::new(None) }
    }

    /// Whether such an operation usually takes long.
    #[inline]
    pub(crate) fn is_slow(&self, kind: Kind) -> bool {
        self.pace(kind).is_slow()
    }

    /// Whether such operations have been measured as quick.
    pub(crate) fn is_quick(&self, kind: Kind) -> bool {
        self.pace(kind).is_quick()
    }

    #[inline]
    fn pace(&self, kind: Kind) -> &Pace {
        match kind {
            Kind::Read => &self.reads,
            Kind::Write => &self.changes,
            Kind::Flush => &self.flushes,
        }
    }

    /// Does an operation and waits for its end. The outcome is that of the store: an offset for a search.
    ///
    /// # Errors
    /// The store's.
    #[inline]
    pub(crate) fn perform(&self, offset: u64, op: Lent<'_>) -> Result<Option<u64>, IoError> {
        let (kind, copied) = judged(&op);
        // How long these take says nothing about reads.
        let is_timed = !matches!(op, Op::Seek(_) | Op::Identify);
        let perform = || {
            self.health.begin();
            let outcome = self.store.perform(offset, op);
            self.health.end(kind, &outcome);
            outcome
        };
        Ok(if is_timed { self.pace(kind).time(copied, perform) } else { perform() }?)
    }

    /// Begins an operation. Does not wait. The time until its end is not noted, because the operation may wait for a thread
    /// or for its turn, which says nothing about the node.
    pub(crate) fn begin(self: &Arc<Self>, offset: u64, op: Owned) -> Pending {
        let (kind, _) = judged(&op);
        let (done, pending) = pending();
        let node = Arc::clone(self);
        let ended = Completion::new(move |op, outcome| {
            node.health.end(kind, &outcome);
            done.complete(op, outcome);
        });
        self.health.begin();
        Arc::clone(&self.store).begin(offset, op, ended);
        pending
    }

    /// Begins to read `len` bytes at `offset`. The time of a success is recorded. A failure is not recorded, because the probe
    /// reads the node again. `done` is called at the end in either case.
    pub(crate) fn probe_ahead(self: &Arc<Self>, offset: u64, len: usize, done: impl FnOnce() + Send + 'static) {
        let node = Arc::clone(self);
        let ended = Completion::new(move |_, outcome| {
            if outcome.is_ok() {
                *node.probed.lock() = Some(Instant::now());
            }
            done();
        });
        Arc::clone(&self.store).begin(offset, Op::Read(vec![0; len]), ended);
    }

    /// Whether a probe ahead has succeeded within this time. It counts once.
    pub(crate) fn was_probed(&self, within: Duration) -> bool {
        self.probed.lock().take().is_some_and(|at| at.elapsed() <= within)
    }

    #[cfg(test)]
    pub(crate) fn is_unprobed(&self) -> bool {
        self.probed.lock().is_none()
    }

    /// Reads, if that does not wait. False when it would: then the content of `buf` is undefined.
    ///
    /// # Errors
    /// The store's.
    #[inline]
    pub(crate) fn read_at_once(&self, offset: u64, buf: &mut [u8]) -> Result<bool, IoError> {
        // One that would wait says nothing good of the node.
        let Some(outcome) = self.store.attempt(offset, Op::Read(buf)) else { return Ok(false) };
        self.health.begin();
        self.health.end(Kind::Read, &outcome);
        Ok(outcome.map(|_| true)?)
    }

    /// Reads; `waits` is called before a wait that takes long.
    ///
    /// # Errors
    /// The store's.
    #[inline]
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8], waits: &dyn Fn()) -> Result<(), IoError> {
        if self.is_slow(Kind::Read) {
            if self.read_at_once(offset, buf)? {
                return Ok(());
            }
            waits();
        }
        self.perform(offset, Op::Read(buf)).map(drop)
    }
}
