//! Work without a request: sending data that is old or plentiful, and following another core.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use super::{POLL_INTERVAL, WriteBack};
use crate::{
    policy::{self, BATCH_BYTES, Sending},
    sender::Destaged,
};

/// Buffered data is sent after this time, when nothing else asks for it. (The kernel's page cache takes 5 to 30 s.)
const AGE_MAX: Duration = Duration::from_secs(5);
/// Interval at which a core without the gate follows the buffer; near a hand-over, the second.
const FOLLOW: Duration = Duration::from_millis(50);
const FOLLOW_CLOSELY: Duration = Duration::from_micros(500);
/// A probe ahead of a hand-over is waited for at most for this time.
const PROBE_LIMIT: Duration = Duration::from_millis(300);
/// The core stays close for this long after it was asked to.
const CLOSE_FOR: Duration = Duration::from_secs(2);
/// Extents followed in one hold of the book's lock.
const FOLLOW_AT_ONCE: u64 = 256;

/// Orders to the sender's thread.
#[derive(Debug, Default)]
pub(super) struct SenderState {
    stop: bool,
    close_until: Option<Instant>,
}

impl WriteBack {
    /// Prepares a core that does not have the gate for being given it: it probes the nodes and follows closely from now on.
    /// Returns when it has caught up, with the bytes it knows of.
    pub fn follow(&self) -> u64 {
        self.engine.probe_ahead(PROBE_LIMIT);
        self.sender.lock().close_until = Some(Instant::now() + CLOSE_FOR);
        self.rouse_sender();
        self.follow_now();
        self.buffered_bytes()
    }

    /// Follows what the core that has the gate has buffered since.
    fn follow_now(&self) {
        let buffer = &self.buffer;
        while buffer.write_book().follow(&buffer.area, FOLLOW_AT_ONCE).extents >= FOLLOW_AT_ONCE {}
    }

    pub(super) fn rouse_sender(&self) {
        let _sender = self.sender.lock();
        self.work.notify_all();
    }

    /// Ends [`WriteBack::run_sender`] and [`WriteBack::run_flusher`].
    pub fn stop_tending(&self) {
        self.sender.lock().stop = true;
        self.work.notify_all();
        self.stop_flusher();
    }

    /// The sender's thread: sends data that is old or plentiful while this core has the gate, and follows while another
    /// core has it.
    pub fn run_sender(&self) {
        let mut aging = Aging { seq: 0, since: Instant::now() };
        let mut sending = Sending::Rests;
        let mut tried = Instant::now();
        let mut next = POLL_INTERVAL;
        while self.sender_sleep(next) {
            let buffer = &self.buffer;
            if !self.serves() {
                sending = Sending::Rests;
                self.follow_now();
                let close = self.sender.lock().close_until.is_some_and(|until| Instant::now() < until);
                next = if close { FOLLOW_CLOSELY } else { FOLLOW };
                continue;
            }
            let (fill, written, head) = {
                let book = buffer.read_book();
                (book.dirty_fill(), book.written(), book.head())
            };
            sending = buffer.sending(fill, sending);
            let wanted = self.wanted.load(Relaxed) > written && head > written;
            let hurries = sending == Sending::Hurries || aging.is_over(written, head) || wanted;
            let tries = sending == Sending::Tries && tried.elapsed() >= policy::TRY_EVERY;
            next = if sending == Sending::Tries { policy::TRY_EVERY } else { FOLLOW };
            if (hurries || tries) && !buffer.progress().is_backing_off() {
                tried = Instant::now();
                match self.turn(if hurries { BATCH_BYTES } else { policy::TRY_BYTES }) {
                    Destaged::Sent => {
                        if buffer.read_book().written_fill() >= policy::FLUSH_ABOVE {
                            self.want_flush();
                        }
                        if hurries {
                            next = Duration::ZERO;
                        }
                    }
                    Destaged::Failed(error) => {
                        tracing::warn!(%error, "buffered data cannot be sent; it is kept and tried again");
                    }
                    Destaged::Nothing | Destaged::Busy | Destaged::NoGate => next = POLL_INTERVAL,
                }
            }
        }
    }

    /// False: the thread is to end.
    fn sender_sleep(&self, time: Duration) -> bool {
        let mut sender = self.sender.lock();
        if sender.stop || time.is_zero() {
            return !sender.stop;
        }
        self.sender_sleeps.store(true, Relaxed);
        self.work.wait_for(&mut sender, time);
        self.sender_sleeps.store(false, Relaxed);
        !sender.stop
    }
}

/// When the buffer was last known to hold nothing older than `seq`.
struct Aging {
    seq: u64,
    since: Instant,
}

impl Aging {
    /// Whether what was there at the last mark is still there after [`AGE_MAX`].
    fn is_over(&mut self, written: u64, head: u64) -> bool {
        if written >= self.seq {
            *self = Self { seq: head, since: Instant::now() };
            return false;
        }
        self.since.elapsed() >= AGE_MAX
    }
}
