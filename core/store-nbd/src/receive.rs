//! The thread of a connection: it reads replies, and sends what the socket did not take from those who began it.
//!
//! ```text
//!         ┌──────────────────────────── the last byte of a part ◀─┐
//!         ▼                                                       │
//!        Head ─ simple reply with data ─────────────────▶ Data ───┤   straight into the memory of the read
//!         ├──── chunk OFFSET_DATA ─▶ Offset ────────────▶ Data ───┤
//!         └──── other chunks ───────────────────────────▶ Small ──┘
//! ```

use std::{
    io::{self, ErrorKind},
    mem,
    os::fd::AsFd,
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use rustls::ClientConnection;

use crate::{
    codec::{
        assembly::Body,
        reply::{DATA_OFFSET_BYTES, Head, Violation, data_offset, head},
    },
    connect::Raw,
    inbox::Inbox,
    lane::Lane,
    shared::Shared,
    state::{State, Work},
};

/// Why a connection has ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    #[error("the server closed the connection")]
    HungUp,
    #[error("the connection failed: {0}")]
    Io(io::Error),
    #[error("the server broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the client was closed")]
    Closed,
}

impl From<io::Error> for Lost {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Self::HungUp,
            _ => Self::Io(error),
        }
    }
}

/// The part of a reply that is being read.
#[derive(Debug)]
enum Phase {
    Head,
    /// The offset of a chunk of data.
    Offset {
        cookie: u64,
        len: u32,
        last: bool,
    },
    /// Data, which belong into `memory[at..end]`; the memory is that of the read.
    Data {
        cookie: u64,
        memory: Vec<u8>,
        at: usize,
        end: usize,
        last: bool,
    },
    /// Another body.
    Small {
        cookie: u64,
        kind: u16,
        len: usize,
        body: Vec<u8>,
        last: bool,
    },
}

/// The thread's own.
#[derive(Debug)]
pub(crate) struct Receiver {
    pub(crate) lane: Arc<Lane>,
    pub(crate) tls: Option<Box<ClientConnection>>,
    inbox: Inbox,
    phase: Phase,
}

impl Receiver {
    pub(crate) fn new(lane: Arc<Lane>, tls: Option<Box<ClientConnection>>, inbox: Inbox) -> Self {
        Self { lane, tls, inbox, phase: Phase::Head }
    }

    /// Until the connection ends.
    pub(crate) fn run(mut self, shared: &Arc<Shared>) {
        let Err(why) = self.serve(shared);
        self.lane.end();
        let half_read = match mem::replace(&mut self.phase, Phase::Head) {
            Phase::Data { cookie, memory, .. } => Some((cookie, memory)),
            Phase::Head | Phase::Offset { .. } | Phase::Small { .. } => None,
        };
        shared.with(|state, work| {
            if let Some((cookie, memory)) = half_read {
                state.sent_on(cookie, self.lane.id).expect("it was in the table when its data began").put_back(memory);
            }
            state.lost(&self.lane, &why, work);
        });
        shared.notify_connector();
    }

    fn serve(&mut self, shared: &Arc<Shared>) -> Result<std::convert::Infallible, Lost> {
        loop {
            // Encrypts what was begun since.
            self.send_encrypted()?;
            if self.lane.is_closing() {
                // The farewell may have been put there a moment ago.
                self.send_encrypted()?;
                return Err(Lost::Closed);
            }
            let ready = self.wait()?;
            if self.tls.is_none() && ready.contains(PollFlags::OUT) {
                self.lane.resume();
            }
            if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                self.receive(shared)?;
            }
        }
    }

    /// Waits until the socket is ready or somebody wakes the thread.
    fn wait(&self) -> Result<PollFlags, Lost> {
        let wants_out = match &self.tls {
            None => self.lane.is_full(),
            Some(tls) => tls.wants_write(),
        };
        let flags = if wants_out { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let waker = self.lane.waker();
        let mut fds = [PollFd::new(&self.lane.socket, flags), PollFd::new(&waker, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Lost::Io(error.into())),
        }
        if !fds[1].revents().is_empty() {
            // The counter is zero if another wake-up was read together with this one.
            let _ = rustix::io::read(waker, &mut [0; 8]);
        }
        Ok(fds[0].revents())
    }

    /// Encrypts and sends as much as the socket takes.
    fn send_encrypted(&mut self) -> Result<(), Lost> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        loop {
            self.lane.encrypt(&mut tls.writer())?;
            if !tls.wants_write() {
                return Ok(());
            }
            match tls.write_tls(&mut Raw(self.lane.socket.as_fd())) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives what is there, and completes what it completes.
    fn receive(&mut self, shared: &Arc<Shared>) -> Result<(), Lost> {
        loop {
            let direct = match &mut self.phase {
                Phase::Data { memory, at, end, .. } => &mut memory[*at..*end],
                Phase::Head | Phase::Offset { .. } | Phase::Small { .. } => &mut [],
            };
            let received = match self.inbox.receive(&self.lane.socket, self.tls.as_deref_mut(), direct) {
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            if let Phase::Data { at, .. } = &mut self.phase {
                *at += received;
            }
            shared.with(|state, work| self.digest(state, work))?;
            // In the clear poll(2) tells whether more is there; TLS may have decrypted more than was read.
            if self.tls.is_none() && !matches!(self.phase, Phase::Data { .. }) {
                return Ok(());
            }
            // What the completions have begun has to be sent before more is received.
            self.send_encrypted()?;
        }
    }

    /// Reads what was received.
    fn digest(&mut self, state: &mut State, work: &mut Work) -> Result<(), Lost> {
        loop {
            match &mut self.phase {
                Phase::Head => {
                    let Some((head, len)) = head(self.inbox.unread())? else { return Ok(()) };
                    self.inbox.consume(len);
                    self.phase = self.begin(head, state, work)?;
                }
                Phase::Offset { cookie, len, last } => {
                    let Some(offset) = data_offset(self.inbox.unread()) else { return Ok(()) };
                    self.inbox.consume(DATA_OFFSET_BYTES);
                    let piece = state.sent_on(*cookie, self.lane.id).ok_or(Violation::ForeignCookie(*cookie))?;
                    let range = piece.assembly.data(offset, *len)?;
                    let memory = piece.lend();
                    self.phase = Phase::Data { cookie: *cookie, memory, at: range.start, end: range.end, last: *last };
                }
                Phase::Data { memory, at, end, .. } => {
                    let unread = self.inbox.unread();
                    let bytes = unread.len().min(*end - *at);
                    memory[*at..*at + bytes].copy_from_slice(&unread[..bytes]);
                    *at += bytes;
                    let is_whole = at == end;
                    self.inbox.consume(bytes);
                    if !is_whole {
                        return Ok(());
                    }
                    if let Phase::Data { cookie, memory, last, .. } = mem::replace(&mut self.phase, Phase::Head) {
                        let piece = state.sent_on(cookie, self.lane.id).ok_or(Violation::ForeignCookie(cookie))?;
                        piece.put_back(memory);
                        if last {
                            state.answered(cookie, work)?;
                        }
                    }
                }
                Phase::Small { cookie, kind, len, body, last } => {
                    let unread = self.inbox.unread();
                    let bytes = unread.len().min(*len - body.len());
                    body.extend_from_slice(&unread[..bytes]);
                    self.inbox.consume(bytes);
                    if body.len() < *len {
                        return Ok(());
                    }
                    let piece = state.sent_on(*cookie, self.lane.id).ok_or(Violation::ForeignCookie(*cookie))?;
                    piece.small(*kind, body)?;
                    if *last {
                        state.answered(*cookie, work)?;
                    }
                    self.phase = Phase::Head;
                }
            }
        }
    }

    /// The head of a reply or chunk has come.
    fn begin(&self, head: Head, state: &mut State, work: &mut Work) -> Result<Phase, Lost> {
        let (Head::Simple { cookie, .. } | Head::Chunk { cookie, .. }) = head;
        let piece = state.sent_on(cookie, self.lane.id).ok_or(Violation::ForeignCookie(cookie))?;
        let (body, last) = match head {
            Head::Simple { error, .. } => (piece.assembly.simple(error)?, true),
            Head::Chunk { kind, last, len, .. } => (piece.assembly.chunk(kind, last, len)?, last),
        };
        Ok(match (body, head) {
            (Body::Empty, _) => {
                if last {
                    state.answered(cookie, work)?;
                }
                Phase::Head
            }
            (Body::AllData, _) => {
                let memory = piece.lend();
                Phase::Data { cookie, at: 0, end: memory.len(), memory, last }
            }
            (Body::Data { len }, _) => Phase::Offset { cookie, len, last },
            (Body::Small, Head::Chunk { kind, len, .. }) => {
                let len = usize::try_from(len).expect("checked against a bound of 8 MiB");
                Phase::Small { cookie, kind, len, body: Vec::new(), last }
            }
            (Body::Small, Head::Simple { .. }) => unreachable!("only chunks have such a body"),
        })
    }
}
