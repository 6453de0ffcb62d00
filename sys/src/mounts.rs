//! Mounts, from /proc/self/mountinfo (Documentation/filesystems/proc.rst, 3.5). Only procfs is read, so a dead server
//! blocks nothing.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::ffi::OsStringExt,
    },
    path::{Component, Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number. The kernel reuses it when this mount has gone.
    pub id: u32,
    /// The number of its parent mount.
    pub parent: u32,
    /// The file system, major and minor number. For a FUSE file system the minor is the number of its connection.
    pub device: (u32, u32),
    /// The part of the file system that is mounted.
    pub root: PathBuf,
    /// The mount point.
    pub path: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// The source: a device, or a name that the mounting program gave.
    pub source: String,
}

/// Every mount; of several at one place the topmost last.
///
/// # Errors
/// When /proc/self/mountinfo cannot be read.
pub fn all() -> io::Result<Vec<Mount>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The topmost mount at `path`, if there is one.
///
/// # Errors
/// As [`all`].
pub fn at(path: &Path) -> io::Result<Option<Mount>> {
    Ok(all()?.into_iter().rev().find(|mount| mount.path == path))
}

/// The mount whose source is `source`.
///
/// # Errors
/// As [`all`].
pub fn from_source(source: &str) -> io::Result<Option<Mount>> {
    Ok(all()?.into_iter().find(|mount| mount.source == source))
}

/// The location of a path, independent of its name: the file system, and the path in it. Bind mounts, links and `..`
/// make no difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ground {
    /// The file system.
    pub device: (u32, u32),
    /// The path in it.
    pub path: PathBuf,
}

impl Ground {
    /// Whether this is `other`, or lies in it.
    pub fn is_in(&self, other: &Self) -> bool {
        self.device == other.device && self.path.starts_with(&other.path)
    }
}

/// The location of `path`. The part that does not exist yet is to be made under the directory that does. May wait for
/// the file systems on the way.
///
/// # Errors
/// The operating system's, and `NotFound` for a place that is mounted nowhere any more.
pub fn ground(path: &Path) -> io::Result<Ground> {
    let (existing, missing) = deepest(path)?;
    if missing.components().any(|part| part == Component::ParentDir) {
        // A part that does not exist is no link, so `..` leads back from it.
        return ground(&missing.components().fold(existing, |place, part| match part {
            Component::ParentDir => place.parent().map(Path::to_owned).unwrap_or(place),
            part => place.join(part),
        }));
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place = rustix::fs::open(&existing, flags, Mode::empty())?;
    let id = mount_id(place.as_fd())?;
    let mount = all()?.into_iter().find(|mount| mount.id == id).ok_or(io::ErrorKind::NotFound)?;
    let below = existing.strip_prefix(&mount.path).map_err(|_| io::ErrorKind::NotFound)?;
    Ok(Ground { device: mount.device, path: mount.root.join(below).join(missing) })
}

/// The part of a path that exists, free of links, and the rest.
fn deepest(path: &Path) -> io::Result<(PathBuf, PathBuf)> {
    for existing in path.ancestors() {
        match fs::canonicalize(existing) {
            Ok(real) => {
                let missing = path.strip_prefix(existing).map_err(|_| io::ErrorKind::InvalidInput)?;
                return Ok((real, missing.to_owned()));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// Number of the mount through which `fd` was opened. It is read from procfs, not from the file system.
///
/// # Errors
/// When procfs cannot be read.
pub fn mount_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    id.and_then(|id| id.trim().parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A line of mountinfo.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let (id, parent) = (text()?.parse().ok()?, text()?.parse().ok()?);
    let (major, minor) = text()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let (root, path) = (unescape(fields.next()?), unescape(fields.next()?));
    // Optional fields end with a lone hyphen.
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = unescape(rest.next()?).to_string_lossy().into_owned();
    Some(Mount { id, parent, device, root, path, kind, source })
}

/// Space, tab, newline, backslash (and `#` in sources) are written as three octal digits behind a backslash.
pub fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(value.unwrap_or(*first));
        rest = if value.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read_with_and_without_optional_fields() {
        let line = b"42 30 0:39 / /srv/a\\040b\\134c rw,nosuid - fuse.everdisk everdisk:v:1 rw,user_id=0";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.device), (42, 30, (0, 39)));
        assert_eq!((mount.path.as_path(), mount.kind.as_str()), (Path::new("/srv/a b\\c"), "fuse.everdisk"));
        assert_eq!(mount.source, "everdisk:v:1");
        let shared = parse(b"31 1 254:0 /sub /srv rw shared:1 master:2 - ext4 /dev/vda rw").unwrap();
        assert_eq!((shared.root.as_path(), shared.kind.as_str()), (Path::new("/sub"), "ext4"));
        assert_eq!(parse(b""), None);
        assert_eq!(unescape(b"a\\b\\04"), Path::new("a\\b\\04"), "no escape, no octal");
    }

    #[test]
    fn one_place_has_one_ground_whatever_leads_there() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        symlink(at("a"), at("link")).unwrap();
        let real = ground(&at("a/b")).unwrap();
        assert_eq!(ground(&at("link/b")).unwrap(), real);
        assert_eq!(ground(&at("a/b/../b")).unwrap(), real);
        let new = ground(&at("link/b/c/d")).unwrap();
        assert!(new.is_in(&real) && !real.is_in(&new) && real.is_in(&real));
        assert_eq!(ground(&at("link/none/../b")).unwrap(), real);
        assert!(!ground(&at("link/none/../../b")).unwrap().is_in(&ground(&at("a")).unwrap()));
        assert!(!ground(&at("a/bc")).unwrap().is_in(&real), "a longer name is another place");
        if rustix::process::geteuid().is_root() {
            fs::create_dir(at("bound")).unwrap();
            rustix::mount::mount_bind(at("a"), at("bound")).unwrap();
            let bound = ground(&at("bound/b"));
            rustix::mount::unmount(at("bound"), rustix::mount::UnmountFlags::DETACH).unwrap();
            assert_eq!(bound.unwrap(), real);
        }
    }
}
