//! The promises of a disk with a volatile write cache that survives the death of any one process, and a load outside
//! the client that holds a volume to them.
//!
//! Every block that is written says which block it is and which write it comes from ([`content`]), so any block that is
//! read can be judged by the history of what was asked and acknowledged ([`history`]):
//!
//! | promise | holds |
//! |---|---|
//! | a read shows the last acknowledged write, or one that was under way during the read | always |
//! | what a read has shown, no later read takes back | always |
//! | no block is torn: each is one write's, as a whole | always, but for a read that meets the write half way |
//! | no application sees an error | unless every process of the volume dies |
//! | nothing is older than what was acknowledged before the last acknowledged fsync began | even then |
//!
//! [`Promises`] outlive the attachment; a [`Workload`] runs on one.

pub mod content;
pub mod history;
#[cfg(test)]
mod tests;
mod threads;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
};

use rustix::fs::OFlags;

use self::{
    history::{Broken, History},
    threads::{Failure, Worker},
};
use crate::{volume::Volume, wait::until};

/// How the load is made.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Whatever is random depends on it.
    pub seed: u64,
    /// Writers; each has a region of its own, from the volume's beginning on. Half of them use O_DIRECT.
    pub writers: u64,
    /// Blocks of a region.
    pub blocks: u64,
    /// Bytes of a block. Writes are whole blocks; below 4096 they overlap in every way.
    pub block: usize,
    /// Largest write, in blocks.
    pub write_max: u64,
}

impl Plan {
    /// Four writers, blocks of 4 KiB, writes up to 64 KiB.
    pub const fn new(seed: u64) -> Self {
        Self { seed, writers: 4, blocks: 512, block: 4096, write_max: 16 }
    }

    /// Blocks of 512 bytes, so that writes cover one another partly and begin and end anywhere.
    pub const fn small(seed: u64) -> Self {
        Self { seed, writers: 4, blocks: 1024, block: 512, write_max: 24 }
    }

    /// Bytes of the volume that the load touches.
    pub fn bytes(&self) -> u64 {
        self.writers * self.blocks * self.block as u64
    }
}

/// What was promised of a volume so far.
#[derive(Clone, Debug)]
pub struct Promises(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    plan: Plan,
    regions: Vec<Mutex<History>>,
    operations: AtomicU64,
    flushes: AtomicU64,
}

impl Shared {
    fn region(&self, index: u64) -> MutexGuard<'_, History> {
        let index = usize::try_from(index).expect("few regions");
        self.regions[index].lock().expect("no thread of the load panics with a history in its hands")
    }

    fn offset(&self, block: u64) -> u64 {
        block * self.plan.block as u64
    }
}

/// What went with the buffer when every process died.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Blocks that show an older write than the last acknowledged one. All were written after the last fsync.
    pub blocks: u64,
    /// Blocks that were written at all.
    pub of: u64,
}

impl Promises {
    /// Of a volume that was never written.
    pub fn new(plan: Plan) -> Self {
        let region = |index| Mutex::new(History::new(plan.seed, index * plan.blocks, plan.blocks, plan.block));
        let regions = (0..plan.writers).map(region).collect();
        Self(Arc::new(Shared { plan, regions, operations: AtomicU64::new(0), flushes: AtomicU64::new(0) }))
    }

    /// Starts the load: the writers, one thread that reads everywhere, one that calls fsync.
    pub fn start(&self, volume: &Volume<'_>) -> Workload {
        assert!(self.0.plan.bytes() <= volume.open().metadata().expect("the volume's size").len());
        let stop = Arc::new(AtomicBool::new(false));
        let direct = volume.open_with(OFlags::DIRECT).expect("open the volume's file with O_DIRECT");
        let (direct, buffered) = (Arc::new(direct), Arc::new(volume.open()));
        let spawn = |index: u64, work: fn(Worker) -> Result<(), Failure>| {
            let file = Arc::clone(if index.is_multiple_of(2) { &buffered } else { &direct });
            let worker = Worker { index, file, shared: Arc::clone(&self.0), stop: Arc::clone(&stop) };
            thread::spawn(move || work(worker))
        };
        let writers = self.0.plan.writers;
        let mut threads: Vec<_> = (0..writers).map(|index| spawn(index, Worker::write)).collect();
        threads.push(spawn(writers, Worker::read));
        threads.push(spawn(writers + 1, Worker::flush));
        Workload { promises: self.clone(), stop, threads, file: buffered }
    }

    /// Reads everything and fails unless each block is the last acknowledged write: nothing may be under way.
    pub fn check(&self, file: &File) {
        for (index, bytes) in (0..).zip(self.contents(file)) {
            let mut region = self.0.region(index);
            let floor = region.floor(region.range());
            region.read(&floor, &bytes).unwrap_or_else(|broken| panic!("{broken}"));
        }
    }

    /// After a loss of the buffer: reads everything and fails unless each block is what was durable, or newer. What was
    /// found is what the volume holds from now on.
    pub fn check_after_loss(&self, file: &File) -> Loss {
        let mut loss = Loss::default();
        for (index, bytes) in (0..).zip(self.contents(file)) {
            let lost = self.0.region(index).lose(&bytes).unwrap_or_else(|broken| panic!("{broken}"));
            loss = Loss { blocks: loss.blocks + lost.blocks, of: loss.of + lost.of };
        }
        loss
    }

    /// fsync calls that were acknowledged so far.
    pub fn flushes(&self) -> u64 {
        self.0.flushes.load(SeqCst)
    }

    fn contents<'a>(&'a self, file: &'a File) -> impl Iterator<Item = Vec<u8>> + 'a {
        let len = usize::try_from(self.0.offset(self.0.plan.blocks)).expect("a small region");
        (0..self.0.plan.writers).map(move |index| {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, index * len as u64).expect("read everything back");
            bytes
        })
    }
}

/// The load on one attachment.
#[derive(Debug)]
pub struct Workload {
    promises: Promises,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<(), Failure>>>,
    file: Arc<File>,
}

impl Workload {
    /// Operations that were acknowledged so far.
    pub fn operations(&self) -> u64 {
        self.promises.0.operations.load(SeqCst)
    }

    /// Waits until `more` further operations were acknowledged: I/O goes on.
    pub fn goes_on(&self, more: u64) {
        let wanted = self.operations() + more;
        until("I/O goes on", || {
            assert!(!self.has_failed(), "a thread of the load has ended");
            (self.operations() >= wanted).then_some(())
        });
    }

    /// Whether a thread has ended by itself.
    pub fn has_failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Ends the load, fails if any promise was broken or any thread saw an error, reads everything back, and returns the
    /// operations.
    pub fn stop(mut self) -> u64 {
        let failures: Vec<String> = self.join().iter().map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        self.promises.check(&self.file);
        self.operations()
    }

    /// Ends the load where every process of the volume died: errors are expected, and a promise may not be broken even so.
    pub fn stop_with_errors(mut self) -> usize {
        let failures = self.join();
        for failure in &failures {
            assert!(matches!(failure, Failure::Io(..)), "{failure}");
        }
        failures.len()
    }

    /// Ends the load where a promise has to be broken, and returns the first that was.
    pub fn stop_broken(mut self) -> Option<Broken> {
        self.join().into_iter().find_map(|failure| match failure {
            Failure::Broken(broken) => Some(broken),
            Failure::Io(..) | Failure::Panic => None,
        })
    }

    fn join(&mut self) -> Vec<Failure> {
        self.stop.store(true, SeqCst);
        let ended = std::mem::take(&mut self.threads).into_iter().map(JoinHandle::join);
        ended.filter_map(|ended| ended.unwrap_or(Err(Failure::Panic)).err()).collect()
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        // In a test that fails the storage nodes may hang until a `Faults` is dropped, after this.
        if !thread::panicking() {
            self.join();
        }
    }
}
