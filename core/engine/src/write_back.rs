//! A volume with its write buffer (D5): a write is acknowledged once it is buffered, a flush once everything acknowledged before
//! it is durable on the storage nodes. In synchronous mode, or without a buffer, writes go through first (M3, M7).
//!
//! ```text
//!  write ──► buffered? ─ room ─────────────► append, acknowledge
//!             │  no room: send, or wait          ▲
//!             │◄─────────────────────────────────┘
//!             │ synchronous (or rather full, and the nodes are as quick as the buffer)
//!             └► waits until nothing buffered overlaps it, writes to the nodes, acknowledges
//! ```
//! What goes through must not be overwritten by older buffered data when that is sent again after a death: hence the wait.
//!
//! Whoever waits for a storage node is [`away`](Caller::away): the gate may be given to another core meanwhile, and the request with
//! it.

use std::{
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
            fence,
        },
    },
    thread,
    time::{Duration, Instant},
};

use everdisk_buffer::{
    area::Area,
    book::{Book, Gaps, Place},
    log,
};
use everdisk_proto::{buffer::Extent, frame::NodeStatus};
use everdisk_store::{FileRange, Sought};
use everdisk_sys::memory::SharedSegment;

use crate::{
    Engine, IoError,
    area::SegmentArea,
    gate::{Caller, Gate, Stopped, away, back},
    passing::{Pass, Passing},
    sender::{BATCH_BYTES, Buffer, Turn},
};

use self::{
    patience::{Patience, ROOM_LIMIT},
    tending::SenderState,
};

/// A flush that an application waits for ends after this time at the latest.
const FLUSH_LIMIT: Duration = Duration::from_secs(60);
/// An extent that another worker has a place for is published within this time, unless that worker is off the CPU.
const PUBLISHED_SOON: Duration = Duration::from_micros(30);
/// A core that is given the gate has taken the buffer over within this time, or something is amiss.
const TAKEN_SOON: Duration = Duration::from_secs(1);
/// So many writes past the buffer at once hardly wait for each other.
const BESIDE_MAX: usize = 4;
/// A range in which a write past the buffer is under way is looked at again after this time.
const BLOCKED_LOOK: Duration = Duration::from_micros(100);
/// Waits look around this often.
const LOOK: Duration = Duration::from_millis(20);

/// Locks; what a panic of another thread left is as good as it was.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a write goes.
enum Way {
    /// Into the buffer.
    Append(Place),
    /// To the storage nodes, because it must, or because they are quick.
    Through { required: bool },
    /// Nowhere yet: there is no room, or it must go through and something buffered overlaps it.
    Wait,
    /// Nowhere yet: a write past the buffer overlaps it.
    Blocked,
}

/// An open volume with its write buffer. All operations may be called from many threads at once.
pub struct WriteBack {
    engine: Arc<Engine>,
    gate: Box<dyn Gate>,
    buffer: Option<Buffer>,
    /// The generation that was taken over last, and the one for which no other core writes any more.
    taken: AtomicU64,
    fenced: AtomicU64,
    taking: Mutex<()>,
    passing: Passing,
    sender: Mutex<SenderState>,
    work: Condvar,
    sender_sleeps: AtomicBool,
}

impl WriteBack {
    /// The volume of `engine` with the buffer in a segment, if there is one in it.
    pub fn new(engine: Arc<Engine>, segment: &Arc<SharedSegment>, gate: Box<dyn Gate>) -> Self {
        let buffer = SegmentArea::of(segment).map(|area| Buffer::new(area, engine.size()));
        Self {
            engine,
            gate,
            buffer,
            taken: AtomicU64::new(u64::MAX),
            fenced: AtomicU64::new(u64::MAX),
            taking: Mutex::new(()),
            passing: Passing::default(),
            sender: Mutex::default(),
            work: Condvar::new(),
            sender_sleeps: AtomicBool::new(false),
        }
    }

    /// The storage nodes.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Every node as the core sees it.
    pub fn nodes(&self) -> Vec<NodeStatus> {
        self.engine.nodes()
    }

    /// Bytes that are buffered, as far as this core knows.
    pub fn buffered_bytes(&self) -> u64 {
        self.buffer.as_ref().map_or(0, |buffer| buffer.read_book().bytes())
    }

    /// This core has the gate under a new generation: whatever its predecessor buffered is its own from now on.
    pub fn take_over(&self, generation: u64) {
        if self.taken.load(Acquire) == generation {
            return;
        }
        let _taking = lock(&self.taking);
        if self.taken.load(Acquire) == generation {
            return;
        }
        self.passing.begin_tenure();
        if let Some(buffer) = &self.buffer {
            let mut book = buffer.write_book();
            let followed = book.adopt(&buffer.area);
            // A probe may have come too late: then somebody else appends meanwhile, and what was read is worth nothing.
            fence(Acquire);
            if self.gate.generation() != Some(generation) {
                *book = Book::new(buffer.area.geometry(), self.engine.size());
                return;
            }
            let bytes = book.bytes();
            drop(book);
            buffer.note_lost();
            self.gate.taken_over(bytes);
            if followed.damaged > 0 {
                tracing::error!(
                    damaged = followed.damaged,
                    "extents of the write buffer are damaged: their data is lost"
                );
            }
            tracing::debug!(generation, bytes, extents = followed.extents, "took the write buffer over");
        }
        self.taken.store(generation, Release);
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn read(&self, caller: &dyn Caller, offset: u64, buf: &mut [u8]) -> Result<(), Stopped> {
        caller.away();
        let read = self.read_now(offset, buf, &|| caller.waits());
        back(caller)?;
        Ok(read?)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8], waits: &dyn Fn()) -> Result<(), IoError> {
        let Some(buffer) = &self.buffer else { return self.engine.read_beside(offset, buf, waits) };
        self.engine.inside(offset, buf.len() as u64)?;
        let gaps = {
            let book = buffer.read_book();
            let lost = |_| IoError::DataLost { ranges: book.lost().ranges().len() };
            book.read(&buffer.area, offset, buf).map_err(lost)?
        };
        match gaps {
            Gaps::All => self.engine.read_beside(offset, buf, waits),
            Gaps::Some(gaps) => gaps.into_iter().try_for_each(|gap| {
                let place = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
                let part = buf.get_mut(place(gap.start)..place(gap.end)).unwrap_or_default();
                self.engine.read_beside(gap.start, part, waits)
            }),
        }
    }

    /// The bytes as a part of a node's file, where nothing of them is buffered and all of them lie in memory.
    pub fn in_memory(&self, offset: u64, len: u64) -> Option<FileRange<'_>> {
        if let Some(buffer) = &self.buffer {
            let book = buffer.read_book();
            if book.index().overlaps(offset..offset.saturating_add(len)) || !book.lost().is_empty() {
                return None;
            }
        }
        self.engine.in_memory(offset, len)
    }

    /// Writes `data` at `offset`. After an error any part of the range may hold the old or the new bytes.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn write(&self, caller: &dyn Caller, offset: u64, data: &[u8]) -> Result<(), Stopped> {
        let range = offset..offset.saturating_add(data.len() as u64);
        self.engine.inside(offset, data.len() as u64)?;
        let Some(buffer) = &self.buffer else {
            let pass = self.passing.enter_beside(&range);
            return self.through(caller, &pass, &range, |engine| engine.write(offset, data));
        };
        let (mut patience, mut may_pass, mut pass) = (None, true, None);
        loop {
            match self.way(buffer, caller, &range, may_pass, &mut pass) {
                Way::Append(place) => {
                    self.append(buffer, place, offset, data);
                    return Ok(());
                }
                Way::Through { required } => {
                    let Some(held) = &pass else { continue };
                    match self.through(caller, held, &range, |engine| engine.write(offset, data)) {
                        Err(Stopped::Failed(error)) if !required => {
                            tracing::debug!(%error, "a write that could go through is buffered instead");
                            buffer.distrust();
                            (may_pass, pass) = (false, None);
                        }
                        done => return done,
                    }
                }
                Way::Blocked => self.blocked(caller)?,
                Way::Wait => self.wait(buffer, caller, &mut patience)?,
            }
        }
    }

    /// Where a write goes now. `may_pass`: it may go through although it need not. `pass`: held while it goes through, and already
    /// while it waits for that, so that nothing that overlaps it is buffered meanwhile.
    fn way<'a>(
        &'a self,
        buffer: &Buffer,
        caller: &dyn Caller,
        range: &Range<u64>,
        may_pass: bool,
        pass: &mut Option<Pass<'a>>,
    ) -> Way {
        let len = range.end - range.start;
        let mut book = buffer.write_book();
        // Under the lock, so that whoever sets the mode and takes the lock afterwards finds no more appended.
        let required = caller.synchronous();
        let buffered = book.index().overlaps(range.clone());
        if required || (!buffered && may_pass && buffer.lets_through(book.fill(), len)) {
            if pass.is_none() {
                *pass = self.passing.enter(range);
            }
            return match pass {
                None => Way::Blocked,
                Some(_) if buffered => Way::Wait,
                Some(_) => Way::Through { required },
            };
        }
        *pass = None;
        if self.passing.overlaps(range) {
            return Way::Blocked;
        }
        book.reserve(&buffer.area, len).map_or(Way::Wait, Way::Append)
    }

    fn append(&self, buffer: &Buffer, place: Place, offset: u64, data: &[u8]) {
        let extent = Extent {
            offset,
            len: data.len() as u64,
            position: place.position,
            generation: self.taken.load(Relaxed),
            crc: crc32c::crc32c(data),
        };
        log::publish(&buffer.area, place.seq, &extent, data);
        let fill = {
            let mut book = buffer.write_book();
            book.published(&buffer.area, place.seq, &extent);
            book.fill()
        };
        if buffer.is_to_be_sent(fill) && self.sender_sleeps.load(Relaxed) {
            self.rouse_sender();
        }
    }

    /// Makes everything acknowledged before durable on every node.
    ///
    /// # Errors
    /// [`Stopped`]; what is buffered stays so.
    pub fn flush(&self, caller: &dyn Caller) -> Result<(), Stopped> {
        away(caller, self.engine.is_slow_to_flush() || self.engine.is_slow_to_change());
        let flushed = self.flush_now(FLUSH_LIMIT).and_then(|done| {
            if done { Ok(()) } else { Err(IoError::Late { what: "the flush", limit_s: FLUSH_LIMIT.as_secs() }) }
        });
        back(caller)?;
        Ok(flushed?)
    }

    /// As [`WriteBack::flush`], for the control module: false when it takes longer than `limit`.
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
        self.flush_now(limit)
    }

    /// Whether this core has the gate, open or closed, and has taken over what there was.
    pub fn serves(&self) -> bool {
        self.gate.generation() == Some(self.taken.load(Acquire))
    }

    fn flush_now(&self, limit: Duration) -> Result<bool, IoError> {
        if let Some(buffer) = &self.buffer {
            let target = buffer.read_book().head();
            if !self.send_up_to(buffer, target, limit)? {
                return Ok(false);
            }
        }
        self.engine.flush()?;
        match &self.buffer {
            Some(buffer) if !buffer.read_book().lost().is_empty() => {
                Err(IoError::DataLost { ranges: buffer.read_book().lost().ranges().len() })
            }
            _ => Ok(true),
        }
    }

    /// Sends until everything up to `target` is on the nodes; false when that takes too long.
    fn send_up_to(&self, buffer: &Buffer, target: u64, limit: Duration) -> Result<bool, IoError> {
        let deadline = Instant::now() + limit;
        // A batch that was under way already says nothing about the nodes as they are now.
        let begun = buffer.progress().begun;
        while buffer.read_book().tail() < target {
            let seen = buffer.seen();
            match self.turn(buffer, BATCH_BYTES) {
                Turn::Sent => {}
                Turn::Nothing => thread::sleep(PUBLISHED_SOON),
                Turn::Failed(error) => return Err(unsent(error.errno(), error.to_string())),
                Turn::NoGate => return Err(IoError::NoGate),
                Turn::Busy => {
                    let progress = buffer.progress();
                    if let (true, Some((errno, reason))) = (progress.last_failed > begun, &progress.error) {
                        return Err(unsent(*errno, reason.clone()));
                    }
                    drop(progress);
                    buffer.wait_progress(seen, LOOK);
                }
            }
            if Instant::now() >= deadline {
                return Ok(buffer.read_book().tail() >= target);
            }
        }
        Ok(true)
    }

    /// Makes the range read as zero and gives its space back.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn discard(&self, caller: &dyn Caller, offset: u64, len: u64) -> Result<(), Stopped> {
        self.settled(caller, offset, len, |engine| engine.discard(offset, len))
    }

    /// Makes the range read as zero and keeps its space where the nodes can.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn write_zeroes(&self, caller: &dyn Caller, offset: u64, len: u64) -> Result<(), Stopped> {
        self.settled(caller, offset, len, |engine| engine.write_zeroes(offset, len))
    }

    /// Reserves space for the range. No byte changes.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn allocate(&self, caller: &dyn Caller, offset: u64, len: u64) -> Result<(), Stopped> {
        let range = offset..offset;
        self.through(caller, &self.passing.enter_beside(&range), &range, |engine| engine.allocate(offset, len))
    }

    /// Offset of the next data or hole at or after `offset`, as [`Engine::seek`] has it; what is buffered is data.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn seek(&self, caller: &dyn Caller, offset: u64, what: Sought) -> Result<Option<u64>, Stopped> {
        away(caller, self.engine.is_slow_to_read());
        let found = self.seek_now(offset, what);
        back(caller)?;
        Ok(found?)
    }

    fn seek_now(&self, offset: u64, what: Sought) -> Result<Option<u64>, IoError> {
        let Some(buffer) = &self.buffer else { return self.engine.seek(offset, what) };
        // The buffer first: what is sent meanwhile is then found on the nodes.
        if what == Sought::Data {
            let buffered = buffer.read_book().index().next_at(offset);
            let stored = self.engine.seek(offset, what)?;
            return Ok(buffered.into_iter().chain(stored).min());
        }
        let mut at = offset;
        loop {
            let gap = buffer.read_book().index().next_gap(at);
            let Some(hole) = self.engine.seek(gap, what)? else {
                return Ok((offset < self.engine.size()).then_some(self.engine.size()));
            };
            if buffer.read_book().index().next_gap(hole) == hole || hole >= self.engine.size() {
                return Ok(Some(hole));
            }
            at = hole;
        }
    }

    /// Does an operation on the nodes when nothing buffered overlaps its range any more.
    fn settled(
        &self,
        caller: &dyn Caller,
        offset: u64,
        len: u64,
        operation: impl FnOnce(&Engine) -> Result<(), IoError>,
    ) -> Result<(), Stopped> {
        self.engine.inside(offset, len)?;
        let range = offset..offset.saturating_add(len);
        let Some(buffer) = &self.buffer else {
            return self.through(caller, &self.passing.enter_beside(&range), &range, operation);
        };
        let (mut patience, mut pass) = (None, None);
        loop {
            if pass.is_none() {
                let _book = buffer.write_book();
                pass = self.passing.enter(&range);
            }
            match &pass {
                None => self.blocked(caller)?,
                Some(_) if buffer.read_book().index().overlaps(range.clone()) => {
                    self.wait(buffer, caller, &mut patience)?;
                }
                Some(pass) => return self.through(caller, pass, &range, operation),
            }
        }
    }

    /// Does an operation that writes to the nodes, behind the fence. The pass was taken under the gate.
    fn through(
        &self,
        caller: &dyn Caller,
        pass: &Pass<'_>,
        range: &Range<u64>,
        operation: impl FnOnce(&Engine) -> Result<(), IoError>,
    ) -> Result<(), Stopped> {
        caller.writing();
        if self.engine.is_slow_to_change() {
            caller.waits();
        }
        let look = self.buffer.as_ref().map(Buffer::begin_write);
        let done = self.fence().and_then(|ours| if ours { Ok(Some(operation(&self.engine)?)) } else { Ok(None) });
        back(caller)?;
        match done {
            // The gate came back meanwhile: the operation is kept and done then.
            Ok(None) => return Err(Stopped::Abandoned),
            done => done?,
        };
        if let (Some(buffer), Some(look)) = (&self.buffer, look) {
            buffer.note_write(&look, pass.beside > BESIDE_MAX);
            buffer.note_through(range);
        }
        Ok(())
    }

    /// Waits until no other core writes to the nodes any more; false when this core has lost the gate. This core's worker has
    /// announced itself.
    fn fence(&self) -> Result<bool, IoError> {
        let taken = self.taken.load(Acquire);
        if self.fenced.load(Acquire) == taken {
            return Ok(true);
        }
        let deadline = Instant::now() + ROOM_LIMIT;
        loop {
            if self.gate.generation() != Some(taken) {
                return Ok(false);
            }
            if self.may_write() {
                self.fenced.store(taken, Release);
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Err(IoError::Late { what: "the last write of the core before", limit_s: ROOM_LIMIT.as_secs() });
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether nobody writes to the nodes any more but this core under this generation.
    fn may_write(&self) -> bool {
        self.passing.are_past_over() && self.gate.may_write()
    }

    /// Sends one batch of about `bytes`, if the role is free and this core has taken over what it sends.
    fn turn(&self, buffer: &Buffer, bytes: u64) -> Turn {
        let taken = self.taken.load(Acquire);
        buffer.turn(&self.engine, &*self.gate, taken, || self.may_write(), bytes)
    }

    /// A write past the buffer is under way in the same range; they end soon, or hang with their node.
    fn blocked(&self, caller: &dyn Caller) -> Result<(), Stopped> {
        away(caller, self.engine.is_slow_to_change());
        thread::sleep(BLOCKED_LOOK);
        back(caller)
    }

    /// Sends a batch, or waits for one: for room, or for a range that is buffered.
    fn wait(&self, buffer: &Buffer, caller: &dyn Caller, patience: &mut Option<Patience>) -> Result<(), Stopped> {
        away(caller, self.engine.is_slow_to_change());
        let patience = patience.get_or_insert_with(|| Patience::new(buffer));
        let seen = buffer.seen();
        let backing_off = buffer.progress().is_backing_off();
        match if backing_off { Turn::Busy } else { self.turn(buffer, BATCH_BYTES) } {
            Turn::Sent => {}
            Turn::Nothing => thread::sleep(PUBLISHED_SOON),
            Turn::Busy | Turn::NoGate | Turn::Failed(_) => buffer.wait_progress(seen, LOOK),
        }
        let verdict = patience.lasts(buffer);
        back(caller)?;
        Ok(verdict?)
    }
}

fn unsent(errno: i32, reason: String) -> IoError {
    IoError::Unsent { errno, reason }
}

impl std::fmt::Debug for WriteBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteBack").field("buffer", &self.buffer).finish_non_exhaustive()
    }
}

mod patience;
mod tending;

#[cfg(test)]
mod succession;
#[cfg(test)]
mod tests;
