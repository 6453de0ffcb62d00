//! A connection as a core has it: the socket and the memory that were lent to it, and what its workers share.
//!
//! ```text
//!  socket ─► input ring ─► request ─► carried out ─► output ring ─► socket
//!            received      parsed        │           committed      sent       positions in the two streams
//!                                        └ one new record
//! ```
//! The core that has the gate finds `received` and `sent` as the kernel wrote them down, and the record of the last
//! step that was done. So nothing else has to be handed over. A worker touches the memory only while its ticket says
//! that it reads or is busy.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
    time::{Duration, Instant},
};

use everdisk_proto::{
    connection::{ASIDE_MAX, INPUT_BYTES, OUTPUT_BYTES, Record, ended},
    frame::LentConnection,
};
use everdisk_sys::{connection::ConnectionMemory, file::FileRange};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::{event::EventfdFlags, io::Errno as Os, net::AddressFamily};

#[cfg(test)]
use super::death::stored;
use super::{
    request::{Command, Request},
    state::{Phase, State},
};
use crate::channel::Lead;

/// The most that is received at once: it is still in the CPU's cache when it is carried out.
const RECEIVE_MAX: usize = 512 << 10;

/// A connection that was lent to this core.
#[derive(Debug)]
pub struct Connection {
    memory: ConnectionMemory,
    socket: OwnedFd,
    /// The interface's description of it.
    pub lent: LentConnection,
    /// Its number.
    pub number: u64,
    /// The worker that reads from it.
    pub lead: Lead,
    /// Whether large replies are sent from where they lie in memory. On TCP that is slower than a copy, because there
    /// sendfile(2) sends 64 KiB at a time.
    pub(super) lends: bool,
    shared: Mutex<Shared>,
    /// Signalled at each new record while a worker waits for one.
    changed: Condvar,
    /// An eventfd that the leader polls while it waits for the client.
    nudge: OwnedFd,
}

/// What the workers of a connection share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The valid record.
    pub(super) record: Record,
    /// The generation under which the record was read; 0 before the first.
    generation: u64,
    /// The worker that carries out the request (or the piece of a long one) at `record.parsed`.
    pub(super) current: Option<Current>,
    /// The workers that carry out the requests that were put aside, by their index.
    pub(super) hands: [Option<usize>; ASIDE_MAX],
    /// The peer has ended its direction of the stream.
    pub(super) is_over: bool,
    /// When this core began to serve it.
    pub(super) since: Instant,
    /// Workers that wait for a new record.
    waiting: usize,
}

/// A request that is being carried out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Current {
    /// Index of the worker's ticket.
    pub(super) worker: usize,
    /// The request; none when it is a piece of a long one.
    pub(super) request: Option<Request>,
}

/// Where the request of a worker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mine {
    /// It is at `record.parsed`.
    Current,
    /// It was put aside.
    Aside(usize),
}

/// The memory does not hold a connection that can be continued.
#[derive(Debug, thiserror::Error)]
#[error("the connection's memory does not make sense")]
pub(super) struct Broken;

impl Connection {
    /// A connection whose lead is with the worker that has this ticket.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn new(lent: LentConnection, socket: OwnedFd, memory: ConnectionMemory, first: usize) -> io::Result<Self> {
        let shared = Shared {
            record: Record::default(),
            generation: 0,
            current: None,
            hands: [None; ASIDE_MAX],
            is_over: false,
            since: Instant::now(),
            waiting: 0,
        };
        let lends = rustix::net::getsockname(&socket).is_ok_and(|name| name.address_family() == AddressFamily::UNIX);
        let nudge = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            memory,
            socket,
            lent,
            number: lent.number,
            lends,
            lead: Lead::new(first),
            shared: Mutex::new(shared),
            changed: Condvar::new(),
            nudge,
        })
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Its memory.
    pub const fn memory(&self) -> &ConnectionMemory {
        &self.memory
    }

    /// Whether it has ended, here or in another core.
    pub fn has_ended(&self) -> bool {
        self.memory.has_ended()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock()
    }

    /// A worker was admitted under a generation. If that is new, the worker reads the connection's position from the
    /// record. `size`: the export's bytes.
    pub(super) fn resume(&self, generation: u64, size: u64) -> Result<(), Broken> {
        let mut shared = self.lock();
        if shared.generation == generation {
            return Ok(());
        }
        let page = &self.memory;
        let turn = page.turn.load(Acquire);
        let words = page.place_of(turn).each_ref().map(|word| word.load(Relaxed));
        let record = Record::decode(&words).ok_or(Broken)?;
        if !self.is_sound(&record, size) {
            return Err(Broken);
        }
        let before = page.generation.swap(generation, Relaxed);
        if before != 0 {
            page.carried.fetch_add(1, Relaxed);
        }
        *shared = Shared {
            record,
            generation,
            current: None,
            hands: [None; ASIDE_MAX],
            is_over: false,
            since: Instant::now(),
            waiting: shared.waiting,
        };
        Ok(())
    }

    /// Checks that a record left by another core is valid, with everything it refers to. What is accepted here counts
    /// as this core's own from then on.
    fn is_sound(&self, record: &Record, size: u64) -> bool {
        let (received, sent) = (self.memory.received(), self.memory.sent());
        let received_is = received.checked_sub(self.tail(record)).is_some_and(|taken| taken <= INPUT_BYTES as u64);
        // The data of a direct reply is not in the ring.
        let direct = record.direct.map_or(0, |direct| u64::from(direct.len));
        let unsent = record.committed.checked_add(direct).and_then(|end| end.checked_sub(sent));
        let sent_is = unsent.is_some_and(|unsent| unsent <= OUTPUT_BYTES as u64 + direct);
        // Requests are checked before they are begun, in a state that does not change any more.
        let begins = record.aside == 0 && record.long.is_none() && record.direct.is_none();
        let (negotiated_is, state) = match record.negotiated {
            0 => (begins, State::START),
            word => match State::from_word(word) {
                Some(state) => (begins || matches!(state.phase, Phase::Transmission | Phase::Ended), state),
                None => (false, State::START),
            },
        };
        let long_is = record.long.is_none_or(|long| {
            Request::from_words(long.request).is_some_and(|request| {
                request.command == Command::Write && request.check(state, size).is_ok() && long.done <= request.len
            })
        });
        let is_there = |(request, data): (Request, u64)| {
            request.check(state, size).is_ok()
                && (request.payload() == 0 || data.checked_add(request.payload()).is_some_and(|end| end <= received))
        };
        let asides_are = asides(record).all(|index| self.look_aside(index).is_some_and(is_there));
        let direct_is = record.direct.is_none_or(|direct| {
            let request = self.look_aside(usize::from(direct.index)).map(|(request, _)| request);
            request.is_some_and(|request| {
                let end = u64::from(direct.done) + u64::from(direct.len);
                request.command == Command::Read && end <= u64::from(request.len)
            })
        });
        record.parsed <= received && received_is && sent_is && negotiated_is && long_is && asides_are && direct_is
    }

    /// Makes `record` the valid one.
    pub(super) fn commit(&self, shared: &mut Shared, record: Record) {
        let turn = self.memory.turn.load(Relaxed).wrapping_add(1);
        for (place, word) in self.memory.place_of(turn).iter().zip(record.encode()) {
            place.store(word, Relaxed);
            stored();
        }
        self.memory.turn.store(turn, Release);
        stored();
        shared.record = record;
        if shared.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Waits for another worker's record, at most for this long.
    pub(super) fn await_record(&self, mut shared: MutexGuard<'_, Shared>, limit: Duration) {
        shared.waiting += 1;
        self.changed.wait_for(&mut shared, limit);
        shared.waiting -= 1;
    }

    /// The input before this position is no longer needed.
    fn tail(&self, record: &Record) -> u64 {
        asides(record).map(|index| self.memory.aside[index][4].load(Relaxed)).fold(record.parsed, u64::min)
    }

    /// Writes a request into the table. It counts once its bit is committed. `payload`: where its data begins.
    pub(super) fn write_aside(&self, index: usize, request: &Request, payload: u64) {
        let words = &self.memory.aside[index];
        let [a, b, c, d] = request.to_words();
        for (word, value) in words.iter().zip([a, b, c, d, payload]) {
            word.store(value, Relaxed);
            stored();
        }
    }

    /// A request of the table, and where its data begins; `None` when the words are not a valid request.
    fn look_aside(&self, index: usize) -> Option<(Request, u64)> {
        let [a, b, c, d, payload, ..] = self.memory.aside[index].each_ref().map(|word| word.load(Relaxed));
        Some((Request::from_words([a, b, c, d])?, payload))
    }

    /// A request that was put aside, and where its data begins.
    pub(super) fn read_aside(&self, index: usize) -> (Request, u64) {
        self.look_aside(index).expect("what stands in the table was checked or written by this core")
    }

    /// Something was left to the leader, which may be waiting for the client.
    pub(super) fn nudge(&self) {
        // A full counter has signalled it already.
        let _ = rustix::io::write(&self.nudge, &1_u64.to_ne_bytes());
    }

    /// The eventfd by which the leader learns of that.
    pub(super) fn nudges(&self) -> BorrowedFd<'_> {
        self.nudge.as_fd()
    }

    /// The leader has learnt of it.
    pub(super) fn nudged(&self) {
        // Another worker may have read it first.
        let _ = rustix::io::read(&self.nudge, &mut [0; 8]);
    }

    /// Bytes received and not parsed.
    pub(super) fn unparsed(&self, record: &Record) -> u64 {
        self.memory.received().saturating_sub(record.parsed)
    }

    /// Copies input out of the ring; false when it is not there.
    #[must_use]
    pub(super) fn read_input(&self, record: &Record, position: u64, into: &mut [u8]) -> bool {
        let there = position.saturating_add(into.len() as u64) <= self.memory.received();
        if there {
            let at = place(position.wrapping_sub(record.input_base), INPUT_BYTES);
            assert!(self.memory.read_input(at, into), "a request fits into the ring");
        }
        there
    }

    /// Bytes committed and not sent, without those that go out directly.
    pub(super) fn unsent(&self, record: &Record) -> u64 {
        record.committed.saturating_sub(self.memory.sent())
    }

    /// Puts a reply behind the committed output. It counts once it is committed. False when there is no room.
    #[must_use]
    pub(super) fn append(&self, record: &mut Record, reply: &[u8]) -> bool {
        let room = (OUTPUT_BYTES as u64).saturating_sub(self.unsent(record));
        if record.direct.is_some() || reply.len() as u64 > room {
            return false;
        }
        assert!(self.memory.write_output(place(record.committed, OUTPUT_BYTES), reply), "a reply fits into the ring");
        stored();
        record.committed += reply.len() as u64;
        true
    }

    /// Sends committed output as far as the socket takes it. Returns whether nothing is left.
    pub(super) fn send(&self, record: &Record) -> Result<bool, Os> {
        loop {
            let sent = self.memory.sent();
            let left = record.committed.saturating_sub(sent);
            if left == 0 {
                return Ok(true);
            }
            let left = usize::try_from(left).map_err(|_| Os::INVAL)?;
            match os(self.memory.send(self.socket(), place(sent, OUTPUT_BYTES), left.min(OUTPUT_BYTES))) {
                Ok(n) if n == left => return Ok(true),
                Ok(_) | Err(Os::INTR) => {}
                Err(Os::AGAIN) => return Ok(false),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Sends bytes that go out directly, as far as the socket takes them.
    pub(super) fn send_direct(&self, data: &[u8]) -> Result<usize, Os> {
        os(self.memory.send_direct(self.socket(), data))
    }

    /// Sends a part of a file, as far as the socket takes it.
    pub(super) fn send_file(&self, range: &FileRange<'_>) -> Result<usize, Os> {
        let len = usize::try_from(range.len).expect("a piece lies in memory");
        os(self.memory.send_file(self.socket(), range.file, range.offset, len))
    }

    /// Receives what there is, if this worker still has the lead. It does so under the lock. So the next leader's first
    /// check comes before it, and then this worker has lost the lead; or it comes after it, and finds what was
    /// received.
    pub(super) fn receive(&self, worker: usize) -> Result<usize, Os> {
        let mut shared = self.lock();
        if !self.lead.is_with(worker) {
            return Err(Os::AGAIN);
        }
        let received = self.memory.received();
        let mut record = shared.record;
        if record.parsed == received && record.aside == 0 && record.input_base != received {
            // The ring is empty: what comes next goes to its beginning, which is in the CPU's cache.
            record.input_base = received;
            self.commit(&mut shared, record);
        }
        let taken = usize::try_from(received - self.tail(&record)).map_err(|_| Os::INVAL)?;
        let max = INPUT_BYTES.saturating_sub(taken).min(RECEIVE_MAX);
        if max == 0 {
            return Err(Os::AGAIN);
        }
        os(self.memory.receive(self.socket(), place(received.wrapping_sub(record.input_base), INPUT_BYTES), max))
    }

    /// Whether anything can be received.
    pub(super) fn has_room(&self, record: &Record) -> bool {
        self.memory.received().saturating_sub(self.tail(record)) < INPUT_BYTES as u64
    }

    /// Ends it: the peer reads the end of the stream, and every process that was lent it closes it.
    pub(super) fn end(&self, broken: bool) {
        let how = if broken { ended::BROKEN } else { ended::IN_ORDER };
        self.memory.ended.store(how, Release);
        // The peer may have gone.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl Shared {
    /// Where this worker's request stands. None: it belongs to another core, or to another generation.
    pub(super) fn mine(&self, worker: usize) -> Option<Mine> {
        if self.current.is_some_and(|current| current.worker == worker) {
            return Some(Mine::Current);
        }
        self.hands.iter().position(|hand| *hand == Some(worker)).map(Mine::Aside)
    }

    /// The worker no longer carries anything out.
    pub(super) fn let_go(&mut self, worker: usize) {
        if self.current.is_some_and(|current| current.worker == worker) {
            self.current = None;
        }
        self.hands.iter_mut().filter(|hand| **hand == Some(worker)).for_each(|hand| *hand = None);
    }

    /// A request that was put aside and that no worker carries out.
    pub(super) fn orphan(&self) -> Option<usize> {
        asides(&self.record).find(|index| self.hands[*index].is_none())
    }

    /// A free place in the table.
    pub(super) fn vacancy(&self) -> Option<usize> {
        (0..ASIDE_MAX).find(|index| self.record.aside >> index & 1 == 0)
    }
}

/// The places of the table that hold a request.
fn asides(record: &Record) -> impl Iterator<Item = usize> + use<> {
    let aside = record.aside;
    (0..ASIDE_MAX).filter(move |index| aside >> index & 1 == 1)
}

fn place(position: u64, ring: usize) -> usize {
    usize::try_from(position % ring as u64).expect("a ring lies in memory")
}

/// The point where tests make a worker die.
#[cfg(not(test))]
const fn stored() {}

fn os(result: io::Result<usize>) -> Result<usize, Os> {
    stored();
    result.map_err(|e| Os::from_io_error(&e).expect("every place is in its ring"))
}

#[cfg(test)]
mod tests;
