//! Storage nodes behind a server that dies and loses what it had acknowledged and not made durable: nbdkit with a cache in its
//! memory.

use everdisk_harness::servers::Server;
use everdisk_proto::{
    version::BUFFER,
    volume::{NodeSpec, NodeUrl, SPEC_VERSION, VolumeSpec},
};
use uuid::Uuid;

use super::{
    linux::{self, Front, KIB64, Place, SIZE, front, give, synchronous},
    *,
};
use crate::sender::Destaged;

struct Bench {
    core: WriteBack,
    place: Place,
    segment: Arc<SharedSegment>,
    server: Server,
    spec: VolumeSpec,
    _dir: tempfile::TempDir,
}

impl Bench {
    /// A volume on an export and a directory.
    fn new(buffer: u64) -> Self {
        let dir = tempfile::TempDir::new_in("/dev/shm").unwrap();
        let server = Server::nbdkit_file(SIZE + (1 << 20), &["--filter=cache", "cache=writeback"]);
        let node = |n: u128, url| NodeSpec { uuid: Uuid::from_u128(n), url };
        let spec = VolumeSpec {
            spec_version: SPEC_VERSION,
            name: "v".parse().unwrap(),
            uuid: Uuid::from_u128(1),
            size: SIZE,
            stripe: KIB64,
            nodes: vec![node(10, server.url()), node(11, NodeUrl::Dir(dir.path().join("node")))],
            buffer,
            bypass: Bypass::Auto,
            timeouts: Timeouts::default(),
        };
        Engine::create(&spec).unwrap();
        let segment = Arc::new(SharedSegment::create(spec.buffer).unwrap());
        segment.header.buffer_version.store(BUFFER, std::sync::atomic::Ordering::SeqCst);
        let (core, place) = Self::start(&spec, &segment);
        give(&core, &place, 1);
        Self { core, place, segment, server, spec, _dir: dir }
    }

    fn start(spec: &VolumeSpec, segment: &Arc<SharedSegment>) -> (WriteBack, Place) {
        let place = Place(Arc::default(), Arc::new(AtomicBool::new(true)));
        let engine = Arc::new(Engine::open(spec).unwrap());
        let core = WriteBack::new(engine, segment, Box::new(place.clone()), spec.bypass, spec.timeouts).unwrap();
        (core, place)
    }

    fn send(&self) {
        while matches!(self.core.turn(1 << 20), Destaged::Sent) {}
    }

    /// The server dies with what it has not made durable, and comes back.
    fn power_cycle(&mut self) {
        self.server.kill();
        self.server.start();
    }

    fn byte(&self, at: u64) -> u8 {
        let mut byte = [0];
        self.core.read(&front(), at, &mut byte).unwrap();
        byte[0]
    }

    /// The byte that the node itself has.
    fn stored(&self, at: u64) -> u8 {
        let mut byte = [0];
        self.core.engine.read(at, &mut byte).unwrap();
        byte[0]
    }
}

/// Semantics 5 to 7: what the server has lost is still buffered. The flush writes it again and succeeds; nobody is told of an
/// error, because nothing is lost.
#[test]
fn d5_what_a_server_has_lost_is_written_again_and_no_client_sees_an_error() {
    let mut bench = Bench::new(2 << 20);
    let (client, other) = (front(), front());
    bench.core.write(&client, 0, &[1; 4096]).unwrap();
    bench.core.flush(&client).unwrap();
    for round in 2..5 {
        bench.core.write(&client, 8192, &[round; 4096]).unwrap();
        bench.core.write(&client, KIB64, &[round; 4096]).unwrap();
        bench.send();
        assert_eq!(bench.stored(8192), round, "the server has acknowledged it");
        bench.power_cycle();
        assert_ne!(bench.stored(8192), round, "the server has lost it; else this test shows nothing");
        assert_eq!(bench.byte(8192), round);
        assert_eq!(bench.core.buffered_bytes(), 8192, "it is not retired");
        bench.core.flush(&client).unwrap();
        assert_eq!(bench.core.buffered_bytes(), 0);
        bench.power_cycle();
        assert_eq!((bench.stored(0), bench.stored(8192), bench.stored(KIB64)), (1, round, round), "durable");
        bench.core.flush(&other).unwrap();
    }
}

/// The server and the core die, one after the other. The next core has not been told that something was lost, and writes everything
/// again that no flush has covered.
#[test]
fn d3_what_a_server_has_lost_before_its_core_died_is_written_again() {
    let mut bench = Bench::new(2 << 20);
    // Large enough to go past the buffer, where that is allowed.
    bench.core.write(&front(), 0, &vec![1; 512 << 10]).unwrap();
    bench.core.write(&front(), 600 << 10, &[2; 4096]).unwrap();
    bench.send();
    bench.power_cycle();
    assert_eq!(
        (bench.stored(0), bench.stored(640 << 10)),
        (0, 0),
        "the server has lost it; else this test shows nothing"
    );
    bench.place.0.store(0, std::sync::atomic::Ordering::SeqCst);
    let (core, place) = Bench::start(&bench.spec, &bench.segment);
    (bench.core, bench.place) = (core, place);
    give(&bench.core, &bench.place, 2);
    bench.core.flush(&front()).unwrap();
    bench.power_cycle();
    let at = |n: u64| n * KIB64;
    assert!((0..8).all(|n| bench.stored(at(n)) == 1) && bench.stored(600 << 10) == 2);
}

/// Without a buffer a write is durable before it is acknowledged, so that the death of the server loses nothing.
#[test]
fn d5_without_a_buffer_nothing_is_acknowledged_that_the_server_can_lose() {
    for (buffer, client) in [(0, Front::default as fn() -> Front), (2 << 20, synchronous)] {
        let mut bench = Bench::new(buffer);
        bench.core.write(&client(), 0, &[1; 4096]).unwrap();
        bench.core.write(&client(), 4096, &[2; 4096]).unwrap();
        bench.core.discard(&client(), 0, 4096).unwrap();
        bench.power_cycle();
        assert_eq!((bench.byte(0), bench.byte(4096)), (0, 2));
        bench.core.flush(&front()).unwrap();
    }
}

/// A write that has to pass is written again when its own flush fails, and succeeds when the node works again.
#[test]
fn d5_a_write_that_never_bypasses_is_written_again_when_its_own_flush_failed() {
    let bench = linux::Bench::with(0, Bypass::Never, 1);
    bench.fails(true);
    let file = Arc::clone(&bench.files[0]);
    let second = Arc::clone(&file);
    // The first flush fails, with what was written before it.
    *file.in_flush.lock() = Some(Box::new(move || {
        let works = Arc::clone(&second);
        *second.in_flush.lock() = Some(Box::new(move || works.fails.store(false, std::sync::atomic::Ordering::SeqCst)));
    }));
    bench.core.write(&front(), 4096, &[7; 4096]).unwrap();
    assert_eq!(bench.byte(4096).unwrap(), 7);
    assert!(file.before.lock().is_empty(), "it is durable");
}
