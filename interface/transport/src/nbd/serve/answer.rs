//! Replies: those that go through the output ring, and those whose data goes straight to the socket.
//!
//! A large reply has its head in the ring and its data nowhere: the record says which request is answered, and the number of
//! bytes sent says how far. Whoever goes on with it reads the data anew. While it goes out nothing else can be put out.

use std::{ops::Range, thread};

use everdisk_proto::connection::{Direct, OUTPUT_BYTES, Record};
use rustix::{event::PollFlags, io::Errno as Os};

use super::{
    Command, Connection, Errno, Failure, Mine, NbdError, PAUSE, PIECE, Request, State, Turn, Worker, is_io, reply, told,
};
use crate::nbd::execute::{Done, INLINE_MAX};

/// Room that every reply finds beside its data.
const HEAD_MAX: usize = 8 << 10;
/// So many bytes are sent although more may come together.
const MUCH: u64 = 64 << 10;

/// Whether a reply of any kind has room in the output.
pub(super) fn has_room(connection: &Connection, record: &Record) -> bool {
    connection.unsent(record) <= (OUTPUT_BYTES - INLINE_MAX - HEAD_MAX) as u64
}

/// Whether enough has come together to be sent.
pub(super) fn is_much(connection: &Connection, record: &Record) -> bool {
    connection.unsent(record) >= MUCH
}

/// Only READ and BLOCK_STATUS are answered with chunks.
const fn in_chunks(request: &Request, state: State) -> bool {
    match request.command {
        Command::Read => state.structured,
        Command::BlockStatus => true,
        _ => false,
    }
}

/// Appends the reply to a request that failed; false when there is no room.
#[must_use]
pub(super) fn refuse(
    connection: &Connection,
    record: &mut Record,
    state: State,
    request: &Request,
    error: NbdError,
) -> bool {
    let mut buf = [0; reply::ERROR_BYTES_MAX];
    connection.append(record, failure(&mut buf, state, request, error))
}

fn failure<'b>(
    buf: &'b mut [u8; reply::ERROR_BYTES_MAX],
    state: State,
    request: &Request,
    error: NbdError,
) -> &'b [u8] {
    if state.structured && in_chunks(request, state) {
        let len = reply::error(buf, request.cookie, error, error.message(), true).unwrap_or(0);
        return buf.get(..len).unwrap_or_default();
    }
    let simple = reply::simple(request.cookie, Err(error));
    let (head, _) = buf.split_at_mut(simple.len());
    head.copy_from_slice(&simple);
    head
}

/// The head of a reply whose data follows it.
enum Head {
    Simple([u8; reply::SIMPLE_BYTES]),
    Chunk([u8; reply::DATA_BYTES]),
}

impl Head {
    /// Before `len` bytes from `done` of the request on.
    fn new(request: &Request, state: State, done: u32, len: u32) -> Self {
        if in_chunks(request, state) {
            let is_last = done + len == request.len;
            Self::Chunk(reply::data(request.cookie, request.offset + u64::from(done), len, is_last))
        } else {
            Self::Simple(reply::simple(request.cookie, Ok(())))
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Simple(bytes) => bytes,
            Self::Chunk(bytes) => bytes,
        }
    }
}

impl Worker<'_, '_> {
    /// Answers a request of this worker's that went well.
    pub(super) fn answer(&mut self, request: &Request, state: State, done: Done) -> Turn {
        match done {
            Done::Data(len) if request.len as usize > INLINE_MAX => self.begin_direct(request, state, len),
            Done::Data(len) => {
                let head = Head::new(request, state, 0, request.len);
                self.put_out(request, head.bytes(), len, false)
            }
            Done::Nothing if in_chunks(request, state) => self.put_out(request, &reply::none(request.cookie), 0, false),
            Done::Nothing => self.put_out(request, &reply::simple(request.cookie, Ok(())), 0, false),
            Done::Extents(extents) => {
                let mut buf = [0; HEAD_MAX];
                match reply::block_status(&mut buf, request.cookie, &extents, true) {
                    Some(len) => self.put_out(request, buf.get(..len).unwrap_or_default(), 0, false),
                    None => self.fail(request, state, Errno(Os::IO.raw_os_error())),
                }
            }
        }
    }

    /// Answers a request of this worker's that failed.
    pub(super) fn fail(&mut self, request: &Request, state: State, errno: Errno) -> Turn {
        let mut buf = [0; reply::ERROR_BYTES_MAX];
        let bytes = failure(&mut buf, state, request, told(request, errno));
        self.put_out(request, bytes, 0, is_io(errno))
    }

    /// Commits a reply, followed by `data` bytes of the buffer: the request is answered.
    fn put_out(&mut self, request: &Request, head: &[u8], data: usize, is_io_error: bool) -> Turn {
        let connection = self.connection;
        loop {
            let mut shared = connection.lock();
            let Some(mine) = shared.mine(self.seat.index()) else { return Turn::Abandoned };
            let mut record = shared.record;
            match mine {
                Mine::Current => record.parsed += Request::BYTES as u64 + request.payload(),
                Mine::Aside(index) => record.aside &= !(1 << index),
            }
            if connection.append(&mut record, head)
                && (data == 0 || connection.append(&mut record, self.buffers.data.part(0..data)))
            {
                connection.commit(&mut shared, record);
                shared.let_go(self.seat.index());
                self.leave(request, is_io_error);
                return self.replied(&shared);
            }
            drop(shared);
            if let Some(turn) = self.wait_for_room() {
                return turn;
            }
        }
    }

    fn leave(&self, request: &Request, is_io_error: bool) {
        let len = if is_io_error { 0 } else { u64::from(request.len) };
        match request.command {
            Command::Read => self.seat.leave(len, 0, is_io_error),
            Command::Write => self.seat.leave(0, len, is_io_error),
            _ => self.seat.leave(0, 0, is_io_error),
        }
    }

    /// Lets the output drain a little, or another worker's large reply go out. Some: this worker is not let in again.
    pub(super) fn wait_for_room(&mut self) -> Option<Turn> {
        self.seat.read_on();
        let sent = {
            let shared = self.connection.lock();
            self.connection.send(&shared.record)
        };
        if sent.is_err() || self.has_waited_too_long() {
            return Some(Turn::Closed);
        }
        thread::sleep(PAUSE);
        (!self.enter()).then_some(Turn::Shut)
    }

    /// Waits until the socket takes more. Some: this worker is not let in again.
    fn wait_for_output(&mut self) -> Option<Turn> {
        self.seat.read_on();
        match self.poll(PollFlags::OUT) {
            Turn::Again => (!self.enter()).then_some(Turn::Shut),
            turn => Some(turn),
        }
    }

    /// Commits the head of a large reply; the first `have` bytes of its data stand in the buffer.
    fn begin_direct(&mut self, request: &Request, state: State, have: usize) -> Turn {
        let connection = self.connection;
        loop {
            let mut shared = connection.lock();
            let index = match (shared.mine(self.seat.index()), shared.vacancy()) {
                (None, _) => return Turn::Abandoned,
                (Some(Mine::Aside(index)), _) => Some(index),
                (Some(Mine::Current), Some(index)) => {
                    self.put_aside(&mut shared, request, index, self.seat.index());
                    Some(index)
                }
                (Some(Mine::Current), None) => None,
            };
            let mut record = shared.record;
            let len = if in_chunks(request, state) { request.len.min(chunk_max()) } else { request.len };
            let place = index.and_then(|index| u8::try_from(index).ok());
            if let Some(index) = place
                && connection.append(&mut record, Head::new(request, state, 0, len).bytes())
            {
                record.direct = Some(Direct { index, done: 0, len });
                connection.commit(&mut shared, record);
                drop(shared);
                return self.direct(request, state, 0..have);
            }
            drop(shared);
            if let Some(turn) = self.wait_for_room() {
                return turn;
            }
        }
    }

    /// Sends the data of a large reply that is in this worker's hands. `have`: which part of it stands in the buffer.
    pub(super) fn direct(&mut self, request: &Request, state: State, mut have: Range<usize>) -> Turn {
        let connection = self.connection;
        let mut is_stuck = false;
        loop {
            let mut shared = connection.lock();
            let mut record = shared.record;
            let (Some(Mine::Aside(index)), Some(direct)) = (shared.mine(self.seat.index()), record.direct) else {
                return Turn::Abandoned;
            };
            let Ok(is_headed) = connection.send(&record) else { return Turn::Closed };
            let sent = connection.memory().sent().saturating_sub(record.committed);
            let at = direct.done as usize + usize::try_from(sent).unwrap_or(usize::MAX);
            let end = (direct.done + direct.len) as usize;
            if !is_headed || at < end {
                let sent = if !is_headed {
                    Err(Os::AGAIN)
                } else if have.contains(&at) {
                    let part = at - have.start..have.end.min(end) - have.start;
                    connection.send_direct(self.buffers.data.part(part))
                } else if let Some(range) =
                    self.disk.in_memory(request.offset + at as u64, (end - at).min(PIECE) as u64)
                    && !is_stuck
                {
                    let sent = connection.send_file(&range);
                    // Nothing sent, and no reason: it has to be read to learn why.
                    is_stuck = sent.is_ok_and(|n| n == 0);
                    sent
                } else {
                    drop(shared);
                    match self.read_piece(request, at, end) {
                        Ok(piece) => have = piece,
                        Err(Failure::Abandoned) => return self.abandon(),
                        Err(Failure::Errno(errno)) => {
                            // The data was promised: there is no other way to say that it does not come.
                            tracing::error!(connection = connection.number, errno = errno.0, "closed within a reply");
                            return Turn::Closed;
                        }
                    }
                    continue;
                };
                drop(shared);
                match sent {
                    Ok(_) | Err(Os::INTR) => {}
                    Err(Os::AGAIN) => {
                        if let Some(turn) = self.wait_for_output() {
                            return turn;
                        }
                    }
                    Err(_) => return Turn::Closed,
                }
                continue;
            }
            let left = request.len - (direct.done + direct.len);
            let (mut failed, mut is_io_error) = (None, false);
            let there = have.contains(&end) || self.is_in_memory(request, end);
            if left > 0 && !there {
                drop(shared);
                match self.read_piece(request, end, request.len as usize) {
                    Ok(piece) => {
                        have = piece;
                        continue;
                    }
                    Err(Failure::Abandoned) => return self.abandon(),
                    Err(Failure::Errno(errno)) => (failed, is_io_error) = (Some(told(request, errno)), is_io(errno)),
                }
                shared = connection.lock();
                if shared.mine(self.seat.index()) != Some(Mine::Aside(index)) {
                    return Turn::Abandoned;
                }
                // Another request may have been put aside meanwhile.
                record = shared.record;
            }
            record.committed += u64::from(direct.len);
            record.direct = None;
            if left == 0 || failed.is_some() {
                if let Some(error) = failed {
                    let mut buf = [0; reply::ERROR_BYTES_MAX];
                    let at = request.offset + end as u64;
                    let len = reply::error_at(&mut buf, request.cookie, error, error.message(), at, true).unwrap_or(0);
                    let _ = connection.append(&mut record, buf.get(..len).unwrap_or_default());
                }
                record.aside &= !(1 << index);
                connection.commit(&mut shared, record);
                shared.let_go(self.seat.index());
                self.leave(request, is_io_error);
                return Turn::Again;
            }
            let next = Direct { done: direct.done + direct.len, len: left.min(chunk_max()), ..direct };
            let _ = connection.append(&mut record, Head::new(request, state, next.done, next.len).bytes());
            record.direct = Some(next);
            connection.commit(&mut shared, record);
        }
    }

    /// Whether the next chunk of the request can be sent from where it lies.
    fn is_in_memory(&self, request: &Request, at: usize) -> bool {
        let len = (request.len as usize).saturating_sub(at).min(PIECE) as u64;
        self.disk.in_memory(request.offset + at as u64, len).is_some()
    }

    /// Reads a piece of the request's range, from `at` on, into the buffer; the piece.
    fn read_piece(&mut self, request: &Request, at: usize, end: usize) -> Result<Range<usize>, Failure> {
        let piece = at..end.min(at + PIECE);
        let hold = self.seat.hold(self.pass);
        self.disk.read(&hold, request.offset + at as u64, self.buffers.data.first(piece.len()))?;
        Ok(piece)
    }
}

/// Bytes of the largest chunk.
fn chunk_max() -> u32 {
    u32::try_from(PIECE).unwrap_or(u32::MAX)
}
