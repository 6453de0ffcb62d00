//! Making, recognising, growing and removing the files of a dir store. A crash at any point leaves a node that is
//! whole, or that is recognised as none: the superblock appears last, by rename, and is removed last.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use everdisk_proto::superblock::{DATA_FILE as DATA, SUPERBLOCK_BYTES, Superblock};
use everdisk_sys::lock::{self, LockError};
use rustix::{
    fs::{Access, AtFlags, Mode, OFlags, ResolveFlags, SeekFrom},
    io::{Errno, retry_on_intr},
};
use uuid::Uuid;

use crate::{
    NodeFormat, OpenError,
    superblock::{ADVICE_RESIZE, check_owner, check_superblock},
};

const SUPERBLOCK: &str = "superblock";
const SUPERBLOCK_NEW: &str = "superblock.new";
/// Stands for the data file while the maximum length is tried.
const DATA_TRY: &str = "data.try";
/// An empty directory may hold this: mkfs makes it in every ext file system.
const LOST_AND_FOUND: &str = "lost+found";

/// Makes the node in the directory `path`, with the directory and those above it where they are missing.
///
/// # Errors
/// [`OpenError`]; then everything that was made is removed again.
pub fn create(path: &Path, format: &NodeFormat) -> Result<Created, OpenError> {
    let mut undo = Created::default();
    make_directory(path, &mut undo)?;
    let directory = open_directory(path)?;
    refuse_used(directory.as_fd(), path)?;

    let data = make_file(directory.as_fd(), path, DATA, OFlags::EXCL, &mut undo)?;
    take_lock(&data, path)?;
    set_length(&data, path, format.len)?;
    sync(&data, &path.join(DATA))?;
    sync_directory(directory.as_fd(), path)?;
    undo.files.push(path.join(SUPERBLOCK));
    put_superblock(directory.as_fd(), path, &format.superblock, &mut undo)?;
    undo.locks.push(data);
    Ok(undo)
}

/// Checks that the node in the directory `path` can be brought from `old` to `new`: it is this node, it may be changed,
/// and its file system holds a file of that length. Changes nothing.
///
/// # Errors
/// [`OpenError`].
pub fn check_resize(path: &Path, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    let node = Resizable::open(path, old, new)?;
    may_change(node.directory.as_fd(), path)?;
    if node.len < new.len {
        try_length(node.directory.as_fd(), path, new.len)?;
    }
    Ok(())
}

/// Brings the node in the directory `path` to `new`, wherever an interrupted resize from `old` left it. Nothing has
/// been written to what it has above `new`.
///
/// # Errors
/// [`OpenError`].
pub fn resize(path: &Path, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    let node = Resizable::open(path, old, new)?;
    if node.len != new.len {
        set_length(&node.data, path, new.len)?;
    }
    sync(&node.data, &path.join(DATA))?;
    if node.size == new.superblock.size {
        return Ok(());
    }
    // Only the temporary name is undone: after the rename no file bears it any more.
    put_superblock(node.directory.as_fd(), path, &new.superblock, &mut Created::default())
}

/// A node that may be resized. An interrupted resize may have left superblock and data larger; everything else is
/// unchanged.
struct Resizable {
    directory: OwnedFd,
    data: File,
    /// Bytes of the data file.
    len: u64,
    /// Volume size in the superblock.
    size: u64,
}

impl Resizable {
    fn open(path: &Path, old: &NodeFormat, new: &NodeFormat) -> Result<Self, OpenError> {
        let directory = open_directory(path)?;
        let found = read_superblock(directory.as_fd(), path)?;
        let size = found.size.max(old.superblock.size);
        check_superblock(&found, &Superblock { size, ..old.superblock }, &path.into())?;
        let data = open_data(directory.as_fd(), path)?;
        take_lock(&data, path)?;
        let len = length(&data, path)?;
        if len < old.len {
            return Err(wrong_length(path, len, old.len));
        }
        if len > new.len && has_data_from(&data, path, new.len)? {
            return Err(OpenError::Beyond { place: path.join(DATA).into(), len: new.len });
        }
        Ok(Self { directory, data, len, size })
    }
}

/// Whether anything has been written at `offset` or above.
fn has_data_from(data: &File, path: &Path, offset: u64) -> Result<bool, OpenError> {
    match retry_on_intr(|| rustix::fs::seek(data, SeekFrom::Data(offset))) {
        Ok(_) => Ok(true),
        Err(Errno::NXIO) => Ok(false),
        Err(e) => Err(os_error(&path.join(DATA), "find data in it", e)),
    }
}

/// Checks that the file system holds a file of `len` bytes, by means of a temporary file.
fn try_length(directory: BorrowedFd<'_>, path: &Path, len: u64) -> Result<(), OpenError> {
    let mode = Mode::RUSR | Mode::WUSR;
    let nameless = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = match retry_on_intr(|| rustix::fs::openat(directory, ".", nameless, mode)) {
        Ok(file) => File::from(file),
        // The file system does not support unnamed files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            let named = OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::RDWR | OFlags::CLOEXEC;
            let tried = path.join(DATA_TRY);
            let file = retry_on_intr(|| rustix::fs::openat(directory, DATA_TRY, named, mode))
                .map_err(|e| os_error(&tried, "make it", e))?;
            remove(directory, path, DATA_TRY)?;
            File::from(file)
        }
        Err(e) => return Err(os_error(path, "make a file in it", e)),
    };
    set_length(&file, path, len)
}

/// Checks that this user may make and remove files in the directory.
fn may_change(directory: BorrowedFd<'_>, path: &Path) -> Result<(), OpenError> {
    let wanted = Access::WRITE_OK | Access::EXEC_OK;
    retry_on_intr(|| rustix::fs::accessat(directory, ".", wanted, AtFlags::EACCESS))
        .map_err(|e| os_error(path, "change what is in it", e))
}

/// Checks that the node in the directory `path` is there, is this one and may be removed. Changes nothing.
///
/// # Errors
/// [`OpenError`].
pub fn check_destroy(path: &Path, volume: Uuid, node: Uuid) -> Result<(), OpenError> {
    let directory = open_directory(path)?;
    check_owner(&read_superblock(directory.as_fd(), path)?, volume, node, &path.into())?;
    may_change(directory.as_fd(), path)
}

/// Checks that a core could serve from the node in the directory `path`. Changes nothing.
///
/// # Errors
/// [`OpenError`].
pub fn check_open(path: &Path, format: &NodeFormat) -> Result<(), OpenError> {
    let directory = open_directory(path)?;
    check_superblock(&read_superblock(directory.as_fd(), path)?, &format.superblock, &path.into())?;
    check_length(&open_data(directory.as_fd(), path)?, format.len, path)
}

/// Removes the node's data and its superblock; the directory stays. Returns false when nothing of a node was there.
///
/// # Errors
/// [`OpenError`] when the directory belongs to another volume or node, or when the operating system fails.
pub fn destroy(path: &Path, volume: Uuid, node: Uuid) -> Result<bool, OpenError> {
    let directory = match open_directory(path) {
        Err(OpenError::Missing { .. }) => return Ok(false),
        opened => opened?,
    };
    match read_superblock(directory.as_fd(), path) {
        Ok(found) => check_owner(&found, volume, node, &path.into())?,
        Err(OpenError::NoSuperblock { .. }) => return Ok(false),
        Err(e) => return Err(e),
    }
    // An interrupted removal may have taken the data. Then no core can serve the node.
    let data = open_file(directory.as_fd(), path, DATA, OFlags::RDWR)?;
    data.as_ref().map_or(Ok(()), |data| take_lock(data, path))?;
    for name in [DATA, DATA_TRY, SUPERBLOCK_NEW, SUPERBLOCK] {
        remove(directory.as_fd(), path, name)?;
    }
    sync_directory(directory.as_fd(), path)?;
    Ok(true)
}

/// Removes a file of the node, if it is there.
fn remove(directory: BorrowedFd<'_>, path: &Path, name: &str) -> Result<(), OpenError> {
    match retry_on_intr(|| rustix::fs::unlinkat(directory, name, AtFlags::empty())) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(os_error(&path.join(name), "remove it", e)),
    }
}

/// Opens the node's directory.
pub(super) fn open_directory(path: &Path) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())).map_err(|e| match e {
        Errno::NOENT => OpenError::Missing { path: path.to_owned() },
        Errno::NOTDIR => OpenError::NotDirectory { path: path.to_owned() },
        e => os_error(path, "open it", e),
    })
}

/// Reads the superblock in an open directory; `path` is for the error.
pub(super) fn read_superblock(directory: BorrowedFd<'_>, path: &Path) -> Result<Superblock, OpenError> {
    let file = open_file(directory, path, SUPERBLOCK, OFlags::RDONLY)?
        .ok_or_else(|| OpenError::NoSuperblock { place: path.into() })?;
    let path = path.join(SUPERBLOCK);
    let mut bytes = Vec::with_capacity(SUPERBLOCK_BYTES);
    match file.take(SUPERBLOCK_BYTES as u64).read_to_end(&mut bytes) {
        Ok(_) => Superblock::decode(&bytes).map_err(|source| OpenError::BadSuperblock { place: path.into(), source }),
        Err(source) => Err(OpenError::Io { path, action: "read it", source }),
    }
}

/// Locks the node for as long as the file is open: no other process serves, grows or removes it in that time.
fn take_lock(data: &File, path: &Path) -> Result<(), OpenError> {
    let file = path.join(DATA);
    let locked = lock::exclusive(data.as_fd()).and_then(|()| Ok(lock::is_at(data.as_fd(), &file)?));
    match locked {
        Ok(true) => Ok(()),
        Ok(false) => Err(OpenError::Io {
            path: file,
            action: "lock it",
            source: io::Error::other("it was removed or replaced at this moment"),
        }),
        Err(LockError::Held(holders)) => Err(OpenError::Held { path: path.to_owned(), holders }),
        Err(LockError::Unsupported(source)) => Err(OpenError::NoLocks { path: path.to_owned(), source }),
        Err(LockError::Io(source)) => Err(OpenError::Io { path: file, action: "lock it", source }),
    }
}

/// Opens the data file for reading and writing.
pub(super) fn open_data(directory: BorrowedFd<'_>, path: &Path) -> Result<File, OpenError> {
    open_file(directory, path, DATA, OFlags::RDWR)?.ok_or_else(|| OpenError::NoData { path: path.join(DATA) })
}

/// Opens the data file to flush it. Read access is enough for that.
pub(super) fn open_flushed(directory: BorrowedFd<'_>, path: &Path) -> Result<File, OpenError> {
    open_file(directory, path, DATA, OFlags::RDONLY)?.ok_or_else(|| OpenError::NoData { path: path.join(DATA) })
}

/// Opens the data file to send from it, without updating its access time, which would cost a disk write. `None` where
/// this user may not.
pub(super) fn open_sent(directory: BorrowedFd<'_>) -> Option<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOATIME;
    retry_on_intr(|| rustix::fs::openat(directory, DATA, flags, Mode::empty())).ok().map(File::from)
}

/// Checks that the data file has the length the layout needs.
pub(super) fn check_length(data: &File, expected: u64, path: &Path) -> Result<(), OpenError> {
    let found = length(data, path)?;
    if found == expected { Ok(()) } else { Err(wrong_length(path, found, expected)) }
}

fn wrong_length(path: &Path, found: u64, expected: u64) -> OpenError {
    OpenError::DataLength { path: path.join(DATA), found, expected, advice: ADVICE_RESIZE }
}

fn length(data: &File, path: &Path) -> Result<u64, OpenError> {
    data.metadata().map(|m| m.len()).map_err(|source| OpenError::Io {
        path: path.join(DATA),
        action: "find out its length",
        source,
    })
}

/// Opens a regular file of the node; `None` when there is none. Never follows a link and never waits for a peer, so
/// neither a symlink nor a fifo in its place does harm. A file mounted over it is not the node's file.
fn open_file(directory: BorrowedFd<'_>, path: &Path, name: &str, access: OFlags) -> Result<Option<File>, OpenError> {
    let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let path = path.join(name);
    let inside = || rustix::fs::openat2(directory, name, flags, Mode::empty(), ResolveFlags::NO_XDEV);
    match retry_on_intr(inside) {
        Ok(fd) => {
            let file = File::from(fd);
            match file.metadata() {
                Ok(metadata) if metadata.is_file() => Ok(Some(file)),
                Ok(_) => Err(OpenError::NotFile { path }),
                Err(source) => Err(OpenError::Io { path, action: "examine it", source }),
            }
        }
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::XDEV) => Err(OpenError::Covered { path }),
        Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => Err(OpenError::NotFile { path }),
        Err(e) => Err(os_error(&path, "open it", e)),
    }
}

/// Refuses a directory that is a node already or is not empty.
fn refuse_used(directory: BorrowedFd<'_>, path: &Path) -> Result<(), OpenError> {
    match read_superblock(directory, path) {
        Ok(found) => return Err(OpenError::InUse { place: path.into(), volume: found.volume }),
        Err(OpenError::NoSuperblock { .. }) => {}
        Err(e) => return Err(e),
    }
    let list = |source| OpenError::Io { path: path.to_owned(), action: "list it", source };
    for entry in fs::read_dir(path).map_err(list)? {
        let name = entry.map_err(list)?.file_name();
        if name != LOST_AND_FOUND {
            return Err(OpenError::NotEmpty { path: path.to_owned(), entry: name.to_string_lossy().into_owned() });
        }
    }
    Ok(())
}

/// Makes the directory and those above it, and makes each durable in the one above.
fn make_directory(path: &Path, undo: &mut Created) -> Result<(), OpenError> {
    let missing: Vec<_> = path.ancestors().take_while(|p| fs::symlink_metadata(p).is_err()).collect();
    for made in missing.into_iter().rev() {
        match fs::DirBuilder::new().mode(0o700).create(made) {
            Ok(()) => undo.directories.push(made.to_owned()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io_error(made, "make the directory", e)),
        }
        if let Some(above) = made.parent() {
            sync_directory(open_directory(above)?.as_fd(), above)?;
        }
    }
    Ok(())
}

fn make_file(
    directory: BorrowedFd<'_>,
    path: &Path,
    name: &str,
    how: OFlags,
    undo: &mut Created,
) -> Result<File, OpenError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | how;
    let path = path.join(name);
    let fd = retry_on_intr(|| rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR))
        .map_err(|e| os_error(&path, "make it", e))?;
    undo.files.push(path);
    Ok(File::from(fd))
}

fn set_length(data: &File, path: &Path, len: u64) -> Result<(), OpenError> {
    let path = path.join(DATA);
    retry_on_intr(|| rustix::fs::ftruncate(data, len)).map_err(|e| match e {
        Errno::FBIG | Errno::INVAL => OpenError::TooLarge { path, len },
        e => os_error(&path, "set its length", e),
    })
}

/// Writes the superblock under another name and renames it. At any time there is the old one or the new one, never a
/// part.
fn put_superblock(
    directory: BorrowedFd<'_>,
    path: &Path,
    superblock: &Superblock,
    undo: &mut Created,
) -> Result<(), OpenError> {
    let new = path.join(SUPERBLOCK_NEW);
    let mut file = make_file(directory, path, SUPERBLOCK_NEW, OFlags::TRUNC, undo)?;
    file.write_all(&superblock.encode()).map_err(|e| io_error(&new, "write it", e))?;
    sync(&file, &new)?;
    retry_on_intr(|| rustix::fs::renameat(directory, SUPERBLOCK_NEW, directory, SUPERBLOCK))
        .map_err(|e| os_error(&new, "rename it", e))?;
    sync_directory(directory, path)
}

fn sync(file: &File, path: &Path) -> Result<(), OpenError> {
    sync_directory(file.as_fd(), path)
}

fn sync_directory(fd: BorrowedFd<'_>, path: &Path) -> Result<(), OpenError> {
    retry_on_intr(|| rustix::fs::fsync(fd)).map_err(|e| os_error(path, "make it durable", e))
}

fn os_error(path: &Path, action: &'static str, errno: Errno) -> OpenError {
    io_error(path, action, errno.into())
}

fn io_error(path: &Path, action: &'static str, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match Errno::from_io_error(&source) {
        Some(Errno::ROFS | Errno::ACCESS | Errno::PERM) => OpenError::ReadOnly { path, source },
        Some(Errno::NOTDIR) => OpenError::NotDirectory { path },
        _ => OpenError::Io { path, action, source },
    }
}

/// What has been made so far. It is removed again on drop, unless [`Created::confirm`] was called.
#[derive(Debug, Default)]
#[must_use = "what was created is removed again unless it is confirmed"]
pub struct Created {
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
    /// The node is locked until they are dropped.
    locks: Vec<File>,
}

impl Created {
    /// Whether the node's directory was made for it.
    pub const fn made_directory(&self) -> bool {
        !self.directories.is_empty()
    }

    /// Keeps what was created.
    pub fn confirm(mut self) {
        self.files.clear();
        self.directories.clear();
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        for file in self.files.iter().rev() {
            let _ = fs::remove_file(file);
        }
        for directory in self.directories.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}
