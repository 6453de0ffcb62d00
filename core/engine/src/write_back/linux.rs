//! For tests: a storage node as Linux presents it, a volume on such nodes, and cores that serve it one after the other.
//! What was written since the last flush is in the page cache only. A flush that fails reports the error once for each
//! opening; from then on the pages count as clean, and are dropped (mm/filemap.c, lib/errseq.c).

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{
    version::BUFFER,
    volume::{NodeSpec, NodeUrl, SPEC_VERSION, Timeouts, VolumeSpec},
};
use everdisk_store::{About, Completion, Lent, Op, Outcome, Owned, Sought, Store, StoreError, pool::Pool};
use uuid::Uuid;

use super::*;
use crate::gate::Work;

pub(super) const KIB64: u64 = 64 << 10;
pub(super) const SIZE: u64 = 1 << 20;

pub(super) type Then = Box<dyn FnOnce() + Send>;

/// What all openings of a node share.
#[derive(Default)]
pub(super) struct File {
    /// The old content of each range written since the last flush, in order.
    pub(super) before: Mutex<Vec<(u64, Vec<u8>)>>,
    pub(super) errors: AtomicU64,
    pub(super) fails: AtomicBool,
    pub(super) write_fails: AtomicBool,
    pub(super) hangs: AtomicBool,
    pub(super) flush_hangs: AtomicBool,
    pub(super) flushes: AtomicU32,
    /// Called at the next search for a hole, and in the middle of the next flush.
    pub(super) at_hole: Mutex<Option<Then>>,
    pub(super) in_flush: Mutex<Option<Then>>,
}

pub(super) struct Linux {
    inner: Arc<dyn Store>,
    pool: Pool,
    file: Arc<File>,
    /// Errors that were reported to this opening.
    seen: AtomicU64,
}

impl Linux {
    fn failed(&self, action: &'static str) -> StoreError {
        StoreError::Io { node: self.inner.url().clone(), action, source: std::io::Error::from_raw_os_error(5) }
    }

    fn keep(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let mut old = vec![0; usize::try_from(len).unwrap()];
        self.inner.read_at(offset, &mut old)?;
        self.file.before.lock().push((offset, old));
        Ok(())
    }

    fn wait(&self, hangs: &AtomicBool) {
        while hangs.load(SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Linux {
    fn flush(&self) -> Result<(), StoreError> {
        self.wait(&self.file.flush_hangs);
        self.file.flushes.fetch_add(1, SeqCst);
        let then = self.file.in_flush.lock().take();
        if let Some(then) = then {
            then();
        }
        {
            let mut before = self.file.before.lock();
            if self.file.fails.load(SeqCst) && !before.is_empty() {
                for (offset, old) in before.drain(..).rev() {
                    self.inner.write_at(offset, &old)?;
                }
                self.file.errors.fetch_add(1, SeqCst);
            } else {
                before.clear();
            }
        }
        let errors = self.file.errors.load(SeqCst);
        if self.seen.swap(errors, SeqCst) != errors {
            return Err(self.failed("flush"));
        }
        self.inner.flush()
    }
}

impl Store for Linux {
    fn about(&self) -> &About {
        self.inner.about()
    }
    fn attempt(&self, _: u64, _: Lent<'_>) -> Option<Outcome> {
        None
    }
    fn perform(&self, offset: u64, op: Lent<'_>) -> Outcome {
        match &op {
            Op::Write(data) => {
                self.wait(&self.file.hangs);
                if self.file.write_fails.load(SeqCst) {
                    return Err(self.failed("write"));
                }
                self.keep(offset, data.len() as u64)?;
            }
            Op::Discard(len) => {
                self.wait(&self.file.hangs);
                self.keep(offset, *len)?;
            }
            Op::WriteZeroes(len) => self.keep(offset, *len)?,
            Op::Flush => return self.flush().map(|()| None),
            Op::Read(_) | Op::Allocate(_) | Op::Seek(_) | Op::Identify => {}
        }
        let is_hole = matches!(op, Op::Seek(Sought::Hole));
        let outcome = self.inner.perform(offset, op);
        let then = if is_hole { self.file.at_hole.lock().take() } else { None };
        if let Some(then) = then {
            then();
        }
        outcome
    }
    fn begin(self: Arc<Self>, offset: u64, op: Owned, completion: Completion) {
        Arc::clone(&self).pool.begin(self, offset, op, completion);
    }
    fn forget_errors(&self) -> Result<(), StoreError> {
        self.seen.store(self.file.errors.load(SeqCst), SeqCst);
        Ok(())
    }
}

/// The generation under which a core has the gate; 0: it does not. Whether it may change the segment.
#[derive(Clone)]
pub(super) struct Place(pub(super) Arc<AtomicU64>, pub(super) Arc<AtomicBool>);

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
        self.generation() == Some(generation) && self.1.load(SeqCst)
    }
    fn leave(&self, _: Work) {}
}

/// A request of a front end that remembers what it was told.
#[derive(Default)]
pub(super) struct Front {
    pub(super) synchronous: bool,
    pub(super) told: AtomicU64,
}

pub(super) fn front() -> Front {
    Front::default()
}

pub(super) fn synchronous() -> Front {
    Front { synchronous: true, ..Front::default() }
}

impl Hold for Front {
    fn synchronous(&self) -> bool {
        self.synchronous
    }
    fn away(&self) {}
    fn writing(&self) {}
    fn back(&self) -> bool {
        true
    }
    fn errors_told(&self) -> Option<u64> {
        Some(self.told.load(SeqCst))
    }
    fn tells_errors(&self, errors: u64) {
        self.told.store(errors, SeqCst);
    }
}

pub(super) struct Bench {
    pub(super) core: Arc<WriteBack>,
    pub(super) place: Place,
    pub(super) segment: Arc<SharedSegment>,
    pub(super) files: Vec<Arc<File>>,
    pub(super) spec: VolumeSpec,
    _dir: tempfile::TempDir,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(2 << 20, Bypass::Auto, 1)
    }

    pub(super) fn with(buffer: u64, bypass: Bypass, nodes: u128) -> Self {
        let dir = tempfile::TempDir::new_in("/dev/shm").unwrap();
        let node = |n: u128| NodeSpec {
            uuid: Uuid::from_u128(10 + n),
            url: NodeUrl::Dir(dir.path().join(format!("node{n}"))),
        };
        let spec = VolumeSpec {
            spec_version: SPEC_VERSION,
            name: "v".parse().unwrap(),
            uuid: Uuid::from_u128(1),
            size: SIZE,
            stripe: KIB64,
            nodes: (0..nodes).map(node).collect(),
            buffer,
            bypass,
            timeouts: Timeouts::default(),
        };
        Engine::create(&spec).unwrap();
        let segment = Arc::new(SharedSegment::create(spec.buffer).unwrap());
        segment.header.buffer_version.store(BUFFER, SeqCst);
        let files: Vec<Arc<File>> = (0..nodes).map(|_| Arc::default()).collect();
        let (core, place) = start(&spec, &segment, &files);
        give(&core, &place, 1);
        Self { core, place, segment, files, spec, _dir: dir }
    }

    pub(super) fn fails(&self, fails: bool) {
        self.files.iter().for_each(|file| file.fails.store(fails, SeqCst));
    }

    pub(super) fn flush(&self, front: &Front) -> Result<(), Stopped> {
        self.core.flush(front)
    }

    pub(super) fn byte(&self, at: u64) -> Result<u8, Stopped> {
        let mut byte = [0];
        self.core.read(&front(), at, &mut byte).map(|()| byte[0])
    }

    /// The core dies; a successor that was present all along adopts its buffer.
    pub(super) fn succeeded_by(&mut self, successor: (Arc<WriteBack>, Place)) {
        self.place.0.store(0, SeqCst);
        let generation = self.core.taken.load(SeqCst) + 1;
        (self.core, self.place) = successor;
        give(&self.core, &self.place, generation);
    }
}

pub(super) fn start(spec: &VolumeSpec, segment: &Arc<SharedSegment>, files: &[Arc<File>]) -> (Arc<WriteBack>, Place) {
    let next = AtomicU32::new(0);
    let wrap = |inner| -> Arc<dyn Store> {
        let file = Arc::clone(&files[next.fetch_add(1, SeqCst) as usize]);
        // An opening is not told of an error that another opening was told of before.
        let seen = AtomicU64::new(file.errors.load(SeqCst));
        Arc::new(Linux { inner, pool: Pool::default(), file, seen })
    };
    let engine = Arc::new(Engine::open_with(spec, &wrap).unwrap());
    let place = Place(Arc::default(), Arc::new(AtomicBool::new(true)));
    let core = WriteBack::new(engine, segment, Box::new(place.clone()), spec.bypass, spec.timeouts).unwrap();
    (Arc::new(core), place)
}

pub(super) fn give(core: &WriteBack, place: &Place, generation: u64) {
    place.0.store(generation, SeqCst);
    core.adopt(generation);
}

/// Runs something that must not wait for a node that hangs. If it does wait, the nodes are released and the test fails.
pub(super) fn without_nodes<T: Send>(files: &[Arc<File>], what: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let does = scope.spawn(what);
        let deadline = Instant::now() + Duration::from_secs(15);
        while !does.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let waits = !does.is_finished();
        files
            .iter()
            .flat_map(|file| [&file.hangs, &file.flush_hangs])
            .filter(|_| waits)
            .for_each(|hangs| hangs.store(false, SeqCst));
        let done = does.join().expect("a panic ends the process");
        assert!(!waits, "it waits for a node that hangs");
        done
    })
}
