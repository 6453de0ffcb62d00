//! Past the buffer: operations that write to the storage nodes before they are acknowledged, behind the fence; and
//! requests that wait for room or for a range.

use std::{
    ops::Range,
    sync::atomic::Ordering::{Acquire, Release},
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::volume::Bypass;

use super::{POLL_INTERVAL, PUBLISHED_SOON, WriteBack, patience::Patience};
use crate::{
    Engine, IoError,
    bypasses::Bypassing,
    gate::{Hold, Stopped, away, back},
    policy::BATCH_BYTES,
    sender::Destaged,
};

/// Up to this number, writes past the buffer at the same time hardly wait for each other.
const BESIDE_MAX: usize = 4;
/// A request that is blocked by a bypass in the same range polls at this interval.
const BLOCKED_LOOK: Duration = Duration::from_micros(100);
/// A bypass is repeated up to this often when flushes fail beside it.
const REPEATS_MAX: u32 = 3;

impl WriteBack {
    /// Does an operation that writes to the nodes, behind the fence. The operation was taken under the gate. `range`:
    /// what it changes.
    pub(super) fn through(
        &self,
        hold: &dyn Hold,
        bypassing: &Bypassing<'_>,
        range: &Range<u64>,
        operation: impl Fn(&Engine) -> Result<(), IoError>,
    ) -> Result<(), Stopped> {
        let mut failed = None;
        for _ in 0..=REPEATS_MAX {
            let failures = self.buffer.failures();
            hold.writing();
            if self.engine.is_slow_to_change() {
                hold.waits();
            }
            let look = self.buffer.begin_write();
            let done =
                self.fence(bypassing).and_then(|ours| if ours { Ok(Some(operation(&self.engine)?)) } else { Ok(None) });
            back(hold)?;
            match done {
                // The gate went away and came back: the operation is kept, and done then.
                Ok(None) => return Err(Stopped::Abandoned),
                done => done?,
            };
            self.buffer.note_write(&look, bypassing.beside > BESIDE_MAX);
            if range.is_empty() {
                return Ok(());
            }
            if !self.buffer.note_through(range) {
                return Err(IoError::ManyLost.into());
            }
            if self.buffer.is_much_passed() {
                self.want_flush();
            }
            // A flush that failed during the write may have taken it. That flush was told of the error, and this range
            // was not noted yet.
            if self.buffer.failures() == failures && self.bypass == Bypass::Never {
                match self.make_durable(hold) {
                    // The node may work again: this write is repeated like any beside a failed flush.
                    Err(Stopped::Failed(error @ IoError::NotDurable { .. })) => failed = Some(error),
                    done => done?,
                }
            }
            // Nor is the range durable by a flush that succeeded after a failed one.
            if self.buffer.failures() == failures {
                return Ok(());
            }
        }
        let late = || IoError::Late { what: "a write beside which no flush fails", limit: Duration::ZERO };
        Err(failed.unwrap_or_else(late).into())
    }

    /// Waits until no other core writes to the nodes any more. False when this core has lost the gate, or has lost it
    /// and been given it again since `bypassing` was taken: then the request is abandoned, and would wait for itself.
    /// This core's worker has announced itself.
    fn fence(&self, bypassing: &Bypassing<'_>) -> Result<bool, IoError> {
        let taken = self.taken.load(Acquire);
        if self.fenced.load(Acquire) == taken {
            return Ok(true);
        }
        let deadline = Instant::now() + self.timeouts.room();
        loop {
            if self.gate.generation() != Some(taken) || bypassing.is_past() {
                return Ok(false);
            }
            if self.may_write() {
                self.fenced.store(taken, Release);
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Err(IoError::Late { what: "the last write of the core before", limit: self.timeouts.room() });
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether no core but this one, under this generation, writes to the nodes any more.
    fn may_write(&self) -> bool {
        self.bypasses.are_past_over() && self.gate.may_write()
    }

    /// Sends one batch of about `bytes`, if the role is free and this core has adopted what it sends.
    pub(super) fn turn(&self, bytes: u64) -> Destaged {
        let taken = self.taken.load(Acquire);
        self.buffer.turn(&self.engine, &*self.gate, taken, || self.may_write(), bytes)
    }

    /// A bypass is under way in the same range. It ends soon, or hangs with its node.
    pub(super) fn blocked(&self, hold: &dyn Hold) -> Result<(), Stopped> {
        away(hold, self.engine.is_slow_to_change());
        thread::sleep(BLOCKED_LOOK);
        back(hold)
    }

    /// Sends a batch and flushes, or waits for another thread to do so: for room, or for a range that is buffered.
    pub(super) fn wait(&self, hold: &dyn Hold, patience: &mut Option<Patience>) -> Result<(), Stopped> {
        away(hold, self.engine.is_slow_to_change() || self.engine.is_slow_to_flush());
        let buffer = &self.buffer;
        let patience = patience.get_or_insert_with(|| Patience::new(buffer));
        let seen = buffer.seen();
        // A failed operation is retried by the sender's and the flusher's threads, which back off, not by every request
        // that waits.
        let fails = {
            let progress = buffer.progress();
            progress.is_backing_off() || progress.flush_error.is_some()
        };
        if self.may_do_it_here(buffer.nodes_are_quick() && !fails) {
            match self.turn(BATCH_BYTES) {
                Destaged::Sent => {}
                Destaged::Nothing => thread::sleep(PUBLISHED_SOON),
                Destaged::Busy | Destaged::NoGate | Destaged::Failed(_) => buffer.wait_progress(seen, POLL_INTERVAL),
            }
            if self.is_undurable() {
                if self.may_do_it_here(self.engine.is_quick_to_flush()) {
                    // The outcome is in the progress.
                    drop(self.flush_nodes(Instant::now() + POLL_INTERVAL, true));
                } else {
                    self.want_flush();
                    buffer.wait_progress(buffer.seen(), POLL_INTERVAL);
                }
            }
        } else {
            self.want_room();
            buffer.wait_progress(seen, POLL_INTERVAL);
        }
        let verdict = patience.lasts(buffer, &self.timeouts);
        back(hold)?;
        Ok(verdict?)
    }

    /// Whether the work may be done on this thread: where it is quick, or no other thread does it.
    pub(super) fn may_do_it_here(&self, is_quick: bool) -> bool {
        is_quick || !self.tended.load(Acquire)
    }

    /// Whether something is written to the nodes that a flush would retire.
    pub(super) fn is_undurable(&self) -> bool {
        let book = self.buffer.read_book();
        book.written() > book.tail()
    }
}
