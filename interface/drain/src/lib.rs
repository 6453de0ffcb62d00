//! The fence of NBD storage nodes. A server goes on executing what it has received when its client dies. So the
//! interface keeps a duplicate of the socket, and reads on until every change that the dead core had sent is answered.
//!
//! ```text
//! in-flight table ─► changes that the server has as a whole ─┐
//! inbox, socket ───► replies ──────────────────────────────► each is crossed out ─► none left: drained
//! ```
//! Measured on qemu-nbd and nbdkit: without this, a dead client's writes land up to seconds after its successor has read and
//! written. A flush on another connection is no barrier, and neither is the end of our half of the connection.
#![forbid(unsafe_code)]

mod replies;

use std::{io, os::fd::BorrowedFd, sync::atomic::Ordering::Acquire, time::Duration};

use everdisk_sys::{in_flight::InFlight, link::wait_readable};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    net::{RecvFlags, Shutdown, recv, shutdown},
};

use replies::Awaited;

/// Bytes that are received at once.
const PIECE_BYTES: usize = 256 << 10;
/// A wait for the server ends after this time, and begins anew.
const WAIT: Duration = Duration::from_secs(1);

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Every change is answered, and the server still had the connection.
    Answered,
    /// The server ended the connection. This number of changes are not answered: a server that lives on may still execute
    /// them.
    Broken(usize),
}

/// What is in flight on a connection of a dead core.
#[derive(Debug)]
pub struct Drain {
    awaited: Awaited,
    piece: Vec<u8>,
}

impl Drain {
    /// Reads the table of a core all of whose threads have ended.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(table: &InFlight) -> io::Result<Self> {
        let sent = table.sent();
        let cookies = table.entries.iter().filter_map(|entry| {
            let cookie = entry.cookie.load(Acquire);
            // A server executes no request whose last byte it does not have, and nobody sends that any more.
            (cookie != 0 && entry.end.load(Acquire) <= sent).then_some(cookie)
        });
        Ok(Self { awaited: Awaited::new(cookies, &table.inbox()?), piece: vec![0; PIECE_BYTES] })
    }

    /// Changes that are not answered yet.
    pub fn left(&self) -> usize {
        self.awaited.left()
    }

    /// Receives what has come, and waits for it for a second at most. `None`: not all is answered yet.
    ///
    /// # Errors
    /// The operating system's, except for those by which a connection ends.
    pub fn step(&mut self, socket: BorrowedFd<'_>) -> io::Result<Option<Drained>> {
        if self.left() == 0 {
            let drained = if has_ended(socket)? { Drained::Broken(0) } else { Drained::Answered };
            // Others have duplicates, so closing would not do. A request that the server has in part is dropped by this. It
            // fails where the server has hung up.
            let _ = shutdown(socket, Shutdown::Both);
            return Ok(Some(drained));
        }
        if !wait_readable(socket, WAIT)? {
            return Ok(None);
        }
        match recv(socket, &mut self.piece, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Ok(Some(Drained::Broken(self.left()))),
            Ok((bytes, _)) => {
                self.awaited.received(&self.piece[..bytes]);
                Ok(None)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(Errno::CONNRESET | Errno::PIPE | Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH) => {
                Ok(Some(Drained::Broken(self.left())))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether the server has ended the connection, also where bytes of it lie unread.
fn has_ended(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    retry_on_intr(|| poll(&mut polled, Some(&Timespec::default())))?;
    Ok(!polled[0].revents().is_empty())
}
