//! Who reads from a channel. One worker leads it. When the request it carries out waits for a storage node that is known to be slow,
//! it passes the lead on before it waits; when one takes long unexpectedly, the lead is taken from it. So requests that need no
//! storage node go on, and many wait for their nodes at once.
//!
//! ```text
//!   idle ──── is given the lead ────► reads, executes, replies, reads …
//!    ▲                                         │ its request takes long: the lead goes to another
//!    └──────────── replied at last ────────────┘
//! ```
//! Threads that take turns in this way are known as leader and followers (Schmidt et al., 2000): no request is copied from one to
//! another.

use std::{
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    thread::{self, Thread},
    time::Duration,
};

/// An idle worker looks around this often even if nobody wakes it.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// The lead of one channel. Workers are told apart by the index of their ticket.
#[derive(Debug)]
pub struct Lead {
    first: usize,
    leader: AtomicUsize,
    /// How often it went to another worker.
    passed: AtomicU64,
    /// The last to become idle is the first to lead: its memory is still in the CPU's cache.
    idle: Mutex<Vec<(usize, Thread)>>,
    /// So many workers are to end when they are idle.
    surplus: AtomicUsize,
    /// A leader wanted to pass it on, and nobody was idle.
    wanted: AtomicBool,
    /// There will be no more workers.
    complete: AtomicBool,
    /// Who brings more workers.
    watcher: OnceLock<Thread>,
}

impl Lead {
    /// The channel's first worker leads.
    pub const fn new(first: usize) -> Self {
        Self {
            first,
            leader: AtomicUsize::new(first),
            passed: AtomicU64::new(0),
            idle: Mutex::new(Vec::new()),
            surplus: AtomicUsize::new(0),
            wanted: AtomicBool::new(false),
            complete: AtomicBool::new(false),
            watcher: OnceLock::new(),
        }
    }

    /// This thread brings more workers from now on: it is unparked when one is wanted. To be called once.
    pub fn watched_by(&self, watcher: Thread) {
        let _ = self.watcher.set(watcher);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(usize, Thread)>> {
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

    /// Waits until this worker leads; false when `stop` says that it is to end, or there are too many.
    pub fn wait(&self, worker: usize, stop: impl Fn() -> bool) -> bool {
        loop {
            {
                let mut idle = self.idle();
                let (is_over, leads) = (stop(), self.leader.load(Acquire) == worker);
                if is_over || leads || self.is_surplus(worker) {
                    // Whoever was given the lead without being asked for is idle no longer, either.
                    idle.retain(|(other, _)| *other != worker);
                    return !is_over && leads;
                }
                if !idle.iter().any(|(other, _)| *other == worker) {
                    idle.push((worker, thread::current()));
                }
            }
            thread::park_timeout(IDLE_LOOK);
        }
    }

    /// Whether this worker, which is idle, is to end because there are too many. The first one stays.
    fn is_surplus(&self, worker: usize) -> bool {
        worker != self.first && self.surplus.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)).is_ok()
    }

    /// Passes the lead from `worker`, if that has it, to an idle worker. False when it has and nobody is idle: then [`Lead::give`] it
    /// to a new one.
    pub fn pass_on(&self, worker: usize) -> bool {
        let next = {
            let mut idle = self.idle();
            if !self.is_with(worker) {
                return true;
            }
            let Some((next, thread)) = idle.pop() else { return false };
            self.give(next);
            thread
        };
        next.unpark();
        true
    }

    /// The request of `worker` will take long: if it leads, another worker goes on, which is called for where nobody is idle.
    pub fn let_others(&self, worker: usize) {
        if !self.is_with(worker) || self.pass_on(worker) || self.wanted.swap(true, Release) {
            return;
        }
        if let Some(watcher) = self.watcher.get().filter(|_| !self.complete.load(Relaxed)) {
            watcher.unpark();
        }
    }

    /// Whether another worker was called for since the last call.
    pub fn is_wanted(&self) -> bool {
        self.wanted.swap(false, Acquire)
    }

    /// Whether it is in vain to call for more workers: nobody is roused for it.
    pub fn set_complete(&self, complete: bool) {
        self.complete.store(complete, Relaxed);
    }

    /// How often it went to another worker.
    pub fn passed(&self) -> u64 {
        self.passed.load(Relaxed)
    }

    /// Gives the lead to a worker that will [`Lead::wait`] for it.
    pub fn give(&self, worker: usize) {
        self.passed.fetch_add(1, Relaxed);
        self.leader.store(worker, Release);
    }

    /// So many workers are too many: they end as soon as they are idle.
    pub fn set_surplus(&self, workers: usize) {
        if self.surplus.swap(workers, Relaxed) < workers {
            self.rouse();
        }
    }

    /// Wakes those who wait, because what they wait for may have ended.
    pub fn rouse(&self) {
        // Whoever has looked and is not idle yet holds the lock.
        for (_, thread) in self.idle().iter() {
            thread.unpark();
        }
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
        assert!(lead.is_with(0) && !lead.pass_on(0), "nobody is idle");
        let stop = Arc::new(AtomicBool::new(false));
        let (l, s) = (Arc::clone(&lead), Arc::clone(&stop));
        let second = thread::spawn(move || l.wait(1, || s.load(Acquire)));
        while !lead.pass_on(0) {
            thread::yield_now();
        }
        assert!(second.join().unwrap() && lead.leader() == 1);
        let (l, s) = (Arc::clone(&lead), Arc::clone(&stop));
        let first = thread::spawn(move || l.wait(0, || s.load(Acquire)));
        stop.store(true, Release);
        lead.rouse();
        assert!(!first.join().unwrap());
        assert!(!lead.pass_on(1), "who has stopped is not idle");
        assert!(lead.pass_on(0), "it has the lead no longer");
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
        assert!(second.join().unwrap() && !lead.pass_on(1) && lead.leader() == 1);
    }

    #[test]
    fn a_leader_that_waits_calls_for_another() {
        let lead = Lead::new(0);
        lead.watched_by(thread::current());
        lead.let_others(1);
        assert!(!lead.is_wanted(), "it was not the leader");
        lead.let_others(0);
        thread::park();
        assert!(lead.is_wanted() && !lead.is_wanted());
        lead.set_complete(true);
        lead.let_others(0);
        assert!(lead.is_wanted(), "it is known that there are too few");
    }

    #[test]
    fn idle_workers_that_are_too_many_end_but_the_first() {
        let lead = Arc::new(Lead::new(0));
        lead.give(1);
        let wait = |worker| {
            let lead = Arc::clone(&lead);
            thread::spawn(move || lead.wait(worker, || false))
        };
        let (first, third) = (wait(0), wait(2));
        while lead.idle().len() < 2 {
            thread::yield_now();
        }
        lead.set_surplus(2);
        assert!(!third.join().unwrap());
        assert_eq!(lead.idle().len(), 1);
        assert!(lead.pass_on(1) && first.join().unwrap() && lead.is_with(0));
    }
}
