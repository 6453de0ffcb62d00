//! The log: extents in the shared memory, each wholly there or not there at all.
//!
//! Correctness rests on the order of the stores. [`reserve`] marks the slot before the head counts it. [`publish`]
//! stores data and fields before the state that makes them valid. [`retire`] is one store. A core that dies between any
//! two of them leaves a log that [`look`] reads correctly. The marks of reserved slots tell a death from damage: a slot
//! below the head that bears neither mark of its sequence number has been overwritten.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
#[cfg(not(loom))]
use core::sync::atomic::fence;
#[cfg(loom)]
use loom::sync::atomic::fence;

use everdisk_proto::buffer::{Extent, ExtentKind, SlotState, word};

use crate::area::Area;

/// To be verified, data is read in pieces of this size, which stay in the L1 cache.
const SCRATCH_BYTES: usize = 8 << 10;

/// The content of a sequence number's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Being written, or never to be finished because its core has died.
    Reserved,
    /// Published.
    Extent(Extent),
    /// Anything else. The slot was reused, if the log has advanced that far; otherwise it is damaged.
    Other,
}

/// Marks the slot of the next sequence number, which the caller assigns one by one. The slot's last extent must be
/// retired.
pub fn reserve(area: &impl Area, seq: u64) {
    let slot = area.geometry().slot_word(seq);
    area.store(slot, SlotState::Reserved(seq).encode(), Release);
    area.store(word::HEAD, seq, Release);
    // A reader that sees a byte of what is copied in now also sees that the extent there before is retired; see `look`.
    fence(Release);
}

/// Copies the data in, if there is any, and publishes the extent. It counts from the last store on.
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

/// Retires every extent up to `seq`. A core that has lost the gate may do so late. Its statement still is true, so the
/// mark is only ever raised, and never goes back.
pub fn retire(area: &impl Area, seq: u64) {
    area.raise(word::TAIL, seq);
}

/// Highest sequence number retired. Load it before the head: then it is never above the head.
pub fn tail(area: &impl Area) -> u64 {
    area.load(word::TAIL, Acquire)
}

/// Highest sequence number reserved.
pub fn head(area: &impl Area) -> u64 {
    area.load(word::HEAD, Acquire)
}

/// Begins anew above a sequence number, after damage to the header.
pub fn reset(area: &impl Area, seq: u64) {
    area.store(word::HEAD, seq, Release);
    area.store(word::TAIL, seq, Release);
}

/// Whether an extent is retired. A reader checks it after it has read the extent: if it is not, the extent was in place
/// all the while.
pub fn is_retired(area: &impl Area, seq: u64) -> bool {
    fence(Acquire);
    tail(area) >= seq
}

/// Reads the slot of a sequence number. The result is certain only if the extent is not retired afterwards
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
