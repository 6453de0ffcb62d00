//! The one owner and the one loop: wait for events, let [`Custody`] decide, carry it out.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use everdisk_gate::custody::{Custody, State};
use everdisk_proto::{
    frame::{Answer, CoreDeath, FromInterface},
    identity::Identity,
    ids::Slot,
    volume::{NodeUrl, VolumeSpec},
};
use everdisk_sys::{clock::monotonic_ns, memory::SharedSegment, wake::Who};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::{
    args::Arguments,
    cores::{self, Core, Cores},
    front::FileFront,
    fronts::Fronts,
    life::Watchdog,
    marks::{self, Bell},
    nbd::NbdFront,
    nodes::KeptNodes,
    peers::{Door, Peer},
    suspension::TAKEOVER_LIMIT,
    unmounting::Unmounting,
};

/// Interval at which the loop polls even without an event.
const TICK: Duration = Duration::from_secs(1);

/// The interface of one volume.
pub(crate) struct Holder {
    pub(crate) segment: Arc<SharedSegment>,
    pub(crate) custody: Custody,
    pub(crate) cores: Cores,
    pub(crate) fronts: Fronts,
    pub(crate) peers: Vec<Peer>,
    pub(crate) unmounting: Option<Unmounting>,
    pub(crate) done: bool,
    /// This program.
    pub(crate) identity: Identity,
    /// The socket for requests to this interface; the cores' sockets lie beside it.
    pub(crate) socket: PathBuf,
    pub(crate) watchdog: Watchdog,
    pub(crate) deaths: Vec<CoreDeath>,
    /// When the core that served died, if no core has had the gate since then.
    pub(crate) orphaned: Option<Instant>,
    /// The volume's storage nodes.
    pub(crate) nodes: Vec<NodeUrl>,
    /// The cores' connections to them.
    pub(crate) kept: KeptNodes,
    /// It took over from an interface that had died: cores may die before they have told it of their connections to storage nodes.
    pub(crate) is_restored: bool,
    retried: Instant,
    pub(crate) door: Door,
    /// Rung when the threads of a core have stopped.
    bell: Arc<Bell>,
}

impl Holder {
    pub(crate) fn new(
        door: Door,
        spec: &VolumeSpec,
        segment: SharedSegment,
        custody: Custody,
        arguments: &Arguments,
        identity: &Identity,
    ) -> io::Result<Self> {
        Ok(Self {
            segment: Arc::new(segment),
            custody,
            cores: Cores::default(),
            fronts: Fronts::default(),
            peers: Vec::new(),
            unmounting: None,
            done: false,
            identity: identity.clone(),
            socket: arguments.socket.clone(),
            watchdog: Watchdog::new(arguments.hang_limit),
            deaths: Vec::new(),
            orphaned: None,
            nodes: spec.nodes.iter().map(|node| node.url.clone()).collect(),
            kept: KeptNodes::default(),
            is_restored: false,
            retried: Instant::now(),
            door,
            bell: Arc::new(Bell::new()?),
        })
    }

    /// A core has a slot: its threads are watched from now on.
    pub(crate) fn enter(&mut self, slot: Slot, mut core: Core) {
        core.stopped = marks::watch(&self.segment, slot, core.pid, &self.bell);
        self.cores.insert(slot, core);
    }

    /// One turn: wait, then handle every event, deaths first.
    pub(crate) fn turn(&mut self) -> io::Result<()> {
        self.wait()?;
        self.bell.rest();
        for slot in self.cores.gone() {
            self.bury(slot);
        }
        let act = self.custody.tick(monotonic_ns());
        self.perform(act, TAKEOVER_LIMIT, None);
        if self.custody.state() == State::Recovering && self.retried.elapsed() >= TICK {
            self.retried = Instant::now();
            let act = self.custody.retry();
            self.perform(act, TAKEOVER_LIMIT, None);
        }
        self.watch_over();
        self.hear_cores();
        self.hear_peers();
        self.cores.all_mut().for_each(Core::look_at_link);
        self.accept();
        self.fronts.take_clients(&mut self.cores);
        self.look_after_front();
        Ok(())
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds: Vec<BorrowedFd<'_>> = vec![self.bell.as_fd()];
        let (door, pause) = self.door.watched();
        fds.extend(door);
        for (_, core) in self.cores.iter() {
            fds.push(core.handle.as_fd());
            fds.extend(core.link.as_ref().map(AsFd::as_fd));
        }
        fds.extend(self.peers.iter().map(|peer| peer.link.as_fd()));
        fds.extend(self.watchdog.answer());
        let (listening, clients) = self.fronts.nbd.as_ref().map(NbdFront::watched).unwrap_or_default();
        fds.extend(listening);
        let mut polls: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        // Of a client only the hang-up matters, which poll reports without being asked.
        polls.extend(clients.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::empty())));
        let mut limit = if self.unmounting.is_some() { Duration::from_millis(2) } else { TICK };
        if let State::Suspended { until_ns, .. } = self.custody.state() {
            limit = limit.min(Duration::from_nanos(until_ns.saturating_sub(monotonic_ns())));
        }
        for patience in [pause, self.fronts.nbd.as_ref().and_then(NbdFront::patience), self.watchdog.patience()] {
            limit = limit.min(patience.unwrap_or(limit));
        }
        let timeout = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput).map_err(io::Error::from)?;
        match rustix::event::poll(&mut polls, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Process id of the core in a slot, for the log.
    pub(crate) fn pid_of(&self, slot: Slot) -> u32 {
        self.cores.get(slot).map_or(0, |core| core.pid)
    }

    /// Checks whether the front end has ended, by our own unmount or by another process's.
    fn look_after_front(&mut self) {
        if let Some(unmounting) = &mut self.unmounting {
            let dead = self.fronts.file.as_ref().is_none_or(FileFront::is_dead);
            let Some(answer) = unmounting.answer(dead) else { return };
            let (number, id) = (unmounting.peer, unmounting.id);
            if unmounting.is_done() && answer != Answer::Done {
                self.fronts.file.iter_mut().for_each(FileFront::serve_elsewhere);
            }
            self.unmounting = None;
            let ended = answer == Answer::Done;
            if ended {
                self.end();
            }
            for peer in self.peers.iter().filter(|peer| peer.number == number) {
                let _ = peer.link.send(id, FromInterface::Answer(answer.clone()), &[]);
            }
        } else if self.fronts.file.as_ref().is_some_and(FileFront::is_lost) {
            tracing::warn!("the file was unmounted by another process");
            self.fronts.file = None;
            if self.fronts.nbd.is_none() {
                self.end();
            }
        }
    }

    /// Nothing is left to hold.
    pub(crate) fn end(&mut self) {
        self.custody.detached();
        if let Some(nbd) = &mut self.fronts.nbd {
            nbd.close();
        }
        self.cores.tell_all(&FromInterface::Quit);
        for slot in Slot::all() {
            cores::rouse(&self.segment, slot, Who::All);
        }
        self.fronts = Fronts::default();
        self.done = true;
    }
}
