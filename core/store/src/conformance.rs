//! What every store must do, whatever it is made of. There is one function per promise of [`Store`]; [`run`] runs them
//! all on stores that the caller makes. A broken promise panics with its name.

use std::sync::Arc;

use crate::{EINVAL, ErrorKind, Op, Sought, Store, StoreError, pending};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Makes the stores under test.
pub trait Fixture {
    /// A fresh store of `len` bytes, never written.
    fn store(&mut self, len: u64) -> Arc<dyn Store>;

    /// Bytes of disk that the last store made takes, or `None` where that is unknown.
    fn allocated_bytes(&self) -> Option<u64>;

    /// Whether the stores tell holes from data. A store that cannot reports everything as data.
    fn knows_holes(&self) -> bool {
        true
    }

    /// Whether the stores reserve space. A store that cannot says so, with EOPNOTSUPP.
    fn reserves(&self) -> bool {
        true
    }
}

/// Runs the whole suite.
///
/// # Panics
/// When the store breaks a promise.
pub fn run(fixture: &mut dyn Fixture) {
    never_written_reads_zero(&*fixture.store(MIB));
    what_was_written_is_read(&*fixture.store(MIB));
    edges_need_no_alignment(&*fixture.store(MIB));
    discarded_and_zeroed_read_zero(&*fixture.store(MIB));
    discard_gives_space_back(fixture);
    allocate_changes_no_byte(fixture);
    data_and_holes_agree_with_the_contents(&*fixture.store(4 * MIB), fixture.knows_holes());
    ranges_outside_are_refused(&*fixture.store(MIB));
    an_empty_node_serves(&*fixture.store(0));
    threads_do_not_disturb_each_other(&*fixture.store(4 * MIB));
    what_is_begun_ends_and_gives_its_memory_back(&fixture.store(4 * MIB), fixture.reserves());
}

fn sound<T>(promise: &str, result: Result<T, StoreError>) -> T {
    result.unwrap_or_else(|e| unreachable!("{promise}: {e}"))
}

fn read(store: &dyn Store, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xEE; len];
    sound("read", store.read_at(offset, &mut buf));
    let mut once = vec![0xEE; len];
    if let Some(outcome) = store.attempt(offset, Op::Read(&mut once)) {
        sound("read at once", outcome);
        assert!(once == buf, "what is read at once is something else");
    }
    buf
}

/// Bytes that differ from their neighbours and are never zero.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (seed..).take(len).map(|n| (n % 251) as u8 + 1).collect()
}

fn size(store: &dyn Store) -> usize {
    usize::try_from(store.size()).expect("the suite's stores are small")
}

fn never_written_reads_zero(store: &dyn Store) {
    assert!(read(store, 0, size(store)).iter().all(|b| *b == 0), "never written, yet not zero");
    sound("recheck", store.recheck());
}

fn what_was_written_is_read(store: &dyn Store) {
    let all = pattern(0, size(store));
    sound("write", store.write_at(0, &all));
    assert!(read(store, 0, all.len()) == all, "read something else than was written");
    sound("flush", store.flush());
    assert!(read(store, 0, all.len()) == all, "a flush changed the bytes");
    let over = pattern(7, 4096);
    sound("write", store.write_at(8 * KIB, &over));
    assert!(read(store, 8 * KIB, 4096) == over, "an overwrite is not read");
}

fn edges_need_no_alignment(store: &dyn Store) {
    let mut expected = vec![0; size(store)];
    for (n, (offset, len)) in
        [(1, 1), (4095, 2), (4097, 8190), (511, 513), (65_535, 4098), (expected.len() - 3, 3)].into_iter().enumerate()
    {
        let data = pattern(n as u64, len);
        sound("write", store.write_at(offset as u64, &data));
        expected[offset..offset + len].copy_from_slice(&data);
    }
    assert!(read(store, 0, expected.len()) == expected, "unaligned writes went astray");
    assert!(read(store, 4093, 77) == expected[4093..4170], "an unaligned read went astray");
}

fn discarded_and_zeroed_read_zero(store: &dyn Store) {
    type Operation = fn(&dyn Store, u64, u64) -> Result<(), StoreError>;
    let operations: [Operation; 2] = [|s, at, n| s.discard(at, n), |s, at, n| s.write_zeroes(at, n)];
    for operation in operations {
        let mut expected = pattern(3, size(store));
        sound("write", store.write_at(0, &expected));
        for (offset, len) in [(4096, 8192), (100_001, 12_347), (200_000, 10), (expected.len() - 5, 5)] {
            sound("discard or write zeros", operation(store, offset as u64, len as u64));
            expected[offset..offset + len].fill(0);
        }
        assert!(read(store, 0, expected.len()) == expected, "a discard or zeroing hit other bytes or missed some");
        sound("discard or write zeros", operation(store, 0, expected.len() as u64));
        assert!(read(store, 0, expected.len()).iter().all(|b| *b == 0), "bytes are left after all was zeroed");
    }
}

fn discard_gives_space_back(fixture: &mut dyn Fixture) {
    let store = fixture.store(8 * MIB);
    sound("write", store.write_at(0, &pattern(1, size(&*store))));
    sound("flush", store.flush());
    let Some(full) = fixture.allocated_bytes() else { return };
    assert!(full >= 8 * MIB, "8 MiB of data take {full} bytes");
    sound("discard", store.discard(MIB, 6 * MIB));
    sound("flush", store.flush());
    let left = fixture.allocated_bytes().unwrap_or_default();
    assert!(left <= full - 5 * MIB, "6 of 8 MiB were discarded, still {left} of {full} bytes are taken");
}

fn allocate_changes_no_byte(fixture: &mut dyn Fixture) {
    let store = fixture.store(8 * MIB);
    let data = pattern(5, 12_345);
    sound("write", store.write_at(77, &data));
    let allocated = store.allocate(0, store.size());
    if fixture.reserves() {
        sound("allocate", allocated);
    } else {
        assert_eq!(allocated.err().map(|e| e.kind()), Some(ErrorKind::Unsupported), "a reservation that was not made");
    }
    assert!(read(&*store, 77, data.len()) == data, "a reservation changed the bytes");
    assert!(read(&*store, MIB, 4096).iter().all(|b| *b == 0), "reserved space does not read as zero");
    if let (true, Some(taken)) = (fixture.reserves(), fixture.allocated_bytes()) {
        assert!(taken >= 8 * MIB, "8 MiB were reserved, {taken} bytes are taken");
    }
}

fn data_and_holes_agree_with_the_contents(store: &dyn Store, knows_holes: bool) {
    let next = |offset, sought| sound("next", store.next(offset, sought));
    if knows_holes {
        assert_eq!(next(0, Sought::Data), None, "data in a store that was never written");
        assert_eq!(next(0, Sought::Hole), Some(0));
    } else {
        assert_eq!((next(7, Sought::Data), next(7, Sought::Hole)), (Some(7), Some(store.size())));
    }
    for offset in [MIB, MIB + 300 * KIB + 17, 3 * MIB] {
        sound("write", store.write_at(offset, &pattern(offset, 10_000)));
    }
    let bytes = read(store, 0, size(store));
    let mut at = 0;
    while let Some(data) = next(at, Sought::Data) {
        let hole = next(data, Sought::Hole).expect("a hole follows any data, the node's end being one");
        assert!(at <= data && data < hole && hole <= store.size(), "data {data} hole {hole} from {at}");
        let gap = &bytes[usize::try_from(at).unwrap_or_default()..usize::try_from(data).unwrap_or_default()];
        assert!(gap.iter().all(|b| *b == 0), "a hole at {at}..{data} has data in it");
        at = hole;
    }
    let rest = &bytes[usize::try_from(at).unwrap_or_default()..];
    assert!(rest.iter().all(|b| *b == 0), "the last hole, from {at} on, has data in it");
    assert_eq!(next(store.size(), Sought::Hole), None, "a hole beyond the end");
    assert_eq!(next(store.size(), Sought::Data), None, "data beyond the end");
    assert_eq!(next(u64::MAX, Sought::Data), None, "data beyond the end");
}

fn ranges_outside_are_refused(store: &dyn Store) {
    let size = store.size();
    sound("write", store.write_at(size - 1, &[9]));
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 4), (size + 1, 0)] {
        let mut buf = vec![0; usize::try_from(len).unwrap_or_default()];
        let once = store.attempt(offset, Op::Read(&mut buf));
        assert!(!matches!(once, Some(Ok(_))), "read at once of {len} bytes at {offset}");
        let results = [
            ("read", store.read_at(offset, &mut buf)),
            ("write", store.write_at(offset, &buf)),
            ("discard", store.discard(offset, len)),
            ("write zeros", store.write_zeroes(offset, len)),
            ("allocate", store.allocate(offset, len)),
        ];
        for (what, result) in results {
            assert_eq!(result.err().map(|e| e.errno()), Some(EINVAL), "{what} of {len} bytes at {offset}");
        }
    }
    assert_eq!(store.discard(0, u64::MAX).err().map(|e| e.errno()), Some(EINVAL), "discard of everything there is");
    assert_eq!(read(store, size - 1, 1), [9], "a refused operation changed something");
    for offset in [0, size] {
        sound("read of nothing", store.read_at(offset, &mut []));
        sound("write of nothing", store.write_at(offset, &[]));
        sound("discard of nothing", store.discard(offset, 0));
        sound("zeroing of nothing", store.write_zeroes(offset, 0));
        sound("reservation of nothing", store.allocate(offset, 0));
    }
}

/// A volume with fewer stripes than nodes has nodes that hold nothing.
fn an_empty_node_serves(store: &dyn Store) {
    assert_eq!(store.size(), 0);
    sound("flush", store.flush());
    sound("recheck", store.recheck());
    assert_eq!(sound("next", store.next(0, Sought::Hole)), None);
}

fn threads_do_not_disturb_each_other(store: &dyn Store) {
    const THREADS: u64 = 4;
    let share = store.size() / THREADS;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for round in 0..64 {
                    let offset = thread * share + (round * 7919 * 13) % (share - 5000);
                    let data = pattern(thread * 31 + round, 5000);
                    sound("write", store.write_at(offset, &data));
                    sound("next", store.next(offset, Sought::Hole));
                    assert!(read(store, offset, data.len()) == data, "another thread's bytes");
                    if round % 16 == 0 {
                        sound("flush", store.flush());
                    }
                }
            });
        }
    });
}

/// Many at once, more than any store does side by side; each kind; and one that is refused.
fn what_is_begun_ends_and_gives_its_memory_back(store: &Arc<dyn Store>, reserves: bool) {
    const AT_ONCE: u64 = 200;
    const LEN: usize = 5000;
    let begin = |offset, op| {
        let (completion, pending) = pending();
        Arc::clone(store).begin(offset, op, completion);
        pending
    };
    let offset = |n: u64| n * (store.size() / AT_ONCE);
    let writes: Vec<_> = (0..AT_ONCE).map(|n| begin(offset(n), Op::Write(pattern(n, LEN)))).collect();
    for (n, write) in (0..).zip(writes) {
        let (op, outcome) = write.wait();
        sound("a write that was begun", outcome);
        assert!(op == Op::Write(pattern(n, LEN)), "a write gives its data back unchanged");
    }
    let reads: Vec<_> = (0..AT_ONCE).map(|n| begin(offset(n), Op::Read(vec![0xEE; LEN]))).collect();
    for (n, read) in (0..).zip(reads) {
        let (op, outcome) = read.wait();
        sound("a read that was begun", outcome);
        assert!(op == Op::Read(pattern(n, LEN)), "a read that was begun gives the bytes");
    }
    let others =
        [Op::WriteZeroes(LEN as u64), Op::Allocate(LEN as u64), Op::Flush, Op::Identify, Op::Seek(Sought::Hole)];
    for op in others {
        let (given_back, outcome) = begin(0, op.clone()).wait();
        assert!(given_back == op, "an operation is given back as it was");
        if let (Op::Allocate(_), false) = (&op, reserves) {
            assert_eq!(
                outcome.err().map(|e| e.kind()),
                Some(ErrorKind::Unsupported),
                "a reservation that was not made"
            );
            continue;
        }
        assert_eq!(sound("an operation that was begun", outcome).is_some(), matches!(op, Op::Seek(_)), "{op:?}");
    }
    assert!(read(&**store, 0, LEN).iter().all(|byte| *byte == 0), "zeros that were begun were not written");
    let refused = begin(store.size(), Op::Write(vec![1])).wait().1;
    assert_eq!(refused.err().map(|e| e.errno()), Some(EINVAL), "a write outside that was begun");
}
