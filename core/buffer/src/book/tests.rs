//! The book against a reference disk, with a death at every store and with damage to every word.

use std::sync::atomic::Ordering::Relaxed;

use everdisk_proto::buffer::Geometry;
use everdisk_testkit::reference_disk::ReferenceDisk;
use proptest::prelude::*;

use super::*;
use crate::testing::MortalArea;

const SIZE: u64 = 4000;
/// Small, so that slots and ring are used again and again.
const TINY: Geometry = Geometry { capacity: 1024, slots: 6 };

/// A core with its storage node.
struct Core {
    book: Book,
    generation: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Send(u64),
    SendAndFail(u64, u64),
    Follow(u64),
    HandOver,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..SIZE - 300, 1u64..300, any::<u8>()).prop_map(|(at, len, seed)| Op::Write(at, len, seed)),
        3 => (1u64..700).prop_map(Op::Send),
        1 => (1u64..700, 0..SIZE).prop_map(|(bytes, at)| Op::SendAndFail(bytes, at)),
        2 => (1u64..5).prop_map(Op::Follow),
        1 => Just(Op::HandOver),
    ]
}

fn content(seed: u8, len: u64) -> Vec<u8> {
    (seed..=255).cycle().map(|b| b | 1).take(usize::try_from(len).unwrap()).collect()
}

impl Core {
    fn new(area: &MortalArea, generation: u64) -> Self {
        Self { book: Book::new(area.geometry(), SIZE), generation }
    }

    /// False: no room.
    fn write(&mut self, area: &MortalArea, offset: u64, data: &[u8]) -> bool {
        let Ok(place) = self.book.reserve(area, data.len() as u64) else { return false };
        let extent = Extent {
            offset,
            len: data.len() as u64,
            position: place.position,
            generation: self.generation,
            crc: crc32c::crc32c(data),
        };
        log::publish(area, place.seq, &extent, data);
        self.book.published(area, place.seq, &extent);
        true
    }

    /// Sends a batch; the pieces that touch `fails` do not reach the node.
    fn send(&mut self, area: &MortalArea, node: &mut ReferenceDisk, bytes: u64, fails: Option<u64>) {
        let batch = self.book.batch(bytes, self.book.head(), 256);
        let mut failed = Vec::new();
        for piece in &batch.pieces {
            if fails.is_some_and(|at| piece.span().contains(&at)) {
                failed.push(piece.span());
                continue;
            }
            let mut data = vec![0; usize::try_from(piece.len()).unwrap()];
            copy_out(area, piece, &mut data);
            assert!(node.write(usize::try_from(piece.start).unwrap(), &data));
        }
        self.book.sent(area, &batch, &failed);
    }

    fn read_all(&self, area: &MortalArea, node: &ReferenceDisk) -> Result<Vec<u8>, DataLost> {
        let mut all = vec![0; usize::try_from(SIZE).unwrap()];
        let gaps = match self.book.read(area, 0, &mut all)? {
            Gaps::All => return Ok(node.read(0, all.len()).unwrap().to_vec()),
            Gaps::Some(gaps) => gaps,
        };
        for gap in gaps {
            let (from, to) = (usize::try_from(gap.start).unwrap(), usize::try_from(gap.end).unwrap());
            all[from..to].copy_from_slice(node.read(from, to - from).unwrap());
        }
        Ok(all)
    }
}

/// Whether `found` is `old` with all of the write in it or none of it.
fn is_before_or_after(found: &[u8], old: &[u8], write: Option<(u64, &[u8])>) -> bool {
    let Some((offset, data)) = write else { return found == old };
    let mut new = old.to_vec();
    let at = usize::try_from(offset).unwrap();
    new[at..at + data.len()].copy_from_slice(data);
    found == old || found == new
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// D5, beyond 2: any sequence of writes, sends that fail in part, hand-overs to a core that has followed; at one store of
    /// it the core dies and the standby takes over. What was acknowledged is there; what was not, is there wholly or not at all.
    #[test]
    fn acknowledged_data_survives_a_death_at_any_store(
        ops in prop::collection::vec(any_op(), 1..60),
        death in 0usize..400,
        again in 0usize..6,
    ) {
        let area = MortalArea::with(TINY);
        let size = usize::try_from(SIZE).unwrap();
        let mut node = ReferenceDisk::new(size);
        let mut acknowledged = vec![0; size];
        let mut generation = 1;
        let mut core = Core::new(&area, generation);
        let mut standby = Core::new(&area, 0);
        core.book.adopt(&area);
        let mut deaths = 0;
        area.die_after(death);
        for op in &ops {
            let mut in_flight = None;
            match *op {
                Op::Write(at, len, seed) => {
                    let data = content(seed, len);
                    let took = core.write(&area, at, &data);
                    in_flight = took.then_some((at, data));
                }
                Op::Send(bytes) => core.send(&area, &mut node, bytes, None),
                Op::SendAndFail(bytes, at) => core.send(&area, &mut node, bytes, Some(at)),
                Op::Follow(limit) => {
                    prop_assert_eq!(standby.book.follow(&area, limit).damaged, 0);
                }
                Op::HandOver => {
                    generation += 1;
                    standby.generation = generation;
                    prop_assert_eq!(standby.book.adopt(&area).damaged, 0);
                    std::mem::swap(&mut core, &mut standby);
                }
            }
            let pending = in_flight.as_ref().map(|(at, data)| (*at, &data[..]));
            if area.revive() {
                deaths += 1;
                // The standby takes over, dies in that too, and a third core does.
                generation += 1;
                if deaths == 1 && again > 0 {
                    standby.generation = generation;
                    area.die_after(again - 1);
                    standby.book.adopt(&area);
                    area.revive();
                    standby = Core::new(&area, generation);
                }
                prop_assert_eq!(standby.book.adopt(&area).damaged, 0);
                core = standby;
                standby = Core::new(&area, 0);
                let found = core.read_all(&area, &node).unwrap();
                prop_assert!(is_before_or_after(&found, &acknowledged, pending), "{op:?}");
                acknowledged = found;
            } else if let Some((at, data)) = pending {
                let at = usize::try_from(at).unwrap();
                acknowledged[at..at + data.len()].copy_from_slice(data);
            }
            let found = core.read_all(&area, &node).unwrap();
            prop_assert!(found == acknowledged, "{op:?}");
            prop_assert_eq!(core.book.bytes(), area.load(word::BYTES, Relaxed));
        }
        // Everything reaches the node at last.
        for _ in 0..100 {
            core.send(&area, &mut node, 500, None);
        }
        prop_assert_eq!(core.book.tail(), core.book.head());
        prop_assert!(core.book.index().is_empty());
        prop_assert!(node.read(0, size).unwrap() == acknowledged);
    }

    /// One changed bit anywhere in slots or data: the byte it concerns is served rightly or not at all, and it is reported.
    #[test]
    fn damage_is_reported_and_never_served(
        writes in prop::collection::vec((0..SIZE - 300, 1u64..300, any::<u8>()), 1..6),
        word_at in 0usize..6 * 8,
        data_at in 0usize..1024,
        in_data: bool,
        bit in 0u32..64,
    ) {
        let area = MortalArea::with(TINY);
        let size = usize::try_from(SIZE).unwrap();
        let node = ReferenceDisk::new(size);
        let mut core = Core::new(&area, 1);
        core.book.adopt(&area);
        for (at, len, seed) in &writes {
            core.write(&area, *at, &content(*seed, *len));
        }
        let right = core.read_all(&area, &node).unwrap();
        if in_data {
            area.data()[data_at] ^= 1 << (bit % 8);
        } else {
            area.words()[word::SLOT + word_at] ^= 1 << bit;
        }
        let mut next = Core::new(&area, 2);
        let followed = next.book.adopt(&area);
        let mut wrong = 0;
        for at in 0..SIZE {
            let mut byte = [0];
            match next.book.read(&area, at, &mut byte) {
                Ok(gaps) => {
                    if gaps == Gaps::All {
                        byte.copy_from_slice(node.read(usize::try_from(at).unwrap(), 1).unwrap());
                    }
                    prop_assert_eq!(byte[0], right[usize::try_from(at).unwrap()], "byte {}", at);
                }
                Err(DataLost) => wrong += 1,
            }
        }
        prop_assert!(wrong == 0 || followed.damaged > 0, "{} bytes are lost and nobody says so", wrong);
        // Written anew it is whole again.
        let mut node = node;
        for _ in 0..10 {
            next.send(&area, &mut node, 500, None);
        }
        for at in (0..SIZE).step_by(250) {
            prop_assert!(next.write(&area, at, &content(7, 250)));
            next.send(&area, &mut node, 500, None);
        }
        prop_assert!(next.book.lost().is_empty());
        prop_assert!(next.read_all(&area, &node).is_ok());
    }

    /// Arbitrary bytes in header, slots and data: no panic, and nothing is served that no checksum vouches for.
    #[test]
    fn arbitrary_memory_never_panics(
        header in prop::collection::vec((0usize..200, prop_oneof![any::<u64>(), 0u64..20]), 0..20),
        slots in prop::collection::vec((0u64..20, prop::option::of((any::<u64>(), any::<u64>(), any::<u64>()))), 0..6),
        write in 1u64..300,
    ) {
        let area = MortalArea::with(TINY);
        for (word, value) in header {
            area.words()[word] = value;
        }
        for (seq, fields) in slots {
            let slot = TINY.slot_word(seq);
            area.words()[slot] = everdisk_proto::buffer::SlotState::Published(seq).encode();
            if let Some((offset, len, position)) = fields {
                let extent = Extent { offset, len: len % 2000, position, generation: 1, crc: 0 };
                area.words()[slot + 1..slot + 7].copy_from_slice(&extent.encode(seq));
            }
        }
        let mut core = Core::new(&area, 1);
        let mut node = ReferenceDisk::new(usize::try_from(SIZE).unwrap());
        core.book.follow(&area, 100);
        core.book.adopt(&area);
        let _ = core.read_all(&area, &node);
        for _ in 0..10 {
            core.send(&area, &mut node, 500, None);
            core.write(&area, 0, &content(1, write));
        }
        let _ = core.read_all(&area, &node);
    }
}

/// What lies beside what is sent goes with it, and need not be sent again.
#[test]
fn neighbours_are_sent_in_one_run() {
    let area = MortalArea::new(2 << 20);
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    // Every other block of 100 bytes, then the ones between.
    for at in (0..20).step_by(2).chain((1..20).step_by(2)) {
        assert!(core.write(&area, at * 100, &content(3, 100)));
    }
    let batch = core.book.batch(100, core.book.head(), 1000);
    assert_eq!(batch.extents.len(), 1, "the oldest alone is retired");
    assert_eq!(batch.pieces.len(), 10, "and nine neighbours go with it: {batch:?}");
    assert!(core.book.sent(&area, &batch, &[]));
    let rest = core.book.batch(u64::MAX, core.book.head(), 1000);
    assert_eq!((rest.extents.len(), rest.pieces.len()), (19, 10));
}

/// A block that is written all the time does not keep its log from being retired.
#[test]
fn what_is_overwritten_while_it_is_sent_is_retired_all_the_same() {
    let area = MortalArea::new(2 << 20);
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    assert!(core.write(&area, 0, &content(1, 100)));
    let batch = core.book.batch(u64::MAX, core.book.head(), 0);
    assert!(core.write(&area, 0, &content(2, 100)));
    assert!(core.book.sent(&area, &batch, &[]));
    assert_eq!((core.book.tail(), core.book.bytes()), (1, 100));
}

/// Damage that comes after the data was verified is found when it is sent; the rest of the buffer goes on.
#[test]
fn damage_found_by_the_sender_is_told_to_the_next_core() {
    let area = MortalArea::new(2 << 20);
    let mut node = ReferenceDisk::new(usize::try_from(SIZE).unwrap());
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    assert!(core.write(&area, 0, &content(1, 100)));
    assert!(core.write(&area, 50, &content(2, 10)));
    core.book.damaged(&area, 1);
    core.send(&area, &mut node, 500, None);
    assert_eq!(core.book.tail(), 2);
    let mut next = Core::new(&area, 2);
    next.book.adopt(&area);
    let read = |core: &Core, at| core.book.read(&area, at, &mut [0; 10]);
    assert_eq!((read(&next, 0), read(&next, 50), read(&next, 60)), (Err(DataLost), Ok(Gaps::All), Err(DataLost)));
    assert_eq!(next.book.lost().ranges(), [0..50, 60..100]);
    next.book.written_through(&area, &(0..100));
    assert!(Lost::load(&area).is_empty());
}

/// A hand-over while the predecessor's sender is at work: it retires after its successor has taken the buffer over, and the
/// successor's first batch is a smaller one. Whoever follows has seen the higher mark, and takes the buffer over all the same.
#[test]
fn what_a_predecessor_retires_late_does_not_make_the_log_go_back() {
    let area = MortalArea::new(2 << 20);
    let mut node = ReferenceDisk::new(usize::try_from(SIZE).unwrap());
    let (mut old, mut new, mut standby) = (Core::new(&area, 1), Core::new(&area, 2), Core::new(&area, 0));
    old.book.adopt(&area);
    for at in 0..4 {
        assert!(old.write(&area, at * 200, &content(1, 100)));
    }
    let late = old.book.batch(300, old.book.head(), 0);
    new.book.adopt(&area);
    assert!(old.book.sent(&area, &late, &[]));
    standby.book.follow(&area, 100);
    new.send(&area, &mut node, 100, None);
    for core in [&mut standby, &mut old] {
        assert_eq!(core.book.adopt(&area).damaged, 0);
        assert_eq!((core.book.lost().ranges(), core.book.tail()), (&[][..], 3));
    }
}

/// A core that was not there when most of the log was written numbers its places anew; one that was there takes over from it.
#[test]
fn a_core_that_remembers_higher_places_finds_the_room_there_is() {
    let area = MortalArea::with(TINY);
    let mut node = ReferenceDisk::new(usize::try_from(SIZE).unwrap());
    let mut first = Core::new(&area, 1);
    first.book.adopt(&area);
    for round in 0..10 {
        assert!(first.write(&area, round * 300, &content(1, 299)));
        first.send(&area, &mut node, 1000, None);
    }
    let mut second = Core::new(&area, 2);
    second.book.adopt(&area);
    assert!(second.write(&area, 0, &content(2, 64)));
    first.book.adopt(&area);
    assert!(first.book.fill() < 200, "{}", first.book.fill());
    assert!(first.write(&area, 100, &content(3, 64)));
}

/// A mark that nothing can follow is damage like any other.
#[test]
fn the_last_number_is_no_end_of_the_world() {
    for word in [word::HEAD, word::TAIL] {
        let area = MortalArea::with(TINY);
        area.words()[word] = u64::MAX;
        let (mut core, mut standby) = (Core::new(&area, 1), Core::new(&area, 0));
        standby.book.follow(&area, 100);
        assert_eq!(core.book.adopt(&area).damaged, 1);
        assert!(core.write(&area, 0, &content(1, 100)));
        let mut node = ReferenceDisk::new(usize::try_from(SIZE).unwrap());
        core.send(&area, &mut node, 500, None);
        standby.book.follow(&area, 100);
        standby.book.adopt(&area);
        assert!(standby.write(&area, 0, &content(1, 100)));
    }
}
