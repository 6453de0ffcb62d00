//! Load that verifies itself: threads that read and write checksummed blocks with O_DIRECT. Each thread has blocks of
//! its own, so it knows of every one which write was acknowledged last, and checks each block it reads against that.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use everdisk_sys::{clock::monotonic_ns, memory::LockedBuffer};

use crate::{
    Error, Result,
    block::{self, BLOCK_BYTES, Noise},
};

/// Blocks of the largest I/O.
const IO_BLOCKS_MAX: u64 = 16;
/// Faults that are kept in words; all are counted.
const FAULTS_KEPT: usize = 20;
/// A write to this block failed: what stands there is unknown until the next one.
const UNKNOWN: u64 = u64::MAX;

/// One I/O as the application saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// CLOCK_MONOTONIC at its end, ns.
    pub end_ns: u64,
    /// How long it took, ns.
    pub latency_ns: u64,
}

/// What happened.
#[derive(Debug, Default)]
pub struct Tally {
    /// Reads that ended well.
    pub reads: u64,
    /// Writes that ended well.
    pub writes: u64,
    /// I/Os that ended with an error.
    pub errors: u64,
    /// Blocks that were not what was acknowledged last.
    pub mismatches: u64,
    /// Blocks compared at the end, all that were ever written among them.
    pub compared_at_end: u64,
    /// The first faults in words.
    pub faults: Vec<String>,
    /// Every I/O, in order of its end.
    pub log: Vec<Io>,
    /// Threads that did not come back: an I/O of theirs hangs.
    pub hanging: usize,
}

impl Tally {
    /// I/Os that ended well.
    pub fn ios(&self) -> u64 {
        self.reads + self.writes
    }

    /// Whether nothing was wrong.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.mismatches == 0 && self.hanging == 0
    }

    fn add(&mut self, mut other: Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.errors += other.errors;
        self.mismatches += other.mismatches;
        self.compared_at_end += other.compared_at_end;
        self.faults.append(&mut other.faults);
        self.faults.truncate(FAULTS_KEPT);
        self.log.append(&mut other.log);
    }

    fn fault(&mut self, what: String) {
        if self.faults.len() < FAULTS_KEPT {
            self.faults.push(what);
        }
    }
}

/// What a thread of the load does its I/O to.
pub trait Disk: Send {
    /// Reads.
    ///
    /// # Errors
    /// An I/O error of the application.
    fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes.
    ///
    /// # Errors
    /// An I/O error of the application.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize>;
}

impl Disk for File {
    fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, bytes, offset)
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }
}

/// Load that runs.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Tally>>,
}

impl Load {
    /// Starts `threads` threads on the first `bytes` of `path`, which must read as zeros.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn start(path: &Path, threads: u64, bytes: u64) -> Result<Self> {
        let open = |_| {
            let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
            let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(path);
            file.map_err(Error::io(format!("open {} with O_DIRECT", path.display())))
        };
        Self::start_on((0..threads).map(open).collect::<Result<_>>()?, bytes)
    }

    /// Starts a thread on each of these ways to the first `bytes` of a volume, which must read as zeros.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start_on<D: Disk + 'static>(disks: Vec<D>, bytes: u64) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let blocks = bytes / BLOCK_BYTES as u64 / disks.len() as u64;
        let mut load = Self { stop, done, threads: Vec::new() };
        for (index, disk) in (0..).zip(disks) {
            let bytes = BLOCK_BYTES * usize::try_from(IO_BLOCKS_MAX).unwrap_or(1);
            let worker = Worker {
                disk,
                first: index * blocks,
                written: vec![0; usize::try_from(blocks).unwrap_or(0)],
                buffer: LockedBuffer::new(bytes).map_err(Error::io("lock memory for the load"))?,
                noise: Noise(index),
                tally: Tally::default(),
            };
            let (stop, done) = (Arc::clone(&load.stop), Arc::clone(&load.done));
            let body = move || worker.run(&stop, &done);
            let thread = thread::Builder::new().name(format!("load-{index}")).spawn(body);
            load.threads.push(thread.map_err(Error::io("start a thread"))?);
        }
        Ok(load)
    }

    /// I/Os that have ended so far.
    pub fn ios(&self) -> u64 {
        self.done.load(Relaxed)
    }

    /// Ends the load: every thread reads back all it ever wrote. Threads that have not ended by then are counted as
    /// hanging and left to the end of the program.
    pub fn finish(mut self, limit: Duration) -> Tally {
        self.stop.store(true, Release);
        let deadline = Instant::now() + limit;
        let mut all = Tally::default();
        for thread in std::mem::take(&mut self.threads) {
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(5));
            }
            match thread.is_finished().then(|| thread.join()) {
                Some(Ok(tally)) => all.add(tally),
                _ => all.hanging += 1,
            }
        }
        all.log.sort_unstable_by_key(|io| io.end_ns);
        all
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Release);
    }
}

struct Worker<D> {
    disk: D,
    first: u64,
    /// Number of the write that was acknowledged last, for each block; 0 for none.
    written: Vec<u64>,
    buffer: LockedBuffer,
    noise: Noise,
    tally: Tally,
}

impl<D: Disk> Worker<D> {
    fn run(mut self, stop: &AtomicBool, done: &AtomicU64) -> Tally {
        let blocks = self.written.len() as u64;
        while !stop.load(Acquire) {
            let count = [1, 1, 1, 1, 1, 1, 4, IO_BLOCKS_MAX].into_iter().nth(self.pick(8)).unwrap_or(1);
            let start = self.noise.below(blocks - count);
            let (start, count) = (usize::try_from(start).unwrap_or(0), usize::try_from(count).unwrap_or(1));
            if self.pick(2) == 0 {
                self.read(start, count);
            } else {
                self.write(start, count);
            }
            done.fetch_add(1, Relaxed);
        }
        self.compare_all();
        self.tally
    }

    fn pick(&mut self, of: u64) -> usize {
        usize::try_from(self.noise.below(of)).unwrap_or(0)
    }

    fn offset(&self, start: usize) -> u64 {
        (self.first + start as u64) * BLOCK_BYTES as u64
    }

    fn write(&mut self, start: usize, count: usize) {
        let offset = self.offset(start);
        let Some(bytes) = self.buffer.get_mut(..count * BLOCK_BYTES) else { return };
        let known = self.written.iter_mut().enumerate().skip(start).take(count);
        let writes: Vec<u64> = known
            .zip(bytes.chunks_exact_mut(BLOCK_BYTES))
            .map(|((index, last), bytes)| {
                // After a failed write the number goes on from noise, so that the failed one is never taken for it.
                let write = if *last == UNKNOWN { self.noise.word() >> 1 } else { *last + 1 };
                block::fill(bytes, self.first + index as u64, write);
                write
            })
            .collect();
        let began = monotonic_ns();
        let result = again(|| self.disk.write_at(bytes, offset));
        self.log(began);
        let expected = bytes_of(count);
        let wrote = matches!(&result, Ok(n) if *n == expected);
        for (last, write) in self.written.iter_mut().skip(start).zip(writes) {
            *last = if wrote { write } else { UNKNOWN };
        }
        match result {
            Ok(_) if wrote => self.tally.writes += 1,
            other => self.error("write", offset, &other),
        }
    }

    fn read(&mut self, start: usize, count: usize) -> bool {
        let offset = self.offset(start);
        let Some(bytes) = self.buffer.get_mut(..count * BLOCK_BYTES) else { return false };
        let began = monotonic_ns();
        let result = again(|| self.disk.read_at(bytes, offset));
        self.log(began);
        match result {
            Ok(n) if n == bytes_of(count) => self.tally.reads += 1,
            other => {
                self.error("read", offset, &other);
                return false;
            }
        }
        let bytes = self.buffer.get(..count * BLOCK_BYTES).unwrap_or_default();
        let known = self.written.iter().enumerate().skip(start).take(count);
        for ((index, &expected), bytes) in known.zip(bytes.chunks_exact(BLOCK_BYTES)) {
            let block = self.first + index as u64;
            if expected != UNKNOWN
                && let Err(wrong) = block::check(bytes, block, expected)
            {
                self.tally.mismatches += 1;
                self.tally.fault(format!("block {block}: {wrong}"));
            }
        }
        true
    }

    /// Reads everything back. The latencies of these reads are not part of the log.
    fn compare_all(&mut self) {
        let logged = self.tally.log.len();
        let step = usize::try_from(IO_BLOCKS_MAX).unwrap_or(1);
        for start in (0..self.written.len()).step_by(step) {
            let count = step.min(self.written.len() - start);
            if self.read(start, count) {
                self.tally.compared_at_end += count as u64;
            }
        }
        self.tally.log.truncate(logged);
    }

    fn log(&mut self, began: u64) {
        let end_ns = monotonic_ns();
        self.tally.log.push(Io { end_ns, latency_ns: end_ns - began });
    }

    fn error(&mut self, what: &str, offset: u64, result: &io::Result<usize>) {
        self.tally.errors += 1;
        self.tally.fault(match result {
            Ok(n) => format!("{what} at {offset}: {n} bytes only"),
            Err(e) => format!("{what} at {offset}: {e}"),
        });
    }
}

const fn bytes_of(count: usize) -> usize {
    count * BLOCK_BYTES
}

fn again(mut io: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match io() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_on_a_plain_file_is_clean_and_damage_is_found() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(8 << 20).unwrap();
        let load = Load::start(&path, 2, 8 << 20).unwrap();
        while load.ios() < 500 {
            thread::sleep(Duration::from_millis(5));
        }
        let tally = load.finish(Duration::from_secs(20));
        assert!(tally.is_clean(), "{tally:?}");
        assert!(tally.writes > 100 && tally.compared_at_end == 2048 && tally.log.len() >= 500);

        let load = Load::start(&path, 2, 8 << 20).unwrap();
        let tally = load.finish(Duration::from_secs(20));
        assert!(tally.mismatches > 100, "the disk was not empty, and this was not noticed");
    }
}
