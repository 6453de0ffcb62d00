//! The one owner and the one loop: wait for what happens, let [`Custody`] decide, do it.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{
        AtomicU64,
        Ordering::{Relaxed, Release},
    },
    time::{Duration, Instant},
};

use everdisk_gate::{
    custody::{Act, Custody, State},
    ticket,
};
use everdisk_proto::{
    buffer::{self, word},
    frame::{Answer, CoreDeath, FromInterface, LentConnection, ToInterface},
    identity::Identity,
    ids::Slot,
    segment::MAGIC,
    volume::{NodeUrl, VolumeSpec},
};
use everdisk_sys::{
    clock::monotonic_ns,
    link::LinkError,
    lock::{self, Holders, LockError},
    memory::SharedSegment,
    packet,
    process::{self, pidfd},
    wake::Who,
};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::{
    args::Arguments,
    cores::{self, Core, Cores, PeerLink},
    front::FileFront,
    fronts::Fronts,
    life::Watchdog,
    nbd::NbdFront,
    restore,
    suspension::{self, Given, not_drained},
    unmounting::Unmounting,
};

/// A core that takes over after a death has this long to read its stores; nobody else could serve meanwhile.
pub(crate) const TAKEOVER_LIMIT: Duration = Duration::from_secs(2);
/// The loop looks around this often even if nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// A peer that has connected says who it is within this time.
const INTRODUCTION_LIMIT: Duration = Duration::from_secs(5);
/// Connections at once: a few cores, and the control module's.
pub(crate) const PEERS_MAX: usize = 64;

static NEXT_PEER: AtomicU64 = AtomicU64::new(1);

/// Why the interface ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fatal {
    /// The volume's description cannot be used.
    #[error("{0}: {1}")]
    Volume(String, String),
    /// The socket.
    #[error("cannot listen at {0}: {1}")]
    Socket(String, io::Error),
    /// Another interface keeps the volume.
    #[error("another interface keeps this volume (it holds the lock beside {0}): {1}; end it first")]
    Second(String, Holders),
    /// Memory, poll.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The cores serve a segment that this program cannot adopt.
    #[error(
        "this volume's segment is of {segment}, and {identity} cannot adopt it: I/O goes on, but nobody handles the death of a core. Put \
         the program of the interface back that made the segment, or detach the volume by force and attach it again"
    )]
    ForeignSegment {
        /// Its ABI and buffer, in words.
        segment: String,
        /// This program.
        identity: Identity,
    },
    /// Nothing to restore.
    #[error("no core of the volume gave the descriptors back: attach the volume again")]
    NothingToRestore,
}

/// A connection that is not (yet) a core's.
pub(crate) struct Peer {
    pub(crate) link: PeerLink,
    /// Distinguishes connections of one process.
    pub(crate) number: u64,
    pub(crate) pid: u32,
    pub(crate) since: Instant,
    pub(crate) is_control: bool,
}

/// The interface of one volume.
pub(crate) struct Holder {
    pub(crate) segment: SharedSegment,
    pub(crate) custody: Custody,
    pub(crate) cores: Cores,
    pub(crate) fronts: Fronts,
    pub(crate) peers: Vec<Peer>,
    pub(crate) unmounting: Option<Unmounting>,
    pub(crate) done: bool,
    /// This program.
    pub(crate) identity: Identity,
    /// Where this interface is asked; the cores' sockets lie beside it.
    pub(crate) socket: PathBuf,
    pub(crate) watchdog: Watchdog,
    pub(crate) deaths: Vec<CoreDeath>,
    /// The core that served has died, and nobody has the gate since then.
    pub(crate) orphaned: Option<Instant>,
    /// The volume's storage nodes.
    pub(crate) nodes: Vec<NodeUrl>,
    retried: Instant,
    listener: OwnedFd,
}

/// Runs until the volume is detached.
pub(crate) fn run(arguments: &Arguments, identity: &Identity) -> Result<(), Fatal> {
    let spec = read_volume(arguments)?;
    process::serve_io();
    let _lock = only_one(&arguments.socket)?;
    let listener =
        packet::listen(&arguments.socket).map_err(|e| Fatal::Socket(arguments.socket.display().to_string(), e))?;
    let mut holder = if arguments.restore {
        restore::restore(listener, &spec, arguments, identity)?
    } else {
        let segment = SharedSegment::create(spec.buffer).map_err(|e| no_memory(spec.buffer, &e))?;
        imprint(&segment, &spec, identity);
        Holder::new(listener, &spec, segment, Custody::new(), arguments, identity)
    };
    tracing::info!(volume = %spec.name, restored = arguments.restore, "the interface is ready");
    while !holder.done {
        holder.turn()?;
    }
    let _ = fs::remove_file(&arguments.socket);
    Ok(())
}

/// Two interfaces of one volume would both believe that the gate is theirs.
fn only_one(socket: &Path) -> Result<fs::File, Fatal> {
    let path = socket.with_extension("lock");
    let fault = |e| Fatal::Socket(path.display().to_string(), e);
    let file = fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(fault)?;
    match lock::exclusive(file.as_fd()) {
        Ok(()) => Ok(file),
        Err(LockError::Held(holders)) => Err(Fatal::Second(socket.display().to_string(), holders)),
        Err(LockError::Unsupported(e) | LockError::Io(e)) => Err(fault(e)),
    }
}

fn read_volume(arguments: &Arguments) -> Result<VolumeSpec, Fatal> {
    let bad = |why: String| Fatal::Volume(arguments.volume.display().to_string(), why);
    let text = fs::read_to_string(&arguments.volume).map_err(|e| bad(e.to_string()))?;
    let spec: VolumeSpec = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    spec.validate().map_err(|e| bad(e.to_string()))?;
    Ok(spec)
}

fn no_memory(buffer: u64, e: &io::Error) -> io::Error {
    io::Error::new(
        e.kind(),
        format!(
            "no shared memory for the write buffer of {buffer} bytes ({e}): free memory, or make the volume with a smaller --buffer"
        ),
    )
}

/// Writes the volume's identity into a new segment and makes its write buffer an empty one; the magic last.
fn imprint(segment: &SharedSegment, spec: &VolumeSpec, identity: &Identity) {
    let header = &segment.header;
    let (high, low) = spec.uuid.as_u64_pair();
    header.abi.store(identity.abi.max, Relaxed);
    let geometry = segment.geometry();
    let words = [(word::CAPACITY, geometry.capacity), (word::SLOTS, geometry.slots), (word::MAGIC, buffer::MAGIC)];
    for (index, value) in words {
        segment.buffer_word(index).expect("every segment has a buffer's header").store(value, Release);
    }
    header.buffer_version.store(identity.buffer.max, Relaxed);
    header.volume_uuid[0].store(high, Relaxed);
    header.volume_uuid[1].store(low, Relaxed);
    header.volume_size.store(spec.size, Relaxed);
    header.magic.store(MAGIC, Release);
}

impl Holder {
    pub(crate) fn new(
        listener: OwnedFd,
        spec: &VolumeSpec,
        segment: SharedSegment,
        custody: Custody,
        arguments: &Arguments,
        identity: &Identity,
    ) -> Self {
        Self {
            segment,
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
            retried: Instant::now(),
            listener,
        }
    }

    /// One turn: wait, then deal with everything that has happened, deaths first.
    fn turn(&mut self) -> Result<(), Fatal> {
        self.wait()?;
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

    fn wait(&self) -> Result<(), Fatal> {
        let mut fds: Vec<BorrowedFd<'_>> = vec![self.listener.as_fd()];
        for (_, core) in self.cores.iter() {
            fds.push(core.handle.as_fd());
            fds.extend(core.link.as_ref().map(AsFd::as_fd));
        }
        fds.extend(self.peers.iter().map(|peer| peer.link.as_fd()));
        fds.extend(self.watchdog.answer());
        let (listening, clients) = self.fronts.nbd.as_ref().map(NbdFront::watched).unwrap_or_default();
        fds.extend(listening);
        let mut polls: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        // Of a client only that it has gone, which needs no asking for.
        polls.extend(clients.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::empty())));
        let mut limit = if self.unmounting.is_some() { Duration::from_millis(2) } else { TICK };
        if let State::Suspended { until_ns, .. } = self.custody.state() {
            limit = limit.min(Duration::from_nanos(until_ns.saturating_sub(monotonic_ns())));
        }
        for patience in [self.fronts.nbd.as_ref().and_then(NbdFront::patience), self.watchdog.patience()] {
            limit = limit.min(patience.unwrap_or(limit));
        }
        let timeout = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput).map_err(io::Error::from)?;
        match rustix::event::poll(&mut polls, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }

    /// Does what custody has decided, and what follows from how that went. `limit` is for the probe of the core that
    /// is given the gate first; when another gets it after that, nobody else could serve meanwhile. `alive`: a core that was
    /// drained just now; every other one has to answer before it is given the gate without a probe. Returns why a core did not take
    /// the gate, if one did not.
    pub(crate) fn perform(&mut self, act: Act, limit: Duration, alive: Option<Slot>) -> Option<String> {
        let mut failure = None;
        let mut late = Vec::new();
        let (mut act, mut limit) = (act, limit);
        loop {
            if let Act::Grant(word) = act
                && alive != Some(word.slot)
                && !self.answers(word.slot)
            {
                let why = "it did not answer when it was to be given the gate";
                failure.get_or_insert_with(|| format!("process {} {why}", self.pid_of(word.slot)));
                self.put_down(word.slot, why.to_owned());
                act = self.custody.probed(word.slot, false);
                continue;
            }
            let (segment, cores, fronts) = (&self.segment, &self.cores, &self.fronts);
            let (word, given) = match act {
                Act::Nothing => break,
                Act::Close(word) => {
                    // `requests::suspend` drains by itself and reports; nobody else closes.
                    ticket::set(&segment.gate.word, word);
                    break;
                }
                Act::Reopen(word) => {
                    segment.gate.lease_until_ns.store(0, Relaxed);
                    suspension::reopen(segment, word);
                    break;
                }
                Act::SetMode(word) => {
                    ticket::set(&segment.gate.word, word);
                    break;
                }
                Act::Give(word) | Act::Grant(word) if !suspension::can_adopt(segment, cores, word.slot) => {
                    (word, Given::Failed("that core cannot take over the write buffer, which is not empty"))
                }
                Act::Give(word) => (word, suspension::give(segment, cores, fronts, word, limit)),
                Act::Grant(word) => (word, suspension::grant(segment, cores, fronts, word)),
            };
            segment.gate.lease_until_ns.store(0, Relaxed);
            limit = TAKEOVER_LIMIT;
            let (slot, generation) = (word.slot, word.generation);
            act = match given {
                Given::Opened => {
                    tracing::info!(event = "gate_given", pid = self.pid_of(slot), %generation, "a core has the gate");
                    self.note_successor(slot);
                    self.custody.probed(slot, true)
                }
                Given::Failed(why) => {
                    tracing::error!(pid = self.pid_of(slot), %generation, why, "a core did not take the gate");
                    failure.get_or_insert_with(|| why.to_owned());
                    late.push(slot);
                    if matches!(act, Act::Grant(_)) {
                        // The last resort has failed: acknowledged data waits for a core that can take it over.
                        self.custody.postponed();
                        Act::Nothing
                    } else {
                        self.custody.probed(slot, false)
                    }
                }
                Given::NotDrained(why) => {
                    let why = not_drained(why);
                    tracing::error!(pid = self.pid_of(slot), %generation, why, "the gate stays closed");
                    failure.get_or_insert(why);
                    self.custody.postponed();
                    Act::Nothing
                }
            };
        }
        if self.custody.state() == State::Recovering {
            ticket::set(&self.segment.gate.word, self.custody.closed());
        }
        // Now that the gate is where it can be: one that has not taken it, and does not answer either, is not to be tried again.
        for slot in late {
            if self.custody.serving() != Some(slot) && self.cores.get(slot).is_some() && !self.answers(slot) {
                self.put_down(slot, "it did not take the gate and does not answer".to_owned());
            }
        }
        failure
    }

    /// Process id of the core in a slot, for the log.
    fn pid_of(&self, slot: Slot) -> u32 {
        self.cores.get(slot).map_or(0, |core| core.pid)
    }

    fn accept(&mut self) {
        let waiting = everdisk_sys::link::wait_readable(self.listener.as_fd(), Duration::ZERO).unwrap_or(false);
        if !waiting {
            return;
        }
        make_room(&mut self.peers);
        match accept_peer(self.listener.as_fd(), self.peers.len()) {
            Ok(peer) => self.peers.extend(peer),
            Err(error) => tracing::warn!(%error, "a connection could not be taken"),
        }
    }

    fn hear_cores(&mut self) {
        let slots: Vec<Slot> = self.cores.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            while let Some(heard) = self.cores.get(slot).and_then(|core| core.link.as_ref()).and_then(hear) {
                match heard {
                    Ok((frame, _)) if matches!(frame.body, ToInterface::Armed { .. }) => {
                        let ToInterface::Armed { fronts } = frame.body else { break };
                        self.arm(slot, fronts);
                    }
                    // One core's descriptors were enough, but for connections that it had not been lent yet.
                    Ok((frame, _))
                        if matches!(frame.body, ToInterface::Returned { .. } | ToInterface::ReturnedLocks { .. }) => {}
                    Ok((frame, fds)) if matches!(frame.body, ToInterface::ReturnedConnection(_)) => {
                        let ToInterface::ReturnedConnection(lent) = frame.body else { break };
                        self.take_back(lent, fds);
                    }
                    Ok((frame, _)) => {
                        tracing::warn!(pid = self.pid_of(slot), body = ?frame.body, "a core said what it may not say now");
                    }
                    Err(error) => {
                        if let Some(core) = self.cores.get_mut(slot) {
                            core.unlink(&error);
                        }
                    }
                }
            }
        }
    }

    fn hear_peers(&mut self) {
        let mut peers = std::mem::take(&mut self.peers);
        peers.retain(|peer| peer.is_control || peer.since.elapsed() < INTRODUCTION_LIMIT);
        for mut peer in peers {
            match hear(&peer.link) {
                None => self.peers.push(peer),
                Some(Ok((frame, _))) => match frame.body {
                    ToInterface::Hello { identity, slot, keeps_locks } => {
                        self.welcome(peer, identity, slot, keeps_locks);
                    }
                    ToInterface::Request(request) => {
                        peer.is_control = true;
                        let answer = self.handle(request, &peer, frame.id);
                        let sent = answer
                            .is_none_or(|answer| peer.link.send(frame.id, FromInterface::Answer(answer), &[]).is_ok());
                        if sent {
                            self.peers.push(peer);
                        }
                    }
                    ToInterface::Armed { .. }
                    | ToInterface::Returned { .. }
                    | ToInterface::ReturnedLocks { .. }
                    | ToInterface::ReturnedConnection(_) => {
                        refuse(&peer, "introduce yourself first");
                    }
                },
                Some(Err(LinkError::Closed)) => {}
                Some(Err(error)) => {
                    tracing::warn!(pid = peer.pid, %error, "a peer is refused");
                    refuse(&peer, &error.to_string());
                }
            }
        }
    }

    /// A core gives a connection back that this interface perhaps knows nothing of: then every other core is lent it.
    pub(crate) fn take_back(&mut self, lent: LentConnection, fds: Vec<OwnedFd>) {
        let Ok([socket, memory]) = <[OwnedFd; 2]>::try_from(fds) else { return };
        let Some(nbd) = &mut self.fronts.nbd else { return };
        if nbd.adopt_connection(lent, socket, memory) {
            self.fronts.lend_to_all(&mut self.cores);
        }
    }

    /// A core says that it is ready. It is, when it has every front end; one that lost its connection before it was
    /// lent the last gets it now.
    fn arm(&mut self, slot: Slot, fronts: u8) {
        let Some(core) = self.cores.get_mut(slot) else { return };
        if fronts == 0 && self.fronts.kinds() > 0 {
            let _ = self.fronts.lend(core);
        } else if fronts == self.fronts.kinds() {
            let act = self.custody.armed(slot);
            self.perform(act, TAKEOVER_LIMIT, None);
        }
    }

    /// A core joins, or comes back to a new interface process.
    fn welcome(&mut self, peer: Peer, identity: Identity, had: Option<Slot>, keeps_locks: bool) {
        if let Some(slot) = had.filter(|slot| restore::is_of(&self.segment, *slot, peer.pid)) {
            if let Some(core) = self.cores.get_mut(slot) {
                core.link = Some(peer.link);
                core.identity = identity;
                core.keeps_locks = keeps_locks;
            } else if let Ok(handle) = pidfd(peer.pid) {
                self.cores.seat(slot, Core::new(peer.pid, handle, identity, Some(peer.link), keeps_locks));
                self.custody.joined(slot);
            }
            // It knows nothing of clients that came meanwhile; and perhaps of one that the interface before lent to nobody else.
            if let Some(core) = self.cores.get_mut(slot) {
                let _ = self.fronts.lend(core);
                if self.fronts.nbd.is_some() {
                    let _ = core.tell(FromInterface::Recall, &[]);
                }
            }
            return;
        }
        let abi = self.segment.header.abi.load(Relaxed);
        if !identity.abi.contains(abi) {
            return refuse(
                &peer,
                &format!("the core serves ABI {}, this volume's segment has ABI {abi}", identity.abi),
            );
        }
        if self.cores.slot_of(peer.pid).is_some() {
            return refuse(&peer, "this process has a slot already");
        }
        let Some(slot) = self.custody.vacancy() else { return refuse(&peer, "every core slot is taken") };
        let Ok(handle) = pidfd(peer.pid) else { return };
        cores::enrol(&self.segment, slot, peer.pid);
        let mut core = Core::new(peer.pid, handle, identity, Some(peer.link), keeps_locks);
        let lend = |core: &mut Core| -> Result<(), LinkError> {
            let fronts = self.fronts.frames(core);
            core.tell(FromInterface::Welcome { slot, fronts }, &[self.segment.as_fd()])?;
            self.fronts.lend(core)
        };
        if lend(&mut core).is_err() {
            return cores::strike(&self.segment, slot);
        }
        self.cores.seat(slot, core);
        self.custody.joined(slot);
    }

    /// The front end may have ended: by our own unmount, or by somebody else's.
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
            tracing::warn!("the file was unmounted by somebody else");
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

/// Whoever has said nothing for the longest time gives up its place to a newcomer: silence keeps nobody out.
pub(crate) fn make_room(peers: &mut Vec<Peer>) {
    if peers.len() >= PEERS_MAX
        && let Some(silent) = peers.iter().position(|peer| !peer.is_control)
    {
        refuse(&peers.remove(silent), "too many connections");
    }
}

/// Takes a waiting connection; `None` when its owner may not speak to us.
pub(crate) fn accept_peer(listener: BorrowedFd<'_>, connected: usize) -> io::Result<Option<Peer>> {
    let socket = packet::accept(listener)?;
    let who = packet::peer(socket.as_fd())?;
    let number = NEXT_PEER.fetch_add(1, Relaxed);
    let peer = Peer { link: PeerLink::new(socket), number, pid: who.pid, since: Instant::now(), is_control: false };
    let ours = rustix::process::geteuid().as_raw();
    if who.uid != 0 && who.uid != ours {
        tracing::warn!(uid = who.uid, pid = who.pid, "a stranger is turned away");
        refuse(&peer, "this volume belongs to another user");
        return Ok(None);
    }
    if connected >= PEERS_MAX {
        refuse(&peer, "too many connections");
        return Ok(None);
    }
    Ok(Some(peer))
}

pub(crate) fn refuse(peer: &Peer, reason: &str) {
    let _ = peer.link.send(0, FromInterface::Refused { reason: reason.to_owned() }, &[]);
}

/// The next frame of a link, if one is there.
pub(crate) fn hear(link: &PeerLink) -> Option<Result<everdisk_sys::link::Received<ToInterface>, LinkError>> {
    match link.recv_within(Duration::ZERO) {
        Err(LinkError::Deadline(_)) => None,
        other => Some(other),
    }
}
