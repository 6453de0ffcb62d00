//! A volume with its buffer on real directories that can be made to fail. Cores serve it one after another on the same
//! segment. It is compared with the reference disk.

use std::{
    cell::Cell,
    fs,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::Duration,
};

use everdisk_proto::{
    buffer,
    limits::BLOCK,
    segment::MAGIC as SEGMENT_MAGIC,
    version::BUFFER,
    volume::{Bypass, NodeSpec, NodeUrl, SPEC_VERSION, Timeouts, VolumeSpec},
};
use everdisk_store::Sought;
use everdisk_testkit::{
    at_end::at_end,
    fault_store::{FaultStore, fault_file},
    reference_disk::ReferenceDisk,
};
use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;

use super::{patience::ENOSPC, *};
use crate::{gate::Work, sender::Destaged};

const NODES: usize = 2;
const BLOCKS: u64 = 96;
const SIZE: u64 = BLOCKS * BLOCK;

/// Which core has the gate, and which ones write: what the segment says of two cores.
#[derive(Debug, Default)]
struct Words {
    /// Core and generation.
    word: AtomicU64,
    writing: [AtomicBool; 2],
    carried: AtomicU64,
}

struct TestGate {
    words: Arc<Words>,
    core: usize,
}

impl Gate for TestGate {
    fn generation(&self) -> Option<u64> {
        let word = self.words.word.load(SeqCst);
        (word & 1 == self.core as u64).then_some(word >> 1)
    }
    fn begin_sending(&self, generation: u64) -> bool {
        self.words.writing[self.core].store(true, SeqCst);
        let ours = self.generation() == Some(generation);
        if !ours {
            self.end_sending();
        }
        ours
    }
    fn end_sending(&self) {
        self.words.writing[self.core].store(false, SeqCst);
    }
    fn may_write(&self) -> bool {
        !self.words.writing[1 - self.core].load(SeqCst)
    }
    fn enter(&self, _: Work, generation: u64) -> bool {
        self.generation() == Some(generation)
    }
    fn leave(&self, _: Work) {}
    fn taken_over(&self, bytes: u64) {
        self.words.carried.store(bytes, SeqCst);
    }
}

/// A request that is let in again as often as wanted.
struct Request {
    synchronous: bool,
    returns: Cell<u32>,
}

fn request(synchronous: bool) -> Request {
    Request { synchronous, returns: Cell::new(u32::MAX) }
}

impl Hold for Request {
    fn synchronous(&self) -> bool {
        self.synchronous
    }
    fn away(&self) {}
    fn writing(&self) {}
    fn back(&self) -> bool {
        let left = self.returns.get();
        self.returns.set(left.saturating_sub(1));
        left > 0
    }
}

/// A volume, its segment, and the core that has the gate.
struct Bench {
    spec: VolumeSpec,
    segment: Arc<SharedSegment>,
    words: Arc<Words>,
    core: WriteBack,
    generation: u64,
    _directory: TempDir,
}

impl Bench {
    fn new(buffer: u64) -> Self {
        let directory = TempDir::new_in("/dev/shm").unwrap();
        let node = |n: usize| NodeSpec {
            url: NodeUrl::Dir(directory.path().join(n.to_string())),
            uuid: Uuid::from_u128(1 + n as u128),
        };
        let spec = VolumeSpec {
            spec_version: SPEC_VERSION,
            name: "v".parse().unwrap(),
            uuid: Uuid::from_u128(0xB),
            size: SIZE,
            stripe: 64 << 10,
            buffer,
            bypass: Bypass::Auto,
            timeouts: Timeouts::default(),
            nodes: (0..NODES).map(node).collect(),
        };
        Engine::create(&spec).unwrap();
        let segment = Arc::new(SharedSegment::create(buffer).unwrap());
        segment.header.magic.store(SEGMENT_MAGIC, SeqCst);
        segment.header.buffer_version.store(BUFFER, SeqCst);
        for (index, value) in buffer::empty(segment.geometry()) {
            segment.buffer_word(index).unwrap().store(value, SeqCst);
        }
        let words = Arc::new(Words::default());
        words.word.store(1 << 1, SeqCst);
        let core = start(&spec, &segment, &words, 0);
        core.adopt(1);
        Self { spec, segment, words, core, generation: 1, _directory: directory }
    }

    /// The core loses the gate to its successor, which has followed or not.
    fn hand_over(&mut self, follows: bool) -> WriteBack {
        let next = (self.words.word.load(SeqCst) & 1) ^ 1;
        let successor = start(&self.spec, &self.segment, &self.words, usize::try_from(next).unwrap());
        if follows {
            successor.follow();
        }
        self.generation += 1;
        self.words.word.store((self.generation << 1) | next, SeqCst);
        successor.adopt(self.generation);
        std::mem::replace(&mut self.core, successor)
    }

    fn faults(&self, text: &str) {
        for node in &self.spec.nodes {
            fs::write(fault_file(&node.url), text).unwrap();
        }
    }

    fn read_all(&self) -> Vec<u8> {
        let mut all = vec![0xEE; usize::try_from(SIZE).unwrap()];
        self.core.read(&request(false), 0, &mut all).unwrap();
        all
    }

    fn turn(&self, bytes: u64) -> Destaged {
        self.core.turn(bytes)
    }

    /// What the nodes hold, without any buffer.
    fn stored(&self) -> Vec<u8> {
        let mut all = vec![0; usize::try_from(SIZE).unwrap()];
        Engine::open(&self.spec).unwrap().read(0, &mut all).unwrap();
        all
    }
}

fn start(spec: &VolumeSpec, segment: &Arc<SharedSegment>, words: &Arc<Words>, core: usize) -> WriteBack {
    let engine = Arc::new(Engine::open_with(spec, &FaultStore::wrap).unwrap());
    let gate = Box::new(TestGate { words: Arc::clone(words), core });
    WriteBack::new(engine, segment, gate, spec.bypass, spec.timeouts).unwrap()
}

#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, len: u64, seed: u8, synchronous: bool },
    Discard(u64, u64),
    WriteZeroes(u64, u64),
    Read(u64, u64),
    Seek(u64),
    Flush,
    Send(u64),
    SendAndFail(u64),
    HandOver { follows: bool },
}

fn any_op() -> impl Strategy<Value = Op> {
    let range = || {
        prop_oneof![
            (0..SIZE, 1u64..20_000).prop_map(|(at, len)| (at, len.min(SIZE - at))),
            (0..BLOCKS, 1u64..6).prop_map(|(at, n)| (at * BLOCK, (n * BLOCK).min(SIZE - at * BLOCK))),
        ]
    };
    prop_oneof![
        8 => (range(), 1u8.., any::<bool>())
            .prop_map(|((at, len), seed, synchronous)| Op::Write { at, len, seed, synchronous: synchronous && seed > 150 }),
        1 => range().prop_map(|(at, len)| Op::Discard(at, len)),
        1 => range().prop_map(|(at, len)| Op::WriteZeroes(at, len)),
        2 => range().prop_map(|(at, len)| Op::Read(at, len)),
        1 => (0..SIZE).prop_map(Op::Seek),
        1 => Just(Op::Flush),
        3 => (1u64..60_000).prop_map(Op::Send),
        1 => (1u64..60_000).prop_map(Op::SendAndFail),
        2 => any::<bool>().prop_map(|follows| Op::HandOver { follows }),
    ]
}

fn content(seed: u8, len: u64) -> Vec<u8> {
    (usize::from(seed)..).take(usize::try_from(len).unwrap()).map(|n| u8::try_from(n % 251).unwrap() + 1).collect()
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    /// D5, M7: data is written (buffered or through), discarded, sent in part and flushed, by any core. Every read
    /// shows it, and what was flushed is on the nodes.
    #[test]
    fn a_volume_with_a_buffer_agrees_with_the_reference_disk(ops in prop::collection::vec(any_op(), 1..50)) {
        let mut bench = Bench::new(2 << 20);
        let mut disk = ReferenceDisk::new(index(SIZE));
        for op in &ops {
            match *op {
                Op::Write { at, len, seed, synchronous } => {
                    let data = content(seed, len);
                    bench.core.write(&request(synchronous), at, &data).unwrap();
                    disk.write(index(at), &data);
                    if synchronous {
                        prop_assert!(bench.stored()[index(at)..index(at + len)] == data[..]);
                    }
                }
                Op::Discard(at, len) => {
                    bench.core.discard(&request(false), at, len).unwrap();
                    disk.zero(index(at), index(len));
                }
                Op::WriteZeroes(at, len) => {
                    bench.core.write_zeroes(&request(false), at, len).unwrap();
                    disk.zero(index(at), index(len));
                }
                Op::Read(at, len) => {
                    let mut buf = vec![0xEE; index(len)];
                    bench.core.read(&request(false), at, &mut buf).unwrap();
                    prop_assert_eq!(&buf[..], disk.read(index(at), index(len)).unwrap());
                }
                Op::Seek(at) => {
                    let data = bench.core.seek(&request(false), at, Sought::Data).unwrap();
                    let hole = bench.core.seek(&request(false), at, Sought::Hole).unwrap().unwrap();
                    let end = data.unwrap_or(SIZE);
                    prop_assert!(disk.is_zero(index(at), index(end - at)), "there is data before {data:?}");
                    prop_assert!(hole == SIZE || hole >= at);
                    if hole < SIZE {
                        prop_assert!(disk.is_zero(index(hole), 1), "{hole} is no hole");
                    }
                }
                Op::Flush => {
                    bench.core.flush(&request(false)).unwrap();
                    prop_assert!(bench.stored()[..] == *disk.read(0, index(SIZE)).unwrap());
                    prop_assert_eq!(bench.core.buffered_bytes(), 0);
                }
                Op::Send(bytes) => {
                    let _ = bench.turn(bytes);
                }
                Op::SendAndFail(bytes) => {
                    bench.faults("write fail=EIO");
                    // What was sent along with an earlier batch is retired without another write.
                    let _ = bench.turn(bytes);
                    bench.faults("");
                }
                Op::HandOver { follows } => drop(bench.hand_over(follows)),
            }
            prop_assert!(bench.read_all()[..] == *disk.read(0, index(SIZE)).unwrap(), "{op:?}");
        }
    }
}

/// M3: in synchronous mode nothing is added to the buffer. A write that overlaps buffered data waits until that was
/// sent.
#[test]
fn m3_a_synchronous_write_goes_through_and_the_buffer_only_shrinks() {
    let bench = Bench::new(2 << 20);
    bench.core.write(&request(false), 0, &content(1, 8192)).unwrap();
    bench.core.write(&request(true), 65_536, &content(2, 4096)).unwrap();
    assert_eq!(bench.core.buffered_bytes(), 8192);
    assert!(bench.stored()[65_536..69_632] == content(2, 4096)[..]);
    bench.core.write(&request(true), 4096, &content(3, 4096)).unwrap();
    assert_eq!(bench.core.buffered_bytes(), 0, "what it overlaps was sent first");
    assert!(bench.stored()[4096..8192] == content(3, 4096)[..]);
    bench.core.adopt(1);
    drop(bench);
}

/// D6: a predecessor's write to a node is over before its successor writes.
#[test]
fn d6_a_successor_sends_nothing_while_its_predecessor_still_does() {
    let mut bench = Bench::new(2 << 20);
    bench.core.write(&request(false), 0, &content(1, 4096)).unwrap();
    bench.faults("write hang");
    let words = Arc::clone(&bench.words);
    thread::scope(|scope| {
        let _let_go = at_end(|| words.writing[0].store(false, SeqCst));
        let old = bench.hand_over(true);
        // The predecessor's sender hangs in a write that it began while it had the gate.
        words.writing[0].store(true, SeqCst);
        bench.core.write(&request(false), 0, &content(2, 4096)).unwrap();
        assert!(matches!(bench.turn(1 << 20), Destaged::Busy));
        assert!(matches!(old.turn(1 << 20), Destaged::NoGate));
        assert!(bench.read_all()[..4096] == content(2, 4096)[..], "reads and writes of what is buffered go on");
        bench.faults("");
        words.writing[0].store(true, SeqCst);
        let through = scope.spawn(|| bench.core.write(&request(true), 131_072, &content(3, 4096)));
        thread::sleep(Duration::from_millis(50));
        assert!(!through.is_finished(), "a write that goes through waits as well");
        words.writing[0].store(false, SeqCst);
        through.join().unwrap().unwrap();
        bench.core.flush(&request(false)).unwrap();
        assert!(bench.stored()[..4096] == content(2, 4096)[..]);
    });
}

/// M1, D2: a request whose gate was closed while it waited changes nothing and says so.
#[test]
fn m1_a_request_that_is_not_let_in_again_is_abandoned() {
    let bench = Bench::new(2 << 20);
    bench.core.write(&request(false), 0, &content(1, 4096)).unwrap();
    let gone = Request { synchronous: false, returns: Cell::new(0) };
    assert!(matches!(bench.core.read(&gone, 0, &mut [0; 10]), Err(Stopped::Abandoned)));
    assert!(matches!(bench.core.flush(&gone), Err(Stopped::Abandoned)));
    assert!(bench.read_all()[..4096] == content(1, 4096)[..]);
    // The next core repeats a write that goes through.
    let gone = Request { synchronous: true, returns: Cell::new(0) };
    assert!(matches!(bench.core.write(&gone, 0, &content(2, 4096)), Err(Stopped::Abandoned)));
}

/// D5: writes go on into the buffer while the nodes hang. A write that finds no room waits until they answer again.
#[test]
fn d5_a_full_buffer_holds_writers_back_without_an_error() {
    let bench = Bench::new(2 << 20);
    bench.faults("write hang");
    let mut written = 0;
    let big = content(9, 64 << 10);
    thread::scope(|scope| {
        let _let_go = at_end(|| {
            bench.faults("");
            bench.core.stop_tending();
        });
        let sender = scope.spawn(|| bench.core.run_sender());
        // The volume is smaller than the buffer: its blocks are written again and again.
        while bench.core.buffered_bytes() + (64 << 10) <= 2 << 20 {
            bench.core.write(&request(false), (written % 5) << 16, &big).unwrap();
            written += 1;
        }
        assert_eq!(written, 32, "all of the buffer was used");
        let waits = scope.spawn(|| bench.core.write(&request(false), 0, &content(4, 64 << 10)));
        thread::sleep(Duration::from_millis(100));
        assert!(!waits.is_finished());
        assert!(bench.read_all()[..100] == big[..100], "reads of what is buffered go on");
        bench.faults("");
        waits.join().unwrap().unwrap();
        bench.core.flush(&request(false)).unwrap();
        bench.core.stop_tending();
        sender.join().unwrap();
    });
    assert!(bench.stored()[..65_536] == content(4, 64 << 10)[..]);
}

/// D5: a node that fails is retried without a request, and the client that asked for a flush is told.
#[test]
fn d5_a_failed_flush_is_told_and_the_sender_tries_again() {
    let bench = Bench::new(2 << 20);
    bench.core.write(&request(false), 0, &content(1, 4096)).unwrap();
    bench.faults("write fail=ENOSPC");
    let error = bench.core.flush(&request(false)).unwrap_err();
    assert!(matches!(error, Stopped::Failed(IoError::Unsent { errno: ENOSPC, .. })), "{error}");
    assert_eq!(bench.core.nodes()[0].state, everdisk_proto::node::NodeState::Failed);
    assert_eq!(bench.core.buffered_bytes(), 4096);
    bench.faults("");
    bench.core.flush(&request(false)).unwrap();
    assert_eq!(bench.core.nodes()[0].state, everdisk_proto::node::NodeState::InStep);
    assert!(bench.stored()[..4096] == content(1, 4096)[..]);
}

/// D5: data that was damaged in the buffer reads as an error until it is written anew, and a flush does not hide it.
#[test]
fn d5_damaged_data_is_an_error_until_it_is_written_anew() {
    let mut bench = Bench::new(2 << 20);
    bench.core.write(&request(false), 0, &content(1, 4096)).unwrap();
    bench.core.write(&request(false), 8192, &content(2, 4096)).unwrap();
    // The first extent lies at the ring's start.
    assert!(bench.segment.buffer_write(100, b"\xff\xff\xff"));
    drop(bench.hand_over(false));
    let read = |at: u64| bench.core.read(&request(false), at, &mut [0; 4096]);
    assert!(matches!(read(0), Err(Stopped::Failed(IoError::DataLost { ranges: 1 }))));
    read(8192).unwrap();
    assert!(matches!(bench.core.flush(&request(false)), Err(Stopped::Failed(IoError::DataLost { .. }))));
    bench.core.write(&request(false), 0, &content(3, 4096)).unwrap();
    bench.core.flush(&request(false)).unwrap();
    assert!(bench.stored()[..4096] == content(3, 4096)[..]);
}
