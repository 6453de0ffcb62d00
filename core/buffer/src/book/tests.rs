//! The book against a reference disk, with a death at every store and with damage to every word.

use std::sync::atomic::Ordering::Relaxed;

use everdisk_proto::buffer::Geometry;
use everdisk_testkit::reference_disk::ReferenceDisk;
use proptest::prelude::*;

use super::*;
use crate::testing::MortalArea;

mod core;

use self::core::{Core, Node, content, index};

const SIZE: u64 = 4000;
/// Small, so that slots and ring are reused again and again.
const TINY: Geometry = Geometry { capacity: 1024, slots: 6 };

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Zero(ExtentKind, u64, u64),
    /// A write past the buffer.
    Through(u64, u64, u8),
    Send(u64),
    SendAndFail(u64, u64),
    Flush,
    FailFlush,
    Follow(u64),
    HandOver,
}

fn any_op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![Just(ExtentKind::Discard), Just(ExtentKind::Zeroes)];
    prop_oneof![
        6 => (0..SIZE - 300, 1u64..300, any::<u8>()).prop_map(|(at, len, seed)| Op::Write(at, len, seed)),
        1 => (kind, 0..SIZE - 900, 1u64..900).prop_map(|(kind, at, len)| Op::Zero(kind, at, len)),
        1 => (0..SIZE - 300, 1u64..300, any::<u8>()).prop_map(|(at, len, seed)| Op::Through(at, len, seed)),
        3 => (1u64..700).prop_map(Op::Send),
        1 => (1u64..700, 0..SIZE).prop_map(|(bytes, at)| Op::SendAndFail(bytes, at)),
        2 => Just(Op::Flush),
        1 => Just(Op::FailFlush),
        2 => (1u64..5).prop_map(Op::Follow),
        1 => Just(Op::HandOver),
    ]
}

/// Whether `found` is `old` with the whole write in it, or with nothing of it.
fn is_before_or_after(found: &[u8], old: &[u8], write: Option<(u64, &[u8])>) -> bool {
    let Some((offset, data)) = write else { return found == old };
    let mut new = old.to_vec();
    let at = usize::try_from(offset).unwrap();
    new[at..at + data.len()].copy_from_slice(data);
    found == old || found == new
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// D5, beyond 2: any sequence of writes, of sends that fail in part, of flushes that succeed or fail, and of
    /// hand-overs to a core that has followed. At one store the core dies and the standby adopts the buffer. What was
    /// acknowledged is there. What was not is there wholly or not at all. Nothing is lost but what was written past the
    /// buffer and a failed flush may have taken.
    #[test]
    fn acknowledged_data_survives_a_death_at_any_store(
        ops in prop::collection::vec(any_op(), 1..60),
        death in 0usize..400,
        again in 0usize..6,
    ) {
        let area = MortalArea::with(TINY);
        let size = usize::try_from(SIZE).unwrap();
        let mut node = Node::new();
        let mut acknowledged = vec![0; size];
        let mut generation = 1;
        let mut core = Core::new(&area, generation);
        let mut standby = Core::new(&area, 0);
        core.book.adopt(&area);
        let mut deaths = 0;
        // Something was written past the buffer since the last flush that succeeded.
        let mut passed = false;
        area.die_after(death);
        for op in &ops {
            let mut in_flight = None;
            match *op {
                Op::Write(at, len, seed) => {
                    let data = content(seed, len);
                    let took = core.write(&area, at, &data);
                    in_flight = took.then_some((at, data));
                }
                Op::Zero(kind, at, len) => {
                    let took = core.append(&area, kind, at, len, &[]);
                    in_flight = took.then(|| (at, vec![0; index(len)]));
                }
                Op::Through(at, len, seed) => {
                    let data = content(seed, len);
                    let took = core.through(&area, &mut node, at, &data);
                    in_flight = took.then_some((at, data));
                    passed |= took;
                }
                Op::Send(bytes) => core.send(&area, &mut node, bytes, None),
                Op::SendAndFail(bytes, at) => core.send(&area, &mut node, bytes, Some(at)),
                Op::Flush => core.flush(&area, &mut node, false),
                Op::FailFlush => core.flush(&area, &mut node, true),
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
                // The standby adopts the buffer and dies during that, and then a third core adopts it.
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
                if matches!(op, Op::FailFlush) {
                    // The successor's own open file reports the error as well.
                    core.flush(&area, &mut node, true);
                }
                let found = core.read_whole(&area, &node, &acknowledged);
                prop_assert!(is_before_or_after(&found, &acknowledged, pending), "{op:?}");
                acknowledged = found;
                if let (Op::Through(..), Some((at, data))) = (op, pending) {
                    // It may have died before the write was noted. Then nothing is known of it but that it has no answer, and
                    // that the request is executed again.
                    prop_assert!(core.through(&area, &mut node, at, data), "{op:?}");
                    acknowledged[index(at)..index(at) + data.len()].copy_from_slice(data);
                }
            } else if let Some((at, data)) = pending {
                let at = usize::try_from(at).unwrap();
                acknowledged[at..at + data.len()].copy_from_slice(data);
            }
            prop_assert!(passed || core.book.lost().is_empty(), "{op:?} lost what was buffered");
            // A standby does not know yet which ranges are lost.
            prop_assert_eq!(Lost::load(&area), core.book.lost().clone());
            passed &= !matches!(op, Op::Flush) || !core.book.lost().is_empty();
            let found = core.read_whole(&area, &node, &acknowledged);
            prop_assert!(found == acknowledged, "{op:?}");
            prop_assert_eq!(core.book.bytes(), area.load(word::BYTES, Relaxed));
        }
        // In the end everything reaches the node.
        for _ in 0..100 {
            core.send(&area, &mut node, 500, None);
        }
        core.flush(&area, &mut node, false);
        prop_assert_eq!(core.book.tail(), core.book.head());
        prop_assert!(core.book.index().is_empty());
        prop_assert!(core.book.lost().ranges().iter().all(|lost| passed && lost.end <= SIZE));
        node.flush(true);
        prop_assert!(core.read_whole(&area, &node, &acknowledged) == acknowledged, "a flush that succeeded means durable");
    }

    /// One bit is changed anywhere in slots or data: the bytes concerned are served correctly or not at all, and the
    /// damage is reported.
    #[test]
    fn damage_is_reported_and_never_served(
        writes in prop::collection::vec((0..SIZE - 300, 1u64..300, any::<u8>()), 1..6),
        word_at in 0usize..6 * 8,
        data_at in 0usize..1024,
        in_data: bool,
        bit in 0u32..64,
    ) {
        let area = MortalArea::with(TINY);
        let node = Node::new();
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
                        byte.copy_from_slice(node.cached.read(index(at), 1).unwrap());
                    }
                    prop_assert_eq!(byte[0], right[usize::try_from(at).unwrap()], "byte {}", at);
                }
                Err(_) => wrong += 1,
            }
        }
        prop_assert!(wrong == 0 || followed.damaged > 0, "{} bytes are lost without a report", wrong);
        // After it was written anew it is whole again.
        let mut node = node;
        for _ in 0..10 {
            next.send_and_flush(&area, &mut node, 500);
        }
        for at in (0..SIZE).step_by(250) {
            prop_assert!(next.write(&area, at, &content(7, 250)));
            next.send_and_flush(&area, &mut node, 500);
        }
        prop_assert!(next.book.lost().is_empty());
        prop_assert!(next.read_all(&area, &node).is_ok());
    }

    /// Arbitrary bytes in header, slots and data: no panic, and nothing is served without a valid checksum.
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
                let kind = if len % 5 == 0 { ExtentKind::Discard } else { ExtentKind::Data };
                let extent = Extent { kind, offset, len: len % 2000, position, generation: 1, crc: 0 };
                area.words()[slot + 1..slot + 7].copy_from_slice(&extent.encode(seq));
            }
        }
        let mut core = Core::new(&area, 1);
        let mut node = Node::new();
        core.book.follow(&area, 100);
        core.book.adopt(&area);
        let _ = core.read_all(&area, &node);
        for _ in 0..10 {
            core.send_and_flush(&area, &mut node, 500);
            core.write(&area, 0, &content(1, write));
        }
        let _ = core.read_all(&area, &node);
    }
}

/// Neighbours of a batch are sent with it, and need not be sent again.
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
    assert_eq!(batch.extents.len(), 1, "the oldest alone counts");
    assert_eq!(batch.pieces.len(), 10, "and nine neighbours go with it: {batch:?}");
    assert!(core.book.sent(&batch, &[]));
    let rest = core.book.batch(u64::MAX, core.book.head(), 1000);
    assert_eq!((rest.extents.len(), rest.pieces.len()), (19, 10));
}

/// A block that is rewritten continually does not prevent the log from being retired.
#[test]
fn what_is_overwritten_while_it_is_sent_is_retired_all_the_same() {
    let area = MortalArea::new(2 << 20);
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    assert!(core.write(&area, 0, &content(1, 100)));
    let batch = core.book.batch(u64::MAX, core.book.head(), 0);
    assert!(core.write(&area, 0, &content(2, 100)));
    let mark = core.book.begin_flush(Some(&area));
    assert!(core.book.sent(&batch, &[]));
    assert_eq!((core.book.written(), core.book.tail()), (1, 0));
    assert!(!core.book.flushed(&area, &mark, true), "the flush began before it was written");
    let mark = core.book.begin_flush(Some(&area));
    assert!(core.book.flushed(&area, &mark, true));
    assert_eq!((core.book.tail(), core.book.bytes()), (1, 100));
}

/// Damage after the data was verified is found when the data is sent. The rest of the buffer goes on.
#[test]
fn damage_found_by_the_sender_is_told_to_the_next_core() {
    let area = MortalArea::new(2 << 20);
    let mut node = Node::new();
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    assert!(core.write(&area, 0, &content(1, 100)));
    assert!(core.write(&area, 50, &content(2, 10)));
    core.book.damaged(1);
    core.book.settle(&area);
    core.send_and_flush(&area, &mut node, 500);
    assert_eq!(core.book.tail(), 2);
    let mut next = Core::new(&area, 2);
    next.book.adopt(&area);
    let read = |core: &Core, at| core.book.read(&area, at, &mut [0; 10]);
    assert_eq!(
        (read(&next, 0), read(&next, 50), read(&next, 60)),
        (Err(Unreadable::Lost), Ok(Gaps::All), Err(Unreadable::Lost))
    );
    assert_eq!(next.book.lost().ranges(), [0..50, 60..100]);
    next.book.written_through(&area, &(0..100));
    assert!(Lost::load(&area).is_empty());
}

/// A hand-over during the predecessor's send. The predecessor retires after its successor has adopted the buffer, and
/// the successor's first batch is a smaller one. A follower has seen the higher mark, and adopts the buffer
/// nevertheless.
#[test]
fn what_a_predecessor_retires_late_does_not_make_the_log_go_back() {
    let area = MortalArea::new(2 << 20);
    let mut node = Node::new();
    let (mut old, mut new, mut standby) = (Core::new(&area, 1), Core::new(&area, 2), Core::new(&area, 0));
    old.book.adopt(&area);
    for at in 0..4 {
        assert!(old.write(&area, at * 200, &content(1, 100)));
    }
    let late = old.book.batch(300, old.book.head(), 0);
    assert!(old.book.sent(&late, &[]));
    let mark = old.book.begin_flush(Some(&area));
    new.book.adopt(&area);
    assert!(old.book.flushed(&area, &mark, false));
    standby.book.follow(&area, 100);
    new.send_and_flush(&area, &mut node, 100);
    for core in [&mut standby, &mut old] {
        assert_eq!(core.book.adopt(&area).damaged, 0);
        assert_eq!((core.book.lost().ranges(), core.book.tail()), (&[][..], 3));
    }
}

/// A core that was absent while most of the log was written numbers its positions anew. A core that was present takes
/// over from it.
#[test]
fn a_core_that_remembers_higher_places_finds_the_room_there_is() {
    let area = MortalArea::with(TINY);
    let mut node = Node::new();
    let mut first = Core::new(&area, 1);
    first.book.adopt(&area);
    for round in 0..10 {
        assert!(first.write(&area, round * 300, &content(1, 299)));
        first.send_and_flush(&area, &mut node, 1000);
    }
    let mut second = Core::new(&area, 2);
    second.book.adopt(&area);
    assert!(second.write(&area, 0, &content(2, 64)));
    first.book.adopt(&area);
    assert!(first.book.fill() < 200, "{}", first.book.fill());
    assert!(first.write(&area, 100, &content(3, 64)));
}

/// A tail that no head can match is damage like any other.
#[test]
fn the_last_number_is_no_end_of_the_world() {
    for word in [word::HEAD, word::TAIL] {
        let area = MortalArea::with(TINY);
        area.words()[word] = u64::MAX;
        let (mut core, mut standby) = (Core::new(&area, 1), Core::new(&area, 0));
        standby.book.follow(&area, 100);
        assert_eq!(core.book.adopt(&area).damaged, 1);
        assert!(core.write(&area, 0, &content(1, 100)));
        let mut node = Node::new();
        core.send(&area, &mut node, 500, None);
        standby.book.follow(&area, 100);
        standby.book.adopt(&area);
        assert!(standby.write(&area, 0, &content(1, 100)));
    }
}

/// D5: data that a failed flush may have taken is written again, in full, before any of it is retired.
#[test]
fn after_a_failed_flush_everything_above_the_tail_is_written_again() {
    let area = MortalArea::new(2 << 20);
    let mut node = Node::new();
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    assert!(core.write(&area, 0, &content(1, 100)) && core.write(&area, 2000, &content(2, 100)));
    core.send(&area, &mut node, 1000, None);
    let late = core.book.begin_flush(Some(&area));
    core.book.flush_failed(&area, |range| range.start < 1000);
    core.book.settle(&area);
    assert!(!core.book.flushed(&area, &late, true), "a flush that was under way then counts for nothing");
    assert_eq!((core.book.written(), core.book.tail(), core.book.dirty_fill() > 0), (0, 0, true));
    let batch = core.book.batch(u64::MAX, core.book.head(), 0);
    let starts: Vec<u64> = batch.pieces.iter().map(|piece| piece.start).collect();
    assert_eq!((batch.extents.len(), &starts[..]), (2, &[0][..]), "the other node has it still");
    core.book.flush_failed(&area, |_| false);
    assert!(!core.book.sent(&batch, &[]), "a batch that was under way then counts for nothing");
}

/// What was written past the buffer is lost when a flush fails, except where newer data is buffered over it.
#[test]
fn what_was_written_past_the_buffer_is_lost_with_a_flush() {
    let area = MortalArea::new(2 << 20);
    let mut node = Node::new();
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    assert!(core.through(&area, &mut node, 0, &content(1, 100)));
    assert!(core.write(&area, 50, &content(2, 100)));
    core.flush(&area, &mut node, true);
    assert_eq!(core.book.lost().ranges(), [0..50, 150..SIZE]);
    assert_eq!(core.book.shown(10), (Shown::Data, 50), "lost is not a hole");
    core.flush(&area, &mut node, true);
    assert_eq!(core.book.lost().ranges(), [0..50, 150..SIZE]);
    // Written anew, past the buffer and into it, the range is whole again. Another flush that fails takes only the part
    // past the buffer.
    assert!(core.through(&area, &mut node, 0, &content(3, 50)) && core.write(&area, 150, &content(4, SIZE - 150)));
    assert!(core.book.lost().is_empty() && Lost::load(&area).is_empty());
    core.flush(&area, &mut node, true);
    assert_eq!(core.book.lost().ranges(), std::slice::from_ref(&(0..50)));
}

/// Semantics 1: lost ranges that are joined because there are many cost no data that is buffered between them, in the
/// next core either.
#[test]
fn lost_ranges_that_are_joined_leave_what_is_buffered_alone() {
    let area = MortalArea::new(2 << 20);
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    assert!(core.write(&area, 100, &content(1, 100)) && core.write(&area, 300, &content(2, 100)));
    core.book.lost.add(0..1000);
    core.book.is_unsaved = true;
    core.book.settle(&area);
    area.data()[128 + 50] ^= 1;
    let mut next = Core::new(&area, 2);
    next.book.adopt(&area);
    assert_eq!(next.read(&area, &Node::new(), 100..200).unwrap(), content(1, 100));
    assert_eq!(next.book.lost().ranges(), [0..100, 200..1000]);
    assert_eq!(Lost::load(&area).ranges(), [0..100, 200..1000]);
}

/// D5: a core dies at any point while it puts the losses of a failed flush into the segment. The next core, whose own
/// flush fails as well, knows them.
#[test]
fn what_a_failed_flush_has_cost_survives_a_death_at_any_store() {
    let mut deaths = 0;
    for stores in 0..40 {
        let area = MortalArea::new(2 << 20);
        let mut node = Node::new();
        let mut core = Core::new(&area, 1);
        core.book.adopt(&area);
        assert!(core.through(&area, &mut node, 0, &content(1, 100)));
        assert!(core.write(&area, 1000, &content(2, 100)));
        area.die_after(stores);
        core.flush(&area, &mut node, true);
        deaths += u32::from(area.revive());
        let mut next = Core::new(&area, 2);
        assert_eq!(next.book.adopt(&area).damaged, 0);
        next.flush(&area, &mut node, true);
        assert_eq!(next.book.lost().ranges(), [0..1000, 1100..SIZE], "after {stores} stores");
        assert_eq!(Lost::load(&area).ranges(), next.book.lost().ranges());
    }
    assert!(deaths > 5);
}

/// D5: an extent is there wholly or not at all: a core dies at any point of an append, and the next core finds no
/// damage.
#[test]
fn a_death_at_any_store_of_an_append_is_no_damage() {
    for stores in 0..14 {
        let area = MortalArea::new(2 << 20);
        let mut core = Core::new(&area, 1);
        core.book.adopt(&area);
        area.die_after(stores);
        core.write(&area, 0, &content(1, 100));
        area.revive();
        let mut next = Core::new(&area, 2);
        assert_eq!(next.book.adopt(&area).damaged, 0, "after {stores} stores");
    }
}

/// A discard supersedes what is buffered of its range, and finds a slot in a buffer that is full of data.
#[test]
fn a_discard_drops_what_is_buffered_and_finds_room() {
    let area = MortalArea::new(2 << 20);
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    while core.write(&area, 0, &content(1, 1)) {}
    assert!(core.append(&area, ExtentKind::Discard, 0, SIZE, &[]));
    let batch = core.book.batch(u64::MAX, core.book.head(), 0);
    assert_eq!(batch.pieces.len(), 1);
    assert_eq!((batch.pieces[0].kind, batch.pieces[0].span()), (ExtentKind::Discard, 0..SIZE));
    assert_eq!(core.book.shown(5), (Shown::Hole, SIZE));
    assert_eq!(core.book.read(&area, 0, &mut [7; 10]), Ok(Gaps::Some(Vec::new())));
    assert!(core.book.sent(&batch, &[]));
    let mark = core.book.begin_flush(Some(&area));
    assert!(core.book.flushed(&area, &mark, true) && core.book.bytes() == 0);
}

/// semantics 12: a read finds damage.
#[test]
fn what_is_read_is_verified() {
    let area = MortalArea::new(2 << 20);
    let mut core = Core::new(&area, 1);
    core.book.adopt(&area);
    assert!(core.write(&area, 0, &content(1, 100)));
    area.data()[50] ^= 1;
    for (at, len) in [(0, 100), (0, 10), (50, 50)] {
        assert_eq!(core.book.read(&area, at, &mut vec![0; len]), Err(Unreadable::Damaged(1)));
    }
    core.book.damaged(1);
    assert_eq!(core.book.read(&area, 0, &mut [0; 10]), Err(Unreadable::Lost));
}

/// An extent with data in a volume that has no ring is damage, whatever it says of itself.
#[test]
fn d15_a_volume_without_a_buffer_takes_no_extent_with_data() {
    let book = Book::new(Geometry { capacity: 0, slots: 6 }, SIZE);
    for (kind, len, possible) in
        [(ExtentKind::Data, 0, false), (ExtentKind::Data, 100, false), (ExtentKind::Discard, 100, true)]
    {
        let extent = Extent { kind, offset: 0, len, position: 0, generation: 1, crc: 0 };
        assert_eq!(book.is_possible(&extent), possible, "{extent:?}");
    }
}
