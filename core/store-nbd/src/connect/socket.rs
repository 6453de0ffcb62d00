//! A connected socket.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::nbd::NbdAddress;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_to, socket_with, sockopt},
};

use super::{ConnectError, resolve::Resolver};

/// Size of the socket's buffers, bytes. The kernel allows less without privilege.
const BUFFER_BYTES: usize = 1 << 20;
/// Without an answer from the peer's kernel for 25 s an idle connection ends: the peer has gone without a word.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// Interval between two attempts at a UNIX socket whose queue is full; there is nothing to sleep on.
const FULL_INTERVAL: Duration = Duration::from_millis(10);

/// A non-blocking stream socket, connected.
pub(super) fn connect(server: &NbdAddress, resolver: &Resolver, deadline: Instant) -> Result<OwnedFd, ConnectError> {
    let socket = match server {
        NbdAddress::Unix(path) => unix(path, deadline).map_err(ConnectError::io("connect to the server"))?,
        NbdAddress::Tcp { host, port } => {
            let addresses = resolver.resolve(host, *port, deadline);
            let addresses = addresses.map_err(ConnectError::io("resolve the host's name"))?;
            tcp(&addresses, deadline).map_err(ConnectError::io("connect to the server"))?
        }
    };
    // A smaller buffer costs speed only.
    let _ = sockopt::set_socket_send_buffer_size(&socket, BUFFER_BYTES);
    let _ = sockopt::set_socket_recv_buffer_size(&socket, BUFFER_BYTES);
    Ok(socket)
}

fn unix(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let address = SocketAddrUnix::new(path)?;
    loop {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match connect_to(&socket, &address) {
            Ok(()) => return Ok(socket),
            // The queue of the listener is full.
            Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(FULL_INTERVAL),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Tries the addresses one after another; each gets its share of the time.
fn tcp(addresses: &[SocketAddr], deadline: Instant) -> io::Result<OwnedFd> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for (tried, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let rest = u32::try_from(addresses.len() - tried).expect("a host has few addresses");
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(address, (left / rest).max(Duration::from_millis(1))) {
            Ok(stream) => return prepared(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn prepared(stream: TcpStream) -> io::Result<OwnedFd> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
    Ok(stream.into())
}
