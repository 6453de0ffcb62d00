//! Who reads from a channel. One worker leads it; when the request it carries out takes long (a storage node is slow or down),
//! another worker takes the lead, so that requests that need no storage node go on.
//!
//! ```text
//!   idle ──── is given the lead ────► reads, executes, replies, reads …
//!    ▲                                         │ its request takes long: the lead goes to another
//!    └──────────── replied at last ────────────┘
//! ```

use std::{
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

/// An idle worker looks around this often even if nobody wakes it.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// The lead of one channel. Workers are told apart by the index of their ticket.
#[derive(Debug)]
pub struct Lead {
    leader: AtomicUsize,
    was_passed_on: AtomicBool,
    idle: Mutex<Vec<usize>>,
    changed: Condvar,
}

impl Lead {
    /// The channel's first worker leads.
    pub const fn new(first: usize) -> Self {
        Self {
            leader: AtomicUsize::new(first),
            was_passed_on: AtomicBool::new(false),
            idle: Mutex::new(Vec::new()),
            changed: Condvar::new(),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<usize>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who leads.
    pub fn leader(&self) -> usize {
        self.leader.load(Relaxed)
    }

    /// Whether this worker leads. It asks before it reads.
    #[inline]
    pub fn is_with(&self, worker: usize) -> bool {
        self.leader.load(Relaxed) == worker
    }

    /// Waits until this worker leads; false when `stop` says that it is to end.
    pub fn wait(&self, worker: usize, stop: impl Fn() -> bool) -> bool {
        let mut idle = self.idle();
        loop {
            let is_stopped = stop();
            if is_stopped || self.leader.load(Acquire) == worker {
                // Whoever was given the lead without being asked for is idle no longer, either.
                idle.retain(|other| *other != worker);
                return !is_stopped;
            }
            if !idle.contains(&worker) {
                idle.push(worker);
            }
            let (woken, _) = self.changed.wait_timeout(idle, IDLE_LOOK).unwrap_or_else(PoisonError::into_inner);
            idle = woken;
        }
    }

    /// Gives the lead to an idle worker; false when there is none, and then [`Lead::give`] it to a new one.
    pub fn pass_on(&self) -> bool {
        let mut idle = self.idle();
        let Some(next) = idle.pop() else { return false };
        self.give(next);
        self.changed.notify_all();
        true
    }

    /// Whether it was ever with another worker than the first.
    pub fn was_passed_on(&self) -> bool {
        self.was_passed_on.load(Relaxed)
    }

    /// Gives the lead to a worker that will [`Lead::wait`] for it.
    pub fn give(&self, worker: usize) {
        self.was_passed_on.store(true, Relaxed);
        self.leader.store(worker, Release);
    }

    /// Wakes those who wait, because what they wait for may have ended.
    pub fn rouse(&self) {
        // Whoever has looked and does not sleep yet holds the lock.
        let _idle = self.idle();
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, atomic::AtomicBool},
        thread,
    };

    use super::*;

    #[test]
    fn the_lead_goes_to_an_idle_worker_and_a_stop_ends_the_wait() {
        let lead = Arc::new(Lead::new(0));
        assert!(lead.is_with(0) && !lead.pass_on(), "nobody is idle");
        let stop = Arc::new(AtomicBool::new(false));
        let (l, s) = (Arc::clone(&lead), Arc::clone(&stop));
        let second = thread::spawn(move || l.wait(1, || s.load(Acquire)));
        while !lead.pass_on() {
            thread::yield_now();
        }
        assert!(second.join().unwrap() && lead.leader() == 1);
        let (l, s) = (Arc::clone(&lead), Arc::clone(&stop));
        let first = thread::spawn(move || l.wait(0, || s.load(Acquire)));
        stop.store(true, Release);
        lead.rouse();
        assert!(!first.join().unwrap());
        assert!(!lead.pass_on(), "who has stopped is not idle");
    }

    #[test]
    fn who_was_given_the_lead_is_not_idle() {
        let lead = Arc::new(Lead::new(0));
        let l = Arc::clone(&lead);
        let second = thread::spawn(move || l.wait(1, || false));
        while lead.idle().is_empty() {
            thread::yield_now();
        }
        lead.give(1);
        lead.rouse();
        assert!(second.join().unwrap() && !lead.pass_on() && lead.leader() == 1);
    }
}
