//! Files by identity: pinned directories, identities, and changes that reach the file that was checked and no other,
//! whatever happens to its name.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use everdisk_proto::file_id::FileId;
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, StatxFlags, Uid},
    io::retry_on_intr,
};

/// The file at a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Identity.
    pub id: FileId,
    /// Type.
    pub kind: FileType,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Bytes.
    pub len: u64,
}

/// A part of a file.
#[derive(Clone, Copy, Debug)]
pub struct FileRange<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where the part begins.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Opens a directory only as the base of further paths. `path` is free of symbolic links; one that was put there since
/// is not followed.
///
/// # Errors
/// The operating system's.
pub fn pin_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(retry_on_intr(|| rustix::fs::openat2(rustix::fs::CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS))?)
}

/// The directory of a path, pinned, and the name in it.
///
/// # Errors
/// The operating system's; `InvalidInput` for a path without a name.
pub fn pin_parent(path: &Path) -> io::Result<(OwnedFd, &OsStr)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    Ok((pin_directory(parent)?, name))
}

/// Pins the file at `name`, without opening it and without following a link.
///
/// # Errors
/// The operating system's; `NotFound` when there is nothing.
pub fn pin(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(retry_on_intr(|| rustix::fs::openat(directory, name, flags, Mode::empty()))?)
}

/// Type, identity and owner of an open or pinned file.
///
/// # Errors
/// The operating system's.
pub fn look(file: BorrowedFd<'_>) -> io::Result<Found> {
    found(file, OsStr::new(""), AtFlags::EMPTY_PATH)
}

/// The file at `name`; `None` when there is none. A link is not followed.
///
/// # Errors
/// The operating system's.
pub fn look_at(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<Found>> {
    match found(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn found(at: BorrowedFd<'_>, name: &OsStr, flags: AtFlags) -> io::Result<Found> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = retry_on_intr(|| rustix::fs::statx(at, name, flags | AtFlags::STATX_DONT_SYNC, wanted))?;
    let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    let born = u64::try_from(stat.stx_btime.tv_sec).ok().filter(|_| known);
    let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    Ok(Found {
        id: FileId {
            device,
            inode: stat.stx_ino,
            born_ns: born.map(|seconds| seconds * 1_000_000_000 + u64::from(stat.stx_btime.tv_nsec)),
        },
        kind: FileType::from_raw_mode(u32::from(stat.stx_mode)),
        mode: u32::from(stat.stx_mode) & 0o7777,
        uid: stat.stx_uid,
        len: stat.stx_size,
    })
}

/// Removes `name` if it is still the file `id`. Returns whether it was.
///
/// # Errors
/// The operating system's.
pub fn remove(directory: BorrowedFd<'_>, name: &OsStr, id: FileId) -> io::Result<bool> {
    if look_at(directory, name)?.is_none_or(|found| found.id != id) {
        return Ok(false);
    }
    retry_on_intr(|| rustix::fs::unlinkat(directory, name, AtFlags::empty()))?;
    Ok(true)
}

/// Gives a pinned file owner and permissions.
///
/// # Errors
/// The operating system's.
pub fn give(file: BorrowedFd<'_>, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    Ok(rustix::fs::chmod(by_descriptor(file), Mode::from_raw_mode(mode))?)
}

/// A path that leads to a pinned file or directory, whatever its present name.
pub fn by_descriptor(file: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Makes an empty placeholder that no process can write to, not even root: a socket that no process has. A file system
/// can be mounted on it as on a file.
///
/// # Errors
/// The operating system's; `AlreadyExists` when something bears the name.
pub fn make_placeholder(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<FileId> {
    retry_on_intr(|| rustix::fs::mknodat(directory, name, FileType::Socket, Mode::empty(), 0))?;
    let found = look_at(directory, name)?.ok_or(io::ErrorKind::NotFound)?;
    if is_placeholder(&found) { Ok(found.id) } else { Err(io::ErrorKind::AlreadyExists.into()) }
}

/// Makes an empty file that its owner can write to.
///
/// # Errors
/// The operating system's; `AlreadyExists` when something bears the name.
pub fn make_empty(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<FileId> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = retry_on_intr(|| rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR))?;
    Ok(look(made.as_fd())?.id)
}

/// Takes every permission from a pinned file. The descriptor reaches it whatever its name, also below a mount.
///
/// # Errors
/// The operating system's.
pub fn close_to_all(file: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::fs::chmod(by_descriptor(file), Mode::empty())?)
}

/// Whether this is a placeholder of [`make_placeholder`], of this user.
pub fn is_placeholder(found: &Found) -> bool {
    found.kind == FileType::Socket && found.mode == 0 && found.uid == rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, symlink},
    };

    use super::*;

    #[test]
    fn a_link_that_took_the_place_of_a_directory_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::create_dir_all(real.join("sub")).unwrap();
        symlink(&real, &link).unwrap();
        pin_directory(&real.join("sub")).unwrap();
        let refused = pin_directory(&link.join("sub")).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::LOOP.raw_os_error()));
        assert!(pin_directory(&link).is_err());
    }

    #[test]
    fn only_the_file_that_is_meant_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let pinned = pin_directory(&fs::canonicalize(dir.path()).unwrap()).unwrap();
        let (name, path) = (OsStr::new("f"), dir.path().join("f"));
        fs::write(&path, "a").unwrap();
        let first = look_at(pinned.as_fd(), name).unwrap().unwrap();
        assert_eq!((first.kind, first.len), (FileType::RegularFile, 1));
        fs::rename(&path, dir.path().join("old")).unwrap();
        assert!(!remove(pinned.as_fd(), name, first.id).unwrap(), "nothing is there");
        fs::write(&path, "b").unwrap();
        assert!(!remove(pinned.as_fd(), name, first.id).unwrap() && path.exists(), "another file is there");
        fs::rename(dir.path().join("old"), &path).unwrap();
        assert!(remove(pinned.as_fd(), name, first.id).unwrap() && !path.exists());
    }

    /// An inode number that is reused, as ext4 does immediately.
    #[test]
    fn a_file_made_later_is_another_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "").unwrap();
        let pinned = pin_directory(&fs::canonicalize(dir.path()).unwrap()).unwrap();
        let found = look_at(pinned.as_fd(), OsStr::new("f")).unwrap().unwrap().id;
        if let Some(born) = found.born_ns {
            let later = FileId { born_ns: Some(born + 1), ..found };
            assert!(!remove(pinned.as_fd(), OsStr::new("f"), later).unwrap());
        }
        assert!(dir.path().join("f").exists());
    }

    #[test]
    fn nobody_can_write_to_a_placeholder_and_it_is_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let pinned = pin_directory(&fs::canonicalize(dir.path()).unwrap()).unwrap();
        let (name, path) = (OsStr::new("v.img"), dir.path().join("v.img"));
        let id = make_placeholder(pinned.as_fd(), name).unwrap();
        assert!(make_placeholder(pinned.as_fd(), name).is_err());
        for refused in [fs::write(&path, "x"), fs::File::create(&path).map(drop), fs::File::open(&path).map(drop)] {
            // ENXIO for root; another user may not even try.
            assert!(refused.is_err());
        }
        assert!(is_placeholder(&look_at(pinned.as_fd(), name).unwrap().unwrap()));
        assert!(remove(pinned.as_fd(), name, id).unwrap());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(!is_placeholder(&look_at(pinned.as_fd(), name).unwrap().unwrap()), "a socket of another process");
    }

    #[test]
    fn what_is_given_away_is_the_pinned_file_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(dir.path()).unwrap();
        let pinned = pin_directory(&real).unwrap();
        fs::write(real.join("mine"), "").unwrap();
        fs::write(real.join("other"), "").unwrap();
        let before = fs::metadata(real.join("other")).unwrap().mode();
        let file = pin(pinned.as_fd(), OsStr::new("mine")).unwrap();
        fs::rename(real.join("mine"), real.join("moved")).unwrap();
        symlink(real.join("other"), real.join("mine")).unwrap();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        give(file.as_fd(), uid, gid, 0o640).unwrap();
        assert_eq!(fs::metadata(real.join("moved")).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(fs::metadata(real.join("other")).unwrap().mode(), before);
    }
}
