//! Flushes: everything acknowledged is sent, then the storage nodes are flushed, then what that made durable is retired.
//!
//! ```text
//!  who wants a flush ─► waits for one that begins from now on ─► its outcome
//!                         │ nobody flushes, and flushes are quick: runs it here
//!                         └ else: the flusher's thread runs it; who waits has a deadline
//!
//!  a flush: how far is everything written? ─► fdatasync on every node ─┬─ all succeed: retire up to there
//!                                                                      └─ one fails: what was written to it counts as not written;
//!                                                                         what passed the buffer is lost; everybody is told once
//! ```
//! One runs at a time: of two at once on one open file, only one is told of an error (lib/errseq.c).

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

/// A flush that an application waits for ends after this time.
const FLUSH_LIMIT: Duration = Duration::from_secs(60);
/// A core that is given the gate has taken the buffer over within this time, or something is amiss.
const TAKEN_SOON: Duration = Duration::from_secs(1);
/// What was written to the nodes is made durable after this time, when nothing else asks for it.
const UNDURABLE_MAX: Duration = Duration::from_secs(5);
/// The flusher looks around this often, and while its core does not have the gate.
const FLUSHER_LOOK: Duration = Duration::from_millis(100);
const IDLE_LOOK: Duration = Duration::from_millis(250);
/// After a failure nobody but who waits for it flushes, at first for this long, then twice as long each time.
const BACK_OFF_MIN: Duration = Duration::from_millis(500);
const BACK_OFF_MAX: Duration = Duration::from_secs(8);

/// The flushes of the nodes.
#[derive(Debug)]
pub(super) struct Flushes {
    state: Mutex<State>,
    changed: Condvar,
    /// Failed flushes of which the stores of this core would tell no more, see [`Store::forget_errors`](everdisk_store::Store).
    known_errors: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Flushes begun, the one that runs among them.
    begun: u64,
    runs: bool,
    /// The number of the last one that ended, and its outcome.
    ended: u64,
    outcome: Option<Failure>,
    /// Somebody waits for this one.
    wanted: u64,
    /// Room is wanted, or will be.
    soon: bool,
    stop: bool,
    /// How much had been written when one failed; `None` after one that succeeded.
    failed_at: Option<(u64, u64)>,
    /// One failed in this tenure that could not be counted yet, because the gate was closed.
    uncounted: Option<u64>,
}

/// Why a flush failed.
#[derive(Clone, Debug)]
struct Failure {
    errno: i32,
    reason: String,
    lost_bytes: u64,
}

impl Failure {
    fn error(&self) -> IoError {
        IoError::NotDurable { errno: self.errno, reason: self.reason.clone(), lost_bytes: self.lost_bytes }
    }
}

impl Flushes {
    /// None yet. `errors`: how many failed flushes there were when the stores were opened.
    pub(super) fn new(errors: u64) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), known_errors: AtomicU64::new(errors) }
    }
}

impl WriteBack {
    /// Makes everything acknowledged before durable on every node.
    ///
    /// # Errors
    /// [`Stopped`]; what is buffered stays so. [`IoError::FailedBefore`] when it is durable, and an earlier flush failed of which the
    /// client was not told.
    pub fn flush(&self, hold: &dyn Hold) -> Result<(), Stopped> {
        away(hold, self.engine.is_slow_to_flush() || self.engine.is_slow_to_change());
        let flushed = self.flush_now(Instant::now() + FLUSH_LIMIT, true);
        back(hold)?;
        let errors = self.buffer.area.flush_errors().load(Acquire);
        let is_news = hold.errors_told().is_some_and(|told| told != errors);
        if is_news {
            hold.tells_errors(errors);
        }
        match flushed? {
            true if is_news => Err(IoError::FailedBefore.into()),
            true => Ok(()),
            false => Err(IoError::Late { what: "the flush", limit_s: FLUSH_LIMIT.as_secs() }.into()),
        }
    }

    /// As [`WriteBack::flush`], for the control module, which is told of no failure but its own: false when it takes longer than
    /// `limit`, also where a node's flush hangs.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn flush_within(&self, limit: Duration) -> Result<bool, IoError> {
        // A core that was given the gate just now does not know yet what there is to flush.
        let deadline = Instant::now() + TAKEN_SOON.min(limit);
        while !self.serves() {
            if Instant::now() >= deadline {
                return Err(IoError::NoGate);
            }
            thread::sleep(Duration::from_millis(1));
        }
        let deadline = Instant::now() + limit;
        match self.flush_now(deadline, false) {
            // It may have met the error of an attempt that came before; everything is still there to be tried again.
            Err(IoError::NotDurable { lost_bytes: 0, .. }) => self.flush_now(deadline, false),
            done => done,
        }
    }

    /// A write past the buffer is made durable before it is acknowledged.
    pub(super) fn make_durable(&self, hold: &dyn Hold) -> Result<(), Stopped> {
        away(hold, true);
        let flushed = self.flush_nodes(Instant::now() + FLUSH_LIMIT, true);
        back(hold)?;
        if flushed? { Ok(()) } else { Err(IoError::Late { what: "the flush", limit_s: FLUSH_LIMIT.as_secs() }.into()) }
    }

    /// `here`: what is quick may be done on this thread.
    fn flush_now(&self, deadline: Instant, here: bool) -> Result<bool, IoError> {
        let target = self.buffer.read_book().head();
        loop {
            if !self.send_up_to(target, deadline, here)? || !self.flush_nodes(deadline, here)? {
                return Ok(false);
            }
            let book = self.buffer.read_book();
            if !book.lost().is_empty() {
                return Err(IoError::DataLost { ranges: book.lost().ranges().len() });
            }
            // Less, when a flush had failed in between: what it may have taken is written again first.
            if book.tail() >= target {
                return Ok(true);
            }
        }
    }

    /// Sends until everything up to `target` is written to the nodes; false when that takes too long.
    fn send_up_to(&self, target: u64, deadline: Instant, here: bool) -> Result<bool, IoError> {
        let buffer = &self.buffer;
        // A batch that was under way already says nothing about the nodes as they are now.
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
    /// [`IoError::NotDurable`].
    pub(super) fn flush_nodes(&self, deadline: Instant, here: bool) -> Result<bool, IoError> {
        let here = self.may_do_it_here(here && self.engine.is_quick_to_flush());
        let mut state = self.flushes.state.lock();
        let number = state.begun + 1;
        loop {
            if state.ended >= number {
                return state.outcome.as_ref().map_or(Ok(true), |failure| Err(failure.error()));
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

    /// Flushes the nodes, and draws the conclusions.
    fn flush_once(&self) -> Option<Failure> {
        let (buffer, taken) = (&self.buffer, self.taken.load(Acquire));
        if !self.serves() {
            // What another core wrote is that one's to flush, and its errors are that one's to be told of.
            let reason = IoError::NoGate.to_string();
            return Some(Failure { errno: IoError::NoGate.errno(), reason, lost_bytes: 0 });
        }
        // One that failed under a closed gate, which is open again for the same core.
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
        let flushed = self.engine.flush();
        if let Err(failure) = flushed {
            return Some(self.flush_failed(&failure, taken));
        }
        let may_change = self.gate.enter(Work::Flushing, taken);
        let retired = buffer.write_book().flushed(&buffer.area, &mark, may_change);
        if may_change {
            self.gate.leave(Work::Flushing);
        } else {
            // What was noted before is still there.
            buffer.keep_noted();
        }
        buffer.set_flushed(passed);
        self.flushes.state.lock().failed_at = None;
        buffer.note_flush(retired, None);
        None
    }

    fn flush_failed(&self, failure: &NotFlushed, taken: u64) -> Failure {
        let buffer = &self.buffer;
        // Before what was noted is looked at: who notes later sees it, and writes again.
        buffer.note_failure();
        let (head, lost_bytes) = {
            let mut book = buffer.write_book();
            let lost = book.flush_failed(&buffer.area, |range| self.engine.touches(failure.nodes, range));
            buffer.note_lost(&book);
            (book.head(), lost)
        };
        // Again: who has looked in between did not see yet that something is lost.
        buffer.note_failure();
        // Who was told, and has written nothing since, need not be told of the same again.
        let now = (head, buffer.passed());
        let is_news = self.flushes.state.lock().failed_at.replace(now) != Some(now);
        // It is counted when what is lost is in the segment, by the core that has the gate. Where this one has lost it the one that has it
        // is told of the error by its own opening, which forgets only what was counted.
        if !self.count_failure(taken, is_news) && is_news {
            self.flushes.state.lock().uncounted = Some(taken);
        }
        let reason = failure.error.to_string();
        if !is_news {
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
        let failed = Failure { errno: failure.error.errno(), reason, lost_bytes };
        buffer.note_flush(false, Some((failed.errno, failed.reason.clone())));
        failed
    }

    /// Puts what a failed flush has cost into the segment, and counts it. False: this core may not change the segment now.
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

    /// Somebody waits until everything up to here is written to the nodes.
    fn want_sent(&self, target: u64) {
        self.wanted.fetch_max(target, Relaxed);
        self.rouse_sender();
    }

    /// Somebody waits for room.
    pub(super) fn want_room(&self) {
        self.want_sent(self.buffer.read_book().head());
        self.want_flush();
    }

    /// What is written is to be made durable soon.
    pub(super) fn want_flush(&self) {
        let mut state = self.flushes.state.lock();
        if !std::mem::replace(&mut state.soon, true) {
            self.flushes.changed.notify_all();
        }
    }

    /// The flusher's thread: flushes when somebody waits for it, when much is written and not durable, and when it has been so for long.
    pub fn run_flusher(&self) {
        let (mut since, mut not_before): (Option<Instant>, Option<Instant>) = (None, None);
        let mut back_off = Duration::ZERO;
        self.tended.store(true, Release);
        loop {
            let (wanted, soon) = {
                let mut state = self.flushes.state.lock();
                // While another thread flushes there is nothing to do: its end is told.
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
                // There is nothing to flush yet, or not again so soon: whoever waits asks again.
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// A core that does not have the gate: of errors that the one that has it was told of and has dealt with, its own openings of the nodes
    /// tell no more when it is given the gate.
    pub(super) fn forget_told_errors(&self) {
        let errors = self.buffer.area.flush_errors().load(Acquire);
        if self.flushes.known_errors.load(Acquire) == errors {
            return;
        }
        match self.engine.forget_errors() {
            Ok(()) => self.flushes.known_errors.store(errors, Release),
            // They are told again then, and what passed the buffer by is thought to be lost.
            Err(error) => tracing::debug!(%error, "a storage node cannot be opened anew"),
        }
    }

    /// Whether to flush, although nobody waits for it. `since`: since when something has not been durable.
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
