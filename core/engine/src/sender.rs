//! Destages buffered data (M8): the oldest first, neighbours together, several writes at once where the nodes are slow.
//! Sending is a role that one thread has at a time. A thread that needs progress takes it: the sender's own thread when
//! the volume is quiet, a flush, or a write that finds no room.
//!
//! ```text
//!  take the role ─► announce to the fence ─► choose a batch ─► copy, verify checksums ─► write ─► note it ─► wake
//!       │ taken: wait for its progress           │ another core still writes: wait
//! ```

use std::{
    ops::Range,
    sync::{
        RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use everdisk_buffer::{area::Area, book::Book, index::Piece, noted::Noted};
use everdisk_proto::buffer::Extent;
use everdisk_sys::process::voluntary_switches;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    Engine, IoError,
    area::SegmentArea,
    gate::{Gate, Work},
    policy::{self, Sending},
    progress::Progress,
};

mod runs;

/// One write to the nodes in this many is sampled: whether the thread slept in it.
const SAMPLE_EVERY: u64 = 8;
/// Share of writes that slept, in thousandths. Above it the nodes count as slow.
const SLEEPY: u64 = 500;
const SLEEPY_MAX: u64 = 1000;

/// The outcome of a turn in the role.
#[derive(Debug)]
pub(crate) enum Destaged {
    /// Something was sent.
    Sent,
    /// There is nothing to send.
    Nothing,
    /// Another thread has the role, or another core still writes: wait for progress.
    Busy,
    /// This core does not have the gate.
    NoGate,
    /// A storage node failed. Everything else of the batch was sent.
    Failed(IoError),
}

/// The write buffer of an open volume.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) area: SegmentArea,
    /// Every write takes it. So it is a lock of std, which waits in futex(2): before it parks, one of parking_lot calls
    /// sched_yield(2), which cost 9 % of 4 KiB writes at a queue depth of 32.
    book: RwLock<Book>,
    role: Mutex<()>,
    progress: Mutex<Progress>,
    progressed: Condvar,
    /// Share of writes to the nodes that slept, as a moving average; [`u64::MAX`] until one was sampled.
    sleepy: AtomicU64,
    /// Writes noted so far.
    noted: AtomicU64,
    /// Since when the nodes have to prove themselves, because the fill is high enough: ns after `start`, or 0 if they
    /// need not.
    tried_since_ns: AtomicU64,
    /// Until when the nodes count as proven: ns after `start`, or 0 if they do not.
    proven_until_ns: AtomicU64,
    /// Something is lost, or is not in the segment yet. Read without the book's lock in the usual case, in which
    /// nothing is lost.
    any_lost: AtomicBool,
    /// Flushes that failed. A write past the buffer during which one failed is written again.
    failures: AtomicU64,
    /// Something was written past the buffer since the last flush began.
    any_noted: AtomicBool,
    /// Bytes written past the buffer in all, and the same count when the last flush that succeeded began.
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
        self.book.read().expect("a panic ends the process")
    }

    pub(crate) fn write_book(&self) -> RwLockWriteGuard<'_, Book> {
        self.book.write().expect("a panic ends the process")
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock()
    }

    /// The progress so far, to be handed to [`Buffer::wait_progress`].
    pub(crate) fn seen(&self) -> (u64, u64, u64) {
        let progress = self.progress();
        (progress.batches, progress.failures, progress.retired)
    }

    /// Waits until something has been sent, retired or has failed since `seen`, at most for `limit`.
    pub(crate) fn wait_progress(&self, seen: (u64, u64, u64), limit: Duration) {
        let mut progress = self.progress();
        let unchanged = |p: &mut Progress| (p.batches, p.failures, p.retired) == seen;
        self.progressed.wait_while_for(&mut progress, unchanged, limit);
    }

    /// A flush has ended.
    pub(crate) fn note_flush(&self, retired: bool, failure: Option<(i32, String)>) {
        let mut progress = self.progress();
        progress.retired += u64::from(retired);
        progress.flush_error = failure;
        drop(progress);
        self.progressed.notify_all();
    }

    /// Whether a write of `len` bytes goes through, given the buffer's fill.
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

    /// Bytes written past the buffer so far. To be handed to [`Buffer::set_flushed`] when a flush that begins now has
    /// succeeded.
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

    /// Counts a failed flush. To be called before what was written past the buffer is examined.
    pub(crate) fn note_failure(&self) {
        self.failures.fetch_add(1, SeqCst);
        self.any_noted.store(true, SeqCst);
    }

    /// Whether something may have been written past the buffer since the last call.
    pub(crate) fn take_noted(&self) -> bool {
        self.any_noted.swap(false, SeqCst)
    }

    /// What was noted has to be examined again.
    pub(crate) fn keep_noted(&self) {
        self.any_noted.store(true, SeqCst);
    }

    /// A node did not take a write: the nodes have to prove themselves anew.
    pub(crate) fn distrust(&self) {
        self.proven_until_ns.store(0, Relaxed);
    }

    /// Whether the sender should be woken, now that the buffer is filled this far. From the fill at which nodes are on
    /// trial they have to prove themselves anew.
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
        u64::try_from(self.start.elapsed().as_nanos()).expect("no core lives for 584 years")
    }

    /// A range was written past the buffer and is acknowledged next: it is no longer lost. The request was let in.
    /// False: the range still counts as lost, see [`IoError::ManyLost`].
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

    /// Whether enough was written past the buffer since the last flush to make another one due.
    pub(crate) fn is_much_passed(&self) -> bool {
        self.passed_since_flush() >= policy::FLUSH_PASSED
    }

    /// A tenure begins: what a predecessor noted has to be flushed eventually.
    pub(crate) fn begin_tenure(&self) {
        self.passed.fetch_add(1, Relaxed);
        self.keep_noted();
    }

    /// The set of lost ranges may have changed.
    pub(crate) fn note_lost(&self, book: &Book) {
        self.any_lost.store(!book.lost().is_empty() || !book.is_settled(), SeqCst);
    }

    /// Puts the lost ranges into the segment if this core may change it now; else a later call does, or the core that
    /// has the gate.
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

    /// A write to the nodes begins. It is sampled if it is its turn.
    pub(crate) fn begin_write(&self) -> Look {
        let looked_at = self.noted.fetch_add(1, Relaxed).is_multiple_of(SAMPLE_EVERY);
        Look { began: Instant::now(), switches: looked_at.then(voluntary_switches) }
    }

    /// The write has succeeded. `beside`: it is one of many at once, which sleep because they wait for each other.
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
            let proven = u64::try_from(policy::PROVEN_FOR.as_nanos()).expect("less than a second");
            self.proven_until_ns.store(self.now_ns().saturating_add(proven), Relaxed);
        }
    }

    /// Whether writes to the storage nodes are as quick as writes to memory, that is, whether they do not sleep. Their
    /// duration would not show it: where every CPU is busy a copy takes long as well.
    pub(crate) fn nodes_are_quick(&self) -> bool {
        self.sleepy.load(Relaxed) < SLEEPY
    }

    /// Takes the role, if it is free, and sends one batch of about `bytes`. `may_write`: whether no other core writes
    /// any more.
    pub(crate) fn turn(
        &self,
        engine: &Engine,
        gate: &dyn Gate,
        generation: u64,
        may_write: impl FnOnce() -> bool,
        bytes: u64,
    ) -> Destaged {
        let Some(_role) = self.role.try_lock() else { return Destaged::Busy };
        if !gate.begin_sending(generation) {
            return Destaged::NoGate;
        }
        let number = {
            let mut progress = self.progress();
            progress.begun += 1;
            progress.begun
        };
        let ours = || gate.generation() == Some(generation);
        let turn = if may_write() { self.send(engine, bytes, ours) } else { Destaged::Busy };
        gate.end_sending();
        self.settle(gate, Work::Sending, generation);
        match &turn {
            Destaged::Sent => self.progress().note(number, None),
            Destaged::Failed(error) => self.progress().note(number, Some(error)),
            Destaged::Nothing | Destaged::Busy | Destaged::NoGate => return turn,
        }
        self.progressed.notify_all();
        turn
    }

    /// `ours`: whether this core still has the gate. If not, what lies in the ring may be its successor's.
    fn send(&self, engine: &Engine, bytes: u64, ours: impl Fn() -> bool) -> Destaged {
        let (batch, extents) = {
            let book = self.read_book();
            let batch = book.batch(bytes, book.head(), policy::RUN_BYTES);
            let extent = |piece: &Piece| *book.extent(piece.seq).expect("a piece belongs to an extent that is there");
            let extents: Vec<Extent> = batch.pieces.iter().map(extent).collect();
            (batch, extents)
        };
        if batch.extents.is_empty() {
            return Destaged::Nothing;
        }
        let runs = runs::runs(&batch.pieces);
        let outcome = self.send_runs(engine, &batch, &extents, &runs);
        if !ours() {
            return Destaged::NoGate;
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
            Some(error) => Destaged::Failed(error),
            None if moved => Destaged::Sent,
            None => Destaged::Nothing,
        }
    }
}

/// A write to the nodes that has begun.
#[derive(Debug)]
pub(crate) struct Look {
    began: Instant,
    switches: Option<u64>,
}
