//! The threads that serve a front end, one for each channel.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Release},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use everdisk_proto::ids::Slot;
use everdisk_sys::{
    memory::SharedSegment,
    wake::{self, Who},
};
use everdisk_transport::{
    fuse::{
        operation::Operations,
        serve::{Buffers, Ended, serve},
    },
    worker::Seat,
};

use crate::disk::EngineDisk;

/// A thread that is started takes its ticket within this time.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The workers of the file front end.
#[derive(Debug)]
pub(crate) struct Workers {
    threads: Vec<JoinHandle<Ended>>,
    stop: Arc<AtomicBool>,
    segment: Arc<SharedSegment>,
    slot: Slot,
}

impl Workers {
    /// Starts a worker for each channel and returns when all are parked.
    pub(crate) fn start(
        channels: &[Arc<OwnedFd>],
        segment: &Arc<SharedSegment>,
        slot: Slot,
        disk: &Arc<EngineDisk>,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, parked) = mpsc::channel();
        let mut threads = Vec::new();
        for (index, channel) in channels.iter().enumerate() {
            let (channel, segment, disk) = (Arc::clone(channel), Arc::clone(segment), Arc::clone(disk));
            let (stop, ready) = (Arc::clone(&stop), ready.clone());
            let mut buffers = Buffers::new()?;
            let body = move || {
                let Some(seat) = Seat::take(&segment, slot, index, &stop) else { return Ended::Stopped };
                let _ = ready.send(());
                let operations = Operations { disk: &*disk, front: &segment.front };
                let ended = serve(&seat, channel.as_fd(), &operations, &mut buffers);
                if let Ended::Failed(errno) = ended {
                    // Half a core serves nobody; a dead one has a successor.
                    tracing::error!(%errno, index, "/dev/fuse failed: this core ends");
                    std::process::exit(1);
                }
                ended
            };
            threads.push(thread::Builder::new().name(format!("worker-{index}")).spawn(body)?);
        }
        for _ in channels {
            parked.recv_timeout(START_LIMIT).map_err(|_| io::Error::other("a worker did not start"))?;
        }
        Ok(Self { threads, stop, segment: Arc::clone(segment), slot })
    }

    /// Whether every worker has ended, because the file was unmounted or /dev/fuse failed.
    pub(crate) fn have_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Ends the workers: those that are parked at once; one that still sits in read(2) ends with the connection or the
    /// process.
    pub(crate) fn stop(self) {
        self.stop.store(true, Release);
        if let Some(area) = self.segment.cores.get(self.slot.index()) {
            area.wake.fetch_add(1, Release);
            wake::wake(&area.wake, Who::All);
        }
    }
}
