//! Replies whose data goes directly to the socket, from where it lies in memory or from the worker's own buffer.
//!
//! Such a reply has its head in the output ring, and its data in no shared memory. The record says which request is
//! answered, and the number of bytes sent says how far. The worker that goes on with it reads the data anew. While such
//! a reply goes out, no other can be put out.
//!
//! ```text
//!  head ─► data ─► … all of the chunk is out ─► the last one? ─ yes ─► answered
//!   ▲                                              no
//!   └──────────── its data is readable ◄────────────┘
//! ```

use std::{ops::Range, time::Instant};

use everdisk_proto::connection::Direct;
use everdisk_sys::file::FileRange;
use rustix::io::Errno as Os;

use super::{
    Errno, Mine, PIECE, Request, State, StepEnd, Stopped, Worker,
    answer::{Head, in_chunks},
    is_io, reply, told,
};

/// The progress of a chunk of data.
enum Pushed {
    /// Some of it was sent.
    Some,
    /// The socket takes no more.
    Full,
    /// The next part, up to the end of the chunk, has to be read.
    Lacks(Range<usize>),
    /// All of it is out, up to this byte of the request.
    Out(usize),
}

/// Bytes of the largest chunk: a piece.
const DIRECT_CHUNK_MAX: u32 = 1 << 20;
const _: () = assert!(DIRECT_CHUNK_MAX as usize == PIECE);

impl Worker<'_, '_> {
    /// Commits the head of a large reply; the first `have` bytes of its data are in the buffer.
    pub(super) fn begin_direct(&mut self, request: &Request, state: State, have: usize) -> StepEnd {
        let (connection, begin) = (self.connection, Instant::now());
        loop {
            let mut shared = connection.lock();
            let index = match (shared.mine(self.access.index()), shared.vacancy()) {
                (None, _) => return StepEnd::Abandoned,
                (Some(Mine::Aside(index)), _) => Some(index),
                (Some(Mine::Current), Some(index)) => {
                    self.put_aside(&mut shared, request, index, self.access.index());
                    Some(index)
                }
                (Some(Mine::Current), None) => None,
            };
            let mut record = shared.record;
            let len = if in_chunks(request, state) { request.len.min(DIRECT_CHUNK_MAX) } else { request.len };
            let place = index.map(|index| u8::try_from(index).expect("the table has 32 places"));
            if let Some(index) = place
                && connection.append(&mut record, Head::new(request, state, 0, len).bytes())
            {
                record.direct = Some(Direct { index, done: 0, len });
                connection.commit(&mut shared, record);
                drop(shared);
                return self.direct(request, state, 0..have);
            }
            drop(shared);
            if let Some(turn) = self.wait_for_room(Some((request, begin))) {
                return turn;
            }
        }
    }

    /// Sends the data of a large reply that is in this worker's hands. `have`: the part of it that is in the buffer.
    pub(super) fn direct(&mut self, request: &Request, state: State, mut have: Range<usize>) -> StepEnd {
        let mut may_lend = true;
        loop {
            let lacks = match self.push(request, &have, &mut may_lend) {
                Err(turn) => return turn,
                Ok(Pushed::Some) => continue,
                Ok(Pushed::Full) => match self.wait_for_output() {
                    Some(turn) => return turn,
                    None => continue,
                },
                Ok(Pushed::Lacks(range)) => range,
                Ok(Pushed::Out(end)) => match self.next_chunk(request, state, end, &have, None) {
                    Err(turn) => return turn,
                    Ok(None) => continue,
                    Ok(Some(lacks)) => lacks,
                },
            };
            let begins_chunk = lacks.end == usize::MAX;
            match self.read_piece(request, lacks.start, lacks.end.min(request.len as usize)) {
                Ok(piece) => have = piece,
                Err(Stopped::Abandoned) => return self.abandon(),
                Err(Stopped::Failed(errno)) if begins_chunk => {
                    match self.next_chunk(request, state, lacks.start, &have, Some(errno)) {
                        Err(turn) => return turn,
                        Ok(_) => return StepEnd::Closed,
                    }
                }
                Err(Stopped::Failed(errno)) => {
                    // The head has promised the data: closing the connection is the only way to report that it does not
                    // come.
                    tracing::error!(connection = self.connection.number, errno = errno.0, "closed within a reply");
                    return StepEnd::Closed;
                }
            }
        }
    }

    /// Sends what can be sent of the chunk that is under way. `may_lend`: whether data may be sent from where it lies.
    fn push(&mut self, request: &Request, have: &Range<usize>, may_lend: &mut bool) -> Result<Pushed, StepEnd> {
        let connection = self.connection;
        let shared = connection.lock();
        let record = shared.record;
        let (Some(Mine::Aside(_)), Some(direct)) = (shared.mine(self.access.index()), record.direct) else {
            return Err(StepEnd::Abandoned);
        };
        match connection.send(&record) {
            Ok(true) => {}
            Ok(false) => return Ok(Pushed::Full),
            Err(_) => return Err(StepEnd::Closed),
        }
        let out = connection.memory().sent().checked_sub(record.committed).expect("what was committed is out");
        let at = direct.done as usize + usize::try_from(out).expect("no more than a chunk");
        let end = (direct.done + direct.len) as usize;
        if at >= end {
            return Ok(Pushed::Out(end));
        }
        let sent = if have.contains(&at) {
            let part = at - have.start..have.end.min(end) - have.start;
            connection.send_direct(self.buffers.data.part(part))
        } else if let (true, Some(range)) = (*may_lend, self.in_memory(request, at, end)) {
            let sent = connection.send_file(&range);
            // Nothing was sent, and no error was returned: a read shows the reason.
            *may_lend = !sent.is_ok_and(|n| n == 0);
            sent
        } else {
            return Ok(Pushed::Lacks(at..end));
        };
        match sent {
            Ok(_) | Err(Os::INTR) => Ok(Pushed::Some),
            Err(Os::AGAIN) => Ok(Pushed::Full),
            Err(_) => Err(StepEnd::Closed),
        }
    }

    /// A chunk is out, up to `end`. Commits the head of the next one if its data is readable, else returns the range
    /// that has to be read for it. Returns the turn when the request is answered: because this was the last chunk, or
    /// because the next `failed`.
    fn next_chunk(
        &mut self,
        request: &Request,
        state: State,
        end: usize,
        have: &Range<usize>,
        failed: Option<Errno>,
    ) -> Result<Option<Range<usize>>, StepEnd> {
        let connection = self.connection;
        let is_there = have.contains(&end) || self.in_memory(request, end, request.len as usize).is_some();
        let mut shared = connection.lock();
        let mut record = shared.record;
        let (Some(Mine::Aside(index)), Some(direct)) = (shared.mine(self.access.index()), record.direct) else {
            return Err(StepEnd::Abandoned);
        };
        let left = request.len - (direct.done + direct.len);
        if left > 0 && !is_there && failed.is_none() {
            return Ok(Some(end..usize::MAX));
        }
        record.committed += u64::from(direct.len);
        record.direct = None;
        if left > 0 && failed.is_none() {
            let next = Direct { done: direct.done + direct.len, len: left.min(DIRECT_CHUNK_MAX), ..direct };
            let head = Head::new(request, state, next.done, next.len);
            assert!(connection.append(&mut record, head.bytes()), "nothing else is in the ring");
            record.direct = Some(next);
            connection.commit(&mut shared, record);
            return Ok(None);
        }
        if let Some(errno) = failed {
            let (mut buf, error) = ([0; reply::ERROR_BYTES_MAX], told(request, errno));
            let at = request.offset + end as u64;
            let len = reply::error_at(&mut buf, request.cookie, error, error.message(), at, true);
            let bytes = &buf[..len.expect("the longest has room")];
            assert!(connection.append(&mut record, bytes), "nothing else is in the ring");
        }
        record.aside &= !(1 << index);
        connection.commit(&mut shared, record);
        shared.let_go(self.access.index());
        self.leave(request, failed.is_some_and(is_io));
        Err(StepEnd::Again)
    }

    /// Where a piece of the request's range lies in memory, from `at` on.
    fn in_memory(&self, request: &Request, at: usize, end: usize) -> Option<FileRange<'_>> {
        if !self.connection.lends {
            return None;
        }
        let len = end.saturating_sub(at).min(PIECE) as u64;
        self.disk.in_memory(request.offset + at as u64, len)
    }

    /// Reads a piece of the request's range, from `at` on, into the buffer. Returns the piece.
    fn read_piece(&mut self, request: &Request, at: usize, end: usize) -> Result<Range<usize>, Stopped> {
        let piece = at..end.min(at + PIECE);
        let hold = self.access.hold(self.pass, None, None);
        self.disk.read(&hold, request.offset + at as u64, self.buffers.data.first(piece.len()))?;
        Ok(piece)
    }
}
