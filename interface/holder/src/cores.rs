//! The cores that have joined: their process handles, their connections, their slots in the segment.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release},
    time::{Duration, Instant},
};

use everdisk_proto::{
    frame::{CoreStatus, FromInterface, ToInterface},
    identity::Identity,
    ids::Slot,
    limits::CORES_MAX,
    segment::{CoreArea, Segment, thread_word, ticket_state},
};
use everdisk_sys::{
    link::{Link, LinkError},
    process,
    wake::{self, Who},
};

use crate::marks::Stopped;

/// A connection to a peer.
pub(crate) type PeerLink = Link<FromInterface, ToInterface>;

/// A core that has closed its connection is dead, or has connected again, within this time.
const UNLINKED_LIMIT: Duration = Duration::from_secs(2);

/// One core.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) pid: u32,
    pub(crate) handle: OwnedFd,
    /// Whether the marks show that its threads have stopped.
    pub(crate) stopped: Stopped,
    pub(crate) identity: Identity,
    /// `None` while the core reconnects.
    pub(crate) link: Option<PeerLink>,
    /// Since when its connection has been closed without a known reason.
    pub(crate) unlinked: Option<Instant>,
    /// It was asked to leave.
    pub(crate) leaves: bool,
    /// Why this interface killed it.
    pub(crate) killed: Option<String>,
    /// The core keeps the locks of the storage nodes; cores of earlier builds do not know of them.
    pub(crate) keeps_locks: bool,
}

impl Core {
    /// A core that has joined.
    pub(crate) fn new(
        pid: u32,
        handle: OwnedFd,
        identity: Identity,
        link: Option<PeerLink>,
        keeps_locks: bool,
    ) -> Self {
        let stopped = Stopped::default();
        Self { pid, handle, stopped, identity, link, unlinked: None, leaves: false, killed: None, keeps_locks }
    }

    /// Its connection has ended. Its process may live on and serve; only its process handle reports a death.
    pub(crate) fn unlink(&mut self, error: &LinkError) {
        self.link = None;
        if matches!(error, LinkError::Closed) {
            self.unlinked = Some(Instant::now());
        } else {
            tracing::warn!(pid = self.pid, %error, "the connection to a core was given up: what it sent cannot be used");
        }
    }

    /// A core that dies or leaves closes its connection first. Only a core that lives on after that is logged.
    pub(crate) fn look_at_link(&mut self) {
        if self.unlinked.is_some_and(|since| since.elapsed() >= UNLINKED_LIMIT) {
            self.unlinked = None;
            if self.link.is_none() && !self.leaves && !self.is_gone() {
                tracing::warn!(pid = self.pid, "a core has closed its connection and lives on");
            }
        }
    }

    /// Whether the core has no system call under way on a channel, a connection or a storage node, and makes none any
    /// more: its threads have stopped, or its process has ended. Stopped threads do not imply that its memory and its
    /// descriptors are gone: they may remain for some time.
    pub(crate) fn is_gone(&self) -> bool {
        self.stopped.is_so() || process::is_gone(self.handle.as_fd())
    }

    /// Sends to the core, if it is connected. A core that does not read its socket loses the connection.
    pub(crate) fn tell(&mut self, what: FromInterface, fds: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        self.leaves |= what == FromInterface::Quit;
        let Some(link) = &self.link else { return Err(LinkError::Closed) };
        link.send(0, what, fds).inspect_err(|error| {
            tracing::warn!(pid = self.pid, %error, "a core does not read its socket: the connection is closed");
            self.link = None;
        })
    }
}

/// Every core by slot.
#[derive(Debug, Default)]
pub(crate) struct Cores([Option<Core>; CORES_MAX]);

impl Cores {
    pub(crate) fn get(&self, slot: Slot) -> Option<&Core> {
        self.0.get(slot.index())?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Core> {
        self.0.get_mut(slot.index())?.as_mut()
    }

    pub(crate) fn insert(&mut self, slot: Slot, core: Core) {
        if let Some(place) = self.0.get_mut(slot.index()) {
            *place = Some(core);
        }
    }

    pub(crate) fn remove(&mut self, slot: Slot) -> Option<Core> {
        self.0.get_mut(slot.index())?.take()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &Core)> {
        Slot::all().filter_map(|slot| Some((slot, self.get(slot)?)))
    }

    /// The slot of the core with this process id.
    pub(crate) fn slot_of(&self, pid: u32) -> Option<Slot> {
        self.iter().find(|(_, core)| core.pid == pid).map(|(slot, _)| slot)
    }

    /// Cores that are gone, see [`Core::is_gone`].
    pub(crate) fn gone(&self) -> Vec<Slot> {
        self.iter().filter(|(_, core)| core.is_gone()).map(|(slot, _)| slot).collect()
    }

    /// Every core.
    pub(crate) fn all_mut(&mut self) -> impl Iterator<Item = &mut Core> {
        self.0.iter_mut().flatten()
    }

    /// Sends to every connected core.
    pub(crate) fn tell_all(&mut self, what: &FromInterface) {
        for core in self.all_mut() {
            let _ = core.tell(what.clone(), &[]);
        }
    }
}

/// A core's area of the segment.
pub(crate) fn area(segment: &Segment, slot: Slot) -> Option<&CoreArea> {
    segment.cores.get(slot.index())
}

/// Writes a core into the segment. Its tickets and its threads' words are free, whatever an earlier core left in the
/// slot.
pub(crate) fn enrol(segment: &Segment, slot: Slot, pid: u32) {
    if let Some(area) = area(segment, slot) {
        clear(area);
        area.started.store(process::start_time(pid).unwrap_or(0), Relaxed);
        area.pid.store(pid, Release);
    }
}

/// Whether the core in `slot` is this process, by the segment. A later process with the same id is not.
pub(crate) fn is_of(segment: &Segment, slot: Slot, pid: u32) -> bool {
    area(segment, slot).is_some_and(|area| {
        let started = process::start_time(pid).is_ok_and(|started| started == area.started.load(Relaxed));
        area.pid.load(Acquire) == pid && started
    })
}

/// Removes a core that is gone from the segment: none of its threads can hold a ticket any more.
pub(crate) fn strike(segment: &Segment, slot: Slot) {
    if let Some(area) = area(segment, slot) {
        area.pid.store(0, Release);
        clear(area);
    }
}

/// Connections to NBD storage nodes on which a core may have changes in flight.
pub(crate) fn node_connections(segment: &Segment, slot: Slot) -> u32 {
    segment.cores[slot.index()].node_connections.load(Acquire)
}

fn clear(area: &CoreArea) {
    area.node_connections.store(0, Relaxed);
    for word in &area.threads {
        // The thread that watches the slot's previous core sleeps on one of them.
        if word.swap(thread_word::FREE, AcqRel) != thread_word::FREE {
            wake::wake(word, Who::All);
        }
    }
    area.sender.store(ticket_state::FREE, Release);
    area.flusher.store(ticket_state::FREE, Release);
    for ticket in &area.tickets {
        ticket.state.store(ticket_state::FREE, Release);
        ticket.tid.store(0, Relaxed);
        ticket.holding.store(0, Relaxed);
        ticket.io_errors.store(0, Relaxed);
        for counter in [&ticket.requests, &ticket.suspended, &ticket.read_bytes, &ticket.written_bytes] {
            counter.store(0, Relaxed);
        }
    }
}

/// Wakes a core's parked workers, so that they check the gate.
pub(crate) fn rouse(segment: &Segment, slot: Slot, who: Who) {
    if let Some(area) = area(segment, slot) {
        area.wake.fetch_add(1, Release);
        wake::wake(&area.wake, who);
    }
}

/// The status of a core.
pub(crate) fn status(segment: &Segment, slot: Slot, core: &Core, armed: bool) -> CoreStatus {
    let tickets = area(segment, slot).map_or(&[][..], |area| &area.tickets);
    CoreStatus {
        pid: core.pid,
        slot,
        identity: core.identity.clone(),
        armed,
        // Cores write these words, so a sum may be anything and wraps.
        requests: tickets.iter().map(|t| t.requests.load(Relaxed)).fold(0, u64::wrapping_add),
        io_errors: tickets.iter().map(|t| u64::from(t.io_errors.load(Relaxed))).fold(0, u64::wrapping_add),
        writing: writing(segment, slot),
    }
}

/// Workers and senders of a core whose write to a storage node has not ended.
fn writing(segment: &Segment, slot: Slot) -> u32 {
    let Some(area) = area(segment, slot) else { return 0 };
    let states = area.tickets.iter().map(|ticket| &ticket.state).chain([&area.sender]);
    u32::try_from(states.filter(|state| state.load(Acquire) == ticket_state::WRITING).count())
        .expect("a core has few tickets")
}

/// Requests that are being executed.
pub(crate) fn in_flight(segment: &Segment) -> u32 {
    let busy = |area: &CoreArea| area.tickets.iter().filter(|t| t.state.load(Acquire) == ticket_state::BUSY).count();
    u32::try_from(segment.cores.iter().map(busy).sum::<usize>()).expect("cores have few tickets")
}
