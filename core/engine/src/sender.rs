//! Sends buffered data to the storage nodes (M8): the oldest first, neighbours together, several writes at once where the nodes
//! are slow. Whoever needs progress takes the role: the sender's own thread in quiet times, a flush, a write that finds no room.
//!
//! ```text
//!  take the role ─► announce to the fence ─► choose a batch ─► copy, verify checksums ─► write ─► retire ─► tell who waits
//!       │ taken: wait for its progress           │ another core still writes: wait
//! ```

use std::{
    ops::Range,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use everdisk_buffer::{
    area::Area,
    book::{Batch, Book, copy_out},
    index::Piece,
};
use everdisk_proto::buffer::Extent;
use everdisk_sys::process::voluntary_switches;

use crate::{
    Engine, IoError,
    area::SegmentArea,
    gate::Gate,
    policy::{self, Sending},
    write_back::lock,
};

/// Bytes of one batch: what a hand-over may have to wait for before the next core sends is a part of it.
pub(crate) const BATCH_BYTES: u64 = 8 << 20;
/// Longest write to a storage node.
const RUN_BYTES: u64 = 1 << 20;
/// One of so many writes to the nodes is looked at more closely: whether the thread slept in it.
const LOOK_EVERY: u64 = 8;
/// How sleepy writes are, in thousandths; nodes whose writes mostly sleep are slow.
const SLEEPY: u64 = 500;
const SLEEPY_MAX: u64 = 1000;
/// After so many writes of one batch that slept, nodes that were thought to be quick are not.
const SLOW_WRITES: u64 = 3;
/// So many at once.
const SENDERS_MAX: usize = 32;
/// Of so many batches to slow nodes, one begins with a write that has the nodes to itself and shows whether they still are slow:
/// of writes beside each other one cannot tell, they wait for each other where a node takes one at a time.
const LONE_EVERY: u64 = 8;
/// After a failure the sender waits, at first this long, then twice as long each time.
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// How sending stands, for those who wait.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Batches that retired something.
    pub(crate) batches: u64,
    /// Batches begun, of whatever outcome.
    pub(crate) begun: u64,
    /// Batches of which something failed, and the number of the last of them among those begun.
    failures: u64,
    pub(crate) last_failed: u64,
    /// The last failure, since the last success.
    pub(crate) error: Option<(i32, String)>,
    back_off: Duration,
    not_before: Option<Instant>,
}

impl Progress {
    /// Whether a failure is too fresh to try again.
    pub(crate) fn is_backing_off(&self) -> bool {
        self.not_before.is_some_and(|at| Instant::now() < at)
    }

    fn note(&mut self, number: u64, failure: Option<&IoError>) {
        match failure {
            None => {
                self.batches += 1;
                self.error = None;
                self.back_off = Duration::ZERO;
                self.not_before = None;
            }
            Some(error) => {
                self.failures += 1;
                self.last_failed = number;
                self.error = Some((error.errno(), error.to_string()));
                self.back_off = (self.back_off * 2).clamp(BACK_OFF_MIN, BACK_OFF_MAX);
                self.not_before = Some(Instant::now() + self.back_off);
            }
        }
    }
}

/// What a turn in the role came to.
#[derive(Debug)]
pub(crate) enum Turn {
    /// Something was sent and retired.
    Sent,
    /// There is nothing to send.
    Nothing,
    /// Somebody else has the role, or another core still writes: wait for progress.
    Busy,
    /// This core does not have the gate.
    NoGate,
    /// A storage node failed; what could be sent was.
    Failed(IoError),
}

/// The write buffer of an open volume.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) area: SegmentArea,
    book: std::sync::RwLock<Book>,
    role: Mutex<()>,
    progress: Mutex<Progress>,
    progressed: Condvar,
    /// How sleepy writes to the nodes are, followed in steps; [`u64::MAX`] as long as none was looked at.
    sleepy: AtomicU64,
    /// Writes noted so far.
    noted: AtomicU64,
    /// Since when the nodes have to prove themselves, because the fill is high enough; ns after `start`, 0: they need not.
    tried_since_ns: AtomicU64,
    /// Until then they count as proven; ns after `start`, 0: not.
    proven_until_ns: AtomicU64,
    /// Something is lost; so that nobody takes the book's lock to learn that nothing is.
    any_lost: AtomicBool,
    start: Instant,
}

impl Buffer {
    pub(crate) fn new(area: SegmentArea, size: u64) -> Self {
        let book = Book::new(area.geometry(), size);
        Self {
            area,
            book: book.into(),
            role: Mutex::new(()),
            progress: Mutex::default(),
            progressed: Condvar::new(),
            sleepy: AtomicU64::new(u64::MAX),
            noted: AtomicU64::new(0),
            tried_since_ns: AtomicU64::new(0),
            proven_until_ns: AtomicU64::new(0),
            any_lost: AtomicBool::new(false),
            start: Instant::now(),
        }
    }

    pub(crate) fn read_book(&self) -> RwLockReadGuard<'_, Book> {
        self.book.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write_book(&self) -> RwLockWriteGuard<'_, Book> {
        self.book.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }

    /// What has been done so far, to wait for more of it.
    pub(crate) fn seen(&self) -> (u64, u64) {
        let progress = self.progress();
        (progress.batches, progress.failures)
    }

    /// Waits until something was sent or failed since, at most for `limit`.
    pub(crate) fn wait_progress(&self, seen: (u64, u64), limit: Duration) {
        let progress = self.progress();
        let unchanged = |p: &mut Progress| (p.batches, p.failures) == seen;
        drop(self.progressed.wait_timeout_while(progress, limit, unchanged).unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether a write of `len` bytes goes through at this fill.
    pub(crate) fn lets_through(&self, fill: u64, len: u64) -> bool {
        // The clock is asked last.
        policy::goes_through(fill, len, self.nodes_are_quick(), true)
            && self.now_ns() < self.proven_until_ns.load(Relaxed)
    }

    /// A node did not take a write: they have to prove themselves anew.
    pub(crate) fn distrust(&self) {
        self.proven_until_ns.store(0, Relaxed);
    }

    /// Whether the sender should look, now that the buffer is filled this far. From where nodes are tried on they have to prove
    /// themselves anew.
    pub(crate) fn is_to_be_sent(&self, fill: u64) -> bool {
        let begins = policy::is_tried(fill) && self.tried_since_ns.load(Relaxed) == 0;
        if begins {
            self.tried_since_ns.store(self.now_ns().max(1), Relaxed);
            self.proven_until_ns.store(0, Relaxed);
        }
        begins || policy::sending(fill, Sending::Rests, self.nodes_are_quick()) == Sending::Hurries
    }

    /// What the sender does at this fill.
    pub(crate) fn sending(&self, fill: u64, before: Sending) -> Sending {
        if !policy::is_tried(fill) {
            self.tried_since_ns.store(0, Relaxed);
        }
        policy::sending(fill, before, self.nodes_are_quick())
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A range was written past the buffer: what was lost of it no longer is.
    pub(crate) fn note_through(&self, range: &Range<u64>) {
        if self.any_lost.load(Relaxed) {
            self.write_book().written_through(&self.area, range);
            self.note_lost();
        }
    }

    /// Something may have been lost, or be whole again.
    pub(crate) fn note_lost(&self) {
        let any = !self.read_book().lost().is_empty();
        self.any_lost.store(any, Relaxed);
    }

    /// A write to the nodes begins: whether it is one to be looked at.
    pub(crate) fn begin_write(&self) -> Look {
        let looked_at = self.noted.fetch_add(1, Relaxed).is_multiple_of(LOOK_EVERY);
        Look { began: Instant::now(), switches: looked_at.then(voluntary_switches) }
    }

    /// It has ended well. `beside`: it is one of many writes at once, which sleep because they wait for each other.
    pub(crate) fn note_write(&self, look: &Look, beside: bool) {
        if let (Some(switches), false) = (look.switches, beside) {
            let slept = if voluntary_switches() > switches { SLEEPY_MAX } else { 0 };
            let sleepy = self.sleepy.load(Relaxed);
            let next = if sleepy > SLEEPY_MAX { slept } else { sleepy - sleepy / 8 + slept / 8 };
            self.sleepy.store(next.min(SLEEPY_MAX), Relaxed);
        }
        let began = look.began;
        let since = self.tried_since_ns.load(Relaxed);
        if since > 0 && began.saturating_duration_since(self.start).as_nanos() >= u128::from(since) {
            let proven = u64::try_from(policy::PROVEN_FOR.as_nanos()).unwrap_or(0);
            self.proven_until_ns.store(self.now_ns().saturating_add(proven), Relaxed);
        }
    }

    /// Whether writes to the storage nodes are as quick as to memory: they do not sleep. Their time would not tell: where every CPU is
    /// busy a copy takes long as well.
    fn nodes_are_quick(&self) -> bool {
        self.sleepy.load(Relaxed) < SLEEPY
    }

    /// Takes the role, if it is free, and sends one batch of about `bytes`. `may_write`: whether nobody else writes any more.
    pub(crate) fn turn(
        &self,
        engine: &Engine,
        gate: &dyn Gate,
        generation: u64,
        may_write: impl FnOnce() -> bool,
        bytes: u64,
    ) -> Turn {
        let _role = match self.role.try_lock() {
            Ok(role) => role,
            Err(TryLockError::Poisoned(role)) => role.into_inner(),
            Err(TryLockError::WouldBlock) => return Turn::Busy,
        };
        if !gate.begin_sending(generation) {
            return Turn::NoGate;
        }
        let number = {
            let mut progress = self.progress();
            progress.begun += 1;
            progress.begun
        };
        let turn = if may_write() { self.send(engine, bytes) } else { Turn::Busy };
        gate.end_sending();
        match &turn {
            Turn::Sent => self.progress().note(number, None),
            Turn::Failed(error) => self.progress().note(number, Some(error)),
            Turn::Nothing | Turn::Busy | Turn::NoGate => return turn,
        }
        self.progressed.notify_all();
        turn
    }

    fn send(&self, engine: &Engine, bytes: u64) -> Turn {
        let (batch, extents) = {
            let book = self.read_book();
            let batch = book.batch(bytes, book.head(), RUN_BYTES);
            let extents: Vec<Option<Extent>> =
                batch.pieces.iter().map(|piece| book.extent(piece.seq).copied()).collect();
            (batch, extents)
        };
        if batch.extents.is_empty() {
            return Turn::Nothing;
        }
        let runs = runs(&batch);
        let outcome = self.send_runs(engine, &batch, &extents, &runs);
        let mut book = self.write_book();
        for seq in outcome.damaged {
            tracing::error!(
                seq,
                "buffered data is damaged: what was acknowledged there is lost until it is written anew"
            );
            book.damaged(&self.area, seq);
        }
        let retired = book.sent(&self.area, &batch, &outcome.failed);
        drop(book);
        self.note_lost();
        match outcome.error {
            Some(error) => Turn::Failed(error),
            None if retired => Turn::Sent,
            None => Turn::Nothing,
        }
    }

    /// Sends the runs, several at once where the nodes are slow.
    fn send_runs(&self, engine: &Engine, batch: &Batch, extents: &[Option<Extent>], runs: &[Range<usize>]) -> Outcome {
        let outcome = Mutex::new(Outcome::default());
        let next = AtomicUsize::new(0);
        let send_next = |data: &mut Vec<u8>, alone: bool| {
            let Some(run) = runs.get(next.fetch_add(1, Relaxed)) else { return false };
            let (Some(pieces), Some(extents)) = (batch.pieces.get(run.clone()), extents.get(run.clone())) else {
                return false;
            };
            self.send_run(engine, pieces, extents, data, &outcome, alone);
            true
        };
        let mut data = Vec::new();
        if self.nodes_are_quick() || runs.len() == 1 {
            // Until the nodes turn out to be slow: then others help.
            let before = voluntary_switches();
            while voluntary_switches() - before < SLOW_WRITES && send_next(&mut data, true) {}
        } else if self.progress().batches.is_multiple_of(LONE_EVERY) {
            send_next(&mut data, true);
        }
        let left = runs.len().saturating_sub(next.load(Relaxed));
        if left > 0 {
            let work = || {
                let mut data = Vec::new();
                while send_next(&mut data, false) {}
            };
            thread::scope(|scope| {
                for _ in 1..left.min(SENDERS_MAX) {
                    // Where no thread can be started, those that run do the work; at least this one does.
                    let _ = thread::Builder::new().name("send".to_owned()).spawn_scoped(scope, work);
                }
                work();
            });
        }
        outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends one run of pieces that follow each other. A damaged piece is left out.
    fn send_run(
        &self,
        engine: &Engine,
        pieces: &[Piece],
        extents: &[Option<Extent>],
        data: &mut Vec<u8>,
        outcome: &Mutex<Outcome>,
        alone: bool,
    ) {
        data.clear();
        let mut begun = pieces.first().map_or(0, |piece| piece.start);
        for (piece, extent) in pieces.iter().zip(extents) {
            if self.copy(piece, extent.as_ref(), data) {
                continue;
            }
            lock(outcome).damaged.push(piece.seq);
            self.write(engine, begun, data, outcome, alone);
            data.clear();
            begun = piece.end;
        }
        self.write(engine, begun, data, outcome, alone);
    }

    /// Appends a piece's data; false when its extent's data does not have its checksum.
    fn copy(&self, piece: &Piece, extent: Option<&Extent>, data: &mut Vec<u8>) -> bool {
        let Some(extent) = extent else { return false };
        let (before, Ok(len)) = (data.len(), usize::try_from(piece.len())) else { return false };
        data.resize(before + len, 0);
        let copied = data.get_mut(before..).unwrap_or_default();
        copy_out(&self.area, piece, copied);
        let sound = if piece.len() == extent.len {
            crc32c::crc32c(copied) == extent.crc
        } else {
            everdisk_buffer::log::data_is_sound(&self.area, extent, &mut Vec::new())
        };
        if !sound {
            data.truncate(before);
        }
        sound
    }

    fn write(&self, engine: &Engine, at: u64, data: &[u8], outcome: &Mutex<Outcome>, alone: bool) {
        if data.is_empty() {
            return;
        }
        let look = self.begin_write();
        let written = engine.write(at, data);
        if written.is_ok() {
            self.note_write(&look, !alone);
        }
        if let Err(error) = written {
            let mut outcome = lock(outcome);
            outcome.failed.push(at..at + data.len() as u64);
            outcome.error.get_or_insert(error);
        }
    }
}

/// A write to the nodes that was begun.
#[derive(Debug)]
pub(crate) struct Look {
    began: Instant,
    switches: Option<u64>,
}

/// How the runs of a batch went.
#[derive(Debug, Default)]
struct Outcome {
    failed: Vec<Range<u64>>,
    damaged: Vec<u64>,
    error: Option<IoError>,
}

/// The pieces of a batch by runs of at most [`RUN_BYTES`] without a gap, as ranges of their indices.
fn runs(batch: &Batch) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut run = (0, 0);
    for (index, piece) in batch.pieces.iter().enumerate() {
        match runs.last_mut() {
            Some(last) if run.1 == piece.start && piece.end - run.0 <= RUN_BYTES => last.end = index + 1,
            _ => {
                runs.push(index..index + 1);
                run.0 = piece.start;
            }
        }
        run.1 = piece.end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_no_gaps_and_a_bounded_length() {
        let piece = |start: u64, len: u64| Piece { start, end: start + len, seq: 1, position: 0, clean: false };
        let third = RUN_BYTES / 3;
        let pieces =
            vec![piece(0, 10), piece(10, 5), piece(20, third), piece(20 + third, third), piece(20 + 2 * third, third)];
        let batch = Batch { extents: Vec::new(), pieces };
        assert_eq!(runs(&batch), [0..2, 2..5]);
        let pieces = vec![piece(0, RUN_BYTES), piece(RUN_BYTES, 1)];
        assert_eq!(runs(&Batch { extents: Vec::new(), pieces }), [0..1, 1..2]);
    }

    #[test]
    fn failures_back_off_and_a_success_forgets_them() {
        let mut progress = Progress::default();
        let error = IoError::NoGate;
        progress.note(1, Some(&error));
        assert!(progress.is_backing_off() && progress.back_off == BACK_OFF_MIN);
        for _ in 0..20 {
            progress.note(2, Some(&error));
        }
        assert_eq!(progress.back_off, BACK_OFF_MAX);
        progress.note(3, None);
        assert!(!progress.is_backing_off() && progress.error.is_none());
    }
}
