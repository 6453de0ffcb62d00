//! AF_UNIX SOCK_SEQPACKET sockets with SCM_RIGHTS: one message, one packet, with file descriptors beside it.

use std::{
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
};

use everdisk_proto::limits::{FRAME_BYTES_MAX, FRAME_FDS_MAX};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// A received packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// The peer of a socket (SO_PEERCRED: as it was when the connection was made).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
}

fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Listens at `path`, mode 0600. A socket that a dead predecessor left there is removed.
///
/// # Errors
/// The operating system's, and `InvalidInput` when the path is longer than a socket address can hold (107 bytes).
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let fd = socket()?;
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&fd, 64)?;
    Ok(fd)
}

/// Connects to `path`; never waits for a listener that does not accept connections.
///
/// # Errors
/// The operating system's: `NotFound` and `ConnectionRefused` when no process listens, `WouldBlock` when the listener's
/// queue is full.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
    rustix::io::ioctl_fionbio(&fd, false)?;
    Ok(fd)
}

/// Two ends of one connection.
///
/// # Errors
/// The operating system's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Accepts a connection that waits at a listener.
///
/// # Errors
/// The operating system's.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?)
}

/// The peer.
///
/// # Errors
/// The operating system's; `NotFound` for a process of another process-id namespace, which has no id here.
pub fn peer(fd: BorrowedFd<'_>) -> io::Result<Peer> {
    let mut credentials = libc::ucred { pid: 0, uid: libc::uid_t::MAX, gid: libc::gid_t::MAX };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: SO_PEERCRED writes at most `len` bytes of a ucred, plain integers, to the pointer; both live on the stack.
    // (rustix's own call gives the id a type that excludes the 0 of a foreign namespace.)
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    match u32::try_from(credentials.pid) {
        Ok(pid) if pid > 0 => Ok(Peer { pid, uid: credentials.uid }),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Sends a packet without waiting: a peer that does not read its socket gets `WouldBlock` here and never stalls us.
///
/// # Errors
/// The operating system's; `InvalidInput` for more than [`FRAME_FDS_MAX`] descriptors.
pub fn send(fd: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.len() > FRAME_FDS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(fd, &[io::IoSlice::new(bytes)], &mut ancillary, flags)?;
    Ok(())
}

/// Receives a packet; `None` at the end of the connection. Blocks unless the socket is non-blocking.
///
/// # Errors
/// The operating system's, and `InvalidData` for a packet that is longer, or has more descriptors, than a frame may
/// have; its descriptors are closed.
pub fn recv(fd: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; FRAME_BYTES_MAX + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        fd.as_fd(),
        &mut [io::IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            fds.extend(came);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) || got.bytes > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet longer than any frame"));
    }
    if got.bytes == 0 && fds.is_empty() {
        return Ok(None);
    }
    bytes.truncate(got.bytes);
    Ok(Some(Packet { bytes, fds }))
}
