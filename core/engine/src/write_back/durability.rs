//! Flushes that fail, on storage nodes that behave as Linux does ([`super::linux`]).

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
    thread,
    time::Duration,
};

use everdisk_store::Sought;
use everdisk_testkit::at_end::at_end;
use proptest::prelude::*;

use super::{
    linux::{Bench, Front, KIB64, SIZE, front, start, synchronous, without_nodes},
    *,
};

/// Semantics 5 and 7, D5: a flush that succeeds after a failed one means durable. Buffered data is kept and written
/// again.
#[test]
fn d5_after_a_failed_flush_buffered_data_is_written_again() {
    let bench = Bench::new();
    bench.core.write(&front(), 4096, &[7; 4096]).unwrap();
    bench.fails(true);
    for _ in 0..3 {
        assert!(matches!(bench.flush(&front()), Err(Stopped::Failed(IoError::NotDurable { lost_bytes: 0, .. }))));
        assert_eq!(bench.core.buffered_bytes(), 4096);
        assert_eq!(bench.byte(4096).unwrap(), 7);
    }
    bench.fails(false);
    let told = Front { told: AtomicU64::new(1), ..front() };
    bench.flush(&told).unwrap();
    assert_eq!(bench.core.buffered_bytes(), 0);
    bench.fails(true);
    bench.flush(&told).unwrap();
    assert_eq!(bench.byte(4096).unwrap(), 7, "it was durable");
}

/// Semantics 7: what was written past the buffer cannot be written again. Until it is written anew, reads of it fail,
/// and every flush fails, for every client and also in the next core.
#[test]
fn d5_what_passed_the_buffer_is_lost_when_a_flush_fails() {
    for buffer in [2 << 20, 0] {
        let mut bench = Bench::with(buffer, Bypass::Auto, 1);
        bench.core.write(&synchronous(), 4096, &[7; 4096]).unwrap();
        bench.flush(&front()).unwrap();
        bench.core.write(&synchronous(), 8192, &[8; 4096]).unwrap();
        bench.fails(true);
        let failed = bench.flush(&front()).unwrap_err();
        assert!(matches!(failed, Stopped::Failed(IoError::NotDurable { lost_bytes: 4096, .. })), "{failed}");
        bench.fails(false);
        for _ in 0..2 {
            assert_eq!(bench.byte(4096).unwrap(), 7);
            assert!(matches!(bench.byte(8192), Err(Stopped::Failed(IoError::DataLost { ranges: 1 }))));
            assert!(matches!(bench.flush(&front()), Err(Stopped::Failed(IoError::DataLost { .. }))));
            assert!(matches!(bench.core.flush_within(Duration::from_secs(5)), Err(IoError::DataLost { .. })));
            let data = bench.core.seek(&front(), 8192, Sought::Data).unwrap();
            assert_eq!(data, Some(8192), "what is lost is no hole");
            assert_eq!(bench.core.seek(&front(), 8192, Sought::Hole).unwrap(), Some(12_288));
            let next = start(&bench.spec, &bench.segment, &bench.files);
            bench.succeeded_by(next);
        }
        bench.core.write(&synchronous(), 8192, &[9; 4096]).unwrap();
        assert_eq!(bench.byte(8192).unwrap(), 9);
        bench.flush(&Front { told: AtomicU64::new(1), ..front() }).unwrap();
    }
}

/// On a volume of two nodes, only the data on the node that failed is lost or written again.
#[test]
fn d5_a_failed_flush_concerns_the_node_that_failed() {
    let bench = Bench::with(2 << 20, Bypass::Auto, 2);
    bench.core.write(&synchronous(), 0, &[1; 4096]).unwrap();
    bench.core.write(&synchronous(), KIB64, &[2; 4096]).unwrap();
    // One range in the volume, on both nodes.
    bench.core.write(&synchronous(), 4 * KIB64, &vec![3; 131_072]).unwrap();
    bench.files[1].fails.store(true, SeqCst);
    assert!(bench.flush(&front()).is_err());
    assert_eq!(bench.byte(0).unwrap(), 1);
    assert!(bench.byte(KIB64).is_err());
    assert_eq!((bench.byte(4 * KIB64).ok(), bench.byte(5 * KIB64).ok()), (Some(3), None));
    assert!(bench.files.iter().all(|file| file.flushes.load(SeqCst) == 1), "every node was flushed");
}

/// Semantics 7: each client is told once of a failed flush, also when another client's flush met the error, as with
/// errseq_t. A client that was told and has written nothing since is not told of the same failure again.
#[test]
fn d5_every_client_is_told_of_a_failed_flush_once() {
    let bench = Bench::new();
    let (one, other, new) = (front(), front(), Front { told: AtomicU64::new(1), ..front() });
    bench.core.write(&one, 0, &[7; 4096]).unwrap();
    bench.fails(true);
    assert!(bench.flush(&other).is_err() && bench.flush(&other).is_err());
    assert!(matches!(bench.core.flush_within(Duration::from_secs(5)), Err(IoError::NotDurable { .. })));
    bench.fails(false);
    bench.flush(&other).unwrap();
    assert!(matches!(bench.flush(&one), Err(Stopped::Failed(IoError::FailedBefore))));
    bench.flush(&one).unwrap();
    bench.flush(&new).unwrap();
}

/// D3: the node reported an error to the core, which died before it could act on it. The error is reported to the
/// successor's own opening as well.
#[test]
fn d3_a_core_that_dies_with_a_failed_flush_leaves_it_to_its_successor() {
    let mut bench = Bench::new();
    let standby = start(&bench.spec, &bench.segment, &bench.files);
    bench.core.write(&front(), 0, &[7; 4096]).unwrap();
    bench.core.write(&synchronous(), 8192, &[8; 4096]).unwrap();
    bench.fails(true);
    // The predecessor did nothing else before its death: the segment records nothing of the error.
    while matches!(bench.core.turn(1 << 20), crate::sender::Destaged::Sent) {}
    assert!(bench.core.engine.flush().is_err());
    bench.fails(false);
    bench.succeeded_by(standby);
    let failed = bench.flush(&front());
    assert!(matches!(failed, Err(Stopped::Failed(IoError::NotDurable { .. }))), "{failed:?}");
    assert!(bench.byte(8192).is_err());
    assert_eq!(bench.byte(0).unwrap(), 7);
}

/// An error that a core has dealt with is not reported again through the standby's opening, although that is older.
/// Nothing is lost by a kill.
#[test]
fn d3_a_successor_is_not_told_of_what_was_dealt_with() {
    let mut bench = Bench::new();
    let standby = start(&bench.spec, &bench.segment, &bench.files);
    bench.core.write(&front(), 0, &[7; 4096]).unwrap();
    bench.fails(true);
    assert!(bench.flush(&front()).is_err());
    bench.fails(false);
    bench.core.flush_within(Duration::from_secs(5)).unwrap();
    bench.core.write(&synchronous(), 8192, &[8; 4096]).unwrap();
    // The standby's flusher checks several times a second.
    standby.0.forget_told_errors();
    bench.succeeded_by(standby);
    bench.flush(&Front { told: AtomicU64::new(1), ..front() }).unwrap();
    assert_eq!(bench.byte(8192).unwrap(), 8);
}

/// D3: a core that has lost the gate during a flush is told of an error and can put nothing into the segment. The core
/// that has the gate is told as well, through its own opening. An error that no core dealt with is not counted.
#[test]
fn d3_an_error_that_a_core_was_told_of_too_late_is_its_successors_as_well() {
    let mut bench = Bench::new();
    let standby = start(&bench.spec, &bench.segment, &bench.files);
    bench.core.write(&synchronous(), 8192, &[8; 4096]).unwrap();
    bench.fails(true);
    let place = bench.place.clone();
    // The gate goes to another core in the middle of the flush.
    *bench.files[0].in_flush.lock() = Some(Box::new(move || place.0.store(0, SeqCst)));
    assert!(bench.core.flush_within(Duration::from_secs(5)).is_err());
    bench.fails(false);
    standby.0.forget_told_errors();
    bench.succeeded_by(standby);
    let flushed = bench.flush(&front());
    assert!(matches!(flushed, Err(Stopped::Failed(IoError::NotDurable { lost_bytes: 4096, .. }))), "{flushed:?}");
    assert!(bench.byte(8192).is_err());
    assert!(bench.flush(&front()).is_err());
}

/// A flush under a closed gate succeeds. The next flush forgets what was noted before it; that does not count as lost
/// long afterwards.
#[test]
fn d2_what_is_durable_by_a_flush_under_a_closed_gate_is_not_lost_later() {
    let bench = Bench::new();
    bench.core.write(&synchronous(), 8192, &[8; 4096]).unwrap();
    for _ in 0..2 {
        bench.place.1.store(false, SeqCst);
        bench.core.flush_within(Duration::from_secs(5)).unwrap();
        bench.place.1.store(true, SeqCst);
    }
    bench.core.flush_within(Duration::from_secs(5)).unwrap();
    bench.core.write(&front(), 0, &[1; 4096]).unwrap();
    bench.fails(true);
    assert!(bench.flush(&front()).is_err());
    assert_eq!(bench.byte(8192).unwrap(), 8);
}

/// A write past the buffer ends while a flush fails beside it. It is written again: the flush may have been told of the
/// error of this very write.
#[test]
fn d5_a_write_that_passes_beside_a_failed_flush_is_written_again() {
    let bench = Bench::new();
    bench.core.write(&synchronous(), 8192, &[1; 4096]).unwrap();
    bench.fails(true);
    let (core, file) = (Arc::clone(&bench.core), Arc::clone(&bench.files[0]));
    // The flush begins while the write is at the node, and fails before it is noted.
    let flush = Mutex::new(Some(move || {
        let flush = thread::spawn(move || drop(core.flush(&front())));
        flush.join().unwrap();
        file.fails.store(false, SeqCst);
    }));
    let range = 4096..8192;
    let bypassing = bench.core.bypasses.enter(&range).unwrap();
    let times = AtomicU32::new(0);
    let through = bench.core.through(&synchronous(), &bypassing, &range, |engine| {
        times.fetch_add(1, SeqCst);
        engine.write(4096, &[7; 4096])?;
        if let Some(flush) = flush.lock().take() {
            flush();
        }
        Ok(())
    });
    drop(bypassing);
    through.unwrap();
    assert_eq!(times.load(SeqCst), 2);
    assert_eq!(bench.byte(4096).unwrap(), 7);
}

/// A write that is under way during a flush is not certain to be durable by it.
#[test]
fn d5_what_is_written_during_a_flush_is_not_durable_by_it() {
    let bench = Bench::new();
    bench.core.write(&front(), 0, &[1; 4096]).unwrap();
    let core = Arc::clone(&bench.core);
    *bench.files[0].in_flush.lock() = Some(Box::new(move || {
        core.write(&front(), 65_536, &[2; 4096]).unwrap();
        while matches!(core.turn(1 << 20), crate::sender::Destaged::Sent) {}
        core.write(&synchronous(), 131_072, &[3; 4096]).unwrap();
    }));
    bench.core.flush_within(Duration::from_secs(5)).unwrap();
    assert_eq!(bench.core.buffered_bytes(), 4096, "the second is not durable");
    assert_eq!(
        bench.core.buffer.read_book().noted().ranges(&bench.core.buffer.area),
        std::slice::from_ref(&(131_072..135_168))
    );
    bench.core.flush_within(Duration::from_secs(5)).unwrap();
    assert_eq!(bench.core.buffered_bytes(), 0);
    assert!(bench.core.buffer.read_book().noted().ranges(&bench.core.buffer.area).is_empty());
}

/// While the gate is closed the segment must not be changed. A lost range is reported at once, and put into the segment
/// when the gate is open again.
#[test]
fn d2_a_flush_that_fails_under_a_closed_gate_is_settled_later() {
    let mut bench = Bench::new();
    bench.core.write(&synchronous(), 8192, &[8; 4096]).unwrap();
    bench.place.1.store(false, SeqCst);
    bench.fails(true);
    assert!(bench.core.flush_within(Duration::from_secs(5)).is_err());
    bench.fails(false);
    let area = SegmentArea::of(&bench.segment).unwrap();
    assert!(everdisk_buffer::lost::Lost::load(&area).is_empty());
    assert!(bench.byte(8192).is_err());
    bench.place.1.store(true, SeqCst);
    bench.core.write(&synchronous(), 0, &[1; 4096]).unwrap();
    assert_eq!(everdisk_buffer::lost::Lost::load(&area).ranges(), std::slice::from_ref(&(8192..12_288)));
    let next = start(&bench.spec, &bench.segment, &bench.files);
    bench.succeeded_by(next);
    assert!(bench.byte(8192).is_err() && bench.byte(0).is_ok());
}

/// A flush fails while the operator has closed the gate. The clients are told when the same core serves on.
#[test]
fn d2_a_flush_that_fails_under_a_closed_gate_is_told_to_the_clients() {
    let bench = Bench::new();
    let (client, operator) = (front(), Duration::from_secs(5));
    bench.core.write(&client, 0, &[7; 4096]).unwrap();
    bench.place.1.store(false, SeqCst);
    bench.fails(true);
    assert!(bench.core.flush_within(operator).is_err());
    bench.fails(false);
    bench.place.1.store(true, SeqCst);
    assert!(matches!(bench.flush(&client), Err(Stopped::Failed(IoError::FailedBefore))));
    bench.flush(&client).unwrap();
    assert_eq!(bench.byte(0).unwrap(), 7);
}

/// A volume whose nodes are not trusted: nothing is acknowledged from their page cache alone.
#[test]
fn d5_a_volume_that_never_bypasses_acknowledges_nothing_that_can_be_lost() {
    for buffer in [2 << 20, 0] {
        let bench = Bench::with(buffer, Bypass::Never, 1);
        bench.core.write(&synchronous(), 0, &[1; 4096]).unwrap();
        assert!(bench.files[0].before.lock().is_empty(), "it is durable");
        bench.fails(true);
        assert!(bench.core.write(&synchronous(), 8192, &[1; 4096]).is_err(), "the writer is told");
    }
}

/// A flush fails while such a write waits for one that succeeds. The failure may have taken the write, so it is written
/// again.
#[test]
fn d5_a_write_that_never_bypasses_is_written_again_when_a_flush_failed_beside_it() {
    let bench = Bench::with(0, Bypass::Never, 1);
    let core = Arc::clone(&bench.core);
    *bench.files[0].in_flush.lock() = Some(Box::new(move || core.buffer.note_failure()));
    let times = AtomicU32::new(0);
    let range = 4096..8192;
    let bypassing = bench.core.bypasses.enter(&range).unwrap();
    let through = bench.core.through(&synchronous(), &bypassing, &range, |engine| {
        times.fetch_add(1, SeqCst);
        engine.write(4096, &[7; 4096])
    });
    drop(bypassing);
    through.unwrap();
    assert_eq!(times.load(SeqCst), 2);
}

/// Architecture, "A slow storage node delays nothing else": the flush's limit holds although the node hangs.
#[test]
fn d5_a_limit_bounds_a_flush_that_hangs() {
    for in_flush in [false, true] {
        let bench = Bench::with(2 << 20, Bypass::Auto, 2);
        bench.core.write(&front(), 0, &[1; 4096]).unwrap();
        let file = &bench.files[0];
        let hangs = if in_flush { &file.flush_hangs } else { &file.hangs };
        hangs.store(true, SeqCst);
        thread::scope(|scope| {
            let (sender, flusher) = (Arc::clone(&bench.core), Arc::clone(&bench.core));
            scope.spawn(move || sender.run_sender());
            scope.spawn(move || flusher.run_flusher());
            while !bench.core.tended.load(SeqCst) {
                thread::yield_now();
            }
            let _end = at_end(|| {
                hangs.store(false, SeqCst);
                bench.core.stop_tending();
            });
            for _ in 0..2 {
                let flushed = without_nodes(&bench.files, || bench.core.flush_within(Duration::from_millis(100)));
                assert!(matches!(flushed, Ok(false)), "{flushed:?}");
            }
            if in_flush {
                assert_eq!(bench.files[1].flushes.load(SeqCst), 1, "the other node is flushed beside it");
            }
            hangs.store(false, SeqCst);
            let flushed = bench.core.flush_within(Duration::from_secs(20));
            assert!(matches!(flushed, Ok(true)), "{flushed:?}");
        });
    }
}

/// The flusher makes room by itself, and makes durable what has waited for long.
#[test]
fn d5_room_is_made_by_flushes_that_nobody_asks_for() {
    let bench = Bench::new();
    thread::scope(|scope| {
        let (sender, flusher) = (Arc::clone(&bench.core), Arc::clone(&bench.core));
        scope.spawn(move || sender.run_sender());
        scope.spawn(move || flusher.run_flusher());
        // Four times what there is room for.
        let written: Result<(), Stopped> =
            (0..128).try_for_each(|n| bench.core.write(&front(), (n % 16) << 16, &vec![7; 65_536]));
        bench.core.stop_tending();
        written.unwrap();
    });
    assert!(bench.files[0].flushes.load(SeqCst) > 0);
}

/// Semantics 12: damage to an extent after its adoption is found when the extent is read.
#[test]
fn d5_damaged_buffered_data_is_never_served() {
    let bench = Bench::new();
    bench.core.write(&front(), 65_536, &[7; 4096]).unwrap();
    assert!(bench.segment.buffer_write(100, b"\xff\xff\xff"));
    for _ in 0..2 {
        let read = bench.core.read(&front(), 65_536, &mut [0; 4096]);
        assert!(matches!(read, Err(Stopped::Failed(IoError::DataLost { ranges: 1 }))), "{read:?}");
    }
    assert_eq!(bench.core.seek(&front(), 0, Sought::Data).unwrap(), Some(65_536), "it is no hole");
    assert!(bench.flush(&front()).is_err());
}

/// Semantics 12: damage between append and sending is found before the extent is sent. Its neighbours are sent.
#[test]
fn d5_damaged_buffered_data_is_never_sent() {
    let bench = Bench::new();
    bench.core.write(&front(), 65_536, &[7; 4096]).unwrap();
    bench.core.write(&front(), 69_632, &[8; 4096]).unwrap();
    assert!(bench.segment.buffer_write(100, b"\xff\xff\xff"));
    assert!(matches!(bench.flush(&front()), Err(Stopped::Failed(IoError::DataLost { ranges: 1 }))));
    let mut stored = [1; 8192];
    Engine::open(&bench.spec).unwrap().read(65_536, &mut stored).unwrap();
    assert!(stored[..4096] == [0; 4096] && stored[4096..] == [8; 4096]);
    let next = start(&bench.spec, &bench.segment, &bench.files);
    let mut bench = bench;
    bench.succeeded_by(next);
    assert!(bench.byte(65_536).is_err(), "the next core knows it");
}

/// lseek: SEEK_HOLE never names a byte that was written and acknowledged before the call.
#[test]
fn a_hole_is_never_found_where_acknowledged_data_is() {
    let bench = Bench::new();
    bench.core.write(&front(), 65_536, &[7; 4096]).unwrap();
    let core = Arc::clone(&bench.core);
    *bench.files[0].at_hole.lock() = Some(Box::new(move || core.flush(&front()).unwrap()));
    bench.core.write(&synchronous(), 61_440, &[7; 4096]).unwrap();
    let hole = bench.core.seek(&front(), 61_440, Sought::Hole).unwrap().unwrap();
    assert!(!(61_440..69_632).contains(&hole), "SEEK_HOLE says that {hole} is a hole");
    assert!(bench.files[0].at_hole.lock().is_none(), "the flush came in between");
}

/// A discard is acknowledged although the node hangs or is full. It drops what is buffered, and keeps no write out of
/// the buffer.
#[test]
fn d5_a_discard_of_buffered_data_needs_no_node() {
    let bench = Bench::new();
    bench.core.write(&front(), 0, &[7; 4096]).unwrap();
    bench.files[0].hangs.store(true, SeqCst);
    bench.files[0].write_fails.store(true, SeqCst);
    without_nodes(&bench.files, || bench.core.discard(&front(), 0, SIZE)).unwrap();
    assert_eq!(bench.byte(0).unwrap(), 0);
    assert_eq!(bench.core.seek(&front(), 0, Sought::Data).unwrap(), None);
    assert_eq!(bench.core.seek(&front(), 0, Sought::Hole).unwrap(), Some(0));
    without_nodes(&bench.files, || bench.core.write(&front(), 524_288, &[8; 4096])).unwrap();
    assert_eq!((bench.byte(524_288).unwrap(), bench.byte(528_384).unwrap()), (8, 0));
    bench.files[0].hangs.store(false, SeqCst);
    bench.core.discard(&front(), 524_288, 4096).unwrap();
    bench.flush(&front()).unwrap();
    assert_eq!(bench.core.buffered_bytes(), 0, "nothing had to be written");
}

#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, len: u64, seed: u8, synchronous: bool },
    Discard(u64, u64),
    Send,
    Flush(bool),
    Die,
}

fn any_op() -> impl Strategy<Value = Op> {
    let range = || (0..60u64, 1u64..5).prop_map(|(at, len)| (at * 4096, len * 4096));
    prop_oneof![
        6 => (range(), 1u8.., any::<bool>())
            .prop_map(|((at, len), seed, synchronous)| Op::Write { at, len, seed, synchronous }),
        1 => range().prop_map(|(at, len)| Op::Discard(at, len)),
        2 => Just(Op::Send),
        3 => any::<bool>().prop_map(Op::Flush),
        1 => Just(Op::Die),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Semantics 2, 5, 6, 7, over any sequence of writes, through and buffered, of failed flushes and of deaths. What
    /// can be read is what was acknowledged last. A byte is lost only after a failed flush. What was acknowledged when
    /// a flush succeeded is on the node when every process is gone and the page cache is dropped.
    #[test]
    fn d5_a_flush_that_succeeds_means_durable(ops in prop::collection::vec(any_op(), 1..60)) {
        let mut bench = Bench::new();
        let mut all = vec![0; usize::try_from(SIZE).unwrap()];
        let mut durable = all.clone();
        let index = |at: u64| usize::try_from(at).unwrap();
        let mut failed = false;
        for op in &ops {
            match *op {
                Op::Write { at, len, seed, synchronous } => {
                    bench.core.write(&Front { synchronous, ..front() }, at, &vec![seed; index(len)]).unwrap();
                    all[index(at)..index(at + len)].fill(seed);
                }
                Op::Discard(at, len) => {
                    bench.core.discard(&front(), at, len).unwrap();
                    all[index(at)..index(at + len)].fill(0);
                }
                Op::Send => drop(bench.core.turn(100_000)),
                Op::Flush(fails) => {
                    bench.fails(fails);
                    // The control module's flush: only its own failure is reported to it.
                    match bench.core.flush_within(Duration::from_secs(20)) {
                        Ok(done) => {
                            prop_assert!(done);
                            durable.clone_from(&all);
                        }
                        Err(_) => failed = true,
                    }
                    bench.fails(false);
                }
                Op::Die => {
                    let next = start(&bench.spec, &bench.segment, &bench.files);
                    bench.succeeded_by(next);
                }
            }
            let mut found = vec![0; index(SIZE)];
            for at in (0..SIZE).step_by(4096) {
                let block = &mut found[index(at)..index(at + 4096)];
                if bench.core.read(&front(), at, block).is_err() {
                    prop_assert!(failed);
                    block.copy_from_slice(&all[index(at)..index(at + 4096)]);
                }
            }
            prop_assert!(found == all, "{op:?}");
        }
        if durable == all {
            bench.fails(true);
            drop(bench.core.engine.flush());
            let mut stored = vec![0; index(SIZE)];
            Engine::open(&bench.spec).unwrap().read(0, &mut stored).unwrap();
            prop_assert!(stored == durable);
        }
    }
}
