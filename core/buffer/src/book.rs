//! One core's view of the buffer: what is in it, what has the byte, what is free, what is sent next.
//!
//! ```text
//!      retired: durable            live: in the log and in the index                     not yet
//!  ──────────────┬───────────────────────────────┬─────────────────────────────┬──────────────────
//!            tail│ written to the storage nodes, │ published … │ reserved …    │head
//!                │ not known to be durable       │written
//! ```
//! A core that has the gate appends ([`Book::reserve`], [`Book::published`]), sends ([`Book::batch`], [`Book::sent`]) and flushes
//! ([`Book::begin_flush`], [`Book::flushed`], [`Book::flush_failed`]). Any other follows ([`Book::follow`]), so that little is left
//! to read when it is given the gate ([`Book::adopt`]).
//!
//! A flush that fails leaves nothing certain of what was written since the last one that succeeded (Linux marks pages clean when
//! their writeback fails). So everything above the tail counts as not written again, and what was written past the buffer meanwhile is lost.
//! What only this core knows (the mark `written`, which pieces are written) is forgotten with it: the next one writes
//! everything above the tail again.

mod damage;

use std::{collections::VecDeque, ops::Range, sync::atomic::Ordering::Relaxed};

use everdisk_proto::buffer::{Extent, ExtentKind, Geometry, SLOTS_WITHOUT_DATA, stored, word};

use crate::{
    area::Area,
    index::{Index, Piece},
    log::{self, Slot},
    lost::Lost,
    noted::Noted,
};

/// A higher sequence number than this is damage: a state word has 62 bits for it, and no core lives that long.
const SEQ_KNOWN_MAX: u64 = u64::MAX >> 8;

/// An extent that is not retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Live {
    /// Its place in the data ring is taken, up to this virtual position.
    Reserved { end: u64 },
    /// It is in the log and in the index.
    Published(Extent),
    /// It will never be published: its core has died. Or its data is lost.
    Void,
}

/// No room for an extent: something has to be retired first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A place for an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Place {
    /// Its sequence number.
    pub seq: u64,
    /// Virtual position of its data.
    pub position: u64,
}

/// What a follower did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    /// Extents taken in.
    pub extents: u64,
    /// Of these, extents whose data or slot was damaged.
    pub damaged: u64,
}

/// What is to be sent to the storage nodes next.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Failed flushes when it was chosen: it counts only as long as there is no other.
    failures: u64,
    /// The extents that are written when every piece has been sent, in order, with their ranges.
    pub extents: Vec<(u64, Range<u64>)>,
    /// What the volume holds now in those ranges, and dirty neighbours of it; in order, without overlaps.
    pub pieces: Vec<Piece>,
}

/// The parts of a range that are not buffered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// All of it.
    All,
    /// These.
    Some(Vec<Range<u64>>),
}

impl Gaps {
    fn some(&mut self) -> &mut Vec<Range<u64>> {
        if *self == Self::All {
            *self = Self::Some(Vec::new());
        }
        match self {
            Self::Some(list) => list,
            Self::All => unreachable!("it was made a list just above"),
        }
    }
}

/// Why a range cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// It is lost, and was not written since.
    Lost,
    /// The data of the extent with this sequence number does not have its checksum: see [`Book::damaged`].
    Damaged(u64),
}

/// How far a flush reaches that begins now.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    failures: u64,
    written: u64,
    /// What was noted has been set aside, so that it can be cleared.
    set_aside: bool,
}

/// What the buffer says of the volume from some offset on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// There is data, also where it is lost.
    Data,
    /// There is none: it was discarded.
    Hole,
    /// What the storage nodes say.
    Below,
}

/// A partly read extent of at most this many bytes is verified as a whole; of a longer one only what is read whole is: for 4 KiB of it
/// the checksum of 1 MiB would have to be computed.
pub const VERIFIED_IN_PART_MAX: u64 = 64 << 10;

/// Copies the data of a piece out of the buffer. The piece must not be retired yet.
pub fn copy_out(area: &impl Area, piece: &Piece, into: &mut [u8]) {
    area.read(piece.position % area.geometry().capacity, into);
}

/// What an extent counts as in a batch, in bytes of data: what has none may have to be written as zeros.
const fn effort(extent: &Extent) -> u64 {
    match extent.kind {
        ExtentKind::Data => extent.len,
        ExtentKind::Discard | ExtentKind::Zeroes => extent.len / 64,
    }
}

/// The part of a buffer from `offset` on that holds a piece's bytes.
fn part<'a>(buf: &'a mut [u8], offset: u64, piece: &Piece) -> &'a mut [u8] {
    let place = |at: u64| usize::try_from(at - offset).expect("the piece lies within the buffer");
    &mut buf[place(piece.start)..place(piece.end)]
}

/// One core's view of the buffer.
#[derive(Debug)]
pub struct Book {
    geometry: Geometry,
    size: u64,
    index: Index,
    noted: Noted,
    lost: Lost,
    /// `lost` is not yet what stands in the segment.
    is_unsaved: bool,
    /// What is noted and counts as lost: to be forgotten when that is saved.
    lost_noted: Vec<Range<u64>>,
    /// Damaged extents that are not retired, found by this core before it had the gate: sequence number and range.
    found: Vec<(u64, Range<u64>)>,
    /// Highest sequence number of an extent whose slot is damaged: nobody knows what it covered, so what is older is not certain.
    doubt: u64,
    /// The extent with sequence number `tail + 1` first.
    live: VecDeque<Live>,
    tail: u64,
    /// Up to this extent everything was written to the storage nodes, by this core since it took over, or something newer.
    written: u64,
    /// Pieces that bear another number than this are not written.
    epoch: u32,
    /// Flushes that failed, and times that the buffer was taken over: what was under way then counts for nothing.
    failures: u64,
    /// Virtual position behind the last reserved extent, behind the last written one, and behind the last retired one.
    end: u64,
    sent_end: u64,
    freed: u64,
    bytes: u64,
}

impl Book {
    /// A book on a buffer of a volume of `size` bytes; nothing is known of what is in it yet.
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

    /// Highest sequence number handed out.
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

    /// How full it is, in thousandths: of its slots or of its data ring, whichever is fuller.
    pub fn fill(&self) -> u64 {
        self.thousandths(self.live.len() as u64, self.end.saturating_sub(self.freed))
    }

    /// As [`Book::fill`], of what is not written to the storage nodes.
    pub fn dirty_fill(&self) -> u64 {
        self.thousandths(self.head() - self.written, self.end.saturating_sub(self.sent_end))
    }

    /// As [`Book::fill`], of what is written and not known to be durable.
    pub fn written_fill(&self) -> u64 {
        self.thousandths(self.written - self.tail, self.sent_end.saturating_sub(self.freed))
    }

    fn thousandths(&self, slots: u64, bytes: u64) -> u64 {
        let Geometry { capacity, slots: all } = self.geometry;
        (slots * 1000 / all).max((bytes * 1000).checked_div(capacity).unwrap_or(0))
    }

    /// What is buffered where.
    pub const fn index(&self) -> &Index {
        &self.index
    }

    /// What is lost.
    pub const fn lost(&self) -> &Lost {
        &self.lost
    }

    /// What was written past the buffer.
    pub const fn noted(&self) -> &Noted {
        &self.noted
    }

    /// What the buffer says of the volume from `at` on, and up to where.
    pub fn shown(&self, at: u64) -> (Shown, u64) {
        let lost = |range: &&Range<u64>| range.end > at;
        let lost = self.lost.ranges().iter().find(lost);
        if let Some(range) = lost.filter(|range| range.start <= at) {
            return (Shown::Data, range.end);
        }
        let end = lost.map_or(self.size, |range| range.start);
        match self.index.overlapping(at..at.saturating_add(1)).next() {
            Some(piece) if piece.kind == ExtentKind::Discard => (Shown::Hole, piece.end.min(end)),
            Some(piece) => (Shown::Data, piece.end.min(end)),
            None => (Shown::Below, self.index.next_at(at).map_or(end, |next| next.min(end))),
        }
    }

    /// Takes a place for an extent.
    ///
    /// # Errors
    /// [`Full`].
    pub fn reserve(&mut self, area: &impl Area, kind: ExtentKind, len: u64) -> Result<Place, Full> {
        let Geometry { capacity, slots } = self.geometry;
        let stored = stored(kind, len);
        if self.live.iter().all(|live| matches!(live, Live::Void)) {
            self.freed = self.end;
            self.sent_end = self.end;
        }
        let slots = match kind {
            // The volumes of some tests have fewer.
            ExtentKind::Data => slots - SLOTS_WITHOUT_DATA.min(slots / 4),
            ExtentKind::Discard | ExtentKind::Zeroes => slots,
        };
        if capacity == 0 || self.live.len() as u64 >= slots {
            return Err(Full);
        }
        // In one piece: what does not fit before the ring's end begins at its start.
        let left = capacity - self.end % capacity;
        let position = if stored > left { self.end + left } else { self.end };
        if (position + stored).saturating_sub(self.freed) > capacity {
            return Err(Full);
        }
        self.end = position + stored;
        self.live.push_back(Live::Reserved { end: self.end });
        let seq = self.head();
        log::reserve(area, seq);
        Ok(Place { seq, position })
    }

    /// An extent was published in its place: from now on it has its bytes.
    pub fn published(&mut self, area: &impl Area, seq: u64, extent: &Extent) {
        self.enter(seq, extent);
        if self.lost.remove(&(extent.offset..extent.end())) {
            self.is_unsaved = true;
            self.settle(area);
        }
        area.store(word::BYTES, self.bytes, Relaxed);
    }

    /// A range was written to the storage nodes without coming by here: it is noted, and no longer lost.
    pub fn written_through(&mut self, area: &impl Area, range: &Range<u64>) {
        // What was noted before the failure is forgotten first.
        self.settle(area);
        self.noted.note(area, range);
        if self.lost.remove(range) {
            self.is_unsaved = true;
            self.settle(area);
        }
    }

    /// Puts what is lost into the segment. Only for the core that has the gate, and as long as nobody else can be given it.
    pub fn settle(&mut self, area: &impl Area) {
        if std::mem::take(&mut self.is_unsaved) {
            self.lost.save(area);
        }
        // After that, so that a death in between forgets nothing.
        self.noted.forget(area, &std::mem::take(&mut self.lost_noted));
    }

    /// Whether there is something for [`Book::settle`].
    pub const fn is_settled(&self) -> bool {
        !self.is_unsaved && self.lost_noted.is_empty()
    }

    fn enter(&mut self, seq: u64, extent: &Extent) {
        // A core that lost the gate while it copied the data may find the extent retired by another.
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

    /// Fills the part of `into`, the bytes of the volume from `offset` on, that is buffered. Returns what is not.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn read(&self, area: &impl Area, offset: u64, into: &mut [u8]) -> Result<Gaps, Unreadable> {
        let range = offset..offset + into.len() as u64;
        let mut gaps = Gaps::All;
        let mut at = range.start;
        let gap = |gap: Range<u64>| if self.lost.overlaps(&gap) { Err(Unreadable::Lost) } else { Ok(gap) };
        for piece in self.index.overlapping(range.clone()) {
            if piece.seq <= self.doubt {
                return Err(Unreadable::Lost);
            }
            let piece = piece.within(&range);
            let gaps = gaps.some();
            if at < piece.start {
                gaps.push(gap(at..piece.start)?);
            }
            let bytes = part(into, offset, &piece);
            if piece.kind == ExtentKind::Data {
                copy_out(area, &piece, bytes);
                if !self.is_sound(area, &piece, bytes) {
                    return Err(Unreadable::Damaged(piece.seq));
                }
            } else {
                bytes.fill(0);
            }
            at = piece.end;
        }
        match &mut gaps {
            Gaps::All => gap(range).map(|_| Gaps::All),
            Gaps::Some(list) => {
                if at < range.end {
                    list.push(gap(at..range.end)?);
                }
                Ok(gaps)
            }
        }
    }

    /// Whether the bytes of a piece, just copied, have their checksum, as far as that is looked at.
    fn is_sound(&self, area: &impl Area, piece: &Piece, bytes: &[u8]) -> bool {
        let extent = self.extent(piece.seq).expect("a piece belongs to an extent that is there");
        if piece.len() == extent.len {
            crc32c::crc32c(bytes) == extent.crc
        } else {
            extent.len > VERIFIED_IN_PART_MAX || log::data_is_sound(area, extent)
        }
    }

    /// Chooses what is sent next: of the extents that are not written the oldest, at least one if any is published and up to `bytes` of
    /// them, none above `through`. Pieces that touch others are joined by their dirty neighbours, up to `run` bytes in one run, so that what was
    /// written in small parts reaches the storage nodes in large ones.
    pub fn batch(&self, bytes: u64, through: u64, run: u64) -> Batch {
        let mut batch = Batch { failures: self.failures, ..Batch::default() };
        let mut taken = 0;
        let begin = usize::try_from(self.written - self.tail).expect("the live extents lie in memory");
        for (seq, live) in (self.written + 1..=through).zip(self.live.range(begin..)) {
            match live {
                Live::Reserved { .. } => break,
                Live::Void => batch.extents.push((seq, 0..0)),
                Live::Published(extent) => {
                    let cost = effort(extent);
                    if taken > 0 && taken + cost > bytes {
                        break;
                    }
                    taken += cost;
                    batch.extents.push((seq, extent.offset..extent.end()));
                }
            }
        }
        let mut pieces = Index::default();
        for (_, range) in &batch.extents {
            for piece in self.index.overlapping(range.clone()).filter(|piece| self.is_dirty(piece)) {
                // Whole: its other parts lie beside it.
                pieces.insert(*piece);
            }
        }
        let chosen: Vec<Piece> = pieces.overlapping(0..u64::MAX).copied().collect();
        batch.pieces = self.with_neighbours(chosen, run);
        batch
    }

    const fn is_dirty(&self, piece: &Piece) -> bool {
        piece.written != self.epoch
    }

    /// Joins dirty neighbours to the pieces.
    fn with_neighbours(&self, chosen: Vec<Piece>, run: u64) -> Vec<Piece> {
        let mut joined: Vec<Piece> = Vec::with_capacity(chosen.len());
        let mut begun = 0;
        for piece in chosen {
            let touches = joined.last().is_some_and(|last| last.end == piece.start);
            if joined.last().is_some_and(|last| last.end > piece.start) {
                // Joined already, as a neighbour of the one before.
                continue;
            }
            if !touches {
                begun = piece.start;
                let mut before = Vec::new();
                let floor = joined.last().map_or(0, |last| last.end);
                while let Some(left) =
                    self.index.ending_at(begun).filter(|left| self.is_dirty(left) && left.start >= floor)
                {
                    if piece.end - left.start > run {
                        break;
                    }
                    begun = left.start;
                    before.push(*left);
                }
                joined.extend(before.into_iter().rev());
            }
            joined.push(piece);
            let mut end = piece.end;
            while let Some(right) = self.index.starting_at(end).filter(|right| self.is_dirty(right)) {
                if right.end - begun > run {
                    break;
                }
                end = right.end;
                joined.push(*right);
            }
        }
        joined
    }

    /// What has become of a batch: every piece but those in `failed` was written to the storage nodes. Whether the mark of what is
    /// written moved on. Where a flush has failed meanwhile the batch counts for nothing: the failure may have been its.
    pub fn sent(&mut self, batch: &Batch, failed: &[Range<u64>]) -> bool {
        if batch.failures != self.failures {
            return false;
        }
        let misses = |range: &Range<u64>| failed.iter().any(|f| f.start < range.end && range.start < f.end);
        for piece in batch.pieces.iter().filter(|piece| !misses(&piece.span())) {
            self.index.set_written(piece, self.epoch);
        }
        let good = batch.extents.iter().take_while(|(_, range)| !misses(range));
        let Some((written, _)) = good.last() else { return false };
        if *written <= self.written {
            return false;
        }
        self.written = *written;
        self.sent_end = self.position_behind(*written);
        true
    }

    /// Virtual position behind an extent that is not retired, or where the retired ones end.
    fn position_behind(&self, seq: u64) -> u64 {
        let upto = self.place(seq).map_or(0, |place| place + 1).min(self.live.len());
        let behind = self.live.range(..upto).rev().find_map(|live| match live {
            Live::Published(extent) => Some(extent.position + extent.stored()),
            Live::Reserved { end } => Some(*end),
            Live::Void => None,
        });
        behind.unwrap_or(self.freed)
    }

    /// A flush of the storage nodes begins: what it makes durable. `area`: only where the caller may change the segment.
    pub fn begin_flush(&self, area: Option<&impl Area>) -> Mark {
        if let Some(area) = area.filter(|_| self.is_settled()) {
            self.noted.begin_flush(area);
        }
        Mark { failures: self.failures, written: self.written, set_aside: area.is_some() && self.is_settled() }
    }

    /// The flush has succeeded: retires what it made durable. `may_change`: whether the segment may be changed, but for the tail, which
    /// may be raised at any time. Whether anything was retired.
    pub fn flushed(&mut self, area: &impl Area, mark: &Mark, may_change: bool) -> bool {
        if mark.failures != self.failures {
            return false;
        }
        let before = self.tail;
        log::retire(area, mark.written);
        self.retire_to(mark.written);
        if may_change {
            area.store(word::BYTES, self.bytes, Relaxed);
            if mark.set_aside {
                self.noted.flushed(area);
            }
        }
        before < self.tail
    }

    /// A flush has failed on the nodes that `touches` says: what was written to them since the last one that succeeded may be gone.
    /// What is buffered counts as not written; what was written past the buffer is lost. [`Book::settle`] has to follow. Returns how many
    /// bytes of the volume are lost by it.
    pub fn flush_failed(&mut self, area: &impl Area, touches: impl Fn(&Range<u64>) -> bool + Copy) -> u64 {
        self.failures += 1;
        self.written = self.tail;
        self.sent_end = self.freed;
        let all: Vec<Piece> = self.index.overlapping(0..u64::MAX).copied().collect();
        for piece in all.iter().filter(|piece| piece.written == self.epoch && touches(&piece.span())) {
            self.index.set_written(piece, 0);
        }
        let noted: Vec<Range<u64>> = self.noted.parts(area).into_iter().filter(touches).collect();
        // What is buffered there is newer: it is written again.
        let gone: Vec<Range<u64>> = noted.iter().flat_map(|range| self.gaps(range)).collect();
        self.lost.add_all(gone.iter().cloned());
        self.is_unsaved |= !gone.is_empty();
        self.lost_noted = noted;
        gone.iter().map(|range| range.end - range.start).sum()
    }

    /// The parts of a range that are not buffered.
    fn gaps(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for piece in self.index.overlapping(range.clone()) {
            if at < piece.start {
                gaps.push(at..piece.start);
            }
            at = piece.end;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    fn retire_to(&mut self, tail: u64) {
        if self.tail < tail {
            // What was found on the way is known to whoever retired it.
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

    /// Takes in what another core has published and retired since; up to `limit` extents, each with its checksum verified.
    pub fn follow(&mut self, area: &impl Area, limit: u64) -> Followed {
        let mut followed = Followed::default();
        let (tail, head) = (log::tail(area), log::head(area));
        if tail > head {
            return followed;
        }
        self.retire_to(tail);
        while self.head() < head && followed.extents < limit {
            // Damage that is not certain to be some is for whoever has the gate to find out.
            match self.read_next(area) {
                Next::Retired => {}
                Next::Extent { seq, extent, sound } => self.take_in(seq, &extent, sound, &mut followed),
                Next::Reserved | Next::Damaged => break,
            }
        }
        followed
    }

    /// Takes the buffer over: nobody appends any more, so what is only reserved never will be published, and what is
    /// neither is damaged. Whatever follows is appended by this core. Another core may still retire.
    pub fn adopt(&mut self, area: &impl Area) -> Followed {
        let mut followed = Followed::default();
        let (tail, head) = (log::tail(area), log::head(area));
        if tail > head || head - tail > self.geometry.slots || self.head() > head || self.tail > tail {
            // The header itself is damaged, so anything may be missing.
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
                    // Something was acknowledged here, and nobody knows where.
                    self.live.push_back(Live::Void);
                    self.doubt = self.head();
                    // Covers whatever was found before it; and one for each of many would take too long to settle.
                    self.found.clear();
                    self.found.push((self.doubt, 0..self.size));
                    followed.extents += 1;
                    followed.damaged += 1;
                }
            }
        }
        self.settle_lost(area);
        // Positions grow with the sequence numbers, so the first extent has the lowest and the last the highest. What is known
        // of retired ones does not count: a core that did not see them has begun lower.
        let published = |live: &Live| if let Live::Published(extent) = live { Some(*extent) } else { None };
        if let Some(last) = self.live.iter().rev().find_map(published) {
            self.end = last.position + last.stored();
        }
        self.freed = self.live.iter().find_map(published).map_or(self.end, |first| first.position);
        self.sent_end = self.freed;
        area.store(word::BYTES, self.bytes, Relaxed);
        followed
    }

    /// What the slot behind the last one known says.
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
            // And perhaps reused while it was read.
            self.retire_to(log::tail(area));
            return Next::Retired;
        }
        next
    }

    /// This core has the gate anew: of what was written nobody knows whether it is durable. What it had found out and could not put
    /// into the segment before it lost the gate is its successor's to find out.
    fn forget_written(&mut self) {
        self.epoch += 1;
        self.failures += 1;
        self.written = self.tail;
        self.is_unsaved = false;
        self.lost_noted.clear();
    }

    fn is_possible(&self, extent: &Extent) -> bool {
        let Geometry { capacity, .. } = self.geometry;
        let in_volume = extent.offset.checked_add(extent.len).is_some_and(|end| end <= self.size);
        let in_ring = match extent.kind {
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
            // Older data of this range is not what was acknowledged last.
            followed.damaged += 1;
            self.index.remove(extent.offset..extent.end());
            self.found.push((seq, extent.offset..extent.end()));
        }
    }
}

/// What a slot says that was not known yet.
enum Next {
    /// Nothing: it is retired.
    Retired,
    /// Nothing yet, or never.
    Reserved,
    /// Its extent, and whether the data has its checksum.
    Extent { seq: u64, extent: Extent, sound: bool },
    /// What nobody can read.
    Damaged,
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;

#[cfg(test)]
#[cfg(loom)]
mod model;
