//! The threads that serve the front ends: one for each channel of the file and for each NBD connection, and stand-ins
//! for those whose request takes long.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, OnceLock,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
        mpsc,
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use everdisk_proto::{frame::LentConnection, ids::Slot, limits::WORKERS_MAX, segment::Ticket};
use everdisk_sys::{
    connection::ConnectionMemory,
    memory::SharedSegment,
    robust,
    wake::{self, Who},
};
use everdisk_transport::{
    channel::Lead,
    fuse::{self, operation::Operations},
    nbd::{self, connection::Connection},
    worker::GateAccess,
};
use parking_lot::Mutex;

use crate::disk::VolumeDisk;

mod watch;

/// A thread that is started takes its ticket within this time.
const START_LIMIT: Duration = Duration::from_secs(10);
/// A ticket of a worker that ends is free again within this time.
const TICKET_LIMIT: Duration = Duration::from_secs(2);
/// At most this many workers of connections probe at once: more would obstruct each other.
const PROBERS_MAX: usize = 4;

/// A channel or a connection.
#[derive(Debug)]
enum What {
    /// A channel of the mounted file.
    Fuse(Arc<OwnedFd>, Lead),
    /// An NBD connection.
    Nbd(Box<Connection>),
}

/// A channel or a connection, and its workers.
#[derive(Debug)]
pub(crate) struct Served {
    what: What,
    stop: AtomicBool,
    /// Workers that run.
    running: AtomicUsize,
    /// Those of them that are stand-ins.
    standins: AtomicUsize,
    /// A stand-in was started and has not arrived yet.
    is_coming: AtomicBool,
}

impl Served {
    const fn new(what: What) -> Self {
        let (running, standins) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { what, stop: AtomicBool::new(false), running, standins, is_coming: AtomicBool::new(false) }
    }

    const fn lead(&self) -> &Lead {
        match &self.what {
            What::Fuse(_, lead) => lead,
            What::Nbd(connection) => &connection.lead,
        }
    }
}

/// What every worker shares.
#[derive(Debug)]
struct Shared {
    segment: Arc<SharedSegment>,
    slot: Slot,
    disk: Arc<VolumeDisk>,
    stop: AtomicBool,
    served: Mutex<Vec<Arc<Served>>>,
    tickets: Mutex<[bool; WORKERS_MAX]>,
    standins: AtomicUsize,
    /// The thread that watches the workers.
    watcher: OnceLock<Thread>,
}

/// The workers of a core.
#[derive(Debug)]
pub(crate) struct Workers(Arc<Shared>);

/// A ticket that is taken until this is dropped.
struct Taken {
    shared: Arc<Shared>,
    ticket: usize,
    stands_in_for: Option<Arc<Served>>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.shared.tickets.lock()[self.ticket] = false;
        if let Some(served) = &self.stands_in_for {
            self.shared.standins.fetch_sub(1, Relaxed);
            served.standins.fetch_sub(1, Relaxed);
        }
    }
}

impl Workers {
    /// No workers yet, only the thread that watches them.
    pub(crate) fn new(segment: &Arc<SharedSegment>, slot: Slot, disk: &Arc<VolumeDisk>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            segment: Arc::clone(segment),
            slot,
            disk: Arc::clone(disk),
            stop: AtomicBool::new(false),
            served: Mutex::default(),
            tickets: Mutex::new([false; WORKERS_MAX]),
            standins: AtomicUsize::new(0),
            watcher: OnceLock::new(),
        });
        let watched = Arc::clone(&shared);
        let watcher = robust::start("watch", move || watch::watch(&watched))?;
        shared.watcher.set(watcher.thread().clone()).expect("it is set here only");
        Ok(Self(shared))
    }

    /// Starts a worker for each channel of the file; returns when all are parked.
    pub(crate) fn add_file(&self, channels: &[Arc<OwnedFd>]) -> io::Result<()> {
        let (ready, parked) = mpsc::channel();
        for channel in channels {
            let taken = self.0.take_ticket(TICKET_LIMIT)?;
            let served = Served::new(What::Fuse(Arc::clone(channel), Lead::new(taken.ticket)));
            self.0.serve_with(served, taken, ready.clone())?;
        }
        for _ in channels {
            await_parked(&parked)?;
        }
        Ok(())
    }

    /// Starts a worker that probes the storage nodes when the gate is given to this core and no other worker does.
    /// There may be no connection, and the file may have been unmounted.
    pub(crate) fn add_guard(&self) -> io::Result<()> {
        let taken = self.0.take_ticket(TICKET_LIMIT)?;
        let (ready, parked) = mpsc::channel();
        robust::start("guard", move || {
            let shared = &taken.shared;
            let access = GateAccess::take(&shared.segment, shared.slot, taken.ticket, &shared.stop);
            // The thread that started it may have timed out.
            let _ = ready.send(());
            access.stand_guard(&*shared.disk, || shared.has_probers());
        })?;
        await_parked(&parked)
    }

    /// Starts a worker for an NBD connection, unless it has one; returns when it is parked.
    pub(crate) fn add_connection(&self, lent: LentConnection, socket: OwnedFd, memory: OwnedFd) -> io::Result<()> {
        self.sweep();
        if self.connections().iter().any(|served| served.connection().is_some_and(|c| c.number == lent.number)) {
            // Lent twice: the interface could not know that the first loan had arrived.
            return Ok(());
        }
        let memory = ConnectionMemory::adopt(memory)?;
        let taken = self.0.take_ticket(TICKET_LIMIT)?;
        let served = Served::new(What::Nbd(Box::new(Connection::new(lent, socket, memory, taken.ticket)?)));
        let (ready, parked) = mpsc::channel();
        self.0.serve_with(served, taken, ready)?;
        await_parked(&parked)?;
        self.0.rouse();
        Ok(())
    }

    /// Whether there is a ticket for another worker.
    pub(crate) fn have_room(&self) -> bool {
        self.0.tickets.lock().contains(&false)
    }

    /// Drops connections that have ended, here or in another core.
    pub(crate) fn sweep(&self) {
        let ended = |served: &Served| served.connection().is_some_and(Connection::has_ended);
        let mut gone = false;
        self.0.served.lock().retain(|served| {
            if ended(served) {
                served.stop.store(true, Release);
                served.lead().rouse();
                gone = true;
            }
            !ended(served)
        });
        if gone {
            self.0.rouse();
        }
    }

    /// The NBD connections.
    pub(crate) fn connections(&self) -> Vec<Arc<Served>> {
        self.0.served.lock().iter().filter(|served| served.connection().is_some()).cloned().collect()
    }

    /// Whether the workers of the file have ended because it was unmounted or /dev/fuse failed.
    pub(crate) fn file_has_ended(&self) -> bool {
        let served = self.0.served.lock();
        let mut file = served.iter().filter(|served| served.connection().is_none()).peekable();
        file.peek().is_some() && file.any(|served| served.running.load(Acquire) == 0)
    }

    /// Ends the workers. Parked ones end at once; one that is blocked in a system call ends with the connection or the
    /// process.
    pub(crate) fn stop(self) {
        self.0.stop.store(true, Release);
        for served in self.0.served.lock().iter() {
            served.stop.store(true, Release);
            served.lead().rouse();
        }
        self.0.rouse();
    }
}

fn await_parked(parked: &mpsc::Receiver<()>) -> io::Result<()> {
    parked.recv_timeout(START_LIMIT).map_err(|_| io::Error::other("a worker did not start"))
}

impl Served {
    /// The NBD connection, when it is one.
    pub(crate) const fn connection(&self) -> Option<&Connection> {
        match &self.what {
            What::Fuse(..) => None,
            What::Nbd(connection) => Some(connection),
        }
    }
}

impl Shared {
    /// Wakes parked workers, so that they see the order to end.
    fn rouse(&self) {
        let area = &self.segment.cores[self.slot.index()];
        area.wake.fetch_add(1, Release);
        wake::wake(&area.wake, Who::All);
    }

    /// Takes the lowest free ticket. One may become free within `limit`.
    fn take_ticket(self: &Arc<Self>, limit: Duration) -> io::Result<Taken> {
        let begin = Instant::now();
        loop {
            let free = {
                let mut tickets = self.tickets.lock();
                let free = tickets.iter().position(|taken| !taken);
                if let Some(index) = free {
                    tickets[index] = true;
                }
                free
            };
            match free {
                Some(ticket) => return Ok(Taken { shared: Arc::clone(self), ticket, stands_in_for: None }),
                None if begin.elapsed() >= limit => return Err(io::Error::other("every ticket is taken")),
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Begins to serve a channel or a connection with its first worker.
    fn serve_with(&self, served: Served, first: Taken, ready: mpsc::Sender<()>) -> io::Result<()> {
        let served = Arc::new(served);
        served.lead().watched_by(self.watcher.get().expect("set before anything is served").clone());
        Self::start(&served, first, ready)?;
        self.served.lock().push(served);
        Ok(())
    }

    /// Starts a worker.
    fn start(served: &Arc<Served>, taken: Taken, ready: mpsc::Sender<()>) -> io::Result<()> {
        let mut locked = match served.what {
            What::Fuse(..) => Some(fuse::serve::Buffers::new()?),
            What::Nbd(_) => None,
        };
        let served = Arc::clone(served);
        served.running.fetch_add(1, AcqRel);
        let started = Arc::clone(&served);
        let body = move || {
            let shared = &taken.shared;
            let access = GateAccess::take(&shared.segment, shared.slot, taken.ticket, &served.stop);
            // A stand-in is not waited for.
            let _ = ready.send(());
            served.is_coming.store(false, Release);
            shared.serve(&access, &served, locked.as_mut());
            served.running.fetch_sub(1, AcqRel);
        };
        let thread = robust::start("worker", body);
        if thread.is_err() {
            started.running.fetch_sub(1, AcqRel);
        }
        thread.map(drop)
    }

    fn serve(&self, access: &GateAccess<'_>, served: &Served, locked: Option<&mut fuse::serve::Buffers>) {
        match (&served.what, locked) {
            (What::Fuse(channel, lead), Some(buffers)) => {
                let operations = Operations { disk: &*self.disk, front: &self.segment.front };
                let ended = fuse::serve::serve(access, channel.as_fd(), lead, &operations, buffers);
                if let fuse::serve::Ended::Failed(errno) = ended {
                    // A core that serves only in part is useless; a dead one has a successor.
                    tracing::error!(%errno, "/dev/fuse failed: this core ends");
                    std::process::exit(1);
                }
                if ended == fuse::serve::Ended::Unmounted {
                    // Idle workers do not read and would not notice.
                    served.stop.store(true, Release);
                    lead.rouse();
                }
            }
            (What::Nbd(connection), _) => {
                let mut buffers = nbd::serve::Buffers::default();
                let ended = nbd::serve::serve(access, connection, &self.disk.name, &*self.disk, &mut buffers);
                tracing::debug!(connection = connection.number, ?ended, "a worker of a connection has ended");
            }
            (What::Fuse(..), None) => unreachable!("a worker of the file has buffers"),
        }
    }

    /// Whether other workers probe when this core is given the gate: a worker of the file, or those of connections if
    /// these are few enough that all of them may probe at once.
    fn has_probers(&self) -> bool {
        let served = self.served.lock();
        let connections = served.iter().filter(|served| served.connection().is_some()).count();
        connections < served.len() || (1..=PROBERS_MAX).contains(&connections)
    }

    fn ticket(&self, index: usize) -> &Ticket {
        &self.segment.cores[self.slot.index()].tickets[index]
    }

    /// Starts another worker, which takes the lead if that is still wanted when it arrives.
    fn stand_in(self: &Arc<Self>, served: &Arc<Served>) -> io::Result<()> {
        let mut taken = self.take_ticket(Duration::ZERO)?;
        taken.stands_in_for = Some(Arc::clone(served));
        self.standins.fetch_add(1, Relaxed);
        served.standins.fetch_add(1, Relaxed);
        served.is_coming.store(true, Release);
        let (ready, _) = mpsc::channel();
        let started = Self::start(served, taken, ready);
        if started.is_err() {
            served.is_coming.store(false, Release);
        }
        started
    }
}
