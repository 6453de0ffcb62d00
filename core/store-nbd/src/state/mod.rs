//! Everything the client knows, behind one lock: which commands have begun, which requests are on their way.
//!
//! ```text
//! begin ─▶ queue ─▶ [waiting for blocks or changes] ─▶ ready ─▶ sent ─▶ answered ─▶ next stage, or finished
//!                                                        ▲        │
//!                                                        └────────┘ the connection was lost
//! ```
//! No method calls out: what is to be sent and completed is collected in [`Work`] and done without the lock.

mod answer;
mod flushes;
mod plan;
mod ranges;
pub(crate) mod task;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use everdisk_proto::{in_flight::ENTRIES, nbd::wire::cmd};
use rustix::rand::{GetRandomFlags, getrandom};
use slab::Slab;

use crate::{
    codec::{assembly::Assembly, request},
    command::{Command, Completion, Done, Outcome, Shape},
    config::{Config, Offer},
    error::{Error, Kind},
    keeper::Keeper,
    lane::{Lane, Outgoing},
    receive::Lost,
};
use flushes::Flushes;
use ranges::Ranges;
use task::{Data, Memory, Part, Piece, Stage, Task};

/// What is to be done without the lock.
#[derive(Debug, Default)]
pub(crate) struct Work {
    sends: Vec<(Arc<Lane>, Outgoing)>,
    finished: Vec<Finished>,
    /// Connections that need not be kept any more.
    settled: Vec<u64>,
}

#[derive(Debug)]
struct Finished {
    completion: Completion,
    memory: Memory,
    result: Result<Done, Error>,
}

impl Work {
    /// Sends, then completes.
    pub(crate) fn run(self, keeper: Option<&dyn Keeper>) {
        if let Some(keeper) = keeper {
            self.settled.into_iter().for_each(|connection| keeper.drop(connection));
        }
        let mut sends = self.sends.into_iter().peekable();
        while let Some((lane, first)) = sends.next() {
            let same =
                std::iter::from_fn(|| sends.next_if(|(next, _)| next.id == lane.id).map(|(_, outgoing)| outgoing));
            lane.push(std::iter::once(first).chain(same));
        }
        for Finished { completion, memory, result } in self.finished {
            let memory = match memory {
                Memory::Here(memory) => memory,
                // The thread that has sent it may not have let go of it yet; this is rare, and waiting could take long.
                Memory::Shared(memory) => Arc::try_unwrap(memory).unwrap_or_else(|memory| memory.to_vec()),
                Memory::Lent => unreachable!("a request gives the memory back when it is answered or given up"),
            };
            completion.complete(Outcome { memory, result });
        }
    }
}

/// Whether commands are accepted.
#[derive(Debug)]
pub(crate) enum Health {
    /// They are, even while there is no connection.
    Serving,
    /// They fail with this until the server is back.
    Down(Error),
    /// They fail with this.
    Closed(Error),
}

/// Changes that were in flight on a connection that was lost. A server that lives on may still execute them, so they are not sent
/// again at once: one that is executed after what was sent again, and after a later change of the same range, would undo that.
#[derive(Debug)]
struct Held {
    until: Instant,
    connection: u64,
    changes: Vec<Piece>,
}

/// Numbers that are used once: a counter from a random beginning, mixed so that no two of them resemble each other (SplitMix64, Steele and
/// others, OOPSLA 2014, a bijection). Who does not see the traffic cannot guess one.
#[derive(Debug)]
struct Cookies(u64);

impl Cookies {
    fn new() -> Self {
        let mut seed = [0; 8];
        getrandom(&mut seed, GetRandomFlags::empty()).expect("the kernel has random numbers (getrandom(2))");
        Self(u64::from_ne_bytes(seed))
    }

    /// The next one. Never 0, which stands for none.
    fn next(&mut self) -> u64 {
        loop {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let cookie = mixed ^ (mixed >> 31);
            if cookie != 0 {
                return cookie;
            }
        }
    }
}

/// A place for a connection.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) lane: Option<Arc<Lane>>,
    /// Requests in flight.
    load: usize,
    /// Entries of the connection's in-flight table that are free.
    entries: Vec<usize>,
    /// When a request was last sent on it.
    used: Instant,
    /// Losses and failed attempts since the last answer.
    pub(crate) failures: u32,
    /// When to connect, if there is no connection.
    pub(crate) next_try: Instant,
    /// When it was connected.
    since: Instant,
}

/// Everything the client knows.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) node: Arc<str>,
    pub(crate) config: Config,
    pub(crate) offer: Offer,
    pub(crate) health: Health,
    pub(crate) slots: Vec<Slot>,
    /// Commands in the order of their beginning that have no requests yet.
    queue: VecDeque<usize>,
    tasks: Slab<Task>,
    /// Tasks that are not in the queue.
    active: usize,
    /// Requests to be sent.
    ready: VecDeque<Piece>,
    /// Requests to be answered, by their cookies.
    sent: HashMap<u64, Piece>,
    /// Bytes of the requests to be answered.
    bytes: u64,
    ranges: Ranges,
    flushes: Flushes,
    cookies: Cookies,
    order: u64,
    /// Since when there has been no connection that answers.
    pub(crate) trouble: Option<Instant>,
    /// Changes that were in flight on connections that were lost, in the order of the losses.
    held: VecDeque<Held>,
    pub(crate) losses: u64,
    pub(crate) lanes_ever: u64,
}

/// A request that changes the export and has not been answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutstandingWrite {
    /// The cookie of its reply.
    pub cookie: u64,
    /// The number of the connection it was sent on.
    pub connection: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl State {
    pub(crate) fn new(node: Arc<str>, mut config: Config, offer: Offer, slots: usize) -> Self {
        config.requests_max = config.requests_max.clamp(1, ENTRIES);
        let now = Instant::now();
        let slot =
            || Slot { lane: None, load: 0, entries: Vec::new(), used: now, failures: 0, next_try: now, since: now };
        Self {
            node,
            config,
            offer,
            health: Health::Serving,
            slots: std::iter::repeat_with(slot).take(slots).collect(),
            queue: VecDeque::new(),
            tasks: Slab::new(),
            active: 0,
            ready: VecDeque::new(),
            sent: HashMap::new(),
            bytes: 0,
            ranges: Ranges::default(),
            flushes: Flushes::default(),
            cookies: Cookies::new(),
            order: 0,
            trouble: None,
            held: VecDeque::new(),
            losses: 0,
            lanes_ever: 0,
        }
    }

    /// Begins a command.
    pub(crate) fn begin(&mut self, command: Command, completion: Completion, work: &mut Work) {
        let (shape, memory) = command.split();
        let memory = Memory::Here(memory);
        let refusal = match &self.health {
            Health::Serving => self.check(shape).err().map(|(kind, words)| Err(Error::new(kind, &self.node, words))),
            Health::Down(error) | Health::Closed(error) => Some(Err(error.clone())),
        };
        let is_empty = shape.range().is_some_and(|(_, len)| len == 0);
        let nothing = if matches!(shape, Shape::Status { .. }) { Done::Extents(Vec::new()) } else { Done::Plain };
        if let Some(result) = refusal.or_else(|| is_empty.then_some(Ok(nothing))) {
            work.finished.push(Finished { completion, memory, result });
            return;
        }
        let key = self.tasks.insert(Task::new(shape, completion, memory, self.flushes.is_suspect()));
        self.queue.push_back(key);
    }

    /// Sends as much as the window allows.
    pub(crate) fn pump(&mut self, work: &mut Work) {
        self.release_held(work);
        while let Some(slot) = self.pick() {
            if let Some(piece) = self.ready.front() {
                let fits =
                    self.sent.len() < self.config.requests_max && self.bytes + piece.bytes() <= self.config.bytes_max;
                if !fits && !self.sent.is_empty() {
                    return;
                }
                let piece = self.ready.pop_front().expect("looked at a moment ago");
                self.send(piece, slot, work);
            } else if self.active < self.config.requests_max.max(1)
                && let Some(key) = self.queue.pop_front()
            {
                self.admit(key, work);
            } else {
                return;
            }
        }
    }

    /// The connection with the fewest requests in flight; `None`: nothing may be sent now.
    fn pick(&mut self) -> Option<usize> {
        let connected = self.slots.iter().enumerate().filter(|(_, slot)| slot.lane.is_some());
        connected.min_by_key(|(_, slot)| slot.load).map(|(index, _)| index)
    }

    /// A task leaves the queue.
    fn admit(&mut self, key: usize, work: &mut Work) {
        self.active += 1;
        let shape = self.tasks[key].shape;
        self.tasks[key].stage = Stage::Waiting;
        if shape == Shape::Flush {
            for flush in self.flushes.begin_flush(key) {
                self.start(flush, work);
            }
            return;
        }
        if shape.changes() {
            self.tasks[key].epoch = Some(self.flushes.begin_change());
            let (offset, len) = shape.range().expect("a change has a range");
            if self.offer.blocks.min > 1 && !self.ranges.acquire(key, self.outward(offset, len)) {
                return;
            }
        }
        self.start(key, work);
    }

    fn send(&mut self, mut piece: Piece, slot: usize, work: &mut Work) {
        let lane = Arc::clone(self.slots[slot].lane.as_ref().expect("picked because it is connected"));
        let cookie = self.cookies.next();
        self.slots[slot].load += 1;
        self.slots[slot].used = Instant::now();
        piece.entry = piece.changes().then(|| {
            let entry = self.slots[slot].entries.pop().expect("there are as many as requests in flight");
            lane.note(entry, cookie);
            entry
        });
        self.bytes += piece.bytes();
        (piece.lane, piece.slot) = (lane.id, slot);
        piece.assembly = Assembly::new(piece.asked(lane.agreed));
        if matches!(piece.data, Data::Later) {
            piece.data = Data::Fill(vec![0; plan::index(piece.len.into())]);
        }
        if piece.command == cmd::FLUSH && self.tasks[piece.task].shape == Shape::Flush {
            self.tasks[piece.task].mark = self.flushes.covers();
        }
        let head = request(piece.command, piece.flags, cookie, piece.offset, piece.len);
        let payload = match &piece.data {
            Data::Send(bytes, range) => Some((Arc::clone(bytes), range.clone())),
            Data::None | Data::Fill(_) => None,
            Data::Later | Data::Lent => unreachable!("a request has its memory when it is sent"),
        };
        let entry = piece.entry;
        self.sent.insert(cookie, piece);
        work.sends.push((lane, Outgoing { head, payload, entry }));
    }

    /// When the connections that are idle then are to be tried; `None` while there are no connections.
    pub(crate) fn next_try_of_idle(&self, now: Instant) -> Option<Instant> {
        let connected = self.slots.iter().filter(|slot| slot.lane.is_some());
        connected.map(|slot| if slot.load == 0 { slot.used } else { now }).min().map(|used| used + self.config.idle)
    }

    /// Reads a block on each connection that has been idle for long enough.
    pub(crate) fn try_idle(&mut self, work: &mut Work) {
        let len = self.offer.blocks.min;
        let is_idle = |slot: &Slot| slot.lane.is_some() && slot.load == 0 && slot.used.elapsed() >= self.config.idle;
        let idle: Vec<usize> = (0..self.slots.len()).filter(|slot| is_idle(&self.slots[*slot])).collect();
        for slot in idle {
            self.slots[slot].used = Instant::now();
            if self.offer.usable() < u64::from(len) {
                continue;
            }
            let shape = Shape::Read { offset: 0, len: len.into() };
            // Whether it succeeds does not matter: the reply tells what the server says of the connection.
            let key = self.tasks.insert(Task::new(shape, Completion::new(drop), Memory::Lent, false));
            (self.tasks[key].stage, self.tasks[key].left) = (Stage::Main, 1);
            self.active += 1;
            let piece =
                Piece { part: Part::Whole, data: Data::Later, ..Piece::new(key, self.order, cmd::READ, 0..len.into()) };
            self.order += 1;
            self.send(piece, slot, work);
        }
    }

    /// The outstanding request with this cookie, if it was sent on this connection.
    pub(crate) fn sent_on(&mut self, cookie: u64, lane: u64) -> Option<&mut Piece> {
        self.sent.get_mut(&cookie).filter(|piece| piece.lane == lane)
    }

    /// A connection is there.
    pub(crate) fn connected(&mut self, lane: &Arc<Lane>) {
        let slot = &mut self.slots[lane.slot];
        slot.lane = Some(Arc::clone(lane));
        slot.load = 0;
        slot.entries = (0..ENTRIES).rev().collect();
        slot.since = Instant::now();
        slot.used = slot.since;
        if self.tasks.is_empty() {
            // No answer will tell whether the server is well, so the handshake has to do.
            self.trouble = None;
        }
        if matches!(self.health, Health::Down(_)) {
            self.health = Health::Serving;
        }
    }

    /// The connection has ended. What was outstanding on it is sent again, in the order of its beginning.
    pub(crate) fn lost(&mut self, lane: &Lane, why: &Lost, work: &mut Work) {
        let now = Instant::now();
        let slot = &mut self.slots[lane.slot];
        if slot.lane.take_if(|current| current.id == lane.id).is_none() {
            return;
        }
        let lived = now.saturating_duration_since(slot.since);
        slot.failures = if lived > self.config.backoff_max { 0 } else { slot.failures };
        slot.load = 0;
        let delay = crate::reconnect::backoff(&self.config, slot.failures);
        slot.next_try = now + delay;
        slot.failures += 1;
        let cookies: Vec<u64> =
            self.sent.iter().filter(|(_, piece)| piece.lane == lane.id).map(|(cookie, _)| *cookie).collect();
        let mut again: Vec<Piece> = cookies.iter().filter_map(|cookie| self.sent.remove(cookie)).collect();
        again.sort_by_key(|piece| piece.order);
        let outstanding = again.len();
        self.bytes -= again.iter().map(Piece::bytes).sum::<u64>();
        let (changes, others): (Vec<_>, Vec<_>) = again.into_iter().partition(Piece::changes);
        self.put_back(others);
        let until = if changes.is_empty() { now } else { now + self.config.settle };
        self.held.push_back(Held { until, connection: lane.id, changes });
        self.release_held(work);
        if self.slots.iter().all(|slot| slot.lane.is_none()) {
            self.trouble.get_or_insert(now);
        }
        if let Health::Closed(error) = &self.health {
            let error = error.clone();
            return self.fail_if_alone(&error, work);
        }
        tracing::warn!(node = %self.node, outstanding, "connection to the node lost: {why}");
        self.losses += 1;
        if self.flushes.connection_lost(self.config.others_write) {
            self.tasks
                .iter_mut()
                .filter(|(_, task)| task.shape == Shape::Flush)
                .for_each(|(_, task)| task.suspect = true);
        }
    }

    /// Requests are to be sent again, before all others.
    fn put_back(&mut self, pieces: Vec<Piece>) {
        for piece in pieces.into_iter().rev() {
            self.ready.push_front(piece);
        }
    }

    /// When changes are to be sent again that were in flight on a connection that was lost.
    pub(crate) fn held_until(&self) -> Option<Instant> {
        self.held.front().map(|held| held.until)
    }

    /// Lets the changes go whose connections were lost long enough ago.
    fn release_held(&mut self, work: &mut Work) {
        if self.held.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(held) = self.held.pop_front_if(|held| held.until <= now) {
            work.settled.push(held.connection);
            self.put_back(held.changes);
        }
    }

    /// Fails everything, unless there is a connection: its thread may be filling the memory of a read.
    pub(crate) fn fail_if_alone(&mut self, error: &Error, work: &mut Work) {
        if self.slots.iter().any(|slot| slot.lane.is_some()) {
            return;
        }
        assert!(self.sent.is_empty(), "a connection that was lost takes its requests out of the table");
        // Until they have settled, their connections are kept.
        self.held.iter_mut().for_each(|held| held.changes.clear());
        for piece in std::mem::take(&mut self.ready) {
            if let (Part::Whole, Data::Fill(memory)) = (piece.part, piece.data) {
                self.tasks[piece.task].memory = Memory::Here(memory);
            }
        }
        self.queue.clear();
        self.ranges.clear();
        self.flushes.clear();
        self.active = 0;
        for task in self.tasks.drain() {
            let Task { completion, memory, .. } = task;
            work.finished.push(Finished { completion, memory, result: Err(error.clone()) });
        }
    }

    /// The server has been out of reach for too long: fails everything, also what comes, until it is back.
    pub(crate) fn give_up(&mut self, error: Error, work: &mut Work) {
        self.fail_if_alone(&error, work);
        self.health = Health::Down(error);
    }

    /// Ends the client.
    pub(crate) fn close(&mut self, work: &mut Work) -> Vec<Arc<Lane>> {
        let error = Error::new(Kind::Unavailable, &self.node, "the client was closed");
        self.fail_if_alone(&error, work);
        self.health = Health::Closed(error);
        self.slots.iter().filter_map(|slot| slot.lane.clone()).collect()
    }

    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.tasks.iter().map(|(_, task)| task.begun).min()
    }

    pub(crate) fn outstanding_writes(&self) -> Vec<OutstandingWrite> {
        let writes = self.sent.iter().filter(|(_, piece)| piece.changes()).map(|(cookie, piece)| OutstandingWrite {
            cookie: *cookie,
            connection: piece.lane,
            offset: piece.offset,
            len: piece.len,
        });
        let mut writes: Vec<OutstandingWrite> = writes.collect();
        writes.sort_by_key(|write| write.cookie);
        writes
    }
}
