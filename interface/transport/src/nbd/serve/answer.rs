//! Replies: what is put into the output ring. For replies whose data goes directly to the socket, only the head is put
//! there.

use std::time::{Duration, Instant};

use everdisk_proto::connection::{OUTPUT_BYTES, Record};
use rustix::event::PollFlags;

use super::{
    Command, Connection, Errno, Mine, NbdError, PAUSE, Request, Shared, State, StepEnd, Worker, is_io, reply, told,
};
use crate::nbd::execute::{Done, INLINE_MAX};

/// Room that every reply needs beside its data.
const HEAD_MAX: usize = 8 << 10;
/// When the client has read nothing for this long, a worker stops waiting for room: it is needed elsewhere.
const STANDSTILL: Duration = Duration::from_millis(20);
/// A worker waits for room no longer than this in any case.
const ROOM_PATIENCE: Duration = Duration::from_secs(1);
/// From this many bytes on, output is sent although more replies may be collected.
const MUCH: u64 = 64 << 10;

/// Whether a reply of any kind has room in the output. While the client reads what it gets, the replies that other
/// workers will put out do not count. When output is left over, the client may have stopped reading, and they count.
pub(super) fn has_room(connection: &Connection, shared: &Shared) -> bool {
    let unsent = connection.unsent(&shared.record);
    unsent == 0 || unsent + promised(connection, shared) <= (OUTPUT_BYTES - INLINE_MAX - HEAD_MAX) as u64
}

/// The room that the replies to the requests in the hands of workers will take.
fn promised(connection: &Connection, shared: &Shared) -> u64 {
    let in_hands = shared.hands.iter().enumerate().filter(|(_, hand)| hand.is_some());
    let requests = in_hands.map(|(index, _)| connection.read_aside(index).0);
    requests.map(|request| if is_inline(&request) { u64::from(request.len) } else { HEAD_MAX as u64 }).sum()
}

const fn is_inline(request: &Request) -> bool {
    matches!(request.command, Command::Read) && request.len as usize <= INLINE_MAX
}

/// Whether enough output was collected to send it.
pub(super) fn is_much(connection: &Connection, record: &Record) -> bool {
    connection.unsent(record) >= MUCH
}

/// Only READ and BLOCK_STATUS are answered with chunks.
pub(super) const fn in_chunks(request: &Request, state: State) -> bool {
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
        let len = reply::error(buf, request.cookie, error, error.message(), true).expect("the longest has room");
        return &buf[..len];
    }
    let simple = reply::simple(request.cookie, Err(error));
    let (head, _) = buf.split_at_mut(simple.len());
    head.copy_from_slice(&simple);
    head
}

/// The head of a reply whose data follows it.
pub(super) enum Head {
    Simple([u8; reply::SIMPLE_BYTES]),
    Chunk([u8; reply::DATA_BYTES]),
}

impl Head {
    /// The head for `len` bytes from `done` of the request on.
    pub(super) fn new(request: &Request, state: State, done: u32, len: u32) -> Self {
        if in_chunks(request, state) {
            let is_last = done + len == request.len;
            Self::Chunk(reply::data(request.cookie, request.offset + u64::from(done), len, is_last))
        } else {
            Self::Simple(reply::simple(request.cookie, Ok(())))
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Simple(bytes) => bytes,
            Self::Chunk(bytes) => bytes,
        }
    }
}

impl Worker<'_, '_> {
    /// Answers a request of this worker that succeeded.
    pub(super) fn answer(&mut self, request: &Request, state: State, done: Done) -> StepEnd {
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
                let len = reply::block_status(&mut buf, request.cookie, &extents, true);
                self.put_out(request, &buf[..len.expect("some extents, and no more than have room")], 0, false)
            }
        }
    }

    /// Answers a request of this worker that failed.
    pub(super) fn fail(&mut self, request: &Request, state: State, errno: Errno) -> StepEnd {
        let mut buf = [0; reply::ERROR_BYTES_MAX];
        let bytes = failure(&mut buf, state, request, told(request, errno));
        self.put_out(request, bytes, 0, is_io(errno))
    }

    /// Commits a reply, followed by `data` bytes of the buffer: the request is answered.
    fn put_out(&mut self, request: &Request, head: &[u8], data: usize, is_io_error: bool) -> StepEnd {
        let (connection, begin) = (self.connection, Instant::now());
        loop {
            let mut shared = connection.lock();
            let Some(mine) = shared.mine(self.access.index()) else { return StepEnd::Abandoned };
            let mut record = shared.record;
            match mine {
                Mine::Current => record.parsed += Request::BYTES as u64 + request.payload(),
                Mine::Aside(index) => record.aside &= !(1 << index),
            }
            if connection.append(&mut record, head)
                && (data == 0 || connection.append(&mut record, self.buffers.data.part(0..data)))
            {
                self.note_told(&mut record);
                connection.commit(&mut shared, record);
                shared.let_go(self.access.index());
                self.leave(request, is_io_error);
                return self.replied(&shared);
            }
            drop(shared);
            if let Some(turn) = self.wait_for_room(Some((request, begin))) {
                return turn;
            }
        }
    }

    pub(super) fn leave(&self, request: &Request, is_io_error: bool) {
        let len = if is_io_error { 0 } else { u64::from(request.len) };
        match request.command {
            Command::Read => self.access.leave(len, 0, is_io_error),
            Command::Write => self.access.leave(0, len, is_io_error),
            _ => self.access.leave(0, 0, is_io_error),
        }
    }

    /// Waits for the output to drain a little, or for another worker's large reply to go out. Some: this worker is not
    /// let in again, or leaves its request, which has waited since the given time, to the leader, which may be this
    /// worker itself. The leader carries the request out again when there is room, so only a read may be left.
    pub(super) fn wait_for_room(&mut self, request: Option<(&Request, Instant)>) -> Option<StepEnd> {
        self.access.read_on();
        let (connection, worker) = (self.connection, self.access.index());
        let sent = {
            let shared = connection.lock();
            connection.send(&shared.record)
        };
        let now = connection.memory().sent();
        if now != std::mem::replace(&mut self.seen_sent, now) {
            self.waiting = None;
        }
        if sent.is_err() || self.has_waited_too_long() {
            return Some(StepEnd::Closed);
        }
        let has_patience = |(request, since): (&Request, Instant)| {
            let stands_still = self.waiting.is_some_and(|since| since.elapsed() >= STANDSTILL);
            request.command != Command::Read || !(stands_still || since.elapsed() >= ROOM_PATIENCE)
        };
        if !request.is_none_or(has_patience) {
            connection.lock().let_go(worker);
            connection.nudge();
            return Some(StepEnd::Again);
        }
        connection.await_record(connection.lock(), PAUSE);
        (!self.enter()).then_some(StepEnd::Shut)
    }

    /// Waits until the socket takes more. Some: this worker is not let in again.
    pub(super) fn wait_for_output(&mut self) -> Option<StepEnd> {
        self.access.read_on();
        match self.poll(PollFlags::OUT) {
            StepEnd::Again => (!self.enter()).then_some(StepEnd::Shut),
            turn => Some(turn),
        }
    }
}
