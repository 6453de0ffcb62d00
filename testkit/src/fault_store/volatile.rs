//! A node with a volatile cache: what was changed since its last flush that succeeded can be lost, and is lost at a failed
//! flush, as Linux loses pages that it could not write.
//!
//! ```text
//!            change                flush succeeds
//!  durable ─────────► unflushed ──────────────────► durable
//!                      │ power lost, write-back failed: the old content comes back
//!                      └──────────────────────────► lost
//! ```
//! The old content of whatever is unflushed lies in `N.faults.unflushed`, which every process that has the node open shares. The
//! node is volatile while that file exists. One lock keeps changes and flushes apart, so a flush covers all that was changed
//! before it and nothing else.
//!
//! A failed write-back is told to every store that was open then, once to each, at its next flush: a store stands for an open
//! file description (errseq_t). An error that no store was told yet is told to stores that are opened later as well.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use everdisk_store::StoreError;

/// Bytes of the head: see [`Head`].
const HEAD: usize = 4 * WORD;
/// Bytes before the old content of a record: where it was, and its length.
const RECORD_HEAD: usize = 2 * WORD;
const WORD: usize = size_of::<u64>();

/// The first words of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    /// Bytes of records that are valid. A record counts once this is written, so a death leaves no half one.
    len: u64,
    /// Write-backs that failed.
    failures: u64,
    /// How many of them a store was told of.
    told: u64,
    /// How the last one failed.
    errno: u64,
}

/// The file, locked: no other process changes or flushes the node while the lock is held.
struct Unflushed {
    file: File,
    head: Head,
}

/// What one store knows of its node's failures.
#[derive(Debug)]
pub(super) struct Volatile {
    path: PathBuf,
    /// The failures that this store was told, or that came before it.
    told: AtomicU64,
}

/// Why an operation failed.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The store below failed.
    Store(StoreError),
    /// What was unflushed is lost; or the file cannot be read or written.
    File(io::Error),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::File(error)
    }
}

fn path(faults: &Path) -> PathBuf {
    let mut name = faults.as_os_str().to_owned();
    name.push(".unflushed");
    name.into()
}

impl Unflushed {
    /// `None` where the node is not volatile.
    fn lock(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::options().read(true).write(true).open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        file.lock()?;
        let mut words = [0; HEAD];
        file.read_exact_at(&mut words, 0)?;
        let word = |n: usize| words.as_chunks().0.get(n).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let head = Head { len: word(0), failures: word(1), told: word(2), errno: word(3) };
        Ok(Some(Self { file, head }))
    }

    fn save(&self) -> io::Result<()> {
        let Head { len, failures, told, errno } = self.head;
        let words = [len, failures, told, errno].map(u64::to_le_bytes).concat();
        self.file.write_all_at(&words, 0)
    }

    fn note(&mut self, offset: u64, old: &[u8]) -> io::Result<()> {
        let record = [&offset.to_le_bytes()[..], &(old.len() as u64).to_le_bytes(), old].concat();
        self.file.write_all_at(&record, HEAD as u64 + self.head.len)?;
        self.head.len += record.len() as u64;
        self.save()
    }

    /// Puts the old content back by `put`, the newest first. Returns the bytes that are lost.
    fn put_back<E: From<io::Error>>(&self, mut put: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<u64, E> {
        let mut all = vec![0; usize::try_from(self.head.len).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut all, HEAD as u64)?;
        let mut records = Vec::new();
        let mut rest = &all[..];
        while let Some((head, behind)) = rest.split_at_checked(RECORD_HEAD) {
            let word = |n: usize| head.as_chunks().0.get(n).map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let len = usize::try_from(word(1)).map_err(io::Error::other)?;
            let (old, next) = behind.split_at_checked(len).expect("a record that counts is whole");
            records.push((word(0), old));
            rest = next;
        }
        let lost = records.iter().map(|(_, old)| old.len() as u64).sum();
        records.into_iter().rev().try_for_each(|(offset, old)| put(offset, old))?;
        Ok(lost)
    }

    /// Puts the old content back for good.
    fn lose<E: From<io::Error>>(&mut self, put: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<u64, E> {
        let lost = self.put_back(put)?;
        self.forget()?;
        Ok(lost)
    }

    /// Everything is durable, or lost.
    fn forget(&mut self) -> io::Result<()> {
        self.head.len = 0;
        self.save()?;
        self.file.set_len(HEAD as u64)
    }

    /// Another write-back has failed.
    fn fail(&mut self, errno: i32) -> io::Result<()> {
        self.head.failures += 1;
        self.head.errno = u64::from(errno.unsigned_abs());
        self.save()
    }
}

impl Volatile {
    /// What a store that is opened now knows.
    pub(super) fn new(faults: &Path) -> io::Result<Self> {
        let path = path(faults);
        let told = Unflushed::lock(&path)?.map_or(0, |unflushed| unflushed.head.told);
        Ok(Self { path, told: told.into() })
    }

    /// Changes `len` bytes from `offset` on by `act`; `old` reads what they are before.
    pub(super) fn change(
        &self,
        offset: u64,
        len: u64,
        old: impl FnOnce(&mut [u8]) -> Result<(), StoreError>,
        act: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), Trouble> {
        let Some(mut unflushed) = Unflushed::lock(&self.path)? else { return Ok(act()?) };
        let mut before = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        old(&mut before)?;
        unflushed.note(offset, &before)?;
        Ok(act()?)
    }

    /// Flushes the node by `act`. `drop`: the write-back of what is unflushed fails with this errno; `put` writes the old content.
    pub(super) fn flush(
        &self,
        drop: Option<i32>,
        mut put: impl FnMut(u64, &[u8]) -> Result<(), StoreError>,
        act: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), Trouble> {
        let Some(mut unflushed) = Unflushed::lock(&self.path)? else {
            return match drop {
                None => Ok(act()?),
                Some(_) => Err(io::Error::other("a node drops nothing unless it is volatile").into()),
            };
        };
        match drop {
            Some(errno) if unflushed.head.len > 0 => {
                unflushed.lose(|offset, old| Ok::<_, Trouble>(put(offset, old)?))?;
                unflushed.fail(errno)?;
            }
            // As on Linux: a flush that has nothing to write does not meet the disk's error.
            Some(_) => {}
            None => {
                act()?;
                unflushed.forget()?;
            }
        }
        let Head { failures, errno, .. } = unflushed.head;
        if self.told.swap(failures, SeqCst) == failures {
            return Ok(());
        }
        unflushed.head.told = failures;
        unflushed.save()?;
        Err(io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(i32::MAX)).into())
    }
}

/// Makes the node volatile that `faults` commands.
///
/// # Errors
/// The operating system's.
pub fn make_volatile(faults: &Path) -> io::Result<()> {
    let file = File::options().create(true).truncate(false).write(true).open(path(faults))?;
    file.lock()?;
    if file.metadata()?.len() < HEAD as u64 { file.write_all_at(&[0; HEAD], 0) } else { Ok(()) }
}

/// The power fails: whatever the volatile node at `node` has not flushed is lost. No process may have it open. Returns the bytes
/// that were lost.
///
/// # Errors
/// The operating system's; `NotFound` where the node is not volatile.
pub fn lose_power(faults: &Path, node: &Path) -> io::Result<u64> {
    lose(faults, node).map(|(_, lost)| lost)
}

/// The kernel's own write-back fails with `errno`, while no flush runs: whatever the volatile node has not flushed is lost, and
/// each process that has it open gets the error at its next flush. Returns the number of bytes that were lost.
///
/// # Errors
/// As [`lose_power`].
pub fn fail_write_back(faults: &Path, node: &Path, errno: i32) -> io::Result<u64> {
    let (mut unflushed, lost) = lose(faults, node)?;
    unflushed.fail(errno)?;
    Ok(lost)
}

/// What the volatile node at `node` would hold if the power failed now. It goes on as before.
///
/// # Errors
/// As [`lose_power`].
pub fn durable(faults: &Path, node: &Path) -> io::Result<Vec<u8>> {
    let unflushed = Unflushed::lock(&path(faults))?.ok_or(io::ErrorKind::NotFound)?;
    let mut bytes = fs::read(node.join("data"))?;
    unflushed.put_back(|offset, old| {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let range = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..old.len()));
        range.ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(old);
        Ok::<_, io::Error>(())
    })?;
    Ok(bytes)
}

fn lose(faults: &Path, node: &Path) -> io::Result<(Unflushed, u64)> {
    let mut unflushed = Unflushed::lock(&path(faults))?.ok_or(io::ErrorKind::NotFound)?;
    let data = File::options().write(true).open(node.join("data"))?;
    let lost = unflushed.lose(|offset, old| data.write_all_at(old, offset))?;
    Ok((unflushed, lost))
}
