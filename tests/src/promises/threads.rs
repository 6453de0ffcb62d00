//! The threads of the load. Each ends at the first error it sees and the first promise it finds broken.

use std::{
    fmt,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use rustix::fs::{FallocateFlags, fallocate};

use super::{Shared, content, history::Broken};
use crate::bytes::{Aligned, Random};

/// Longest time between two fsync calls of the flusher.
const FLUSH_PAUSE_MAX_US: u64 = 20_000;

/// Why a thread ended before it was told to.
#[derive(Debug)]
pub(super) enum Failure {
    /// An error, and what was being done.
    Io(String, io::Error),
    /// A promise is broken.
    Broken(Broken),
    /// A mistake in the harness.
    Panic,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(what, error) => write!(f, "the application saw an error: {what}: {error}"),
            Self::Broken(broken) => broken.fmt(f),
            Self::Panic => f.write_str("a thread of the load panicked"),
        }
    }
}

/// What a thread works with.
pub(super) struct Worker {
    /// Its number; a writer's is that of its region.
    pub(super) index: u64,
    /// The volume's file.
    pub(super) file: Arc<File>,
    /// What all of them share.
    pub(super) shared: Arc<Shared>,
    /// Set when they are to end.
    pub(super) stop: Arc<AtomicBool>,
}

impl Worker {
    fn random(&self) -> Random {
        // Another sequence in each attachment: the counter has moved on.
        let past = self.shared.operations.load(SeqCst);
        Random::new(self.shared.plan.seed ^ past.rotate_left(32) ^ (self.index << 56))
    }

    fn runs(&self) -> bool {
        !self.stop.load(SeqCst)
    }

    fn done(&self) {
        self.shared.operations.fetch_add(1, SeqCst);
    }

    /// Some blocks of a region, at most `max`.
    fn range(&self, region: u64, max: u64, random: &mut Random) -> Range<u64> {
        let blocks = self.shared.plan.blocks;
        let len = 1 + random.below(max.min(blocks));
        let start = region * blocks + random.below(blocks - len + 1);
        start..start + len
    }

    fn len(&self, range: &Range<u64>) -> usize {
        usize::try_from(self.shared.offset(range.end - range.start)).expect("a small range")
    }

    /// Writes, makes zero, reads back and flushes in a region of its own.
    pub(super) fn write(self) -> Result<(), Failure> {
        let mut random = self.random();
        while self.runs() {
            let range = self.range(self.index, self.shared.plan.write_max, &mut random);
            match random.below(64) {
                0 => self.flush_once()?,
                1..4 => self.zero(&range, FallocateFlags::PUNCH_HOLE)?,
                4..6 => self.zero(&range, FallocateFlags::ZERO_RANGE)?,
                6..16 => self.read_once(self.index, &range)?,
                _ => self.write_once(&range)?,
            }
            self.done();
        }
        Ok(())
    }

    /// Reads everywhere.
    pub(super) fn read(self) -> Result<(), Failure> {
        let mut random = self.random();
        while self.runs() {
            let region = random.below(self.shared.plan.writers);
            let range = self.range(region, self.shared.plan.write_max, &mut random);
            self.read_once(region, &range)?;
            self.done();
            // The writers are what the load is about.
            thread::sleep(Duration::from_micros(random.below(500)));
        }
        Ok(())
    }

    /// Calls fsync again and again.
    pub(super) fn flush(self) -> Result<(), Failure> {
        let mut random = self.random();
        while self.runs() {
            self.flush_once()?;
            self.done();
            thread::sleep(Duration::from_micros(random.below(FLUSH_PAUSE_MAX_US)));
        }
        Ok(())
    }

    fn write_once(&self, range: &Range<u64>) -> Result<(), Failure> {
        let write = self.shared.region(self.index).begin_write(range);
        let mut bytes = Aligned::new(self.len(range));
        let blocks = bytes.as_mut().chunks_exact_mut(self.shared.plan.block);
        range.clone().zip(blocks).for_each(|(block, b)| content::fill(self.shared.plan.seed, block, write, b));
        let outcome = self.file.write_all_at(bytes.as_ref(), self.shared.offset(range.start));
        outcome.map_err(|e| Failure::Io(format!("write of blocks {range:?}"), e))?;
        self.shared.region(self.index).acknowledge(range, write);
        Ok(())
    }

    fn zero(&self, range: &Range<u64>, how: FallocateFlags) -> Result<(), Failure> {
        let write = self.shared.region(self.index).begin_zero(range);
        let (offset, len) = (self.shared.offset(range.start), self.len(range) as u64);
        let outcome = fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len);
        outcome.map_err(|e| Failure::Io(format!("{how:?} of blocks {range:?}"), e.into()))?;
        self.shared.region(self.index).acknowledge(range, write);
        Ok(())
    }

    fn read_once(&self, region: u64, range: &Range<u64>) -> Result<(), Failure> {
        let floor = self.shared.region(region).floor(range.clone());
        let mut bytes = Aligned::new(self.len(range));
        let outcome = self.file.read_exact_at(bytes.as_mut(), self.shared.offset(range.start));
        outcome.map_err(|e| Failure::Io(format!("read of blocks {range:?}"), e))?;
        self.shared.region(region).read(&floor, bytes.as_ref()).map_err(Failure::Broken)
    }

    fn flush_once(&self) -> Result<(), Failure> {
        let regions = 0..self.shared.plan.writers;
        let marks: Vec<_> = regions.clone().map(|region| self.shared.region(region).begin_flush()).collect();
        self.file.sync_data().map_err(|e| Failure::Io("fsync".to_owned(), e))?;
        regions.zip(&marks).for_each(|(region, mark)| self.shared.region(region).flushed(mark));
        self.shared.flushes.fetch_add(1, SeqCst);
        Ok(())
    }
}
