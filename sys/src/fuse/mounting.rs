//! Mounting a connection on a file, and unmounting it: by mount(2) as root, else through fusermount3.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use everdisk_proto::file_id::FileId;
use rustix::{
    fs::FileType,
    mount::{MountFlags, UnmountFlags},
};

use super::open;
use crate::{
    file,
    link::wait_readable,
    mounts::{self, Mount},
    packet,
};

/// Options of a mount.
#[derive(Clone, Copy, Debug)]
pub struct MountOptions<'a> {
    /// Owner of the mount.
    pub uid: u32,
    /// Group of the mount.
    pub gid: u32,
    /// Let other users in (the kernel then checks the file's mode).
    pub allow_other: bool,
    /// The mount's name in the kernel's table. It is the mount's identity, because numbers of mounts and connections
    /// are reused.
    pub source: &'a str,
    /// The file to mount on. Where it is known, nothing is mounted on any other.
    pub target: Option<FileId>,
}

/// Mounts a connection whose root is a regular file on the file `path`: by mount(2) as root, else through fusermount3. Returns the
/// connection's fd; the INIT request waits in it. On failure nothing is left mounted.
///
/// # Errors
/// The operating system's; an error of fusermount3; or that the path leads to another file now.
pub fn mount(path: &Path, options: MountOptions<'_>) -> io::Result<OwnedFd> {
    // The file is pinned first: otherwise a link could be put at the path between the check and the mount.
    let (directory, name) = file::pin_parent(path)?;
    let target = file::pin(directory.as_fd(), name)?;
    check_target(&file::look(target.as_fd())?, options.target)?;
    let mounted = if rustix::process::geteuid().is_root() {
        mount_as_root(target.as_fd(), options)?
    } else {
        mount_by_helper(path, options)?
    };
    // A mount that another process made at the same moment is below ours now, hidden. It was first.
    let table = mounts::all()?;
    let ours = table.iter().find(|mount| mount.source == options.source);
    let below = ours.and_then(|ours| table.iter().find(|mount| mount.id == ours.parent && mount.path == ours.path));
    if let (Some(ours), Some(below)) = (ours, below) {
        unmount(ours, true)?;
        let why = format!("{} was mounted there in the same moment", below.source);
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
    }
    Ok(mounted)
}

fn check_target(found: &file::Found, wanted: Option<FileId>) -> io::Result<()> {
    match wanted {
        Some(wanted) if wanted == found.id => Ok(()),
        None if found.kind == FileType::RegularFile => Ok(()),
        Some(_) => Err(io::Error::new(io::ErrorKind::ResourceBusy, "something else is there by now")),
        None => Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file")),
    }
}

fn mount_as_root(target: BorrowedFd<'_>, options: MountOptions<'_>) -> io::Result<OwnedFd> {
    let fd = open()?;
    let other = if options.allow_other { ",allow_other,default_permissions" } else { "" };
    let data =
        format!("fd={},rootmode=100000,user_id={},group_id={}{other}\0", fd.as_raw_fd(), options.uid, options.gid);
    let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount(options.source, file::by_descriptor(target), "fuse.everdisk", flags, Some(data))?;
    Ok(fd)
}

fn mount_by_helper(path: &Path, options: MountOptions<'_>) -> io::Result<OwnedFd> {
    const HELPER_DEADLINE: Duration = Duration::from_secs(10);
    let (ours, theirs) = helper_socket()?;
    let other = if options.allow_other { ",allow_other,default_permissions" } else { "" };
    let mut child = Command::new("fusermount3")
        .args(["-o", &format!("fsname={},subtype=everdisk,nosuid,nodev{other}", options.source), "--"])
        .arg(path)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("cannot start fusermount3 (Debian package fuse3): {e}")))?;
    let came = wait_readable(ours.as_fd(), HELPER_DEADLINE)?;
    if !came {
        let _ = child.kill();
    }
    let received = if came { packet::recv(ours.as_fd()).ok().flatten() } else { None };
    let output = child.wait_with_output()?;
    match received.and_then(|mut packet| packet.fds.pop()) {
        Some(fd) if output.status.success() => Ok(fd),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(io::Error::other(format!("fusermount3 did not mount {}: {said}", path.display())))
        }
    }
}

/// fusermount3 sends the fd on a stream socket given to it as descriptor 0.
fn helper_socket() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Unmounts this mount and no other. `lazy`: takes it out of the mount tree at once, although it is in use.
///
/// # Errors
/// `ResourceBusy` when the file is in use and `lazy` is not asked, else the operating system's; also when something else has been
/// mounted over it.
pub fn unmount(mount: &Mount, lazy: bool) -> io::Result<()> {
    let path = &mount.path;
    match mounts::at(path)? {
        Some(top) if top.id == mount.id && top.source == mount.source => {}
        Some(top) => {
            let why = format!("{} is mounted over it; unmount that first (umount {})", top.source, path.display());
            return Err(io::Error::other(why));
        }
        None => return Err(io::ErrorKind::NotFound.into()),
    }
    if rustix::process::geteuid().is_root() {
        let flags = UnmountFlags::NOFOLLOW | if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        return Ok(rustix::mount::unmount(path, flags)?);
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(path);
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let kind = if said.contains("busy") { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    Err(io::Error::new(kind, said))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The path is checked again before anything is mounted.
    #[test]
    fn only_the_file_that_was_looked_at_is_mounted_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = std::fs::canonicalize(dir.path()).unwrap().join("v.img");
        std::fs::write(&path, "").unwrap();
        let (directory, name) = file::pin_parent(&path).unwrap();
        let wanted = file::look_at(directory.as_fd(), name).unwrap().unwrap();
        assert!(check_target(&wanted, Some(wanted.id)).is_ok() && check_target(&wanted, None).is_ok());
        std::fs::rename(&path, path.with_file_name("old")).unwrap();
        std::fs::write(&path, "").unwrap();
        let options =
            MountOptions { uid: 0, gid: 0, allow_other: false, source: "everdisk:t:1", target: Some(wanted.id) };
        let refused = mount(&path, options).unwrap_err();
        assert_eq!(refused.to_string(), "something else is there by now");
        assert_eq!(mounts::from_source("everdisk:t:1").unwrap(), None);
        let directory = file::look(directory.as_fd()).unwrap();
        assert!(check_target(&directory, None).is_err());
    }

    /// Two processes mount at one place: the second finds the first's mount below its own, and gives up.
    #[test]
    fn what_was_mounted_in_the_same_moment_stays_and_ours_goes() {
        if !rustix::process::geteuid().is_root() || open().is_err() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = std::fs::canonicalize(dir.path()).unwrap().join("v.img");
        std::fs::write(&path, "").unwrap();
        let mut options = MountOptions { uid: 0, gid: 0, allow_other: false, source: "everdisk:t:2", target: None };
        let _first = mount(&path, options).unwrap();
        let first = mounts::at(&path).unwrap().unwrap();
        options.source = "everdisk:t:3";
        let refused = mount(&path, options).unwrap_err().to_string();
        assert!(refused.contains("everdisk:t:2 was mounted there in the same moment"), "{refused}");
        assert_eq!(mounts::at(&path).unwrap().as_ref(), Some(&first));
        let (directory, name) = file::pin_parent(&path).unwrap();
        let pinned = file::pin(directory.as_fd(), name).unwrap();
        let second = mount_as_root(pinned.as_fd(), options).unwrap();
        let table = mounts::all().unwrap();
        let ours = table.iter().find(|mount| mount.source == options.source).unwrap();
        assert_eq!((ours.parent, &ours.path), (first.id, &first.path));
        let refused = unmount(&first, true).unwrap_err().to_string();
        assert!(refused.contains("everdisk:t:3 is mounted over it"), "{refused}");
        unmount(ours, true).unwrap();
        drop(second);
        assert_eq!(mounts::at(&path).unwrap().as_ref(), Some(&first));
        let stale = Mount { source: "everdisk:t:9".to_owned(), ..first.clone() };
        assert!(unmount(&stale, true).is_err(), "the same number and another source is another mount");
        unmount(&first, true).unwrap();
        assert_eq!(mounts::at(&path).unwrap(), None);
    }
}
