//! Whether a core answers. A core that is stopped, or whose threads do not run, still holds its descriptors and its
//! tickets, and its process lives. Only its silence shows the fault.
//!
//! ```text
//!  serves, requests wait, no ticket moves ─► asked on its own socket ─► answers: its nodes hang, it does not
//!                                                                   └─► silent for --hang-limit, another is armed: killed
//!  is to be given the gate without a probe, or has not taken it in time ─► asked ─► silent: killed, the next
//! ```

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::atomic::Ordering::{Acquire, Relaxed},
    time::{Duration, Instant},
};

use everdisk_proto::{
    frame::{CoreAnswer, CoreRequest},
    ids::Slot,
    segment::Segment,
};
use everdisk_sys::link::{Link, LinkError};

use crate::cores::{Core, area};

/// A live core answers within this time, however busy its machine is.
pub(crate) const LIFE_LIMIT: Duration = Duration::from_secs(1);
/// Interval between two checks of the core that serves, and the most that one check can add to its silence: time in
/// which this process itself did not run does not count as silence.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The socket at which a core answers, beside the interface's own.
pub(crate) fn core_socket(interface: &Path, pid: u32) -> PathBuf {
    interface.with_file_name(format!("core-{pid}.sock"))
}

/// A ping to a core that is under way.
#[derive(Debug)]
struct Ping(Option<Link<CoreRequest, CoreAnswer>>);

impl Ping {
    /// Sends a ping. A core whose queue is full has left others without an answer.
    fn send(socket: &Path) -> Self {
        let link = Link::connect(socket).ok();
        Self(link.filter(|link| link.send(1, CoreRequest::Status, &[]).is_ok()))
    }

    /// Whether it was answered within `limit`. A core that has closed the connection has read it.
    fn is_answered(&self, limit: Duration) -> bool {
        self.0.as_ref().is_some_and(|link| matches!(link.recv_within(limit), Ok(_) | Err(LinkError::Closed)))
    }
}

/// Asks a core whether it lives, and waits for the answer.
pub(crate) fn answers(socket: &Path) -> bool {
    Ping::send(socket).is_answered(LIFE_LIMIT)
}

/// What the last check of the core that serves has shown.
#[derive(Debug)]
pub(crate) struct Watchdog {
    limit: Duration,
    looked: Instant,
    /// The core whose silence is measured, and the state of its tickets.
    watched: Option<(Slot, u32, u64)>,
    silent: Duration,
    ping: Option<Ping>,
}

impl Watchdog {
    /// A core may be silent for `limit`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, looked: Instant::now(), watched: None, silent: Duration::ZERO, ping: None }
    }

    fn look(&self) -> Duration {
        POLL_INTERVAL.min(self.limit / 4)
    }

    /// The longest time that the loop may wait.
    pub(crate) fn patience(&self) -> Option<Duration> {
        self.watched.map(|_| self.look())
    }

    /// The descriptor that becomes readable when the core has answered.
    pub(crate) fn answer(&self) -> Option<BorrowedFd<'_>> {
        self.ping.as_ref()?.0.as_ref().map(AsFd::as_fd)
    }

    /// No core's silence is measured for now.
    pub(crate) fn rest(&mut self) {
        (self.watched, self.silent, self.ping) = (None, Duration::ZERO, None);
    }

    /// Whether a check is due.
    pub(crate) fn is_due(&self) -> bool {
        self.looked.elapsed() >= self.look()
    }

    /// Checks the core that serves while requests wait. Returns how long it has been silent, if that is too long.
    pub(crate) fn watch(&mut self, segment: &Segment, slot: Slot, core: &Core, socket: &Path) -> Option<Duration> {
        let passed = self.looked.elapsed();
        self.looked = Instant::now();
        let now = (slot, core.pid, movement(segment, slot));
        let answered = self.ping.as_ref().is_some_and(|ping| ping.is_answered(Duration::ZERO));
        if answered || self.watched != Some(now) {
            (self.watched, self.silent, self.ping) = (Some(now), Duration::ZERO, None);
            return None;
        }
        // Its answer to the ping has to come during the silence that is measured from here on.
        if self.ping.is_some() {
            self.silent += passed.min(2 * self.look());
        } else {
            self.ping = Some(Ping::send(&core_socket(socket, core.pid)));
        }
        (self.silent >= self.limit).then_some(self.silent)
    }
}

/// A number that changes when a ticket has moved.
fn movement(segment: &Segment, slot: Slot) -> u64 {
    let tickets = area(segment, slot).map_or(&[][..], |area| &area.tickets);
    let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    tickets
        .iter()
        .fold(0, |sum, ticket| mix(mix(sum, ticket.requests.load(Relaxed)), u64::from(ticket.state.load(Acquire))))
}
