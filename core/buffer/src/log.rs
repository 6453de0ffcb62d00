//! The log: extents in the shared memory, each wholly there or not there.
//!
//! The order of the stores is the whole of it. [`reserve`] marks the slot before the head counts it; [`publish`] stores data
//! and fields before the state that makes them count; [`retire`] is one store. A core that dies between any two of them leaves
//! a log that [`look`] reads rightly. The marks of what was only reserved tell a death from damage: a slot below the head
//! that bears neither mark of its sequence number has been overwritten.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
#[cfg(not(loom))]
use core::sync::atomic::fence;
#[cfg(loom)]
use loom::sync::atomic::fence;

use everdisk_proto::buffer::{Extent, ExtentKind, SlotState, word};

use crate::area::Area;

/// Data is read in pieces of this size to be verified: one that stays in the first cache.
const SCRATCH_BYTES: usize = 8 << 10;

/// What the slot of a sequence number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Being written, or never to be finished because its core has died.
    Reserved,
    /// There.
    Extent(Extent),
    /// Something else: reused since, when the log goes that far; else damaged.
    Other,
}

/// Takes the slot of the next sequence number, which the caller hands out one by one. The slot's last extent must be retired.
pub fn reserve(area: &impl Area, seq: u64) {
    let slot = area.geometry().slot_word(seq);
    area.store(slot, SlotState::Reserved(seq).encode(), Release);
    area.store(word::HEAD, seq, Release);
    // Whoever sees a byte of what is copied in now also sees that the extent it lay in before is retired; see `look`.
    fence(Release);
}

/// Copies the data in, if it has any, and publishes the extent: from the last store on it is there.
pub fn publish(area: &impl Area, seq: u64, extent: &Extent, data: &[u8]) {
    if extent.kind == ExtentKind::Data {
        area.write(extent.position % area.geometry().capacity, data);
    }
    let slot = area.geometry().slot_word(seq);
    for (index, value) in (slot + 1..).zip(extent.encode(seq)) {
        area.store(index, value, Relaxed);
    }
    area.store(slot, SlotState::Published(seq).encode(), Release);
}

/// Retires every extent up to `seq`. A core that lost the gate meanwhile may come late with it: what it says is true all the same, so the
/// mark is raised, and never goes back.
pub fn retire(area: &impl Area, seq: u64) {
    area.raise(word::TAIL, seq);
}

/// Highest sequence number retired. Load it before the head: it never is above the head then.
pub fn tail(area: &impl Area) -> u64 {
    area.load(word::TAIL, Acquire)
}

/// Highest sequence number reserved.
pub fn head(area: &impl Area) -> u64 {
    area.load(word::HEAD, Acquire)
}

/// Begins anew behind a sequence number, after damage to the header.
pub fn reset(area: &impl Area, seq: u64) {
    area.store(word::HEAD, seq, Release);
    area.store(word::TAIL, seq, Release);
}

/// Whether an extent is retired, for a reader that has looked at it and wants to know whether it stood meanwhile.
pub fn is_retired(area: &impl Area, seq: u64) -> bool {
    fence(Acquire);
    tail(area) >= seq
}

/// What the slot of a sequence number says. That it stood while it was read is certain when it is not retired afterwards
/// ([`is_retired`]).
pub fn look(area: &impl Area, seq: u64) -> Slot {
    let slot = area.geometry().slot_word(seq);
    let state = SlotState::decode(area.load(slot, Acquire));
    if state == SlotState::Reserved(seq) {
        return Slot::Reserved;
    }
    if state != SlotState::Published(seq) {
        return Slot::Other;
    }
    let mut words = [0; 6];
    for (index, value) in (slot + 1..).zip(&mut words) {
        *value = area.load(index, Acquire);
    }
    Extent::decode(seq, &words).map_or(Slot::Other, Slot::Extent)
}

/// Whether the data of an extent, if it has any, has the checksum that it was published with.
pub fn data_is_sound(area: &impl Area, extent: &Extent) -> bool {
    if extent.kind != ExtentKind::Data {
        return true;
    }
    let mut scratch = [0; SCRATCH_BYTES];
    let (mut crc, mut done) = (0, 0);
    while done < extent.len {
        let len = usize::try_from(extent.len - done).map_or(SCRATCH_BYTES, |left| left.min(SCRATCH_BYTES));
        area.read((extent.position + done) % area.geometry().capacity, &mut scratch[..len]);
        crc = crc32c::crc32c_append(crc, &scratch[..len]);
        done += len as u64;
    }
    crc == extent.crc
}
