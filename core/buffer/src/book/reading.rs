//! The reader's view: the buffered bytes of a range, each verified where that is affordable, and where there is data.

use alloc::vec::Vec;
use core::ops::Range;

use everdisk_proto::buffer::ExtentKind;

use super::Book;
use crate::{area::Area, index::Piece, log};

/// The parts of a range that are not buffered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// All of it.
    All,
    /// These parts.
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
    /// It is lost, and has not been written since.
    Lost,
    /// The data of the extent with this sequence number does not have its checksum: see [`Book::damaged`].
    Damaged(u64),
}

/// The buffer's view of the volume from some offset on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Data, which may be lost.
    Data,
    /// A hole: it was discarded.
    Hole,
    /// Nothing: the storage nodes' view counts.
    Below,
}

/// An extent of at most this many bytes is verified as a whole even when only a part is read. A longer one is verified
/// only when all of it is read: for 4 KiB of it the checksum of 1 MiB would have to be computed.
pub const VERIFIED_IN_PART_MAX: u64 = 64 << 10;

/// Copies the data of a piece out of the buffer. The piece must not be retired yet.
pub fn copy_out(area: &impl Area, piece: &Piece, into: &mut [u8]) {
    area.read(piece.position % area.geometry().capacity, into);
}

/// The part of a buffer from `offset` on that holds a piece's bytes.
fn part<'a>(buf: &'a mut [u8], offset: u64, piece: &Piece) -> &'a mut [u8] {
    let place = |at: u64| usize::try_from(at - offset).expect("the piece lies within the buffer");
    &mut buf[place(piece.start)..place(piece.end)]
}

impl Book {
    /// The buffer's view of the volume at `at`, and the offset up to which it holds.
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

    /// Fills the part of `into` (the bytes of the volume from `offset` on) that is buffered. Returns the parts that are
    /// not.
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

    /// Whether the bytes of a piece, just copied, have their checksum; true where it is not checked.
    fn is_sound(&self, area: &impl Area, piece: &Piece, bytes: &[u8]) -> bool {
        let extent = self.extent(piece.seq).expect("a piece belongs to an extent that is there");
        if piece.len() == extent.len {
            crc32c::crc32c(bytes) == extent.crc
        } else {
            extent.len > VERIFIED_IN_PART_MAX || log::data_is_sound(area, extent)
        }
    }
}
