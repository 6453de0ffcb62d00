//! One core's view of the buffer: its content, which extent holds each byte, what is free, what is sent next.
//!
//! ```text
//!      retired: durable            live: in the log and in the index                     not yet
//!  ──────────────┬───────────────────────────────┬─────────────────────────────┬──────────────────
//!            tail│ written to the storage nodes, │ published … │ reserved …    │head
//!                │ not known to be durable       │written
//! ```
//! A core that has the gate appends ([`Book::reserve`], [`Book::published`]), sends ([`Book::batch`], [`Book::sent`])
//! and flushes ([`Book::begin_flush`], [`Book::flushed`], [`Book::flush_failed`]). Any other core follows
//! ([`Book::follow`]), so that little is left to adopt when it is given the gate ([`Book::adopt`]).
//!
//! A flush that fails leaves it uncertain what has reached the nodes since the last flush that succeeded (Linux marks
//! pages clean when their writeback fails). So everything above the tail counts as not written again, and what was
//! written past the buffer since then is lost. Some facts are known to this core only: the mark `written`, and which
//! pieces are written. They die with it, and the next core writes everything above the tail again.

mod damage;
mod flushing;
mod reading;
mod sending;

use alloc::{collections::VecDeque, vec::Vec};
use core::{ops::Range, sync::atomic::Ordering::Relaxed};

use everdisk_proto::buffer::{Extent, ExtentKind, Geometry, SLOTS_WITHOUT_DATA, stored, word};

use crate::{
    area::Area,
    index::{Index, Piece},
    log::{self, Slot},
    lost::Lost,
    noted::Noted,
};

pub use self::{
    flushing::Mark,
    reading::{Gaps, Shown, Unreadable, VERIFIED_IN_PART_MAX, copy_out},
    sending::Batch,
};

/// A higher sequence number is damage: a state word has 62 bits for it, and no core lives long enough to reach this.
const SEQ_KNOWN_MAX: u64 = u64::MAX >> 8;

/// An extent that is not retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Live {
    /// Its room in the data ring is reserved, up to this virtual position.
    Reserved { end: u64 },
    /// It is in the log and in the index.
    Published(Extent),
    /// It will never be published, because its core has died; or its data is lost.
    Void,
}

/// No room for an extent: something has to be retired first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The slot and ring position reserved for an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Reservation {
    /// Its sequence number.
    pub seq: u64,
    /// Virtual position of its data.
    pub position: u64,
}

/// The outcome of a call to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    /// Extents that were read.
    pub extents: u64,
    /// Of these, extents whose data or slot was damaged.
    pub damaged: u64,
}

/// One core's view of the buffer.
#[derive(Debug)]
pub struct Book {
    geometry: Geometry,
    size: u64,
    index: Index,
    noted: Noted,
    lost: Lost,
    /// `lost` differs from the list in the segment.
    is_unsaved: bool,
    /// Noted ranges that count as lost: to be cleared in the bitmaps once `lost` is saved.
    lost_noted: Vec<Range<u64>>,
    /// Damaged extents that are not retired, found by this core before it had the gate: sequence number and range.
    found: Vec<(u64, Range<u64>)>,
    /// Highest sequence number of an extent whose slot is damaged. The range it covered is unknown, so older data is
    /// not certain.
    doubt: u64,
    /// The extent with sequence number `tail + 1` first.
    live: VecDeque<Live>,
    /// Extents that are being copied into the ring: sequence number and range. There are at most as many as workers.
    copied: Vec<(u64, Range<u64>)>,
    tail: u64,
    /// Up to this extent everything was written to the storage nodes by this core since it adopted the buffer, or was
    /// superseded.
    written: u64,
    /// A piece that bears another number than this is not written.
    epoch: u32,
    /// Failed flushes, plus adoptions. Each of them invalidates the batches and flushes that were under way.
    failures: u64,
    /// Virtual position behind the last reserved extent, behind the last written one, and behind the last retired one.
    end: u64,
    sent_end: u64,
    freed: u64,
    bytes: u64,
}

impl Book {
    /// A book on a buffer of a volume of `size` bytes. It knows nothing of the content yet.
    pub fn new(geometry: Geometry, size: u64) -> Self {
        Self {
            geometry,
            size,
            index: Index::default(),
            noted: Noted::new(size),
            lost: Lost::default(),
            is_unsaved: false,
            lost_noted: Vec::new(),
            found: Vec::new(),
            doubt: 0,
            live: VecDeque::new(),
            copied: Vec::new(),
            tail: 0,
            written: 0,
            epoch: 1,
            failures: 0,
            end: 0,
            sent_end: 0,
            freed: 0,
            bytes: 0,
        }
    }

    /// Bytes of data that are not retired.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Highest sequence number assigned.
    pub fn head(&self) -> u64 {
        self.tail + self.live.len() as u64
    }

    /// Highest sequence number retired: up to it everything is durable.
    pub const fn tail(&self) -> u64 {
        self.tail
    }

    /// Up to this sequence number everything was written to the storage nodes.
    pub const fn written(&self) -> u64 {
        self.written
    }

    /// How full the buffer is, in thousandths: its slots or its data ring, whichever is fuller.
    pub fn fill(&self) -> u64 {
        self.thousandths(self.live.len() as u64, self.end.saturating_sub(self.freed))
    }

    /// As [`Book::fill`], but only what is not written to the storage nodes.
    pub fn dirty_fill(&self) -> u64 {
        self.thousandths(self.head() - self.written, self.end.saturating_sub(self.sent_end))
    }

    /// As [`Book::fill`], but only what is written and not known to be durable.
    pub fn written_fill(&self) -> u64 {
        self.thousandths(self.written - self.tail, self.sent_end.saturating_sub(self.freed))
    }

    fn thousandths(&self, slots: u64, bytes: u64) -> u64 {
        let Geometry { capacity, slots: all } = self.geometry;
        // A buffer with a capacity of 0 bytes has nothing in it.
        let bytes = (bytes * 1000).checked_div(capacity).unwrap_or(0);
        bytes.max(slots * 1000 / all)
    }

    /// Which extent holds which byte.
    pub const fn index(&self) -> &Index {
        &self.index
    }

    /// The lost ranges.
    pub const fn lost(&self) -> &Lost {
        &self.lost
    }

    /// The noted ranges.
    pub const fn noted(&self) -> &Noted {
        &self.noted
    }

    /// Reserves a slot and room in the ring for an extent of this range.
    ///
    /// # Errors
    /// [`Full`].
    pub fn reserve(&mut self, area: &impl Area, kind: ExtentKind, range: &Range<u64>) -> Result<Reservation, Full> {
        let Geometry { capacity, slots } = self.geometry;
        let stored = stored(kind, range.end - range.start);
        if self.live.iter().all(|live| matches!(live, Live::Void)) {
            self.freed = self.end;
            self.sent_end = self.end;
        }
        let slots = match kind {
            // Some tests have volumes with fewer slots.
            ExtentKind::Data => slots - SLOTS_WITHOUT_DATA.min(slots / 4),
            ExtentKind::Discard | ExtentKind::Zeroes => slots,
        };
        if capacity == 0 || self.live.len() as u64 >= slots {
            return Err(Full);
        }
        // The data of an extent is contiguous: what does not fit before the ring's end begins at its start.
        let left = capacity - self.end % capacity;
        let position = if stored > left { self.end + left } else { self.end };
        if (position + stored).saturating_sub(self.freed) > capacity {
            return Err(Full);
        }
        self.end = position + stored;
        self.live.push_back(Live::Reserved { end: self.end });
        let seq = self.head();
        log::reserve(area, seq);
        self.copied.push((seq, range.clone()));
        Ok(Reservation { seq, position })
    }

    /// Whether an extent overlaps the range: one that is there, or one that is being copied and has been reserved by this
    /// core.
    pub fn overlaps(&self, range: &Range<u64>) -> bool {
        let is_copied = self.copied.iter().any(|(_, other)| other.start < range.end && range.start < other.end);
        is_copied || self.index.overlaps(range.clone())
    }

    /// An extent was published in its slot: from now on the index maps its bytes to it.
    pub fn published(&mut self, area: &impl Area, seq: u64, extent: &Extent) {
        self.copied.retain(|(other, _)| *other != seq);
        self.enter(seq, extent);
        if self.lost.remove(&(extent.offset..extent.end())) {
            self.is_unsaved = true;
            self.settle(area);
        }
        area.store(word::BYTES, self.bytes, Relaxed);
    }

    fn enter(&mut self, seq: u64, extent: &Extent) {
        // A core that lost the gate while it copied the data may find that another core has retired the extent.
        let Some(place) = self.place(seq).and_then(|place| self.live.get_mut(place)) else { return };
        *place = Live::Published(*extent);
        self.end = self.end.max(extent.position + extent.stored());
        self.bytes += extent.buffered();
        self.index.insert(Piece {
            start: extent.offset,
            end: extent.end(),
            seq,
            position: extent.position,
            kind: extent.kind,
            written: 0,
        });
    }

    /// Index in `live` of an extent that is not retired.
    fn place(&self, seq: u64) -> Option<usize> {
        seq.checked_sub(self.tail + 1).and_then(|place| usize::try_from(place).ok())
    }

    fn retire_to(&mut self, tail: u64) {
        if self.tail < tail {
            // Damage to a retired extent is known to the core that retired it.
            self.found.retain(|(seq, _)| *seq > tail);
        }
        while self.tail < tail {
            self.tail += 1;
            match self.live.pop_front() {
                Some(Live::Published(extent)) => {
                    self.index.remove_of(self.tail, extent.offset..extent.end());
                    self.bytes -= extent.buffered();
                    self.freed = extent.position + extent.stored();
                }
                Some(Live::Reserved { end }) => self.freed = end,
                Some(Live::Void) => {}
                None => {
                    self.tail = tail;
                    break;
                }
            }
        }
        if self.written <= self.tail {
            self.written = self.tail;
            self.sent_end = self.freed;
        }
    }

    /// Follows what another core has published and retired since: up to `limit` extents, each with its checksum
    /// verified.
    pub fn follow(&mut self, area: &impl Area, limit: u64) -> Followed {
        let mut followed = Followed::default();
        let (tail, head) = (log::tail(area), log::head(area));
        if tail > head {
            return followed;
        }
        self.retire_to(tail);
        while self.head() < head && followed.extents < limit {
            // A follower cannot be certain that this is damage. The core that has the gate finds out.
            match self.read_next(area) {
                Next::Retired => {}
                Next::Extent { seq, extent, sound } => self.take_in(seq, &extent, sound, &mut followed),
                Next::Reserved | Next::Damaged => break,
            }
        }
        followed
    }

    /// Adopts the buffer. No other core appends any more. So an extent that is only reserved never will be published,
    /// and a slot that is neither reserved nor published is damaged. Later extents are appended by this core. Another
    /// core may still retire.
    pub fn adopt(&mut self, area: &impl Area) -> Followed {
        let mut followed = Followed::default();
        let (tail, head) = (log::tail(area), log::head(area));
        if tail > head || head - tail > self.geometry.slots || self.head() > head || self.tail > tail {
            // The header itself is damaged, so any extent may be missing.
            self.begin_anew(area, tail, head);
            return Followed { extents: 0, damaged: 1 };
        }
        self.retire_to(tail);
        self.forget_written();
        while self.head() < head {
            match self.read_next(area) {
                Next::Retired => {}
                Next::Reserved => self.live.push_back(Live::Void),
                Next::Extent { seq, extent, sound } => self.take_in(seq, &extent, sound, &mut followed),
                Next::Damaged => {
                    // An extent was acknowledged here, and its range is unknown.
                    self.live.push_back(Live::Void);
                    self.doubt = self.head();
                    // It covers every damage found before. To settle each of many would take too long.
                    self.found.clear();
                    self.found.push((self.doubt, 0..self.size));
                    followed.extents += 1;
                    followed.damaged += 1;
                }
            }
        }
        self.settle_lost(area);
        // Positions grow with the sequence numbers, so the first extent has the lowest and the last the highest.
        // Positions of retired extents do not count: a core that did not see those has begun lower.
        let published = |live: &Live| if let Live::Published(extent) = live { Some(*extent) } else { None };
        if let Some(last) = self.live.iter().rev().find_map(published) {
            self.end = last.position + last.stored();
        }
        self.freed = self.live.iter().find_map(published).map_or(self.end, |first| first.position);
        self.sent_end = self.freed;
        area.store(word::BYTES, self.bytes, Relaxed);
        followed
    }

    /// Reads the slot behind the last one known.
    fn read_next(&mut self, area: &impl Area) -> Next {
        let seq = self.head() + 1;
        let next = match log::look(area, seq) {
            Slot::Extent(extent) if self.is_possible(&extent) => {
                let sound = log::data_is_sound(area, &extent);
                Next::Extent { seq, extent, sound }
            }
            Slot::Reserved => Next::Reserved,
            Slot::Extent(_) | Slot::Other => Next::Damaged,
        };
        if log::is_retired(area, seq) {
            // The slot may also have been reused while it was read.
            self.retire_to(log::tail(area));
            return Next::Retired;
        }
        next
    }

    /// This core is given the gate anew. It is not known whether what it wrote before is durable. What it had found out
    /// and could not put into the segment before it lost the gate is for its successor to find.
    fn forget_written(&mut self) {
        self.epoch += 1;
        self.failures += 1;
        self.written = self.tail;
        self.copied.clear();
        self.is_unsaved = false;
        self.lost_noted.clear();
    }

    fn is_possible(&self, extent: &Extent) -> bool {
        let Geometry { capacity, .. } = self.geometry;
        let in_volume = extent.offset.checked_add(extent.len).is_some_and(|end| end <= self.size);
        let in_ring = match extent.kind {
            // A volume without a buffer has no ring, so no extent with data.
            ExtentKind::Data if capacity == 0 => false,
            ExtentKind::Data => extent.len <= capacity && extent.position % capacity + extent.len <= capacity,
            ExtentKind::Discard | ExtentKind::Zeroes => true,
        };
        extent.len > 0 && in_volume && in_ring && extent.position <= u64::MAX / 2
    }

    fn take_in(&mut self, seq: u64, extent: &Extent, sound: bool, followed: &mut Followed) {
        self.live.push_back(Live::Void);
        followed.extents += 1;
        if sound {
            self.enter(seq, extent);
        } else {
            // Older data of this range is not what was acknowledged last, so it must not be read either.
            followed.damaged += 1;
            self.index.remove(extent.offset..extent.end());
            self.found.push((seq, extent.offset..extent.end()));
        }
    }
}

/// What the next slot holds.
enum Next {
    /// Nothing: it is retired.
    Retired,
    /// Nothing yet, or never.
    Reserved,
    /// An extent, and whether its data has its checksum.
    Extent { seq: u64, extent: Extent, sound: bool },
    /// Nothing readable.
    Damaged,
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;

#[cfg(test)]
#[cfg(loom)]
mod model;
