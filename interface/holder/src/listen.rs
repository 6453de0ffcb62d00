//! Making the sockets on which NBD clients are accepted, and removing those that were made here and no others.
//!
//! The directory of a UNIX socket may be writable for other users. So it is pinned by a descriptor, and every step is
//! done through that, whatever happens to its name. Owner and permissions are given to the socket that was made, not to
//! its name. At the end the file that was made is removed, if it is still there.

use std::{
    ffi::OsStr,
    io,
    net::TcpListener,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use everdisk_proto::{file_id::FileId, frame::NbdListen, nbd::NbdAddress};
use everdisk_sys::{file, lock, packet};
use rustix::{
    fs::{FileType, Mode, OFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

/// Length of the accept queue: as long as the system allows.
const BACKLOG: i32 = 4096;

/// Makes a socket that listens at a place. Returns the place with the address it got.
pub(crate) fn listen(place: &NbdListen) -> io::Result<(NbdListen, OwnedFd)> {
    match &place.address {
        NbdAddress::Unix(path) => {
            let (bound, socket) = bind(path, place)?;
            Ok((NbdListen { bound: Some(bound), ..place.clone() }, socket))
        }
        NbdAddress::Tcp { host, port } => {
            let listener = TcpListener::bind((host.as_str(), *port))?;
            listener.set_nonblocking(true)?;
            let address = NbdAddress::Tcp { host: host.clone(), port: listener.local_addr()?.port() };
            Ok((NbdListen { address, ..place.clone() }, listener.into()))
        }
    }
}

/// Removes the socket that was made at a place, unless something else is there now.
pub(crate) fn remove(place: &NbdListen) {
    let (NbdAddress::Unix(path), Some(bound)) = (&place.address, place.bound) else { return };
    let removed = file::pin_parent(path).and_then(|(directory, name)| file::remove(directory.as_fd(), name, bound));
    if !matches!(removed, Ok(true)) {
        tracing::warn!(path = %path.display(), ?removed, "the socket was not removed: something else is there by now");
    }
}

fn bind(path: &Path, place: &NbdListen) -> io::Result<(FileId, OwnedFd)> {
    let (directory, name) = file::pin_parent(path)?;
    let directory = directory.as_fd();
    // One after another, so that a socket that was just made and does not listen yet is not taken for a dead one. Where
    // directories cannot be locked, or another process keeps the lock, this goes on without it.
    let turn = rustix::fs::openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let _locked = turn.as_ref().map(|turn| lock::exclusive(turn.as_fd()));
    remove_stale(directory, name)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The socket file that bind makes has these permissions from the beginning: only root can connect before the right
    // ones are set.
    rustix::fs::fchmod(&socket, Mode::empty())?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(file::by_descriptor(directory).join(name))?)?;
    let made = file::pin(directory, name)?;
    let found = file::look(made.as_fd())?;
    if !file::is_placeholder(&found) {
        return Err(in_use("something else was put there in the same moment"));
    }
    let give = || {
        file::give(made.as_fd(), place.uid, place.gid, place.mode & 0o777)?;
        Ok(rustix::net::listen(&socket, BACKLOG)?)
    };
    give().inspect_err(|_: &io::Error| drop(file::remove(directory, name, found.id)))?;
    Ok((found.id, socket))
}

fn in_use(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, why)
}

/// Removes the socket of a server that is gone. Anything else at the name stays, and is an error.
fn remove_stale(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let Some(found) = file::look_at(directory, name)? else { return Ok(()) };
    if found.kind != FileType::Socket {
        return Err(in_use("there is something else than a socket at that path"));
    }
    // The type differs from the listener's: a live server refuses it (EPROTOTYPE) without noticing it.
    match packet::connect(&file::by_descriptor(directory).join(name)) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            file::remove(directory, name, found.id)?;
            Ok(())
        }
        _ => Err(in_use("another process listens there")),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{
            fs::MetadataExt,
            net::{UnixListener, UnixStream},
        },
    };

    use super::*;

    fn place(path: &Path, mode: u32) -> NbdListen {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        NbdListen { address: NbdAddress::Unix(path.to_owned()), mode, uid, gid, bound: None }
    }

    #[test]
    fn a_socket_is_made_with_its_permissions_and_only_that_socket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(dir.path()).unwrap().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let (made, socket) = listen(&place(&path, 0o640)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        UnixStream::connect(&path).unwrap();
        let second = listen(&place(&path, 0o640)).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse, "another process listens there");
        fs::rename(&path, path.with_file_name("moved")).unwrap();
        fs::write(&path, "precious").unwrap();
        remove(&made);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        remove(&made);
        assert!(path.exists(), "the socket of another server stays");
        fs::rename(path.with_file_name("moved"), &path).unwrap();
        remove(&made);
        assert!(!path.exists());
        drop(socket);
    }

    #[test]
    fn what_is_no_socket_stays_and_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(dir.path()).unwrap().join("s");
        fs::write(&path, "precious").unwrap();
        assert_eq!(listen(&place(&path, 0o600)).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    /// A directory that was replaced by a link to another since it was checked.
    #[test]
    fn a_directory_that_was_replaced_by_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(real.join("etc")).unwrap();
        std::os::unix::fs::symlink(real.join("etc"), real.join("link")).unwrap();
        assert!(listen(&place(&real.join("link/s"), 0o600)).is_err());
        assert_eq!(fs::read_dir(real.join("etc")).unwrap().count(), 0);
    }
}
