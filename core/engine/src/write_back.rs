//! A volume with its write buffer (D5): a write, a discard or a zeroed range is acknowledged once it is buffered, a flush once
//! everything acknowledged before it is durable on the storage nodes. In synchronous mode, or without a buffer, writes go through
//! first (M3, M7).
//!
//! ```text
//!  write ──► buffered? ─ room ─────────────► append, acknowledge
//!             │  no room: send and flush, or wait   ▲
//!             │◄────────────────────────────────────┘
//!             │ synchronous (or rather full, and the nodes are as quick as the buffer)
//!             └► waits until nothing buffered overlaps it, writes to the nodes, notes the range, acknowledges
//! ```
//! A write that goes through waits until nothing buffered overlaps it. Otherwise older buffered data could overwrite it
//! when that is sent again, after a death or a failed flush.
//!
//! A request that waits for a storage node is [`away`](Hold::away): during the wait the gate may be given to another
//! core, and the request with it.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
            fence,
        },
    },
    time::Duration,
};

use everdisk_buffer::{
    area::Area,
    book::{Gaps, Reservation, Unreadable},
    log,
};
use everdisk_proto::{
    buffer::{Extent, ExtentKind},
    frame::NodeStatus,
    volume::{Bypass, Timeouts},
};
use everdisk_sys::{file::FileRange, memory::SharedSegment};
use parking_lot::{Condvar, Mutex};

use crate::{
    Engine, IoError,
    area::SegmentArea,
    bypasses::{Bypasses, Bypassing},
    gate::{Gate, Hold, Stopped, back},
    sender::Buffer,
};

use self::{flushing::Flushes, tending::SenderState};

/// An extent for which another worker has reserved a slot is published within this time, unless that worker is off the
/// CPU.
const PUBLISHED_SOON: Duration = Duration::from_micros(30);
/// Interval at which waits poll, without a wake.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Where a write goes.
enum Way {
    /// Into the buffer.
    Append(Reservation),
    /// To the storage nodes, because it must, or because they are quick.
    Through { required: bool },
    /// Nowhere yet: there is no room, or it must go through and something buffered overlaps it.
    Wait,
    /// Nowhere yet: a write past the buffer overlaps it.
    Blocked,
    /// Nowhere: see [`IoError::ManyLost`].
    Refused,
}

/// What a write makes of its range.
#[derive(Clone, Copy, Debug)]
enum Content<'a> {
    Data(&'a [u8]),
    Zeros(ExtentKind),
}

impl Content<'_> {
    const fn kind(&self) -> ExtentKind {
        match self {
            Self::Data(_) => ExtentKind::Data,
            Self::Zeros(kind) => *kind,
        }
    }
}

/// An open volume with its write buffer. All operations may be called from many threads at once.
pub struct WriteBack {
    engine: Arc<Engine>,
    gate: Box<dyn Gate>,
    buffer: Buffer,
    /// Whether the volume has a write buffer: else every write goes through.
    buffers: bool,
    bypass: Bypass,
    timeouts: Timeouts,
    /// The generation adopted last, and the one for which no other core writes any more.
    taken: AtomicU64,
    fenced: AtomicU64,
    taking: Mutex<()>,
    bypasses: Bypasses,
    sender: Mutex<SenderState>,
    work: Condvar,
    sender_sleeps: AtomicBool,
    /// Whether there are threads that send and flush without a request. Where there are none, a request that waits does
    /// it.
    tended: AtomicBool,
    /// Up to this extent everything is to be sent at once, because a thread waits for it.
    wanted: AtomicU64,
    flushes: Flushes,
}

impl WriteBack {
    /// The volume of `engine` with the buffer in a segment; `None` when the buffer is of a version that this core does
    /// not know.
    pub fn new(
        engine: Arc<Engine>,
        segment: &Arc<SharedSegment>,
        gate: Box<dyn Gate>,
        bypass: Bypass,
        timeouts: Timeouts,
    ) -> Option<Self> {
        let area = SegmentArea::of(segment)?;
        let buffers = area.geometry().capacity > 0;
        // What passes the buffer cannot be written again. Where a node may lose it, and no other core would know, it does not pass,
        // or is durable before it is acknowledged.
        let bypass = if engine.may_forget() { Bypass::Never } else { bypass };
        let flushes = Flushes::new(area.flush_errors().load(Acquire));
        let buffer = Buffer::new(area, engine.size());
        Some(Self {
            engine,
            gate,
            buffer,
            buffers,
            bypass,
            timeouts,
            taken: AtomicU64::new(u64::MAX),
            fenced: AtomicU64::new(u64::MAX),
            taking: Mutex::new(()),
            bypasses: Bypasses::default(),
            sender: Mutex::default(),
            work: Condvar::new(),
            sender_sleeps: AtomicBool::new(false),
            tended: AtomicBool::new(false),
            wanted: AtomicU64::new(0),
            flushes,
        })
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
        self.buffer.read_book().bytes()
    }

    /// This core has the gate under a new generation: it adopts what its predecessor buffered.
    pub fn adopt(&self, generation: u64) {
        if self.taken.load(Acquire) == generation {
            return;
        }
        let _taking = self.taking.lock();
        if self.taken.load(Acquire) == generation {
            return;
        }
        self.bypasses.begin_tenure();
        let buffer = &self.buffer;
        let mut book = buffer.write_book();
        let followed = book.adopt(&buffer.area);
        // The probe may have come too late. Then another core has been appending, and what was read here is void.
        fence(Acquire);
        if self.gate.generation() != Some(generation) {
            book.forget_all();
            return;
        }
        let bytes = book.bytes();
        buffer.note_lost(&book);
        drop(book);
        buffer.begin_tenure();
        self.gate.taken_over(bytes);
        if followed.damaged > 0 {
            tracing::error!(damaged = followed.damaged, "extents of the write buffer are damaged: their data is lost");
        }
        tracing::debug!(generation, bytes, extents = followed.extents, "took the write buffer over");
        self.taken.store(generation, Release);
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn read(&self, hold: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Stopped> {
        hold.away();
        let read = self.read_now(offset, buf, &|| hold.waits());
        back(hold)?;
        match read {
            Ok(()) => Ok(()),
            Err(NotRead::Failed(error)) => Err(error.into()),
            Err(NotRead::Damaged(seq)) => {
                tracing::error!(
                    seq,
                    "buffered data is damaged: what was acknowledged there is lost until it is written anew"
                );
                let mut book = self.buffer.write_book();
                book.damaged(seq);
                book.settle(&self.buffer.area);
                self.buffer.note_lost(&book);
                Err(IoError::DataLost { ranges: book.lost().ranges().len() }.into())
            }
        }
    }

    fn read_now(&self, offset: u64, buf: &mut [u8], waits: &dyn Fn()) -> Result<(), NotRead> {
        self.engine.inside(offset, buf.len() as u64)?;
        let gaps = {
            let book = self.buffer.read_book();
            book.read(&self.buffer.area, offset, buf).map_err(|why| match why {
                Unreadable::Lost => NotRead::Failed(IoError::DataLost { ranges: book.lost().ranges().len() }),
                Unreadable::Damaged(seq) => NotRead::Damaged(seq),
            })?
        };
        match gaps {
            Gaps::All => Ok(self.engine.read_beside(offset, buf, waits)?),
            Gaps::Some(gaps) => gaps.into_iter().try_for_each(|gap| {
                let place = |at: u64| usize::try_from(at - offset).expect("the gap lies within the buffer");
                Ok(self.engine.read_beside(gap.start, &mut buf[place(gap.start)..place(gap.end)], waits)?)
            }),
        }
    }

    /// The bytes as a part of a node's file, where nothing of them is buffered and all of them lie in memory.
    pub fn in_memory(&self, offset: u64, len: u64) -> Option<FileRange<'_>> {
        {
            let book = self.buffer.read_book();
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
    pub fn write(&self, hold: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Stopped> {
        self.put(hold, offset, data.len() as u64, Content::Data(data))
    }

    /// Makes the range read as zero and gives its space back, where the nodes can. What is buffered of it is dropped.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn discard(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.put(hold, offset, len, Content::Zeros(ExtentKind::Discard))
    }

    /// Makes the range read as zero and keeps its space where the nodes can. What is buffered of it is dropped.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn write_zeroes(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.put(hold, offset, len, Content::Zeros(ExtentKind::Zeroes))
    }

    fn put(&self, hold: &dyn Hold, offset: u64, len: u64, content: Content<'_>) -> Result<(), Stopped> {
        self.engine.inside(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let range = offset..offset + len;
        let (mut patience, mut may_pass, mut bypassing) = (None, true, None);
        loop {
            match self.way(hold, &range, content.kind(), may_pass, &mut bypassing) {
                Way::Append(place) => {
                    self.append(place, &range, content);
                    return Ok(());
                }
                Way::Through { required } => {
                    let held = bypassing.as_ref().expect("who goes through is bypassing");
                    match self.through(hold, held, &range, |engine| content.write(engine, &range)) {
                        Err(Stopped::Failed(error)) if !required => {
                            tracing::debug!(%error, "a write that could go through is buffered instead");
                            self.buffer.distrust();
                            (may_pass, bypassing) = (false, None);
                        }
                        done => return done,
                    }
                }
                Way::Blocked => self.blocked(hold)?,
                Way::Wait => self.wait(hold, &mut patience)?,
                Way::Refused => return Err(IoError::ManyLost.into()),
            }
        }
    }

    /// Where a write goes now. `may_pass`: it may go through although it need not. `bypassing`: held while it goes
    /// through and while it waits to, so that nothing that overlaps it is buffered in that time.
    fn way<'a>(
        &'a self,
        hold: &dyn Hold,
        range: &Range<u64>,
        kind: ExtentKind,
        may_pass: bool,
        bypassing: &mut Option<Bypassing<'a>>,
    ) -> Way {
        let len = range.end - range.start;
        let mut book = self.buffer.write_book();
        if !book.lost().has_room_to_cut(range) {
            return Way::Refused;
        }
        // Under the lock: a thread that sets the mode and then takes the lock finds no more appended.
        let required = !self.buffers || hold.synchronous();
        let buffered = book.overlaps(range);
        let may_pass = may_pass && kind == ExtentKind::Data && self.bypass == Bypass::Auto;
        if required || (!buffered && may_pass && self.buffer.lets_through(&book, len)) {
            if bypassing.is_none() {
                *bypassing =
                    if self.buffers { self.bypasses.enter(range) } else { Some(self.bypasses.enter_beside(range)) };
            }
            return match bypassing {
                None => Way::Blocked,
                Some(_) if buffered => Way::Wait,
                Some(_) => Way::Through { required },
            };
        }
        *bypassing = None;
        if self.bypasses.overlaps(range) {
            return Way::Blocked;
        }
        book.reserve(&self.buffer.area, kind, range).map_or(Way::Wait, Way::Append)
    }

    fn append(&self, place: Reservation, range: &Range<u64>, content: Content<'_>) {
        let buffer = &self.buffer;
        let data = content.data();
        let extent = Extent {
            kind: content.kind(),
            offset: range.start,
            len: range.end - range.start,
            position: place.position,
            generation: self.taken.load(Relaxed),
            crc: crc32c::crc32c(data),
        };
        log::publish(&buffer.area, place.seq, &extent, data);
        let fill = {
            let mut book = buffer.write_book();
            book.published(&buffer.area, place.seq, &extent);
            book.dirty_fill()
        };
        // A discard is sent soon, because it gives space back: the client that asked for it may check.
        let at_once = extent.kind != ExtentKind::Data;
        if at_once {
            self.wanted.fetch_max(place.seq, Relaxed);
        }
        if (at_once || buffer.is_to_be_sent(fill)) && self.sender_sleeps.load(Relaxed) {
            self.rouse_sender();
        }
    }

    /// Reserves space for the range. No byte changes.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn allocate(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        let range = offset..offset;
        self.through(hold, &self.bypasses.enter_beside(&range), &range, |engine| engine.allocate(offset, len))
    }

    /// Whether this core has the gate, open or closed, and has adopted the buffer.
    pub fn serves(&self) -> bool {
        self.gate.generation() == Some(self.taken.load(Acquire))
    }
}

fn unsent(errno: i32, reason: String) -> IoError {
    IoError::Unsent { errno, reason }
}

/// Why nothing was read.
enum NotRead {
    Failed(IoError),
    /// The extent with this sequence number does not have its checksum.
    Damaged(u64),
}

impl From<IoError> for NotRead {
    fn from(error: IoError) -> Self {
        Self::Failed(error)
    }
}

impl<'a> Content<'a> {
    const fn data(&self) -> &'a [u8] {
        match self {
            Self::Data(data) => data,
            Self::Zeros(_) => &[],
        }
    }

    fn write(&self, engine: &Engine, range: &Range<u64>) -> Result<(), IoError> {
        let len = range.end - range.start;
        match self {
            Self::Data(data) => engine.write(range.start, data),
            Self::Zeros(ExtentKind::Zeroes) => engine.zero_and_keep(range.start, len),
            Self::Zeros(_) => engine.discard_or_zero(range.start, len),
        }
    }
}

impl std::fmt::Debug for WriteBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteBack").field("buffer", &self.buffer).finish_non_exhaustive()
    }
}

mod flushing;
mod patience;
mod seeking;
mod tending;
mod through;

#[cfg(test)]
mod durability;
#[cfg(test)]
mod forgetful;
#[cfg(test)]
mod linux;
#[cfg(test)]
mod succession;
#[cfg(test)]
mod tests;
