//! Sends buffered data to the storage nodes (M8): the oldest first, neighbours together, several writes at once where the nodes
//! are slow. Whoever needs progress takes the role: the sender's own thread in quiet times, a flush, a write that finds no room.
//!
//! ```text
//!  take the role ─► announce to the fence ─► choose a batch ─► copy, verify checksums ─► write ─► note it ─► tell who waits
//!       │ taken: wait for its progress           │ another core still writes: wait
//! ```

use std::{
    ops::Range,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
    time::{Duration, Instant},
};

use everdisk_buffer::{
    area::Area,
    book::{Batch, Book, copy_out},
    index::Piece,
    noted::Noted,
};
use everdisk_proto::buffer::{Extent, ExtentKind};
use everdisk_sys::{process::voluntary_switches, robust};

use crate::{
    Engine, IoError,
    area::SegmentArea,
    gate::{Gate, Work},
    policy::{self, Sending},
    progress::Progress,
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

/// What a turn in the role came to.
#[derive(Debug)]
pub(crate) enum Turn {
    /// Something was sent.
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
    /// Something is lost, or not in the segment yet; so that nobody takes the book's lock to learn that nothing is.
    any_lost: AtomicBool,
    /// Flushes that failed: who wrote past the buffer meanwhile writes again.
    failures: AtomicU64,
    /// Something was written past the buffer since the last flush began.
    any_noted: AtomicBool,
    /// Bytes written past the buffer, and how many when the last flush that succeeded began.
    passed: AtomicU64,
    passed_flushed: AtomicU64,
    passed_ranges: Noted,
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
            failures: AtomicU64::new(0),
            any_noted: AtomicBool::new(true),
            passed: AtomicU64::new(0),
            passed_flushed: AtomicU64::new(0),
            passed_ranges: Noted::new(size),
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
    pub(crate) fn seen(&self) -> (u64, u64, u64) {
        let progress = self.progress();
        (progress.batches, progress.failures, progress.retired)
    }

    /// Waits until something was sent, retired or failed since, at most for `limit`.
    pub(crate) fn wait_progress(&self, seen: (u64, u64, u64), limit: Duration) {
        let progress = self.progress();
        let unchanged = |p: &mut Progress| (p.batches, p.failures, p.retired) == seen;
        drop(self.progressed.wait_timeout_while(progress, limit, unchanged).unwrap_or_else(PoisonError::into_inner));
    }

    /// A flush has ended.
    pub(crate) fn note_flush(&self, retired: bool, failure: Option<(i32, String)>) {
        let mut progress = self.progress();
        progress.retired += u64::from(retired);
        progress.flush_error = failure;
        drop(progress);
        self.progressed.notify_all();
    }

    /// Whether a write of `len` bytes goes through, as the buffer stands.
    pub(crate) fn lets_through(&self, book: &Book, len: u64) -> bool {
        let fill = policy::crowding(book.dirty_fill(), book.fill());
        // The clock is asked last.
        policy::goes_through(fill, len, self.nodes_are_quick(), true)
            && self.passed_since_flush() < policy::PASSED_MAX
            && self.now_ns() < self.proven_until_ns.load(Relaxed)
    }

    /// Bytes that were written past the buffer since the last flush that succeeded began.
    pub(crate) fn passed_since_flush(&self) -> u64 {
        self.passed.load(Relaxed).saturating_sub(self.passed_flushed.load(Relaxed))
    }

    /// Bytes that were written past the buffer so far, to be told [`Buffer::set_flushed`] when a flush that begins now has succeeded.
    pub(crate) fn passed(&self) -> u64 {
        self.passed.load(Relaxed)
    }

    pub(crate) fn set_flushed(&self, passed: u64) {
        self.passed_flushed.store(passed, Relaxed);
    }

    /// Flushes that failed so far.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(SeqCst)
    }

    /// A flush has failed: before anybody looks at what was written past the buffer.
    pub(crate) fn note_failure(&self) {
        self.failures.fetch_add(1, SeqCst);
        self.any_noted.store(true, SeqCst);
    }

    /// Whether something may have been written past the buffer since this was asked last.
    pub(crate) fn take_noted(&self) -> bool {
        self.any_noted.swap(false, SeqCst)
    }

    /// What was noted has to be looked at again.
    pub(crate) fn keep_noted(&self) {
        self.any_noted.store(true, SeqCst);
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

    /// A range was written past the buffer, and is acknowledged next: what was lost of it no longer is. The caller was let in. False: it
    /// still counts as lost, see [`IoError::ManyLost`].
    #[must_use]
    pub(crate) fn note_through(&self, range: &Range<u64>) -> bool {
        let mut whole = true;
        if self.any_lost.load(SeqCst) {
            let mut book = self.write_book();
            book.written_through(&self.area, range);
            whole = !book.lost().overlaps(range);
            self.note_lost(&book);
        } else {
            self.passed_ranges.note(&self.area, range);
        }
        self.any_noted.store(true, SeqCst);
        self.passed.fetch_add(range.end - range.start, Relaxed);
        whole
    }

    /// Whether so much was written past the buffer since the last flush that it is time for another.
    pub(crate) fn is_much_passed(&self) -> bool {
        self.passed_since_flush() >= policy::FLUSH_PASSED
    }

    /// A tenure begins: what a predecessor noted is to be flushed some time.
    pub(crate) fn begin_tenure(&self) {
        self.passed.fetch_add(1, Relaxed);
        self.keep_noted();
    }

    /// Something may have been lost, or be whole again.
    pub(crate) fn note_lost(&self, book: &Book) {
        self.any_lost.store(!book.lost().is_empty() || !book.is_settled(), SeqCst);
    }

    /// Puts what is lost into the segment, if this core may change it now; else somebody who may does later.
    pub(crate) fn settle(&self, gate: &dyn Gate, work: Work, generation: u64) {
        if self.read_book().is_settled() || !gate.enter(work, generation) {
            return;
        }
        let mut book = self.write_book();
        book.settle(&self.area);
        self.note_lost(&book);
        drop(book);
        gate.leave(work);
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
    pub(crate) fn nodes_are_quick(&self) -> bool {
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
        let ours = || gate.generation() == Some(generation);
        let turn = if may_write() { self.send(engine, bytes, ours) } else { Turn::Busy };
        gate.end_sending();
        self.settle(gate, Work::Sending, generation);
        match &turn {
            Turn::Sent => self.progress().note(number, None),
            Turn::Failed(error) => self.progress().note(number, Some(error)),
            Turn::Nothing | Turn::Busy | Turn::NoGate => return turn,
        }
        self.progressed.notify_all();
        turn
    }

    /// `ours`: whether this core has the gate still. If not, what lies in the ring may be its successor's.
    fn send(&self, engine: &Engine, bytes: u64, ours: impl Fn() -> bool) -> Turn {
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
        let runs = runs(&batch.pieces);
        let outcome = self.send_runs(engine, &batch, &extents, &runs);
        if !ours() {
            return Turn::NoGate;
        }
        let mut book = self.write_book();
        for seq in outcome.damaged {
            tracing::error!(
                seq,
                "buffered data is damaged: what was acknowledged there is lost until it is written anew"
            );
            book.damaged(seq);
        }
        let moved = book.sent(&batch, &outcome.failed);
        self.note_lost(&book);
        drop(book);
        match outcome.error {
            Some(error) => Turn::Failed(error),
            None if moved => Turn::Sent,
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
                    let _ = robust::start_scoped(scope, "send", work);
                }
                work();
            });
        }
        outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends one run of pieces of one kind that follow each other. A damaged piece is left out.
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
        let (first, last) = (pieces.first().expect("a run has pieces"), pieces.last().expect("a run has pieces"));
        if first.kind != ExtentKind::Data {
            return Self::zero(engine, first.kind, first.start..last.end, outcome);
        }
        let mut begun = first.start;
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
        // Retired since, by another core that has the gate now: what lies there is somebody else's.
        let Some(extent) = extent else { return false };
        let before = data.len();
        data.resize(before + usize::try_from(piece.len()).expect("a piece lies in the ring"), 0);
        let copied = &mut data[before..];
        copy_out(&self.area, piece, copied);
        let sound = if piece.len() == extent.len {
            crc32c::crc32c(copied) == extent.crc
        } else {
            everdisk_buffer::log::data_is_sound(&self.area, extent)
        };
        if !sound {
            data.truncate(before);
        }
        sound
    }

    fn zero(engine: &Engine, kind: ExtentKind, range: Range<u64>, outcome: &Mutex<Outcome>) {
        let len = range.end - range.start;
        let done = match kind {
            ExtentKind::Zeroes => engine.zero_and_keep(range.start, len),
            ExtentKind::Discard | ExtentKind::Data => engine.discard_or_zero(range.start, len),
        };
        if let Err(error) = done {
            let mut outcome = lock(outcome);
            outcome.failed.push(range);
            outcome.error.get_or_insert(error);
        }
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

/// The pieces of a batch by runs of one kind without a gap, of data at most [`RUN_BYTES`], as ranges of their indices.
fn runs(pieces: &[Piece]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut run: Option<Piece> = None;
    for (index, piece) in pieces.iter().enumerate() {
        match (&mut run, runs.last_mut()) {
            (Some(run), Some(last)) if continues(run, piece) => {
                last.end = index + 1;
                run.end = piece.end;
            }
            _ => {
                runs.push(index..index + 1);
                run = Some(*piece);
            }
        }
    }
    runs
}

fn continues(run: &Piece, piece: &Piece) -> bool {
    let fits = piece.kind != ExtentKind::Data || piece.end - run.start <= RUN_BYTES;
    run.end == piece.start && run.kind == piece.kind && fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_no_gaps_and_a_bounded_length() {
        let kinds =
            |start: u64, len: u64, kind| Piece { start, end: start + len, seq: 1, position: 0, kind, written: 0 };
        let piece = |start: u64, len: u64| kinds(start, len, ExtentKind::Data);
        let third = RUN_BYTES / 3;
        let pieces =
            vec![piece(0, 10), piece(10, 5), piece(20, third), piece(20 + third, third), piece(20 + 2 * third, third)];
        assert_eq!(runs(&pieces), [0..2, 2..5]);
        let pieces = vec![piece(0, RUN_BYTES), piece(RUN_BYTES, 1)];
        assert_eq!(runs(&pieces), [0..1, 1..2]);
        let zeroes = |start, len| kinds(start, len, ExtentKind::Zeroes);
        let pieces = vec![piece(0, 10), zeroes(10, RUN_BYTES), zeroes(10 + RUN_BYTES, RUN_BYTES)];
        assert_eq!(runs(&pieces), [0..1, 1..3]);
    }
}
