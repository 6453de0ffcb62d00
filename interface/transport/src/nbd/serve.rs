//! A worker of the NBD front end. It serves one connection, as its first worker or as a stand-in for one that waits for
//! a storage node.
//!
//! ```text
//!          ┌──────► parked ── admitted ──► where does the record say that we are? ◄──────────────────────────┐
//!          │                                │                                                               │
//!          │                                ├─ a request was put aside and has no worker now    ─► execute ─┤
//!          │                                ├─ the next message is complete ─► negotiate, or execute ───────┤
//!          │                                └─ it is not ─► send what is committed, receive ────────────────┘
//!          └◄── the gate is closed, at any of these
//! ```
//! Each path back to the top has made one new record, or none. So it does not matter where a worker stops, or dies.

use std::time::{Duration, Instant};

use everdisk_gate::ticket::Pass;
use everdisk_proto::connection::Record;
use parking_lot::MutexGuard;
use rustix::io::Errno as Os;

use super::{
    connection::{Connection, Current, Mine, Shared},
    execute::{Data, PIECE},
    negotiation::{OPTION_BYTES_MAX, Step, step},
    protocol::PAYLOAD_MAX,
    reply::{self, NbdError},
    request::{Command, Request},
    spin::Spin,
    state::{Export, Phase, State},
};
use crate::{
    disk::{Disk, Errno, Stopped},
    worker::GateAccess,
};

mod answer;
mod direct;
mod input;
mod requests;

/// A worker that can only wait for another worker of the connection polls at this interval.
const PAUSE: Duration = Duration::from_millis(1);
/// Replies that are collected before they are sent: more of them would only delay the first.
const REPLIES_MAX: u32 = 16;
/// The longest refused WRITE whose data is discarded to stay in step.
const REFUSED_MAX: u64 = 2 * PAYLOAD_MAX as u64;

/// A worker's own memory, beside the connection's.
#[derive(Debug)]
pub struct Buffers {
    data: Data,
    spin: Spin,
}

impl Default for Buffers {
    fn default() -> Self {
        let mut data = Data::default();
        // The memory is allocated before the first request.
        data.first(1);
        Self { data, spin: Spin::default() }
    }
}

/// Why a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to.
    Stopped,
    /// The connection has ended.
    Closed,
}

/// The outcome of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StepEnd {
    /// Read the record again.
    Again,
    /// The gate is closed.
    Shut,
    /// The gate was closed while a request was carried out: it stays unanswered.
    Abandoned,
    /// The connection is to be closed.
    Closed,
}

/// A worker and what it works on.
struct Worker<'w, 'a> {
    access: &'w GateAccess<'a>,
    connection: &'w Connection,
    export: Export<'w>,
    disk: &'w dyn Disk,
    buffers: &'w mut Buffers,
    pass: Pass,
    /// When the gate admitted it.
    admitted: Instant,
    /// No request has been executed since the gate admitted this worker.
    is_first: bool,
    /// Replies committed since output was last sent.
    replies: u32,
    /// Since when the worker has waited for the peer in vain.
    waiting: Option<Instant>,
    /// The output position when the worker last waited for room.
    seen_sent: u64,
    /// The number of failed flushes that the reply to the request in hand reports.
    tells: Option<u64>,
}

/// Serves a connection until the connection or the core ends.
pub fn serve(
    access: &GateAccess<'_>,
    connection: &Connection,
    name: &str,
    disk: &dyn Disk,
    buffers: &mut Buffers,
) -> Ended {
    let export = Export { name, size: disk.size() };
    loop {
        if !connection.lead.is_with(access.index()) {
            access.idle();
            let stop = || access.must_stop() || connection.has_ended();
            if !connection.lead.wait(access.index(), stop) {
                return if connection.has_ended() { Ended::Closed } else { Ended::Stopped };
            }
        }
        let Some(pass) = access.wait(disk) else { return Ended::Stopped };
        if connection.has_ended() {
            access.park(false);
            return Ended::Closed;
        }
        let admitted = Instant::now();
        let worker = Worker {
            access,
            connection,
            export,
            disk,
            buffers,
            pass,
            admitted,
            is_first: true,
            replies: 0,
            waiting: None,
            seen_sent: 0,
            tells: None,
        };
        let turn = worker.run();
        if turn == StepEnd::Closed {
            connection.lead.rouse();
            access.park(false);
            return Ended::Closed;
        }
        access.park(turn == StepEnd::Abandoned);
    }
}

impl Worker<'_, '_> {
    /// Works until the gate is closed, another worker has the lead, or the connection is to be closed; it is closed
    /// here.
    fn run(mut self) -> StepEnd {
        let generation = self.pass.word().generation.0;
        if let Err(broken) = self.connection.resume(generation, self.export.size) {
            tracing::error!(connection = self.connection.number, %broken, "closed");
            self.connection.end(true);
            return StepEnd::Closed;
        }
        while self.connection.lead.goes_on(self.access.index()) && self.access.may_read(self.pass) {
            if self.connection.has_ended() {
                // Another worker has found that the client is gone. What it had in hand belongs to no worker any more.
                return StepEnd::Closed;
            }
            match self.turn() {
                StepEnd::Again => {}
                StepEnd::Closed => return self.close(),
                StepEnd::Shut => break,
                // Another core may serve the connection by now.
                StepEnd::Abandoned => return StepEnd::Abandoned,
            }
        }
        match self.flush() {
            StepEnd::Closed => self.close(),
            _ => StepEnd::Shut,
        }
    }

    /// Ends the connection, after sending the client what is possible.
    fn close(&self) -> StepEnd {
        let shared = self.connection.lock();
        // It may be over because the client has gone.
        let _ = self.connection.send(&shared.record);
        self.connection.end(false);
        StepEnd::Closed
    }

    /// Sends what is committed, as far as the socket takes it. Where the gate is closed, the client reads that and
    /// sends its next requests while the next core wakes up. Where another worker leads, that one sends the rest: this
    /// worker may be needed elsewhere.
    fn flush(&mut self) -> StepEnd {
        let sent = {
            let shared = self.connection.lock();
            self.connection.send(&shared.record)
        };
        match sent {
            Err(_) => return StepEnd::Closed,
            Ok(false) if !self.connection.lead.is_with(self.access.index()) => self.connection.nudge(),
            Ok(_) => {}
        }
        StepEnd::Again
    }

    fn turn(&mut self) -> StepEnd {
        let connection = self.connection;
        let mut shared = connection.lock();
        if let Some(current) = shared.current {
            // It belongs to the worker that had the lead before, and waits for a storage node.
            let Some((request, index)) = current.request.zip(shared.vacancy()) else { return self.pause(shared) };
            self.put_aside(&mut shared, &request, index, current.worker);
        }
        let record = shared.record;
        let orphan = match record.direct.map(|direct| usize::from(direct.index)) {
            Some(index) if shared.hands[index].is_none() => Some(index),
            Some(_) => return self.pause(shared),
            None => shared.orphan(),
        };
        if let Some(index) = orphan {
            return self.resume_aside(shared, index);
        }
        if record.skip > 0 {
            return self.skip(shared);
        }
        let state = if record.negotiated == 0 { Some(State::START) } else { State::from_word(record.negotiated) };
        match state {
            Some(state) if state.phase == Phase::Transmission => self.transmit(shared, state),
            Some(state) if state.phase == Phase::Ended => self.finish(shared),
            Some(state) => self.negotiate(shared, state),
            None => StepEnd::Closed,
        }
    }

    /// Discards input that is to be discarded.
    fn skip(&mut self, mut shared: MutexGuard<'_, Shared>) -> StepEnd {
        let mut record = shared.record;
        let there = self.connection.unparsed(&record).min(record.skip);
        if there == 0 {
            return self.fill(shared);
        }
        record.parsed += there;
        record.skip -= there;
        self.connection.commit(&mut shared, record);
        StepEnd::Again
    }

    fn negotiate(&mut self, mut shared: MutexGuard<'_, Shared>, state: State) -> StepEnd {
        let mut record = shared.record;
        let longest = 64 + OPTION_BYTES_MAX as usize;
        let there = usize::try_from(self.connection.unparsed(&record)).map_or(longest, |there| there.min(longest));
        let mut output = Vec::new();
        let input = self.buffers.data.first(there);
        assert!(self.connection.read_input(&record, record.parsed, input), "so much was received");
        let (consumed, skip, next) = match step(state, &self.export, input, &mut output) {
            Step::Need(_) => return self.fill(shared),
            Step::Done { consumed, skip, next } => (consumed, skip, next),
        };
        if !self.connection.append(&mut record, &output) {
            return self.fill(shared);
        }
        record.parsed += consumed as u64;
        record.skip = skip;
        record.negotiated = next.to_word();
        if next.phase == Phase::Transmission {
            // A failed flush before the client connected does not concern it.
            record.errors_told = self.access.flush_errors();
        }
        self.connection.commit(&mut shared, record);
        if next.phase == Phase::Transmission {
            tracing::debug!(connection = self.connection.number, structured = next.structured, "an NBD client");
        }
        StepEnd::Again
    }

    /// Nothing more is to be read: the connection ends when everything is answered and sent.
    fn finish(&mut self, mut shared: MutexGuard<'_, Shared>) -> StepEnd {
        shared.is_over = true;
        self.fill(shared)
    }

    /// Waits a moment for another worker of this connection.
    fn pause(&self, shared: MutexGuard<'_, Shared>) -> StepEnd {
        if self.connection.send(&shared.record).is_err() {
            return StepEnd::Closed;
        }
        self.connection.await_record(shared, PAUSE);
        StepEnd::Again
    }
}

const fn is_io(errno: Errno) -> bool {
    errno.0 == Os::IO.raw_os_error()
}

/// The client's error for an errno.
const fn told(request: &Request, errno: Errno) -> NbdError {
    request.error(errno.0)
}

#[cfg(test)]
mod tests;
