//! The dir store: a storage node that is a local directory.
//!
//! ```text
//! superblock   identity of the node and layout of the volume (4096 bytes, checksummed)
//! data         the node's bytes at their offsets; sparse
//! ```
//! Reads and writes go through the page cache; a flush is fdatasync. A worker may get a signal at any moment, so every
//! system call is retried after EINTR.
//!
//! Operations that a file system need not support have fallbacks:
//!
//! | operation | system call | fallback | second fallback |
//! |---|---|---|---|
//! | discard | fallocate, PUNCH_HOLE | zeros are written over what is not zero; the space stays taken | |
//! | write zeros | fallocate, ZERO_RANGE | PUNCH_HOLE | zeros are written |
//! | allocate | fallocate | the range is mapped, and its pages made writable | |
//! | find data, holes | lseek, SEEK_DATA and SEEK_HOLE | everything is data | |
//! | read at once | preadv2, RWF_NOWAIT | a read that may wait | |
//! | send from memory | mmap, mincore, sendfile | a read, and a copy | |

mod format;
#[cfg(test)]
mod plain;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod tests;
mod whole;

use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use everdisk_proto::volume::NodeUrl;
use everdisk_sys::{
    cache::{Resident, reserve},
    file::FileRange,
};
use parking_lot::Mutex;
use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::{Errno, ReadWriteFlags, retry_on_intr},
};

pub use self::format::{Created, check_destroy, check_open, check_resize, create, destroy, resize};
use self::whole::Stopped;
use crate::{
    About, Completion, Lent, NodeFormat, Op, OpenError, Outcome, Owned, Sought, Store, StoreError, pool::Pool,
    superblock::check_superblock,
};

/// Where the file system has no better way, zeros are written in pieces of this size.
const ZEROS_PIECE: u64 = 1 << 20;
/// Where the file system makes no holes, the data is checked for zeros in pieces of this size.
const CLEARED_PIECE: usize = 64 << 10;

/// Whether the errno means that the file system does not support the operation at all.
const fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS)
}

/// A directory opened as a storage node.
#[derive(Debug)]
pub struct DirStore {
    about: About,
    path: PathBuf,
    pool: Pool,
    format: NodeFormat,
    directory: OwnedFd,
    data: File,
    /// A second opening of the data, for flushes. It is opened anew to forget errors.
    flushed: Mutex<Arc<File>>,
    /// A third opening of the data, to send from memory; `None` where that might wait.
    sent: Option<Resident>,
}

impl DirStore {
    /// Opens the node in `path`, which must bear exactly this format.
    ///
    /// # Errors
    /// [`OpenError`] says what was found instead.
    pub fn open(path: &Path, format: &NodeFormat) -> Result<Self, OpenError> {
        let directory = format::open_directory(path)?;
        check_superblock(&format::read_superblock(directory.as_fd(), path)?, &format.superblock, &path.into())?;
        let data = format::open_data(directory.as_fd(), path)?;
        format::check_length(&data, format.len, path)?;
        let flushed = Mutex::new(Arc::new(format::open_flushed(directory.as_fd(), path)?));
        let sent = format::open_sent(directory.as_fd()).and_then(|file| Resident::new(file).ok());
        let about = About { url: NodeUrl::Dir(path.to_owned()), uuid: format.superblock.node, size: format.len };
        Ok(Self {
            about,
            path: path.to_owned(),
            pool: Pool::default(),
            format: *format,
            directory,
            data,
            flushed,
            sent,
        })
    }

    /// Bytes of disk that the data takes.
    ///
    /// # Errors
    /// The operating system's.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.data.metadata()?.blocks() * 512)
    }

    fn inside(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        if offset.checked_add(len).is_some_and(|end| end <= self.format.len) {
            Ok(())
        } else {
            Err(self.out_of_range(offset, len))
        }
    }

    #[cold]
    fn out_of_range(&self, offset: u64, len: u64) -> StoreError {
        StoreError::OutOfRange { node: self.about.url.clone(), offset, len, size: self.format.len }
    }

    #[cold]
    fn failed(&self, action: &'static str, errno: Errno) -> StoreError {
        StoreError::Io { node: self.about.url.clone(), action, source: errno.into() }
    }

    #[cold]
    fn truncated(&self, at: u64) -> StoreError {
        StoreError::Truncated { node: self.about.url.clone(), at }
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        retry_on_intr(|| rustix::fs::fallocate(&self.data, flags, offset, len))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Writes zeros over what is not zero, for a file system that makes no holes. What takes no space goes on taking
    /// none.
    #[cold]
    fn clear(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let Some(data) = self.next(at, Sought::Data)?.filter(|data| *data < end) else { return Ok(()) };
            at = self.next(data, Sought::Hole)?.map_or(end, |hole| hole.min(end));
            self.clear_data(data, at)?;
        }
        Ok(())
    }

    /// The same for ranges that may hold data but need not: not every file system reports holes.
    fn clear_data(&self, mut at: u64, end: u64) -> Result<(), StoreError> {
        let mut piece = vec![0; CLEARED_PIECE];
        while at < end {
            let n = usize::try_from(end - at).map_or(CLEARED_PIECE, |left| left.min(CLEARED_PIECE));
            let found = &mut piece[..n];
            self.read_at(at, found)?;
            if found.iter().any(|byte| *byte != 0) {
                found.fill(0);
                self.write_at(at, found)?;
            }
            at += n as u64;
        }
        Ok(())
    }

    /// For a file system that supports neither zeroed ranges nor holes.
    #[cold]
    fn write_zero_bytes(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let zeros = vec![0; usize::try_from(len.min(ZEROS_PIECE)).expect("a piece lies in memory")];
        (0..len).step_by(zeros.len().max(1)).try_for_each(|done| {
            let n = usize::try_from(len - done).map_or(zeros.len(), |left| left.min(zeros.len()));
            self.write_at(offset + done, &zeros[..n])
        })
    }
}

fn is_same(one: &File, other: &File) -> Result<bool, Errno> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

impl DirStore {
    fn recheck(&self) -> Result<(), StoreError> {
        let path = &self.path;
        format::read_superblock(self.directory.as_fd(), path)
            .and_then(|found| check_superblock(&found, &self.format.superblock, &path.as_path().into()))
            .and_then(|()| format::check_length(&self.data, self.format.len, path))
            .map_err(|source| StoreError::Changed { node: self.about.url.clone(), source: Box::new(source) })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.inside(offset, buf.len() as u64)?;
        whole::read(offset, buf, |rest, at| rustix::io::pread(&self.data, rest, at)).map_err(|stopped| match stopped {
            Stopped::Nothing(at) => self.truncated(at),
            Stopped::Failed(e) => self.failed("read", e),
        })
    }

    /// As `read_at`, if the bytes are in the page cache: else `None`, as where the file system does not tell (EOPNOTSUPP), and
    /// after a fault, whose cause `read_at` finds.
    fn read_at_once(&self, offset: u64, buf: &mut [u8]) -> Option<Outcome> {
        if let Err(error) = self.inside(offset, buf.len() as u64) {
            return Some(Err(error));
        }
        let len = buf.len();
        let mut into = [IoSliceMut::new(buf)];
        let done = rustix::io::preadv2(&self.data, &mut into, offset, ReadWriteFlags::NOWAIT);
        (done == Ok(len)).then_some(Ok(None))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.inside(offset, data.len() as u64)?;
        whole::write(offset, data, |rest, at| rustix::io::pwrite(&self.data, rest, at)).map_err(|stopped| match stopped
        {
            Stopped::Nothing(_) => self.failed("write", Errno::IO),
            Stopped::Failed(e) => self.failed("write", e),
        })
    }

    fn flush(&self) -> Result<(), StoreError> {
        let file = Arc::clone(&self.flushed.lock());
        retry_on_intr(|| rustix::fs::fdatasync(&file)).map_err(|e| self.failed("flush", e))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.inside(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        match self.punch(offset, len) {
            Err(e) if is_unsupported(e) => self.clear(offset, len),
            done => done.map_err(|e| self.failed("discard", e)),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.inside(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let done = match self.zero_range(offset, len) {
            Err(e) if is_unsupported(e) => self.punch(offset, len),
            done => done,
        };
        match done {
            Err(e) if is_unsupported(e) => self.write_zero_bytes(offset, len),
            done => done.map_err(|e| self.failed("write zeros", e)),
        }
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.inside(offset, len)?;
        let reserved =
            whole::pieces(offset, len, |at, n| rustix::fs::fallocate(&self.data, FallocateFlags::KEEP_SIZE, at, n));
        let reserved = match reserved {
            Err(e) if is_unsupported(e) => whole::pieces(offset, len, |at, n| reserve(&self.data, at, n)),
            done => done,
        };
        reserved.map_err(|e| self.failed("reserve space", e))
    }

    fn next(&self, offset: u64, sought: Sought) -> Result<Option<u64>, StoreError> {
        if offset >= self.format.len {
            return Ok(None);
        }
        let from = match sought {
            Sought::Data => SeekFrom::Data(offset),
            Sought::Hole => SeekFrom::Hole(offset),
        };
        match retry_on_intr(|| rustix::fs::seek(&self.data, from)) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(e) if is_unsupported(e) || e == Errno::INVAL => Ok(match sought {
                Sought::Data => Some(offset),
                Sought::Hole => Some(self.format.len),
            }),
            Err(e) => Err(self.failed("find data and holes", e)),
        }
    }
}

impl Store for DirStore {
    fn about(&self) -> &About {
        &self.about
    }

    fn attempt(&self, offset: u64, op: Lent<'_>) -> Option<Outcome> {
        match op {
            Op::Read(buf) => self.read_at_once(offset, buf),
            _ => None,
        }
    }

    fn perform(&self, offset: u64, op: Lent<'_>) -> Outcome {
        match op {
            Op::Read(buf) => self.read_at(offset, buf),
            Op::Write(data) => self.write_at(offset, data),
            Op::Flush => self.flush(),
            Op::Discard(len) => self.discard(offset, len),
            Op::WriteZeroes(len) => self.write_zeroes(offset, len),
            Op::Allocate(len) => self.allocate(offset, len),
            Op::Seek(sought) => return self.next(offset, sought),
            Op::Identify => self.recheck(),
        }
        .map(|()| None)
    }

    fn begin(self: Arc<Self>, offset: u64, op: Owned, completion: Completion) {
        Arc::clone(&self).pool.begin(self, offset, op, completion);
    }

    fn in_memory(&self, offset: u64, len: u64) -> Option<FileRange<'_>> {
        let sent = self.sent.as_ref().filter(|sent| self.inside(offset, len).is_ok() && sent.has(offset, len))?;
        Some(FileRange { file: sent.as_fd(), offset, len })
    }

    fn forget_errors(&self) -> Result<(), StoreError> {
        let path = &self.path;
        let file = format::open_flushed(self.directory.as_fd(), path)
            .map_err(|source| StoreError::Changed { node: self.about.url.clone(), source: Box::new(source) })?;
        // Data is not written to another file of the same name.
        if !is_same(&self.data, &file).map_err(|e| self.failed("stat the data file", e))? {
            return Err(self.failed("open the data anew", Errno::STALE));
        }
        *self.flushed.lock() = Arc::new(file);
        Ok(())
    }
}
