//! Flushes: everything acknowledged is sent, then the storage nodes are flushed, then the extents that are now durable
//! are retired.
//!
//! ```text
//!  a flush is wanted ─► waits for one that begins from now on ─► its outcome
//!                         │ none runs, and flushes are quick: it runs here
//!                         └ else: the flusher's thread runs it; the wait has a deadline
//!
//!  a flush: how far is everything written? ─► fdatasync on every node ─┬─ all succeed: retire up to there
//!                                                                      └─ one fails: what was written to it counts as not written;
//!                                                                         what passed the buffer is lost; clients are told once,
//!                                                                         unless the node works again and nothing is lost
//! ```
//! Flushes run one at a time. Linux reports a writeback error once for each open file (lib/errseq.c): of two concurrent
//! flushes on one open file only one would see it.

use std::{
    sync::atomic::{
        AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{POLL_INTERVAL, PUBLISHED_SOON, WriteBack, unsent};
use crate::{
    IoError,
    engine::NotFlushed,
    gate::{Hold, Stopped, Work, away, back},
    policy::{self, BATCH_BYTES},
    sender::Destaged,
};

/// A core that is given the gate adopts the buffer within this time, unless something is wrong.
const TAKEN_SOON: Duration = Duration::from_secs(1);
/// What was written to the nodes is made durable after this time if nothing asks for it earlier.
const UNDURABLE_MAX: Duration = Duration::from_secs(5);
/// Interval at which the flusher polls; and the same while its core does not have the gate.
const FLUSHER_LOOK: Duration = Duration::from_millis(100);
const IDLE_LOOK: Duration = Duration::from_millis(250);
/// After a failure only a flush that is waited for is tried, at first for this long, then twice as long each time.
const BACK_OFF_MIN: Duration = Duration::from_millis(500);
const BACK_OFF_MAX: Duration = Duration::from_secs(8);

/// The flushes of the nodes.
#[derive(Debug)]
pub(super) struct Flushes {
    state: Mutex<State>,
    changed: Condvar,
    /// The number of failed flushes that this core's stores will not report again, see
    /// [`Store::forget_errors`](everdisk_store::Store).
    known_errors: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Flushes begun, including the one that runs.
    begun: u64,
    runs: bool,
    /// The number of the last flush that ended, and its outcome.
    ended: u64,
    outcome: Option<Failure>,
    /// The number of the flush that is waited for.
    wanted: u64,
    /// Room is wanted, now or soon.
    soon: bool,
    stop: bool,
    /// How much had been written when the last flush failed; `None` after a success.
    failed_at: Option<(u64, u64)>,
    /// The generation in which a flush failed and could not be counted yet, because the gate was closed.
    uncounted: Option<u64>,
}

/// Why a flush failed.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    errno: i32,
    reason: String,
    lost_bytes: u64,
    /// The nodes work, and everything that they lost is buffered: it is written again, and nobody need be told.
    is_mended: bool,
}

impl From<Failure> for IoError {
    fn from(failure: Failure) -> Self {
        let Failure { errno, reason, lost_bytes, .. } = failure;
        Self::NotDurable { errno, reason, lost_bytes }
    }
}

impl Flushes {
    /// No flush so far. `errors`: the number of failed flushes when the stores were opened.
    pub(super) fn new(errors: u64) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), known_errors: AtomicU64::new(errors) }
    }
}

impl WriteBack {
    /// Makes everything acknowledged before durable on every node.
    ///
    /// # Errors
    /// [`Stopped`]; what is buffered stays buffered. [`IoError::FailedBefore`] when everything is durable, but an
    /// earlier flush failed and the client was not told.
    pub fn flush(&self, hold: &dyn Hold) -> Result<(), Stopped> {
        away(hold, self.engine.is_slow_to_flush() || self.engine.is_slow_to_change());
        let flushed = self.flush_now(Instant::now() + self.timeouts.flush(), true);
        back(hold)?;
        let errors = self.buffer.area.flush_errors().load(Acquire);
        let is_news = hold.errors_told().is_some_and(|told| told != errors);
        if is_news {
            hold.tells_errors(errors);
        }
        match flushed? {
            true if is_news => Err(IoError::FailedBefore.into()),
            true => Ok(()),
            false => Err(IoError::Late { what: "the flush", limit: self.timeouts.flush() }.into()),
        }
    }

    /// As [`WriteBack::flush`], for the control module, which is told only of its own failure. False when it takes
    /// longer than `limit`, also where a node's flush hangs.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn flush_within(&self, limit: Duration) -> Result<bool, IoError> {
        // A core that has just been given the gate does not know yet what there is to flush.
        let deadline = Instant::now() + TAKEN_SOON.min(limit);
        while !self.serves() {
            if Instant::now() >= deadline {
                return Err(IoError::NoGate);
            }
            thread::sleep(Duration::from_millis(1));
        }
        let deadline = Instant::now() + limit;
        match self.flush_now(deadline, false) {
            // This flush may have met the error of an earlier attempt. The data is still buffered and can be tried
            // again.
            Err(IoError::NotDurable { lost_bytes: 0, .. }) => self.flush_now(deadline, false),
            done => done,
        }
    }

    /// A write past the buffer is made durable before it is acknowledged.
    pub(super) fn make_durable(&self, hold: &dyn Hold) -> Result<(), Stopped> {
        away(hold, true);
        let flushed = self.flush_nodes(Instant::now() + self.timeouts.flush(), true);
        back(hold)?;
        if flushed.map_err(IoError::from)? {
            Ok(())
        } else {
            Err(IoError::Late { what: "the flush", limit: self.timeouts.flush() }.into())
        }
    }

    /// `here`: a quick operation may run on this thread.
    fn flush_now(&self, deadline: Instant, here: bool) -> Result<bool, IoError> {
        let target = self.buffer.read_book().head();
        loop {
            if !self.send_up_to(target, deadline, here)? {
                return Ok(false);
            }
            match self.flush_nodes(deadline, here) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(failure) if failure.is_mended && Instant::now() < deadline => continue,
                Err(failure) => return Err(failure.into()),
            }
            let book = self.buffer.read_book();
            if !book.lost().is_empty() {
                return Err(IoError::DataLost { ranges: book.lost().ranges().len() });
            }
            // The tail is lower when a flush failed in between: what that may have taken is written again first.
            if book.tail() >= target {
                return Ok(true);
            }
        }
    }

    /// Sends until everything up to `target` is written to the nodes; false on reaching the deadline.
    fn send_up_to(&self, target: u64, deadline: Instant, here: bool) -> Result<bool, IoError> {
        let buffer = &self.buffer;
        // A batch that was already under way says nothing about the nodes' present state.
        let begun = buffer.progress().begun;
        buffer.progress().try_again();
        while buffer.read_book().written() < target {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            let seen = buffer.seen();
            let turn = if self.may_do_it_here(here && buffer.nodes_are_quick()) {
                self.turn(BATCH_BYTES)
            } else if self.serves() {
                self.want_sent(target);
                Destaged::Busy
            } else {
                Destaged::NoGate
            };
            match turn {
                Destaged::Sent => {}
                Destaged::Nothing => thread::sleep(PUBLISHED_SOON),
                Destaged::Failed(error) => return Err(unsent(error.errno(), error.to_string())),
                Destaged::NoGate => return Err(IoError::NoGate),
                Destaged::Busy => {
                    let progress = buffer.progress();
                    if let (true, Some((errno, reason))) = (progress.last_failed > begun, &progress.error) {
                        return Err(unsent(*errno, reason.clone()));
                    }
                    drop(progress);
                    buffer.wait_progress(seen, POLL_INTERVAL);
                }
            }
        }
        Ok(true)
    }

    /// Waits for a flush of the nodes that begins from now on, or runs it; false when the deadline comes first.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) fn flush_nodes(&self, deadline: Instant, here: bool) -> Result<bool, Failure> {
        let here = self.may_do_it_here(here && self.engine.is_quick_to_flush());
        let mut state = self.flushes.state.lock();
        let number = state.begun + 1;
        loop {
            if state.ended >= number {
                return state.outcome.clone().map_or(Ok(true), Err);
            }
            if !state.runs && here {
                drop(state);
                self.run_flush();
                state = self.flushes.state.lock();
                continue;
            }
            if state.wanted < number {
                state.wanted = number;
                self.flushes.changed.notify_all();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.flushes.changed.wait_for(&mut state, left);
        }
    }

    /// Runs a flush, unless one runs.
    fn run_flush(&self) {
        let number = {
            let mut state = self.flushes.state.lock();
            if state.runs {
                return;
            }
            (state.runs, state.soon) = (true, false);
            state.begun += 1;
            state.begun
        };
        let outcome = self.flush_once();
        let mut state = self.flushes.state.lock();
        state.runs = false;
        state.ended = number;
        state.outcome = outcome;
        drop(state);
        self.flushes.changed.notify_all();
    }

    /// Flushes the nodes, and updates the book and the counts by the outcome.
    fn flush_once(&self) -> Option<Failure> {
        let (buffer, taken) = (&self.buffer, self.taken.load(Acquire));
        if !self.serves() {
            // What another core wrote is for that core to flush, and its errors are for that core to be told of.
            let reason = IoError::NoGate.to_string();
            return Some(Failure { errno: IoError::NoGate.errno(), reason, lost_bytes: 0, is_mended: false });
        }
        // A flush failed under a closed gate, which is now open again for the same core.
        if self.flushes.state.lock().uncounted == Some(taken) && self.count_failure(taken, true) {
            self.flushes.state.lock().uncounted = None;
        }
        let passed = buffer.passed();
        let is_noted = buffer.take_noted();
        let may_change = is_noted && self.gate.enter(Work::Flushing, taken);
        if is_noted && !may_change {
            buffer.keep_noted();
        }
        let mark = {
            let mut book = buffer.write_book();
            if may_change {
                book.settle(&buffer.area);
                buffer.note_lost(&book);
            }
            book.begin_flush(may_change.then_some(&buffer.area))
        };
        if may_change {
            self.gate.leave(Work::Flushing);
        }
        let lost = self.gate.lost_nodes();
        let flushed = match self.engine.flush() {
            Ok(()) if lost == 0 => Ok(()),
            Ok(()) => Err(NotFlushed { nodes: lost, error: IoError::Unflushed, only_forgot: true }),
            Err(failure) => Err(NotFlushed { nodes: failure.nodes | lost, ..failure }),
        };
        if let Err(failure) = flushed {
            let failed = self.flush_failed(&failure, taken);
            self.gate.lost_nodes_reported(lost);
            return Some(failed);
        }
        let may_change = self.gate.enter(Work::Flushing, taken);
        let retired = buffer.write_book().flushed(&buffer.area, &mark, may_change);
        if may_change {
            self.gate.leave(Work::Flushing);
        } else {
            // What was noted before the flush is still in the segment.
            buffer.keep_noted();
        }
        buffer.set_flushed(passed);
        self.flushes.state.lock().failed_at = None;
        buffer.note_flush(retired, None);
        None
    }

    fn flush_failed(&self, failure: &NotFlushed, taken: u64) -> Failure {
        let buffer = &self.buffer;
        // Counted before the noted ranges are examined. A thread that notes one later sees the count, and writes again.
        buffer.note_failure();
        let (head, lost_bytes) = {
            let mut book = buffer.write_book();
            let lost = book.flush_failed(&buffer.area, |range| self.engine.touches(failure.nodes, range));
            buffer.note_lost(&book);
            (book.head(), lost)
        };
        // Counted again, for a thread that checked in between and did not see yet that something is lost.
        buffer.note_failure();
        // A client that was told, and has written nothing since, need not be told of the same failure again.
        let now = (head, buffer.passed());
        let is_mended = failure.only_forgot && lost_bytes == 0;
        let is_news = !is_mended && self.flushes.state.lock().failed_at.replace(now) != Some(now);
        // The failure is counted once the lost ranges are in the segment, by the core that has the gate. Where this
        // core has lost the gate, the core that has it meets the error at its own descriptors: these are opened anew only
        // for errors that were counted.
        if !self.count_failure(taken, is_news) && is_news {
            self.flushes.state.lock().uncounted = Some(taken);
        }
        let reason = failure.error.to_string();
        if is_mended {
            tracing::warn!(
                error = reason,
                "a storage node has lost what was not durable: it is buffered, and written again"
            );
        } else if !is_news {
            tracing::debug!(error = reason, "a storage node could not make data durable, again");
        } else if lost_bytes > 0 {
            tracing::error!(
                lost_bytes,
                error = reason,
                "a storage node could not make data durable: what had been written past the buffer is lost until it is written anew"
            );
        } else {
            tracing::warn!(
                error = reason,
                "a storage node could not make data durable: buffered data is written again"
            );
        }
        let failed = Failure { errno: failure.error.errno(), reason, lost_bytes, is_mended };
        buffer.note_flush(false, Some((failed.errno, failed.reason.clone())));
        failed
    }

    /// Puts the lost ranges of a failed flush into the segment, and counts the failure. False: this core may not change
    /// the segment now.
    fn count_failure(&self, taken: u64, is_news: bool) -> bool {
        if !self.gate.enter(Work::Flushing, taken) {
            return false;
        }
        let mut book = self.buffer.write_book();
        book.settle(&self.buffer.area);
        self.buffer.note_lost(&book);
        drop(book);
        if is_news {
            self.flushes.known_errors.fetch_add(1, AcqRel);
            self.buffer.area.flush_errors().fetch_add(1, AcqRel);
        }
        self.gate.leave(Work::Flushing);
        true
    }

    /// A thread waits until everything up to here is written to the nodes.
    fn want_sent(&self, target: u64) {
        self.wanted.fetch_max(target, Relaxed);
        self.rouse_sender();
    }

    /// A thread waits for room.
    pub(super) fn want_room(&self) {
        self.want_sent(self.buffer.read_book().head());
        self.want_flush();
    }

    /// Written data is to be made durable soon.
    pub(super) fn want_flush(&self) {
        let mut state = self.flushes.state.lock();
        if !std::mem::replace(&mut state.soon, true) {
            self.flushes.changed.notify_all();
        }
    }

    /// The flusher's thread. It flushes when a flush is waited for, when much data is written and not durable, and when
    /// some has been so for long.
    pub fn run_flusher(&self) {
        let (mut since, mut not_before): (Option<Instant>, Option<Instant>) = (None, None);
        let mut back_off = Duration::ZERO;
        self.tended.store(true, Release);
        loop {
            let (wanted, soon) = {
                let mut state = self.flushes.state.lock();
                // Nothing to do while another thread flushes: the end of that flush wakes this thread.
                let quiet =
                    |state: &mut State| !state.stop && (state.runs || (state.wanted <= state.begun && !state.soon));
                let look = if self.serves() { FLUSHER_LOOK } else { IDLE_LOOK };
                self.flushes.changed.wait_while_for(&mut state, quiet, look);
                if state.stop {
                    return;
                }
                (state.wanted > state.begun, std::mem::take(&mut state.soon))
            };
            if !self.serves() {
                self.forget_told_errors();
            }
            let backing_off = not_before.is_some_and(|at| Instant::now() < at);
            if wanted || (self.serves() && !backing_off && self.is_flush_due(soon, &mut since)) {
                self.run_flush();
                since = None;
                let failed = self.flushes.state.lock().outcome.is_some();
                back_off = if failed { (back_off * 2).clamp(BACK_OFF_MIN, BACK_OFF_MAX) } else { Duration::ZERO };
                not_before = failed.then(|| Instant::now() + back_off);
            } else if soon {
                // There is nothing to flush yet, or it is too early for another flush. A thread that waits asks again.
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// For a core that does not have the gate. The core that has it has been told of some errors and has dealt with
    /// them. This core's own openings of the nodes must not report those again when it is given the gate.
    pub(super) fn forget_told_errors(&self) {
        let errors = self.buffer.area.flush_errors().load(Acquire);
        if self.flushes.known_errors.load(Acquire) == errors {
            return;
        }
        match self.engine.forget_errors() {
            Ok(()) => self.flushes.known_errors.store(errors, Release),
            // The errors will be reported again, and what was written past the buffer will count as lost.
            Err(error) => tracing::debug!(%error, "a storage node cannot be opened anew"),
        }
    }

    /// Whether to flush although no thread waits for it. `since`: since when something has not been durable.
    fn is_flush_due(&self, soon: bool, since: &mut Option<Instant>) -> bool {
        let (fill, undurable) = {
            let book = self.buffer.read_book();
            (book.written_fill(), book.written() > book.tail())
        };
        let passed = self.buffer.passed_since_flush();
        if !undurable && passed == 0 {
            *since = None;
            return false;
        }
        let long = since.get_or_insert_with(Instant::now).elapsed() >= UNDURABLE_MAX;
        long || (undurable && soon) || fill >= policy::FLUSH_ABOVE || passed >= policy::FLUSH_PASSED
    }

    /// Ends [`WriteBack::run_flusher`].
    pub(super) fn stop_flusher(&self) {
        self.flushes.state.lock().stop = true;
        self.flushes.changed.notify_all();
    }
}
