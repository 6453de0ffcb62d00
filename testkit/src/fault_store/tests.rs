//! The fault store conforms when its file is silent, and does what the file says when it is not.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::superblock::Superblock;
use everdisk_store::{
    Creation, NodeFormat, Sought,
    conformance::{self, Fixture},
    create, open,
};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::at_end::at_end;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn url(parent: &TempDir, name: &str) -> NodeUrl {
    NodeUrl::Dir(parent.path().join(name))
}

fn store(url: &NodeUrl, len: u64) -> Arc<dyn Store> {
    let superblock = Superblock {
        volume: Uuid::from_u128(1),
        node: Uuid::from_u128(2),
        size: len,
        stripe: 4096,
        index: 0,
        nodes: 1,
    };
    let format = NodeFormat { superblock, len };
    create(url, &format, Creation::default()).unwrap().confirm();
    FaultStore::wrap(open(url, &format, Duration::ZERO).unwrap())
}

struct Directories {
    parent: TempDir,
    made: u64,
}

impl Fixture for Directories {
    fn store(&mut self, len: u64) -> Arc<dyn Store> {
        self.made += 1;
        store(&url(&self.parent, &self.made.to_string()), len)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        None
    }
}

#[test]
fn conforms_without_faults_and_when_slow() {
    let mut silent = Directories { parent: TempDir::new().unwrap(), made: 0 };
    conformance::run(&mut silent);
    let mut slow = Directories { parent: TempDir::new().unwrap(), made: 0 };
    for n in 1..20 {
        fs::write(fault_file(&url(&slow.parent, &n.to_string())), "all delay_us=20\n").unwrap();
    }
    conformance::run(&mut slow);
}

#[test]
fn the_language() {
    let faults: Faults =
        "# a comment\n\nwrite delay_us=1000\nwrite delay_us=500 # more\nread fail=EIO\nflush hang".parse().unwrap();
    let write = Fault { delay: Duration::from_micros(1500), ..Fault::default() };
    for operation in [Operation::Write, Operation::Zeroes, Operation::Allocate, Operation::Discard] {
        assert_eq!(faults.on(operation), write, "{operation:?}");
    }
    assert_eq!(faults.on(Operation::Read), Fault { fail: Some(EIO), ..Fault::default() });
    assert_eq!(faults.on(Operation::Flush), Fault { hang: true, ..Fault::default() });
    let faults: Faults = "write hang\ndiscard fail=ENOSPC".parse().unwrap();
    assert_eq!(faults.on(Operation::Discard), Fault { fail: Some(ENOSPC), ..Fault::default() });
    assert!(faults.on(Operation::Zeroes).hang);
    let faults: Faults = "all hang".parse().unwrap();
    assert!(faults.on(Operation::Read).hang && faults.on(Operation::Flush).hang && faults.on(Operation::Discard).hang);
    let faults: Faults = "read astray".parse().unwrap();
    assert_eq!(faults.on(Operation::Read), Fault { astray: true, ..Fault::default() });
    let faults: Faults = "flush drop=EIO".parse().unwrap();
    assert_eq!(faults.on(Operation::Flush), Fault { drop: Some(EIO), ..Fault::default() });
    assert_eq!("".parse(), Ok(Faults::default()));
    let bad = [
        "wirte hang",
        "write",
        "write hang now",
        "write fail=EWHAT",
        "write delay_us=-1",
        "read lose",
        "write astray",
        "all lose",
        "all drop=EIO",
        "write drop=EIO",
    ];
    for line in bad {
        assert!(line.parse::<Faults>().unwrap_err().to_string().contains(line), "{line}");
    }
}

#[test]
fn each_operation_meets_with_its_fault_and_only_with_that() {
    let parent = TempDir::new().unwrap();
    let url = url(&parent, "n");
    let store = store(&url, 1 << 20);
    let say = |text: &str| fs::write(fault_file(&url), text).unwrap();
    let errno = |result: Result<(), StoreError>| result.err().map(|e| e.errno());
    let mut buf = [0; 4096];

    store.write_at(0, &[7; 4096]).unwrap();
    say("write fail=ENOSPC");
    assert_eq!(errno(store.write_at(0, &[8; 4096])), Some(ENOSPC));
    assert_eq!(errno(store.discard(0, 4096)), Some(ENOSPC));
    store.flush().unwrap();
    say("read fail=EIO\nflush fail=EIO");
    assert_eq!(errno(store.read_at(0, &mut buf)), Some(EIO));
    assert_eq!(errno(store.flush()), Some(EIO));
    assert_eq!(errno(store.recheck()), Some(EIO));
    assert_eq!(errno(store.next(0, Sought::Data).map(|_| ())), Some(EIO));
    store.write_at(4096, &[9; 4096]).unwrap();
    say("write lose\nread delay_us=30000");
    store.write_at(0, &[10; 4096]).unwrap();
    let began = Instant::now();
    store.read_at(0, &mut buf).unwrap();
    assert!(began.elapsed() >= Duration::from_millis(30));
    assert_eq!(buf, [7; 4096], "what failed or was lost is not there");
    say("read astray");
    assert_eq!(store.next(4096, Sought::Data).unwrap(), Some(4095));
    assert_eq!(store.next(4096, Sought::Data).unwrap(), Some(4096), "once");
    say("nonsense");
    assert_eq!(errno(store.flush()), Some(EIO), "a file that is not understood is noticed");
    fs::remove_file(fault_file(&url)).unwrap();
    store.flush().unwrap();
}

#[test]
fn an_operation_hangs_until_the_line_is_gone_and_is_then_done() {
    let parent = TempDir::new().unwrap();
    let url = url(&parent, "n");
    let store = store(&url, 1 << 20);
    fs::write(fault_file(&url), "write hang").unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _let_go = at_end(|| drop(fs::remove_file(fault_file(&url))));
        scope.spawn(|| {
            store.write_at(0, &[7; 4096]).unwrap();
            done.store(true, SeqCst);
        });
        let mut buf = [1; 4096];
        for _ in 0..20 {
            store.read_at(0, &mut buf).unwrap();
            assert_eq!(buf, [0; 4096], "reads go on, and the write has not been done");
            thread::sleep(POLL_INTERVAL);
        }
        assert!(!done.load(SeqCst));
        fs::remove_file(fault_file(&url)).unwrap();
    });
    let mut buf = [1; 4096];
    store.read_at(0, &mut buf).unwrap();
    assert_eq!(buf, [7; 4096]);
}

#[test]
fn what_was_done_is_counted_outside() {
    let parent = TempDir::new().unwrap();
    let url = url(&parent, "n");
    let store = store(&url, 1 << 20);
    let look = || {
        let all = counts(&fault_file(&url));
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].0, std::process::id());
        all[0].1.clone()
    };
    assert_eq!(look(), Counts::default());
    for len in [512, 4096, 4096, 65_536] {
        store.write_at(0, &vec![1; len]).unwrap();
    }
    store.read_at(0, &mut [0; 100]).unwrap();
    assert_eq!(look().unflushed(), 4);
    store.flush().unwrap();
    store.discard(0, 8192).unwrap();
    store.write_zeroes(0, 4096).unwrap();
    fs::write(fault_file(&url), "write fail=EIO").unwrap();
    store.write_at(0, &[1; 4096]).unwrap_err();
    let counts = look();
    let of = |operation| (counts.operations(operation), counts.bytes(operation));
    assert_eq!(of(Operation::Read), (1, 100));
    assert_eq!(of(Operation::Write), (4, 512 + 2 * 4096 + 65_536));
    assert_eq!(of(Operation::Discard), (1, 8192));
    assert_eq!(of(Operation::Zeroes), (1, 4096));
    assert_eq!(of(Operation::Flush), (1, 0));
    assert_eq!(counts.unflushed(), 2);
    assert_eq!((counts.writes_from(4096), counts.writes_from(65_536), counts.writes_from(1 << 20)), (3, 1, 0));
    assert_eq!(counts.mean_write(), (512 + 2 * 4096 + 65_536) / 4);
    let twice = counts.clone() + counts;
    assert_eq!(twice.operations(Operation::Write), 8);
}

/// A volatile node of 1 MiB that holds nines, flushed, as two processes have it open; its directory, what commands it.
fn volatile(parent: &TempDir) -> (PathBuf, PathBuf, Arc<dyn Store>, Arc<dyn Store>) {
    let url = url(parent, "n");
    let node = url.as_directory().unwrap().clone();
    let file = fault_file(&url);
    let one = store(&url, 1 << 20);
    make_volatile(&file).unwrap();
    one.write_at(0, &vec![9; 1 << 20]).unwrap();
    one.flush().unwrap();
    let format = NodeFormat {
        superblock: Superblock {
            volume: Uuid::from_u128(1),
            node: Uuid::from_u128(2),
            size: 1 << 20,
            stripe: 4096,
            index: 0,
            nodes: 1,
        },
        len: 1 << 20,
    };
    let other = FaultStore::wrap(open(&url, &format, Duration::ZERO).unwrap());
    (node, file, one, other)
}

fn bytes(store: &dyn Store) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    store.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn conforms_when_volatile() {
    let mut volatile = Directories { parent: TempDir::new().unwrap(), made: 0 };
    for n in 1..20 {
        make_volatile(&fault_file(&url(&volatile.parent, &n.to_string()))).unwrap();
    }
    conformance::run(&mut volatile);
}

#[test]
fn power_takes_what_is_unflushed_whoever_wrote_it_and_nothing_else() {
    let parent = TempDir::new().unwrap();
    let (node, file, one, other) = volatile(&parent);
    let mut expected = vec![9; 1 << 20];
    one.write_at(100, &[1; 5000]).unwrap();
    other.discard(4000, 5000).unwrap();
    assert!(one.write_at((1 << 20) - 1, &[1; 2]).is_err(), "outside");
    expected[100..5100].fill(1);
    expected[4000..9000].fill(0);
    one.flush().unwrap();
    assert_eq!(lose_power(&file, &node).unwrap(), 0);
    assert!(bytes(&*one) == expected);
    // Overlapping, by both, of every kind; what is flushed by one covers the other.
    for store in [&one, &other] {
        store.write_at(4096, &[2; 8192]).unwrap();
        store.write_zeroes(5000, 3000).unwrap();
        store.write_at(6000, &[3; 10]).unwrap();
        store.discard(0, 6005).unwrap();
        store.allocate(0, 1 << 20).unwrap();
    }
    assert!(bytes(&*one) != expected);
    assert!(durable(&file, &node).unwrap() == expected);
    assert_eq!(lose_power(&file, &node).unwrap(), 2 * (8192 + 3000 + 10 + 6005));
    assert!(bytes(&*one) == expected);
    one.flush().unwrap();
    other.flush().unwrap();
}

/// errseq_t: what a failed flush loses is gone, the next flush succeeds, and each store is told once.
#[test]
fn a_failed_flush_loses_what_is_unflushed_and_is_told_once_to_each() {
    let parent = TempDir::new().unwrap();
    let (node, file, one, other) = volatile(&parent);
    let errno = |result: Result<(), StoreError>| result.err().map(|e| e.errno());
    fs::write(&file, "flush drop=ENOSPC").unwrap();
    one.flush().unwrap();
    one.write_at(100, &[1; 5000]).unwrap();
    assert_eq!(errno(other.flush()), Some(ENOSPC));
    assert!(bytes(&*one) == vec![9; 1 << 20], "the data is gone");
    assert_eq!(errno(other.flush()), None, "nothing is left to be written");
    fs::remove_file(&file).unwrap();
    assert_eq!(errno(one.flush()), Some(ENOSPC), "the one that did not flush is told as well");
    assert_eq!((errno(one.flush()), errno(other.flush())), (None, None));
    // By the kernel's own write-back, while no flush runs.
    one.write_at(100, &[1; 5000]).unwrap();
    assert_eq!(fail_write_back(&file, &node, EIO).unwrap(), 5000);
    assert!(bytes(&*one) == vec![9; 1 << 20]);
    let later = Volatile::new(&file).unwrap();
    let flush = |volatile: &Volatile| volatile.flush(None, |_, _| Ok(()), || Ok(()));
    assert_eq!(errno(one.flush()), Some(EIO));
    assert!(flush(&later).is_err(), "no store had been told when it was opened");
    assert_eq!(errno(other.flush()), Some(EIO));
    flush(&Volatile::new(&file).unwrap()).unwrap();
    assert_eq!((errno(one.flush()), errno(other.flush())), (None, None));
}

#[test]
fn a_node_that_is_not_volatile_drops_nothing() {
    let parent = TempDir::new().unwrap();
    let url = url(&parent, "n");
    let store = store(&url, 1 << 20);
    fs::write(fault_file(&url), "flush drop=EIO").unwrap();
    assert!(store.flush().unwrap_err().to_string().contains("volatile"));
    let node = url.as_directory().unwrap();
    assert_eq!(lose_power(&fault_file(&url), node).unwrap_err().kind(), io::ErrorKind::NotFound);
}
