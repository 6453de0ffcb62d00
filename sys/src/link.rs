//! A socket that carries frames: typed on both sides, every wait under a deadline.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use everdisk_proto::frame::{BadFrame, Body, Frame, decode, encode};
use rustix::event::{PollFd, PollFlags};

use crate::packet::{self, Packet};

/// Why a link failed. After any of these but `Deadline` it is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The operating system's error.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
    /// The peer sent an invalid frame.
    #[error("the peer sent something else than was agreed: {0}")]
    Frame(#[from] BadFrame),
    /// The peer has closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer did not answer in time.
    #[error("no answer within {0:?}")]
    Deadline(Duration),
}

/// A frame and the descriptors that came with it.
pub type Received<B> = (Frame<B>, Vec<OwnedFd>);

/// One end of a connection that sends bodies `S` and receives bodies `R`.
#[derive(Debug)]
pub struct Link<S, R> {
    socket: OwnedFd,
    next_id: u64,
    bodies: PhantomData<fn(S) -> R>,
}

impl<S: Body, R: Body> Link<S, R> {
    /// Speaks frames on a connected socket.
    pub const fn new(socket: OwnedFd) -> Self {
        Self { socket, next_id: 1, bodies: PhantomData }
    }

    /// Connects to a listener.
    ///
    /// # Errors
    /// The operating system's.
    pub fn connect(path: &Path) -> Result<Self, LinkError> {
        Ok(Self::new(packet::connect(path)?))
    }

    /// Sends a frame with `id` and its descriptors; never blocks.
    ///
    /// # Errors
    /// [`LinkError`]; `WouldBlock` when the peer does not read.
    pub fn send(&self, id: u64, body: S, fds: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        let bytes = encode(&Frame::new(id, body))?;
        packet::send(self.socket.as_fd(), &bytes, fds)?;
        Ok(())
    }

    /// Receives the next frame. Blocks unless poll has reported one.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn recv(&self) -> Result<Received<R>, LinkError> {
        let Packet { bytes, fds } = packet::recv(self.socket.as_fd())?.ok_or(LinkError::Closed)?;
        Ok((decode(&bytes, fds.len())?, fds))
    }

    /// Receives the next frame or gives up after `limit`.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn recv_within(&self, limit: Duration) -> Result<Received<R>, LinkError> {
        wait_readable(self.socket.as_fd(), limit)?.then_some(()).ok_or(LinkError::Deadline(limit))?;
        self.recv()
    }

    /// Sends a request and waits for the answer that bears the same id.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn ask(&mut self, body: S, limit: Duration) -> Result<R, LinkError> {
        let id = self.next_id;
        self.next_id += 1;
        self.send(id, body, &[])?;
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.recv_within(left) {
                Ok((frame, _)) if frame.id == id => return Ok(frame.body),
                Ok(_) => {}
                Err(LinkError::Deadline(_)) => return Err(LinkError::Deadline(limit)),
                Err(e) => return Err(e),
            }
        }
    }
}

impl<S, R> AsFd for Link<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits until `fd` can be read (or has ended); false when `limit` is over.
///
/// # Errors
/// The operating system's.
pub fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = left.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
