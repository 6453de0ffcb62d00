//! The threads that serve a front end: one for each channel, and others that stand in for those whose request takes long.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Relaxed, Release},
        },
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use everdisk_proto::{
    ids::Slot,
    limits::WORKERS_MAX,
    segment::{Ticket, ticket_state},
};
use everdisk_sys::{
    memory::SharedSegment,
    wake::{self, Who},
};
use everdisk_transport::{
    channel::Lead,
    fuse::{
        operation::Operations,
        serve::{Buffers, Ended, serve},
    },
    worker::Seat,
};

use crate::disk::VolumeDisk;

/// A thread that is started takes its ticket within this time.
const START_LIMIT: Duration = Duration::from_secs(10);
/// A request that has taken longer than one of these looks (two at most) takes long.
const WATCH: Duration = Duration::from_millis(10);
/// While nothing is asked for, the looks are this far apart.
const WATCH_IDLE: Duration = Duration::from_millis(100);

/// What every worker of a front end has in common.
#[derive(Debug)]
struct Shared {
    channels: Vec<(Arc<OwnedFd>, Lead)>,
    segment: Arc<SharedSegment>,
    slot: Slot,
    stop: AtomicBool,
    threads: Mutex<Vec<JoinHandle<Ended>>>,
}

/// The workers of the file front end.
#[derive(Debug)]
pub(crate) struct Workers(Arc<Shared>);

impl Workers {
    /// Starts a worker for each channel and returns when all are parked.
    pub(crate) fn start(
        channels: &[Arc<OwnedFd>],
        segment: &Arc<SharedSegment>,
        slot: Slot,
        disk: &Arc<VolumeDisk>,
    ) -> io::Result<Self> {
        let channels = channels.iter().enumerate().map(|(index, fd)| (Arc::clone(fd), Lead::new(index)));
        let shared = Arc::new(Shared {
            channels: channels.collect(),
            segment: Arc::clone(segment),
            slot,
            stop: AtomicBool::new(false),
            threads: Mutex::default(),
        });
        let (ready, parked) = mpsc::channel();
        for index in 0..shared.channels.len() {
            shared.spawn(index, index, disk, ready.clone())?;
        }
        for _ in &shared.channels {
            parked.recv_timeout(START_LIMIT).map_err(|_| io::Error::other("a worker did not start"))?;
        }
        let (watched, disk) = (Arc::clone(&shared), Arc::clone(disk));
        thread::Builder::new().name("watch".to_owned()).spawn(move || watched.watch(&disk))?;
        Ok(Self(shared))
    }

    /// Whether a worker has ended because the file was unmounted or /dev/fuse failed: then all of them do.
    pub(crate) fn have_ended(&self) -> bool {
        let leaders = self.0.channels.len();
        let threads = self.0.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.iter().filter(|thread| thread.is_finished()).count() >= leaders.max(1)
    }

    /// Ends the workers: those that are parked at once; one that still sits in read(2) ends with the connection or the
    /// process.
    pub(crate) fn stop(self) {
        self.0.stop.store(true, Release);
        if let Some(area) = self.0.segment.cores.get(self.0.slot.index()) {
            area.wake.fetch_add(1, Release);
            wake::wake(&area.wake, Who::All);
        }
        self.0.channels.iter().for_each(|(_, lead)| lead.rouse());
    }
}

impl Shared {
    fn spawn(
        self: &Arc<Self>,
        channel: usize,
        ticket: usize,
        disk: &Arc<VolumeDisk>,
        ready: mpsc::Sender<()>,
    ) -> io::Result<()> {
        let (shared, disk) = (Arc::clone(self), Arc::clone(disk));
        let mut buffers = Buffers::new()?;
        let body = move || {
            let Some((fd, lead)) = shared.channels.get(channel) else { return Ended::Stopped };
            let Some(seat) = Seat::take(&shared.segment, shared.slot, ticket, &shared.stop) else {
                return Ended::Stopped;
            };
            let _ = ready.send(());
            let operations = Operations { disk: &*disk, front: &shared.segment.front };
            let ended = serve(&seat, fd.as_fd(), lead, &operations, &mut buffers);
            if let Ended::Failed(errno) = ended {
                // Half a core serves nobody; a dead one has a successor.
                tracing::error!(%errno, channel, "/dev/fuse failed: this core ends");
                std::process::exit(1);
            }
            ended
        };
        let thread = thread::Builder::new().name(format!("worker-{ticket}")).spawn(body)?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    fn ticket(&self, index: usize) -> Option<&Ticket> {
        self.segment.cores.get(self.slot.index())?.tickets.get(index)
    }

    /// Passes the lead of a channel on when its leader's request takes long: as long as another worker can be had, requests that
    /// wait for a storage node do not keep others waiting.
    fn watch(self: &Arc<Self>, disk: &Arc<VolumeDisk>) {
        let mut seen: Vec<(usize, u64, bool)> = vec![(usize::MAX, 0, false); self.channels.len()];
        let mut started = self.channels.len();
        let mut pause = WATCH;
        // When there was no memory that may be locked, or no thread, for another worker.
        let mut refused: Option<Instant> = None;
        while !self.stop.load(Acquire) {
            thread::sleep(pause);
            pause = WATCH_IDLE;
            for ((channel, (_, lead)), seen) in self.channels.iter().enumerate().zip(&mut seen) {
                let Some(ticket) = self.ticket(lead.leader()) else { continue };
                let state = ticket.state.load(Acquire);
                let at_work = matches!(state, ticket_state::BUSY | ticket_state::AWAY | ticket_state::WRITING);
                let now = (lead.leader(), ticket.requests.load(Relaxed), at_work);
                if now.1 != seen.1 || at_work {
                    pause = WATCH;
                }
                if !at_work || now != *seen {
                    *seen = now;
                    continue;
                }
                if lead.pass_on() || started >= WORKERS_MAX || refused.is_some_and(|at| at.elapsed() < START_LIMIT) {
                    continue;
                }
                let (ready, parked) = mpsc::channel();
                match self.spawn(channel, started, disk, ready) {
                    Ok(()) if parked.recv_timeout(START_LIMIT).is_ok() => {
                        lead.give(started);
                        lead.rouse();
                        started += 1;
                    }
                    Ok(()) => started += 1,
                    Err(error) => {
                        tracing::warn!(%error, "no worker stands in for one that waits for a storage node");
                        refused = Some(Instant::now());
                    }
                }
            }
        }
    }
}
