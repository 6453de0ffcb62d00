//! A connection in the transmission phase: what is sent on it. [`crate::receive`] reads what comes.
//!
//! A request is sent by the thread that begins it, without waiting. What the socket does not take at once, the thread of the
//! connection sends later. With TLS that thread sends everything, because the state of the encryption is its own.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, IoSlice, Write},
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, Release},
    },
};

use everdisk_proto::{in_flight::NOT_QUEUED, nbd::wire::cmd};
use everdisk_sys::in_flight::InFlight;
use parking_lot::Mutex;
use rustix::{
    event::{EventfdFlags, eventfd},
    net::{Shutdown, shutdown},
};

use crate::codec::{REQUEST_BYTES, request};

/// Most parts that one system call sends. A request has two at most.
const PARTS_MAX: usize = 64;

/// A connection.
#[derive(Debug)]
pub(crate) struct Lane {
    /// Distinguishes it from every other connection of the client, earlier ones among them.
    pub(crate) id: u64,
    /// Its place among the connections that exist at one time.
    pub(crate) slot: usize,
    pub(crate) socket: Arc<OwnedFd>,
    /// Readable when the connection's thread has something to do.
    wake: OwnedFd,
    encrypted: bool,
    pub(crate) agreed: Agreed,
    table: InFlight,
    outbox: Mutex<Outbox>,
}

/// What client and server agreed upon for one connection. Another one of the same client may differ.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Agreed {
    pub(crate) structured: bool,
    /// The number of the context `base:allocation`.
    pub(crate) context: Option<u32>,
}

/// A request on its way to the socket.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) head: [u8; REQUEST_BYTES],
    pub(crate) payload: Option<(Arc<Vec<u8>>, Range<usize>)>,
    /// The entry of a change in the in-flight table.
    pub(crate) entry: Option<usize>,
}

#[derive(Debug, Default)]
struct Outbox {
    queue: VecDeque<Outgoing>,
    /// Bytes of all requests that were ever queued.
    queued: u64,
    /// Bytes of the first one that were sent.
    sent: usize,
    /// The socket takes no more at the moment.
    full: bool,
    state: Phase,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    /// The client goes. What can be sent without waiting is sent.
    Closing,
    /// Every further request is dropped.
    Closed,
}

impl Lane {
    pub(crate) fn new(
        id: u64,
        slot: usize,
        socket: OwnedFd,
        encrypted: bool,
        agreed: Agreed,
        table: InFlight,
    ) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { id, slot, socket: Arc::new(socket), wake, encrypted, agreed, table, outbox: Mutex::default() })
    }

    pub(crate) fn table(&self) -> BorrowedFd<'_> {
        self.table.as_fd()
    }

    /// Notes a change that is about to be sent.
    pub(crate) fn note(&self, entry: usize, cookie: u64) {
        let entry = &self.table.entries[entry];
        entry.end.store(NOT_QUEUED, Relaxed);
        entry.cookie.store(cookie, Release);
    }

    /// The change has been answered.
    pub(crate) fn forget(&self, entry: usize) {
        self.table.entries[entry].cookie.store(0, Release);
    }

    /// Sends requests, now or as soon as the socket takes them. They are dropped if the connection was lost: the
    /// client's table has them.
    pub(crate) fn push(&self, requests: impl IntoIterator<Item = Outgoing>) {
        let mut outbox = self.outbox.lock();
        if outbox.state != Phase::Open {
            return;
        }
        for outgoing in requests {
            outbox.queue(outgoing, &self.table);
        }
        if self.encrypted {
            drop(outbox);
            self.wake();
        } else if !outbox.full {
            self.send(&mut outbox);
            if outbox.full {
                drop(outbox);
                self.wake();
            }
        }
    }

    /// Goes on with what the socket did not take.
    pub(crate) fn resume(&self) {
        let mut outbox = self.outbox.lock();
        outbox.full = false;
        self.send(&mut outbox);
    }

    /// Whether there is something that the socket did not take.
    pub(crate) fn is_full(&self) -> bool {
        self.outbox.lock().full
    }

    fn send(&self, outbox: &mut Outbox) {
        while !outbox.queue.is_empty() {
            match outbox.send_once(self.socket.as_fd(), &self.table) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    outbox.full = true;
                    return;
                }
                Err(_) => {
                    // The connection is lost. Its thread notices, since nothing more comes, and learns why.
                    self.hang_up();
                    outbox.queue.clear();
                    return;
                }
            }
        }
    }

    /// Encrypts what is to be sent, as much as TLS buffers.
    pub(crate) fn encrypt(&self, writer: &mut dyn Write) -> io::Result<()> {
        let mut outbox = self.outbox.lock();
        while let Some(first) = outbox.queue.front() {
            let part = first.rest(outbox.sent).into_iter().find(|part| !part.is_empty());
            let part = part.expect("a request that was sent has left the queue");
            let written = writer.write(part)?;
            if written == 0 {
                return Ok(());
            }
            outbox.advance(written);
        }
        Ok(())
    }

    /// Takes leave of the server, and ends the connection's thread.
    pub(crate) fn close(&self) {
        self.push([Outgoing { head: request(cmd::DISC, 0, 0, 0, 0), payload: None, entry: None }]);
        self.outbox.lock().state = Phase::Closing;
        self.wake();
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.outbox.lock().state == Phase::Closing
    }

    /// Drops what was not sent, and hangs up. Others may hold duplicates of the socket, so closing would not do.
    pub(crate) fn end(&self) {
        let mut outbox = self.outbox.lock();
        outbox.state = Phase::Closed;
        outbox.queue.clear();
        drop(outbox);
        self.hang_up();
    }

    fn hang_up(&self) {
        // It fails if the other side has hung up: nothing is left to be done.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    pub(crate) fn waker(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn wake(&self) {
        // It fails when the counter is at its limit; then the thread is woken already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl Outgoing {
    fn bytes(&self) -> usize {
        REQUEST_BYTES + self.payload.as_ref().map_or(0, |(_, range)| range.len())
    }

    /// Head and payload without the first `sent` bytes.
    fn rest(&self, sent: usize) -> [&[u8]; 2] {
        let payload: &[u8] = self.payload.as_ref().map_or(&[], |(memory, range)| &memory[range.clone()]);
        let of_head = sent.min(REQUEST_BYTES);
        [&self.head[of_head..], &payload[sent - of_head..]]
    }
}

impl Outbox {
    /// A request gets its place in the stream.
    fn queue(&mut self, outgoing: Outgoing, table: &InFlight) {
        self.queued += outgoing.bytes() as u64;
        if let Some(entry) = outgoing.entry {
            table.entries[entry].end.store(self.queued, Release);
        }
        self.queue.push_back(outgoing);
    }

    fn send_once(&mut self, socket: BorrowedFd<'_>, table: &InFlight) -> io::Result<()> {
        let mut parts = Vec::with_capacity(PARTS_MAX.min(2 * self.queue.len()));
        let mut sent = self.sent;
        for outgoing in self.queue.iter().take(PARTS_MAX / 2) {
            parts.extend(outgoing.rest(sent).into_iter().filter(|part| !part.is_empty()).map(IoSlice::new));
            sent = 0;
        }
        let written = table.send(socket, &parts)?;
        self.advance(written);
        Ok(())
    }

    fn advance(&mut self, written: usize) {
        self.sent += written;
        while let Some(first) = self.queue.front() {
            let bytes = first.bytes();
            if self.sent < bytes {
                return;
            }
            self.sent -= bytes;
            self.queue.pop_front();
        }
    }
}
