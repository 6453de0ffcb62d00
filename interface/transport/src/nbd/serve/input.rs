//! Waiting for the client: to send more, or to read more.

use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno as Os,
};

use super::{Phase, Shared, State, StepEnd, Worker};

/// Interval at which to check whether another worker, which came back to a closed gate, has left its request to this
/// one.
const ASIDE_LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// Interval at which a worker that has passed the lead on and got it back checks that it still has it: a worker without
/// it can stand in for the next.
const LEAD_LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// The handshake is completed within this time, or the connection ends.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// A peer that has sent a part of a request, or reads no replies, goes on within this time, or the connection ends.
const STALL_LIMIT: Duration = Duration::from_secs(300);

impl Worker<'_, '_> {
    /// The received input cannot be processed, or the output has no room: sends, and receives.
    pub(super) fn fill(&mut self, shared: MutexGuard<'_, Shared>) -> StepEnd {
        let connection = self.connection;
        let record = shared.record;
        self.replies = 0;
        let was_left = connection.unsent(&record) > 0;
        let Ok(all_sent) = connection.send(&record) else { return StepEnd::Closed };
        if all_sent && was_left && (connection.unparsed(&record) > 0 || record.aside != 0) {
            // There may be room now for a request that had none.
            return StepEnd::Again;
        }
        // While the gate was closed no core read from the client.
        let (is_over, since) = (shared.is_over, shared.since.max(self.admitted));
        if is_over && all_sent {
            return if record.aside == 0 { StepEnd::Closed } else { self.pause(shared) };
        }
        drop(shared);
        let is_established = State::from_word(record.negotiated).is_some_and(|s| s.phase == Phase::Transmission);
        if !is_established && since.elapsed() > HANDSHAKE_LIMIT {
            tracing::info!(connection = connection.number, "an NBD client did not finish its handshake in time");
            return StepEnd::Closed;
        }
        let has_room = !is_over && connection.has_room(&record);
        if has_room && !all_sent {
            // A client may send everything it has to send before it reads.
            match connection.receive(self.access.index()) {
                Err(Os::AGAIN | Os::INTR) => {}
                other => return self.received(other),
            }
        }
        if !all_sent || !has_room {
            let mut what = PollFlags::empty();
            what.set(PollFlags::IN, has_room);
            what.set(PollFlags::OUT, !all_sent);
            return if what.is_empty() { self.pause(connection.lock()) } else { self.poll(what) };
        }
        let is_idle = is_established && connection.unparsed(&record) == 0 && record.skip == 0 && record.long.is_none();
        self.receive(is_idle, record.aside != 0)
    }

    /// Receives. Waits without limit only when the peer owes nothing, and no other worker's request may be left to this
    /// worker.
    pub(super) fn receive(&mut self, is_idle: bool, has_aside: bool) -> StepEnd {
        let (access, pass, connection) = (self.access, self.pass, self.connection);
        let received = self.buffers.spin.until(|| match connection.receive(access.index()) {
            Err(Os::AGAIN | Os::INTR) if access.may_read(pass) && connection.lead.is_with(access.index()) => None,
            other => Some(other),
        });
        if let Some(result) = received {
            return self.received(result);
        }
        if is_idle {
            self.waiting = None;
        }
        let begin = Instant::now();
        let limit = match (has_aside, connection.lead.passed() > 0) {
            (true, _) => Some(ASIDE_LOOK),
            (false, true) => Some(LEAD_LOOK),
            (false, false) => None,
        };
        let turn = if is_idle { self.sleep(limit) } else { self.poll(PollFlags::IN) };
        self.buffers.spin.slept(begin.elapsed());
        if turn != StepEnd::Again {
            return turn;
        }
        self.received(connection.receive(access.index()))
    }

    /// Sleeps until the client sends something, the gate is closed, or it is time to check.
    fn sleep(&self, limit: Option<Timespec>) -> StepEnd {
        match self.poll_socket(PollFlags::IN, limit.as_ref()) {
            Ok(_) | Err(Os::INTR) => StepEnd::Again,
            Err(_) => StepEnd::Closed,
        }
    }

    /// Waits for the client; the leader also waits for what others leave to it. Returns what the socket is ready for.
    fn poll_socket(&self, what: PollFlags, limit: Option<&Timespec>) -> Result<PollFlags, Os> {
        let (connection, lead) = (self.connection, &self.connection.lead);
        let socket = PollFd::from_borrowed_fd(connection.socket(), what);
        // While no other worker has ever had the lead, there are no others.
        if lead.passed() == 0 || !lead.is_with(self.access.index()) {
            let mut polled = [socket];
            rustix::event::poll(&mut polled, limit)?;
            return Ok(polled[0].revents());
        }
        let mut polled = [socket, PollFd::from_borrowed_fd(connection.nudges(), PollFlags::IN)];
        rustix::event::poll(&mut polled, limit)?;
        if !polled[1].revents().is_empty() {
            connection.nudged();
            if !lead.is_with(self.access.index()) {
                // The event was meant for another worker.
                connection.nudge();
            }
        }
        Ok(polled[0].revents())
    }

    pub(super) fn received(&mut self, result: Result<usize, Os>) -> StepEnd {
        match result {
            Ok(0) => self.connection.lock().is_over = true,
            Ok(_) => self.waiting = None,
            Err(Os::AGAIN | Os::INTR) => {}
            Err(_) => return StepEnd::Closed,
        }
        StepEnd::Again
    }

    pub(super) fn has_waited_too_long(&mut self) -> bool {
        let since = *self.waiting.get_or_insert_with(Instant::now);
        let too_long = since.elapsed() > STALL_LIMIT;
        if too_long {
            tracing::info!(connection = self.connection.number, "an NBD client has stopped in the middle");
        }
        too_long
    }

    /// Waits until the socket can be read or written. The connection ends when that takes too long.
    pub(super) fn poll(&mut self, what: PollFlags) -> StepEnd {
        if self.has_waited_too_long() {
            return StepEnd::Closed;
        }
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        match self.poll_socket(what, Some(&second)) {
            Err(Os::INTR) => {}
            Ok(ready) => {
                if ready.contains(PollFlags::OUT) {
                    self.waiting = None;
                }
                let has_gone = ready.contains(PollFlags::HUP) && !what.contains(PollFlags::IN);
                if ready.contains(PollFlags::ERR) || has_gone {
                    return StepEnd::Closed;
                }
            }
            Err(_) => return StepEnd::Closed,
        }
        StepEnd::Again
    }
}
