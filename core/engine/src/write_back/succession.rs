//! Cores that have the gate one after the other, on one segment and one storage node.

use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use everdisk_buffer::book::Book;
use everdisk_proto::{
    version::BUFFER,
    volume::{Bypass, NodeSpec, NodeUrl, SPEC_VERSION, Timeouts, VolumeSpec},
};
use everdisk_store::{About, Completion, Lent, Op, Outcome, Owned, Store, pool::Pool};
use everdisk_testkit::at_end::at_end;
use uuid::Uuid;

use super::*;
use crate::gate::Work;

const LEN: usize = 4096;
/// A write that begins with this byte waits at the node.
const STUCK: u8 = 0xEE;

/// A storage node at which some writes wait until they are released.
struct Node {
    inner: Arc<dyn Store>,
    pool: Pool,
    stuck: Arc<AtomicBool>,
}

impl Store for Node {
    fn about(&self) -> &About {
        self.inner.about()
    }
    fn attempt(&self, _: u64, _: Lent<'_>) -> Option<Outcome> {
        None
    }
    fn perform(&self, offset: u64, op: Lent<'_>) -> Outcome {
        if let Op::Write(data) = &op {
            while data[0] == STUCK && self.stuck.load(SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.inner.perform(offset, op)
    }
    fn begin(self: Arc<Self>, offset: u64, op: Owned, completion: Completion) {
        Arc::clone(&self).pool.begin(self, offset, op, completion);
    }
}

/// The generation under which a core has the gate; 0: it does not.
#[derive(Clone, Default)]
struct Place(Arc<AtomicU64>);

impl Gate for Place {
    fn generation(&self) -> Option<u64> {
        Some(self.0.load(SeqCst)).filter(|generation| *generation > 0)
    }
    fn begin_sending(&self, generation: u64) -> bool {
        self.generation() == Some(generation)
    }
    fn end_sending(&self) {}
    fn may_write(&self) -> bool {
        true
    }
    fn taken_over(&self, _: u64) {}
    fn enter(&self, _: Work, generation: u64) -> bool {
        self.generation() == Some(generation)
    }
    fn leave(&self, _: Work) {}
}

#[derive(Default)]
struct Request {
    synchronous: bool,
    writes: AtomicBool,
    /// The gate was given to another core.
    over: AtomicBool,
}

impl Hold for Request {
    fn synchronous(&self) -> bool {
        self.synchronous
    }
    fn away(&self) {}
    fn writing(&self) {
        self.writes.store(true, SeqCst);
    }
    fn back(&self) -> bool {
        !self.over.load(SeqCst)
    }
}

struct Setting {
    _dir: tempfile::TempDir,
    spec: VolumeSpec,
    segment: Arc<SharedSegment>,
    stuck: Arc<AtomicBool>,
}

impl Setting {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let node = NodeSpec { uuid: Uuid::from_u128(2), url: NodeUrl::Dir(dir.path().join("node")) };
        let spec = VolumeSpec {
            spec_version: SPEC_VERSION,
            name: "v".parse().unwrap(),
            uuid: Uuid::from_u128(1),
            size: 1 << 20,
            stripe: 64 << 10,
            nodes: vec![node],
            buffer: 2 << 20,
            bypass: Bypass::Auto,
            timeouts: Timeouts::default(),
        };
        Engine::create(&spec).unwrap();
        let segment = Arc::new(SharedSegment::create(spec.buffer).unwrap());
        segment.header.buffer_version.store(BUFFER, SeqCst);
        Self { _dir: dir, spec, segment, stuck: Arc::new(AtomicBool::new(true)) }
    }

    fn core(&self) -> (WriteBack, Place) {
        let wrap = |inner| -> Arc<dyn Store> {
            Arc::new(Node { inner, pool: Pool::default(), stuck: Arc::clone(&self.stuck) })
        };
        let engine = Arc::new(Engine::open_with(&self.spec, &wrap).unwrap());
        let place = Place::default();
        (
            WriteBack::new(engine, &self.segment, Box::new(place.clone()), Bypass::Auto, Timeouts::default()).unwrap(),
            place,
        )
    }
}

/// The gate goes from another core to this one.
fn give(core: &(WriteBack, Place), generation: u64) {
    core.1.0.store(generation, SeqCst);
    core.0.adopt(generation);
}

fn write(core: &(WriteBack, Place), byte: u8) {
    write_at(core, 0, byte);
}

fn write_at(core: &(WriteBack, Place), offset: u64, byte: u8) {
    core.0.write(&Request::default(), offset, &[byte; LEN]).unwrap();
}

fn read(core: &(WriteBack, Place)) -> u8 {
    let mut byte = [0];
    core.0.read(&Request::default(), 0, &mut byte).unwrap();
    byte[0]
}

/// D6: a core whose write hangs at a node loses the gate and is given it again. What it then buffers and sends is
/// newer.
#[test]
fn a_write_that_was_abandoned_does_not_land_on_what_the_same_core_sends_later() {
    let setting = Setting::new();
    let core = setting.core();
    give(&core, 1);
    let old = Request { synchronous: true, ..Request::default() };
    thread::scope(|scope| {
        let _let_go = at_end(|| setting.stuck.store(false, SeqCst));
        let abandoned = scope.spawn(|| core.0.write(&old, 0, &[STUCK; LEN]));
        while !old.writes.load(SeqCst) {
            assert!(!abandoned.is_finished(), "the write ended before it came to its node");
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(50));
        old.over.store(true, SeqCst);
        give(&core, 3);
        write(&core, 2);
        let flushed = core.0.flush_within(Duration::from_millis(200));
        setting.stuck.store(false, SeqCst);
        assert!(matches!(abandoned.join().unwrap(), Err(Stopped::Abandoned)));
        assert!(matches!(core.0.flush_within(Duration::from_secs(10)), Ok(true)));
        assert_eq!(read(&core), 2, "what was acknowledged and flushed is overwritten by an older write");
        assert!(matches!(flushed, Ok(false)), "{flushed:?}");
    });
}

/// D5, D6: a core is given the gate again. A flush comes before the core has adopted what was buffered and sent in
/// between.
#[test]
fn nothing_is_sent_before_it_is_known_what_there_is() {
    let setting = Setting::new();
    let (first, second) = (setting.core(), setting.core());
    give(&first, 1);
    write(&first, 1);
    first.1.0.store(0, SeqCst);
    give(&second, 2);
    write(&second, 2);
    assert!(matches!(second.0.flush_within(Duration::from_secs(10)), Ok(true)));
    second.1.0.store(0, SeqCst);
    first.1.0.store(3, SeqCst);
    let early = first.0.flush_within(Duration::from_millis(20));
    assert!(matches!(early, Err(IoError::NoGate)), "{early:?}");
    first.0.adopt(3);
    assert!(matches!(first.0.flush_within(Duration::from_secs(10)), Ok(true)));
    assert_eq!(read(&first), 2);
}

/// D3: a core comes to its probe after the gate was taken from it, while another appends. It discards everything it
/// saw.
#[test]
fn who_takes_over_too_late_does_not_miss_what_is_written_meanwhile() {
    let setting = Setting::new();
    let late = setting.core();
    let area = SegmentArea::of(&setting.segment).unwrap();
    let mut book = Book::new(area.geometry(), setting.spec.size);
    book.adopt(&area);
    let place = book.reserve(&area, ExtentKind::Data, &(0..LEN as u64)).unwrap();
    late.0.adopt(2);
    let data = [7; LEN];
    let (kind, position, crc) = (ExtentKind::Data, place.position, crc32c::crc32c(&data));
    let extent = Extent { kind, offset: 0, len: LEN as u64, position, generation: 3, crc };
    log::publish(&area, place.seq, &extent, &data);
    give(&late, 4);
    assert_eq!(read(&late), 7);
}

/// D5: a write that is buffered while a bypass is under way in the same range waits for it. What is read does not
/// change any more once both are acknowledged.
#[test]
fn what_overlaps_a_write_past_the_buffer_waits_for_it() {
    let setting = Setting::new();
    let core = setting.core();
    give(&core, 1);
    let passing = Request { synchronous: true, ..Request::default() };
    thread::scope(|scope| {
        let _let_go = at_end(|| setting.stuck.store(false, SeqCst));
        let first = scope.spawn(|| core.0.write(&passing, 0, &[STUCK; LEN]));
        while !passing.writes.load(SeqCst) {
            assert!(!first.is_finished(), "the write ended before it came to its node");
            thread::yield_now();
        }
        let second = scope.spawn(|| write(&core, 2));
        write_at(&core, 65_536, 3);
        thread::sleep(Duration::from_millis(50));
        assert!(!second.is_finished(), "it was buffered, and the write under way will land on it");
        setting.stuck.store(false, SeqCst);
        first.join().unwrap().unwrap();
        second.join().unwrap();
        assert!(matches!(core.0.flush_within(Duration::from_secs(10)), Ok(true)));
        assert_eq!(read(&core), 2);
    });
}

/// D5: a write that goes through waits for one that is being copied into the buffer, although nobody can read that one yet.
/// Otherwise readers would see first the one and then the other.
#[test]
fn what_goes_through_waits_for_what_is_being_copied_into_the_buffer() {
    let setting = Setting::new();
    let core = setting.core();
    give(&core, 1);
    let (buffer, range) = (&core.0.buffer, 0..LEN as u64);
    let place = buffer.write_book().reserve(&buffer.area, ExtentKind::Data, &range).unwrap();
    let (passing, begun) = (Request { synchronous: true, ..Request::default() }, AtomicBool::new(false));
    thread::scope(|scope| {
        let second = scope.spawn(|| {
            begun.store(true, SeqCst);
            core.0.write(&passing, 0, &[2; LEN])
        });
        while !begun.load(SeqCst) {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(50));
        assert!(!passing.writes.load(SeqCst), "it goes to the node beside a write that is being copied");
        core.0.append(place, &range, Content::Data(&[1; LEN]));
        second.join().unwrap().unwrap();
        assert_eq!(read(&core), 2);
        assert!(matches!(core.0.flush_within(Duration::from_secs(10)), Ok(true)));
        assert_eq!(read(&core), 2);
    });
}

/// D6: a worker is off the CPU between its announcement that it writes and the fence, while the gate goes away and
/// comes back. Its own bypass then is one of an earlier tenure, and it must not wait for itself.
struct Preempted<'a> {
    core: &'a (WriteBack, Place),
    over: AtomicBool,
}

impl Hold for Preempted<'_> {
    fn synchronous(&self) -> bool {
        true
    }
    fn away(&self) {}
    fn writing(&self) {
        give(self.core, 3);
        self.over.store(true, SeqCst);
    }
    fn back(&self) -> bool {
        !self.over.load(SeqCst)
    }
}

#[test]
fn a_write_that_lost_the_gate_before_the_fence_does_not_wait_for_itself() {
    let setting = Setting::new();
    setting.stuck.store(false, SeqCst);
    let core = setting.core();
    give(&core, 1);
    let start = Instant::now();
    let request = Preempted { core: &core, over: AtomicBool::new(false) };
    assert!(matches!(core.0.write(&request, 0, &[1; LEN]), Err(Stopped::Abandoned)));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(matches!(core.0.flush_within(Duration::from_secs(5)), Ok(true)));
}
