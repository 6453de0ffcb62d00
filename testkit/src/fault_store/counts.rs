//! How many operations a process did and of what size, kept in a file so that the test outside can read it and a
//! SIGKILL loses nothing of it.

use std::{
    ffi::OsString,
    fs::{self, File},
    ops::Add,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;

use super::Operation;

/// Kinds of operation.
const KINDS: usize = 6;
/// Classes of write sizes: up to 1 byte, 2, 4 … 8 MiB, and beyond.
const CLASSES: usize = 25;
/// Words in the file: operations and bytes of each kind, changes begun, ended and flushed, writes by size, the most
/// operations at once.
const WORDS: usize = 2 * KINDS + 3 + CLASSES + 1;

/// What was done to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    operations: [u64; KINDS],
    bytes: [u64; KINDS],
    begun: u64,
    ended: u64,
    flushed: u64,
    writes: [u64; CLASSES],
    most_at_once: u64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            operations: [0; KINDS],
            bytes: [0; KINDS],
            begun: 0,
            ended: 0,
            flushed: 0,
            writes: [0; CLASSES],
            most_at_once: 0,
        }
    }
}

impl Counts {
    /// Operations of this kind that succeeded.
    pub fn operations(&self, operation: Operation) -> u64 {
        self.operations[operation as usize]
    }

    /// Bytes of the operations of this kind that succeeded.
    pub fn bytes(&self, operation: Operation) -> u64 {
        self.bytes[operation as usize]
    }

    /// Flushes that succeeded.
    pub fn flushes(&self) -> u64 {
        self.operations(Operation::Flush)
    }

    /// Writes, zeroings and discards that had not ended when the last flush that succeeded was begun: what is not
    /// durable. Of one process' counts: another process' flush makes it durable too, and is not counted here.
    pub fn unflushed(&self) -> u64 {
        self.begun - self.flushed
    }

    /// Writes of at least `len` bytes, a power of two; what [`Operation::Write`] counts, by size.
    pub fn writes_from(&self, len: u64) -> u64 {
        self.writes[class(len)..].iter().sum()
    }

    /// Mean length of a write; 0 when there was none.
    pub fn mean_write(&self) -> u64 {
        self.bytes(Operation::Write).checked_div(self.operations(Operation::Write)).unwrap_or(0)
    }

    /// The most operations that a process had under way at once on one node, those included that a fault keeps waiting.
    pub fn most_at_once(&self) -> u64 {
        self.most_at_once
    }

    fn words(&self) -> impl Iterator<Item = u64> + '_ {
        let flushes = [self.begun, self.ended, self.flushed];
        self.operations.iter().chain(&self.bytes).copied().chain(flushes).chain(self.writes).chain([self.most_at_once])
    }

    fn words_mut(&mut self) -> impl Iterator<Item = &mut u64> {
        let flushes = [&mut self.begun, &mut self.ended, &mut self.flushed];
        let writes = self.writes.iter_mut().chain([&mut self.most_at_once]);
        self.operations.iter_mut().chain(&mut self.bytes).chain(flushes).chain(writes)
    }
}

impl Add for Counts {
    type Output = Self;
    fn add(mut self, other: Self) -> Self {
        let most = self.most_at_once.max(other.most_at_once);
        self.words_mut().zip(other.words()).for_each(|(word, more)| *word += more);
        self.most_at_once = most;
        self
    }
}

/// The class of a length: the power of two that is not above it.
fn class(len: u64) -> usize {
    (len.max(1).ilog2() as usize).min(CLASSES - 1)
}

/// One process' counts, in memory and in its file.
pub(super) struct Counter {
    file: File,
    counts: Mutex<Counts>,
    under_way: AtomicU64,
}

/// An operation that is at the node.
pub(super) struct UnderWay<'a>(&'a AtomicU64);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// An operation that was begun, and the changes that had ended by then.
pub(super) struct Begun {
    operation: Operation,
    ended: u64,
}

impl Begun {
    fn is_change(&self) -> bool {
        matches!(self.operation, Operation::Write | Operation::Zeroes | Operation::Discard)
    }
}

fn path(faults: &Path) -> OsString {
    let mut name = faults.as_os_str().to_owned();
    name.push(".count.");
    name
}

impl Counter {
    pub(super) fn new(faults: &Path) -> Self {
        let mut name = path(faults);
        name.push(process::id().to_string());
        let file = File::create(PathBuf::from(name)).expect("a file for the counts beside the storage node");
        let counter = Self { file, counts: Mutex::default(), under_way: AtomicU64::new(0) };
        counter.note(|_| {});
        counter
    }

    /// An operation comes to the node; its end is when what is returned is dropped.
    pub(super) fn arrive(&self) -> UnderWay<'_> {
        let now = self.under_way.fetch_add(1, Relaxed) + 1;
        if now > self.counts.lock().most_at_once {
            self.note(|counts| counts.most_at_once = counts.most_at_once.max(now));
        }
        UnderWay(&self.under_way)
    }

    /// An operation is about to begin.
    pub(super) fn begin(&self, operation: Operation) -> Begun {
        let mut begun = Begun { operation, ended: 0 };
        self.note(|counts| {
            begun.ended = counts.ended;
            counts.begun += u64::from(begun.is_change());
        });
        begun
    }

    /// An operation on `len` bytes has ended.
    #[expect(clippy::needless_pass_by_value, reason = "it ends once")]
    pub(super) fn end(&self, begun: Begun, succeeded: bool, len: u64) {
        self.note(|counts| {
            counts.ended += u64::from(begun.is_change());
            if !succeeded {
                return;
            }
            counts.operations[begun.operation as usize] += 1;
            counts.bytes[begun.operation as usize] += len;
            match begun.operation {
                Operation::Flush => counts.flushed = counts.flushed.max(begun.ended),
                Operation::Write => counts.writes[class(len)] += 1,
                Operation::Read | Operation::Zeroes | Operation::Discard | Operation::Allocate => {}
            }
        });
    }

    /// Changes the counts and the file under one lock, so that the file never goes back.
    fn note(&self, change: impl FnOnce(&mut Counts)) {
        let mut counts = self.counts.lock();
        change(&mut counts);
        let mut bytes = [0; WORDS * 8];
        bytes.chunks_exact_mut(8).zip(counts.words()).for_each(|(b, word)| b.copy_from_slice(&word.to_le_bytes()));
        // A file system that is full is what some tests are about; the counts are not.
        let _ = self.file.write_all_at(&bytes, 0);
    }
}

/// The counts of every process that had the node open.
pub(super) fn read_all(faults: &Path) -> Vec<(u32, Counts)> {
    let prefix = path(faults);
    let directory = faults.parent().map(fs::read_dir).into_iter().flatten().flatten().flatten();
    let files = directory.filter_map(|entry| {
        let path = entry.path();
        let pid = path.to_str()?.strip_prefix(prefix.to_str()?)?.parse().ok()?;
        Some((pid, read(&path)?))
    });
    files.collect()
}

fn read(path: &Path) -> Option<Counts> {
    let bytes = fs::read(path).ok()?;
    let words = bytes.as_chunks().0.iter().map(|chunk| u64::from_le_bytes(*chunk));
    let mut counts = Counts::default();
    counts.words_mut().zip(words).for_each(|(word, read)| *word = read);
    Some(counts)
}
