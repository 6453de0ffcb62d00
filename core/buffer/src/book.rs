//! One core's view of the buffer: what is in it, what has the byte, what is free, what is sent next.
//!
//! ```text
//!      retired          live: in the log and in the index                       not yet
//!  ──────────────┬────────────────────────────────────────────────────┬──────────────────
//!            tail│ sent, not retired │ published … │ reserved …        │head
//! ```
//! A core that has the gate appends ([`Book::reserve`], [`Book::published`]) and sends ([`Book::batch`], [`Book::sent`]). Any
//! other follows ([`Book::follow`]), so that little is left to read when it is given the gate ([`Book::adopt`]).

use std::{collections::VecDeque, ops::Range, sync::atomic::Ordering::Relaxed};

use everdisk_proto::buffer::{Extent, Geometry, word};

use crate::{
    area::Area,
    index::{Index, Piece},
    log::{self, Slot},
    lost::Lost,
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
    /// The extents that can be retired when every piece has been sent, in order, with their ranges.
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

/// Buffered data of the range was found damaged and it was not written since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataLost;

/// Copies the data of a piece out of the buffer. The piece must not be retired yet.
pub fn copy_out(area: &impl Area, piece: &Piece, into: &mut [u8]) {
    area.read(piece.position % area.geometry().capacity, into);
}

/// The part of a buffer from `offset` on that holds a piece's bytes.
fn part<'a>(buf: &'a mut [u8], offset: u64, piece: &Piece) -> &'a mut [u8] {
    let place = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
    buf.get_mut(place(piece.start)..place(piece.end)).unwrap_or_default()
}

/// One core's view of the buffer.
#[derive(Debug)]
pub struct Book {
    geometry: Geometry,
    size: u64,
    index: Index,
    lost: Lost,
    /// Damaged extents that are not retired, found by this core before it had the gate: sequence number and range.
    found: Vec<(u64, Range<u64>)>,
    /// Highest sequence number of an extent whose slot is damaged: nobody knows what it covered, so what is older is not certain.
    doubt: u64,
    /// The extent with sequence number `tail + 1` first.
    live: VecDeque<Live>,
    tail: u64,
    /// Virtual position behind the last reserved extent, and behind the last retired one.
    end: u64,
    freed: u64,
    bytes: u64,
    scratch: Vec<u8>,
}

impl Book {
    /// A book on a buffer of a volume of `size` bytes; nothing is known of what is in it yet.
    pub fn new(geometry: Geometry, size: u64) -> Self {
        Self {
            geometry,
            size,
            index: Index::default(),
            lost: Lost::default(),
            found: Vec::new(),
            doubt: 0,
            live: VecDeque::new(),
            tail: 0,
            end: 0,
            freed: 0,
            bytes: 0,
            scratch: Vec::new(),
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

    /// Highest sequence number retired.
    pub const fn tail(&self) -> u64 {
        self.tail
    }

    /// How full it is, in thousandths: of its slots or of its data ring, whichever is fuller.
    pub fn fill(&self) -> u64 {
        let slots = self.live.len() as u64 * 1000 / self.geometry.slots;
        slots.max(self.end.saturating_sub(self.freed) * 1000 / self.geometry.capacity)
    }

    /// What is buffered where.
    pub const fn index(&self) -> &Index {
        &self.index
    }

    /// What is lost.
    pub const fn lost(&self) -> &Lost {
        &self.lost
    }

    /// Takes a place for `len` bytes.
    ///
    /// # Errors
    /// [`Full`].
    pub fn reserve(&mut self, area: &impl Area, len: u64) -> Result<Place, Full> {
        let Geometry { capacity, slots } = self.geometry;
        let stored = len.next_multiple_of(everdisk_proto::buffer::DATA_ALIGN);
        if self.live.iter().all(|live| matches!(live, Live::Void)) {
            self.freed = self.end;
        }
        // In one piece: what does not fit before the ring's end begins at its start.
        let left = capacity - self.end % capacity;
        let position = if stored > left { self.end + left } else { self.end };
        if self.live.len() as u64 >= slots || (position + stored).saturating_sub(self.freed) > capacity {
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
            self.lost.save(area);
        }
        area.store(word::BYTES, self.bytes, Relaxed);
    }

    /// A range was written to the storage nodes without coming by here.
    pub fn written_through(&mut self, area: &impl Area, range: &Range<u64>) {
        if self.lost.remove(range) {
            self.lost.save(area);
        }
    }

    fn enter(&mut self, seq: u64, extent: &Extent) {
        let Some(live) = seq.checked_sub(self.tail + 1).and_then(|at| usize::try_from(at).ok()) else { return };
        if let Some(place) = self.live.get_mut(live) {
            *place = Live::Published(*extent);
            self.end = self.end.max(extent.position + extent.stored());
            self.bytes += extent.len;
            self.index.insert(seq, extent.offset..extent.end(), extent.position);
        }
    }

    /// Fills the part of `into`, the bytes of the volume from `offset` on, that is buffered. Returns what is not.
    ///
    /// # Errors
    /// [`DataLost`].
    pub fn read(&self, area: &impl Area, offset: u64, into: &mut [u8]) -> Result<Gaps, DataLost> {
        let range = offset..offset + into.len() as u64;
        let mut gaps = Gaps::All;
        let mut at = range.start;
        let gap = |gap: Range<u64>| if self.lost.overlaps(&gap) { Err(DataLost) } else { Ok(gap) };
        for piece in self.index.overlapping(range.clone()) {
            if piece.seq <= self.doubt {
                return Err(DataLost);
            }
            let piece = piece.within(&range);
            let gaps = gaps.some();
            if at < piece.start {
                gaps.push(gap(at..piece.start)?);
            }
            copy_out(area, &piece, part(into, offset, &piece));
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

    /// Chooses what is sent next: the oldest extents, at least one if any is published and up to `bytes` of them, none above
    /// `through`. Pieces that touch others are joined by their dirty neighbours, up to `run` bytes in one run, so that what was
    /// written in small parts reaches the storage nodes in large ones.
    pub fn batch(&self, bytes: u64, through: u64, run: u64) -> Batch {
        let mut batch = Batch::default();
        let mut taken = 0;
        for (seq, live) in (self.tail + 1..=through).zip(&self.live) {
            match live {
                Live::Reserved { .. } => break,
                Live::Void => batch.extents.push((seq, 0..0)),
                Live::Published(extent) => {
                    if taken > 0 && taken + extent.len > bytes {
                        break;
                    }
                    taken += extent.len;
                    batch.extents.push((seq, extent.offset..extent.end()));
                }
            }
        }
        let mut pieces = Index::default();
        for (_, range) in &batch.extents {
            for piece in self.index.overlapping(range.clone()).filter(|piece| !piece.clean) {
                // Whole: its other parts lie beside it.
                pieces.insert(piece.seq, piece.start..piece.end, piece.position);
            }
        }
        let chosen: Vec<Piece> = pieces.overlapping(0..u64::MAX).copied().collect();
        batch.pieces = self.with_neighbours(chosen, run);
        batch
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
                while let Some(left) = self.index.ending_at(begun).filter(|left| !left.clean && left.start >= floor) {
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
            while let Some(right) = self.index.starting_at(end).filter(|right| !right.clean) {
                if right.end - begun > run {
                    break;
                }
                end = right.end;
                joined.push(*right);
            }
        }
        joined
    }

    /// What has become of a batch: every piece but those in `failed` is on the storage nodes. Retires what can be, and
    /// returns whether anything could.
    pub fn sent(&mut self, area: &impl Area, batch: &Batch, failed: &[Range<u64>]) -> bool {
        let misses = |range: &Range<u64>| failed.iter().any(|f| f.start < range.end && range.start < f.end);
        for piece in batch.pieces.iter().filter(|piece| !misses(&(piece.start..piece.end))) {
            self.index.set_clean(piece);
        }
        let good = batch.extents.iter().take_while(|(_, range)| !misses(range));
        let Some((tail, _)) = good.last() else { return false };
        // A predecessor may have retired more after this core had taken over: the mark never goes back.
        if log::tail(area) < *tail {
            log::retire(area, *tail);
        }
        self.retire_to(*tail);
        area.store(word::BYTES, self.bytes, Relaxed);
        true
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
                    self.bytes -= extent.len;
                    self.freed = extent.position + extent.stored();
                }
                Some(Live::Reserved { end }) => self.freed = end,
                Some(Live::Void) => {}
                None => {
                    self.tail = tail;
                    return;
                }
            }
        }
    }

    /// The data of a piece does not have its checksum: what its extent still has is lost.
    pub fn damaged(&mut self, area: &impl Area, seq: u64) {
        let Some(live) = seq.checked_sub(self.tail + 1).and_then(|at| usize::try_from(at).ok()) else { return };
        let Some(Live::Published(extent)) = self.live.get(live).copied() else { return };
        let range = extent.offset..extent.end();
        let hit: Vec<Piece> = self.index.overlapping(range.clone()).filter(|piece| piece.seq == seq).copied().collect();
        for piece in hit {
            self.lost.add(piece.start..piece.end);
        }
        self.index.remove_of(seq, range);
        self.lost.save(area);
    }

    /// The extent that a piece belongs to.
    pub fn extent(&self, seq: u64) -> Option<&Extent> {
        let live = seq.checked_sub(self.tail + 1).and_then(|at| usize::try_from(at).ok())?;
        match self.live.get(live)? {
            Live::Published(extent) => Some(extent),
            Live::Reserved { .. } | Live::Void => None,
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
        area.store(word::BYTES, self.bytes, Relaxed);
        followed
    }

    /// What the slot behind the last one known says.
    fn read_next(&mut self, area: &impl Area) -> Next {
        let seq = self.head() + 1;
        let next = match log::look(area, seq) {
            Slot::Extent(extent) if self.is_possible(&extent) => {
                let sound = log::data_is_sound(area, &extent, &mut self.scratch);
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

    /// What is lost, for the core that has the gate: what its predecessor knew, and what it has found itself since. Data that
    /// was written after the damage is in the log behind it.
    fn settle_lost(&mut self, area: &impl Area) {
        self.lost = Lost::load(area);
        for range in self.lost.ranges() {
            self.index.remove(range.clone());
        }
        if self.found.is_empty() {
            return;
        }
        for (seq, range) in std::mem::take(&mut self.found) {
            self.lost.add(range.clone());
            for newer in self.index.overlapping(range.clone()).filter(|piece| piece.seq > seq) {
                self.lost.remove(&newer.within(&range).span());
            }
        }
        self.lost.save(area);
    }

    /// Begins anew behind every sequence number that may be known, with nothing certain.
    fn begin_anew(&mut self, area: &impl Area, tail: u64, head: u64) {
        let known = [tail, head, self.head()].into_iter().filter(|seq| *seq <= SEQ_KNOWN_MAX).max();
        let seq = known.unwrap_or(0) + self.geometry.slots;
        *self = Self { tail: seq, ..Self::new(self.geometry, self.size) };
        log::reset(area, seq);
        self.lost.add(0..self.size);
        self.lost.save(area);
        area.store(word::BYTES, 0, Relaxed);
    }

    fn is_possible(&self, extent: &Extent) -> bool {
        let Geometry { capacity, .. } = self.geometry;
        let in_volume = extent.offset.checked_add(extent.len).is_some_and(|end| end <= self.size);
        let in_ring = extent.len <= capacity && extent.position % capacity + extent.len <= capacity;
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
