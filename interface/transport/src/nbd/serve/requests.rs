//! Requests of a client: taken out of the input, put aside, carried out.

use everdisk_proto::connection::Long;
use parking_lot::MutexGuard;
use rustix::io::Errno as Os;

use super::{
    Command, Current, Mine, PIECE, Phase, REFUSED_MAX, REPLIES_MAX, Record, Request, Shared, State, StepEnd, Stopped,
    Worker, answer, reply,
};
use crate::nbd::{execute::execute, protocol::cmd_flag};

impl Worker<'_, '_> {
    /// Moves the request at `parsed` into the table.
    pub(super) fn put_aside(&self, shared: &mut Shared, request: &Request, index: usize, worker: usize) -> Record {
        let mut record = shared.record;
        record.parsed += Request::BYTES as u64;
        // The data of a write stays in the input; for other requests nothing has to.
        let data = if request.payload() > 0 { record.parsed } else { u64::MAX };
        self.connection.write_aside(index, request, data);
        record.parsed += request.payload();
        record.aside |= 1 << index;
        self.connection.commit(shared, record);
        shared.current = None;
        shared.hands[index] = Some(worker);
        record
    }

    pub(super) fn transmit(&mut self, mut shared: MutexGuard<'_, Shared>, state: State) -> StepEnd {
        let connection = self.connection;
        let mut record = shared.record;
        if let Some(long) = record.long {
            return self.piece(shared, long);
        }
        let mut head = [0; Request::BYTES];
        if !connection.read_input(&record, record.parsed, &mut head) {
            return self.fill(shared);
        }
        let Some(request) = Request::decode(&head) else {
            tracing::info!(connection = connection.number, "an NBD client sent something else than a request");
            return StepEnd::Closed;
        };
        let payload = request.payload();
        if let Err(error) = request.check(state, self.export.size) {
            if payload > REFUSED_MAX {
                return StepEnd::Closed;
            }
            record.parsed += Request::BYTES as u64;
            record.skip = payload;
            if !answer::refuse(connection, &mut record, state, &request, error) {
                return self.fill(shared);
            }
            connection.commit(&mut shared, record);
            return self.replied(&shared);
        }
        if request.command == Command::Disconnect {
            record.parsed += Request::BYTES as u64;
            record.negotiated = state.with(Phase::Ended).to_word();
            connection.commit(&mut shared, record);
            return StepEnd::Again;
        }
        if payload > PIECE as u64 {
            record.parsed += Request::BYTES as u64;
            record.long = Some(Long { request: request.to_words(), done: 0, error: 0 });
            connection.commit(&mut shared, record);
            return StepEnd::Again;
        }
        let data = record.parsed + Request::BYTES as u64;
        if connection.unparsed(&record) < Request::BYTES as u64 + payload || !answer::has_room(connection, &shared) {
            return self.fill(shared);
        }
        if payload > 0 {
            let there = connection.read_input(&record, data, self.buffers.data.first(request.len as usize));
            assert!(there, "so much was received");
        }
        shared.current = Some(Current { worker: self.access.index(), request: Some(request) });
        drop(shared);
        self.carry_out(&request, state)
    }

    /// Takes over a request that was put aside, and whose worker is gone.
    pub(super) fn resume_aside(&mut self, mut shared: MutexGuard<'_, Shared>, index: usize) -> StepEnd {
        let record = shared.record;
        let state = State::from_word(record.negotiated).expect("a request follows the handshake");
        let (request, data) = self.connection.read_aside(index);
        let is_direct = record.direct.is_some();
        if !is_direct && !answer::has_room(self.connection, &shared) {
            return self.fill(shared);
        }
        let is_write = request.payload() > 0;
        if is_write {
            let there = self.connection.read_input(&record, data, self.buffers.data.first(request.len as usize));
            assert!(there, "what was put aside was received");
        }
        shared.hands[index] = Some(self.access.index());
        drop(shared);
        if !is_direct {
            return self.carry_out(&request, state);
        }
        if !self.enter() {
            return StepEnd::Shut;
        }
        self.direct(&request, state, 0..0)
    }

    /// Asks to be let in for a request of this worker. If refused, the worker lets go of the request.
    pub(super) fn enter(&mut self) -> bool {
        let may = self.access.enter(self.pass);
        if !may {
            self.connection.lock().let_go(self.access.index());
        } else if std::mem::take(&mut self.is_first) {
            self.access.note_first_request();
        }
        may
    }

    /// Executes a request that is in this worker's hands, and answers it.
    fn carry_out(&mut self, request: &Request, state: State) -> StepEnd {
        if !self.enter() {
            return StepEnd::Shut;
        }
        let hold = self.access.hold(self.pass, Some(&self.connection.lead), self.told(request));
        let done = execute(self.disk, &hold, request, &mut self.buffers.data, self.connection.lends);
        self.tells = hold.tells();
        match done {
            Ok(done) => self.answer(request, state, done),
            Err(Stopped::Failed(errno)) => self.fail(request, state, errno),
            Err(Stopped::Abandoned) => self.abandon(),
        }
    }

    /// The number of failed flushes that the client was told of, where the request may have to report one.
    pub(super) fn told(&self, request: &Request) -> Option<u64> {
        let flushes = request.command == Command::Flush || request.has(cmd_flag::FUA);
        flushes.then(|| self.connection.lock().record.errors_told)
    }

    /// The record that answers this worker's request includes the failed flushes that the reply reports.
    pub(super) fn note_told(&mut self, record: &mut Record) {
        if let Some(errors) = self.tells.take() {
            record.errors_told = record.errors_told.max(errors);
        }
    }

    pub(super) fn abandon(&self) -> StepEnd {
        self.connection.lock().let_go(self.access.index());
        StepEnd::Abandoned
    }

    /// Writes a piece of a long write, once its data is there.
    fn piece(&mut self, mut shared: MutexGuard<'_, Shared>, mut long: Long) -> StepEnd {
        let connection = self.connection;
        let request = Request::from_words(long.request).expect("the record was checked or written by this core");
        let record = shared.record;
        let left = (request.len - long.done) as usize;
        let len = left.min(PIECE);
        if connection.unparsed(&record) < len as u64 || !answer::has_room(connection, &shared) {
            return self.fill(shared);
        }
        assert!(connection.read_input(&record, record.parsed, self.buffers.data.first(len)), "so much was received");
        shared.current = Some(Current { worker: self.access.index(), request: None });
        drop(shared);
        if !self.enter() {
            return StepEnd::Shut;
        }
        // What follows it in the input has to wait in any case.
        let hold = self.access.hold(self.pass, None, self.told(&request));
        let offset = request.offset + u64::from(long.done);
        let mut result = Ok(());
        if long.error == 0 {
            result = self.disk.write(&hold, offset, self.buffers.data.first(len));
            if len == left && request.has(cmd_flag::FUA) && result.is_ok() {
                result = self.disk.flush(&hold);
            }
        }
        self.tells = hold.tells();
        let mut is_io_error = false;
        match result {
            Ok(()) => {}
            Err(Stopped::Abandoned) => return self.abandon(),
            Err(Stopped::Failed(errno)) => {
                is_io_error = errno.0 == Os::IO.raw_os_error();
                long.error = request.error(errno.0).code();
            }
        }
        long.done += u32::try_from(len).expect("a piece of a request");
        loop {
            let mut shared = connection.lock();
            if shared.mine(self.access.index()) != Some(Mine::Current) {
                return StepEnd::Abandoned;
            }
            let mut record = shared.record;
            record.parsed += len as u64;
            record.long = (len < left).then_some(long);
            if len < left || connection.append(&mut record, &reply::simple_code(request.cookie, long.error)) {
                self.note_told(&mut record);
                connection.commit(&mut shared, record);
                shared.let_go(self.access.index());
                self.access.leave(0, len as u64, is_io_error);
                return if len == left { self.replied(&shared) } else { StepEnd::Again };
            }
            drop(shared);
            // A reply of another worker has taken the room.
            if let Some(turn) = self.wait_for_room(None) {
                return turn;
            }
        }
    }

    /// A reply was committed. It is sent when enough are collected, or when there is nothing else to do (see `fill`).
    pub(super) fn replied(&mut self, shared: &Shared) -> StepEnd {
        self.replies += 1;
        if self.replies < REPLIES_MAX && !answer::is_much(self.connection, &shared.record) {
            return StepEnd::Again;
        }
        self.replies = 0;
        if self.connection.send(&shared.record).is_err() { StepEnd::Closed } else { StepEnd::Again }
    }
}
