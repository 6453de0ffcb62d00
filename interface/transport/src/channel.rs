//! Which worker reads from a channel. One worker leads it. Before its request waits for a storage node that is known to
//! be slow, it passes the lead on. When a request takes long unexpectedly, the lead is taken from it. So requests that
//! need no storage node go on, and many requests wait for their nodes at the same time.
//!
//! ```text
//!   idle ──── is given the lead ────► reads, executes, replies, reads …
//!    ▲                                         │ its request takes long: the lead goes to another
//!    └──────────── replied ────────────┘
//! ```
//! This scheme is known as leader and followers (Schmidt et al., 2000): no request is copied from one thread to
//! another.

use std::{
    sync::{
        OnceLock,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    thread::{self, Thread},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};

/// Interval at which an idle worker polls without a wake.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// The lead of one channel. A worker is identified by the index of its ticket.
///
/// The lead changes hands under the lock only, and only to a worker that is idle at that time. So a worker that has
/// ended never has it.
#[derive(Debug)]
pub struct Lead {
    first: usize,
    leader: AtomicUsize,
    /// How often the lead went to another worker.
    passed: AtomicU64,
    followers: Mutex<Followers>,
    /// The leader waits, and no worker was idle: the next one that is takes the lead.
    is_wanted: AtomicBool,
    /// There will be no more workers.
    is_complete: AtomicBool,
    /// The thread that starts more workers.
    watcher: OnceLock<Thread>,
}

#[derive(Debug)]
struct Followers {
    /// The last worker to become idle is the first to lead: its memory is still in the CPU's cache.
    idle: Vec<(usize, Thread)>,
    /// Number of workers that are to end when they are idle.
    surplus: usize,
}

impl Lead {
    /// The channel's first worker leads.
    pub const fn new(first: usize) -> Self {
        Self {
            first,
            leader: AtomicUsize::new(first),
            passed: AtomicU64::new(0),
            followers: Mutex::new(Followers { idle: Vec::new(), surplus: 0 }),
            is_wanted: AtomicBool::new(false),
            is_complete: AtomicBool::new(false),
            watcher: OnceLock::new(),
        }
    }

    /// This thread starts more workers from now on. It is unparked when one is wanted.
    ///
    /// # Panics
    /// On a second call.
    pub fn watched_by(&self, watcher: Thread) {
        self.watcher.set(watcher).expect("a channel is watched by one thread");
    }

    fn followers(&self) -> MutexGuard<'_, Followers> {
        self.followers.lock()
    }

    /// The leader.
    pub fn leader(&self) -> usize {
        self.leader.load(Relaxed)
    }

    /// Whether this worker leads.
    #[inline]
    pub fn is_with(&self, worker: usize) -> bool {
        self.leader.load(Relaxed) == worker
    }

    /// Whether this worker leads and is about to go on: then the lead need not be taken from it.
    #[inline]
    pub fn goes_on(&self, worker: usize) -> bool {
        if self.is_wanted.load(Relaxed) {
            let _followers = self.followers();
            if self.is_with(worker) {
                self.is_wanted.store(false, Relaxed);
            }
        }
        self.is_with(worker)
    }

    /// Waits until this worker leads. False when it is to end, because `stop` says so or there are too many workers.
    pub fn wait(&self, worker: usize, stop: impl Fn() -> bool) -> bool {
        loop {
            {
                let mut followers = self.followers();
                let is_over = stop();
                if !is_over && self.is_wanted.load(Relaxed) && !self.is_with(worker) {
                    self.hand_to(worker);
                }
                let leads = self.leader.load(Acquire) == worker;
                if is_over || leads || followers.is_surplus(worker, self.first) {
                    followers.idle.retain(|(other, _)| *other != worker);
                    return !is_over && leads;
                }
                if !followers.idle.iter().any(|(other, _)| *other == worker) {
                    followers.idle.push((worker, thread::current()));
                }
            }
            thread::park_timeout(IDLE_LOOK);
        }
    }

    /// The request of `worker` takes long. If `worker` leads, the lead goes to an idle worker; where none is idle, to
    /// the next that is, or to a new one, which is requested.
    pub fn let_others(&self, worker: usize) {
        if !self.is_with(worker) {
            return;
        }
        let idle = {
            let mut followers = self.followers();
            if !self.is_with(worker) {
                return;
            }
            let idle = followers.idle.pop();
            match idle {
                Some((next, _)) => self.hand_to(next),
                None if self.is_wanted.swap(true, Relaxed) => return,
                None => {}
            }
            idle
        };
        match idle {
            Some((_, thread)) => thread.unpark(),
            None => {
                if let Some(watcher) = self.watcher.get().filter(|_| !self.is_complete.load(Relaxed)) {
                    watcher.unpark();
                }
            }
        }
    }

    /// Under the lock.
    fn hand_to(&self, worker: usize) {
        self.is_wanted.store(false, Relaxed);
        self.passed.fetch_add(1, Relaxed);
        self.leader.store(worker, Release);
    }

    /// Whether the leader waits and no worker has taken the lead yet.
    pub fn is_wanted(&self) -> bool {
        self.is_wanted.load(Relaxed)
    }

    /// Sets whether no more workers can be started: then the thread that starts them is not woken.
    pub fn set_complete(&self, is_complete: bool) {
        self.is_complete.store(is_complete, Relaxed);
    }

    /// How often the lead went to another worker.
    pub fn passed(&self) -> u64 {
        self.passed.load(Relaxed)
    }

    /// This number of workers is surplus: they end as soon as they are idle and not wanted.
    pub fn set_surplus(&self, workers: usize) {
        let mut followers = self.followers();
        let more = workers > followers.surplus;
        followers.surplus = workers;
        if more {
            followers.rouse();
        }
    }

    /// Wakes the idle workers, because they may have to end.
    pub fn rouse(&self) {
        // A worker that has checked and is not idle yet holds the lock.
        self.followers().rouse();
    }

    /// Gives the lead to this worker, whichever has it.
    #[cfg(test)]
    pub(crate) fn give(&self, worker: usize) {
        let followers = self.followers();
        self.hand_to(worker);
        followers.rouse();
    }
}

impl Followers {
    /// Whether this idle worker is to end because there are too many. The first worker stays.
    fn is_surplus(&mut self, worker: usize, first: usize) -> bool {
        let is_surplus = worker != first && self.surplus > 0;
        self.surplus -= usize::from(is_surplus);
        is_surplus
    }

    fn rouse(&self) {
        for (_, thread) in &self.idle {
            thread.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, atomic::AtomicBool},
        thread::JoinHandle,
    };

    use super::*;

    fn wait(lead: &Arc<Lead>, worker: usize) -> JoinHandle<bool> {
        let lead = Arc::clone(lead);
        thread::spawn(move || lead.wait(worker, || false))
    }

    fn await_idle(lead: &Lead, workers: usize) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while lead.followers().idle.len() != workers {
            assert!(std::time::Instant::now() < deadline, "{workers} workers are not idle");
            thread::yield_now();
        }
    }

    #[test]
    fn the_lead_goes_to_an_idle_worker_and_a_stop_ends_the_wait() {
        let lead = Arc::new(Lead::new(0));
        let second = wait(&lead, 1);
        await_idle(&lead, 1);
        lead.let_others(1);
        assert!(lead.is_with(0), "it was not the leader who said so");
        lead.let_others(0);
        assert!(second.join().unwrap() && lead.is_with(1) && !lead.is_wanted());
        let stop = Arc::new(AtomicBool::new(false));
        let (l, s) = (Arc::clone(&lead), Arc::clone(&stop));
        let first = thread::spawn(move || l.wait(0, || s.load(Acquire)));
        stop.store(true, Release);
        lead.rouse();
        assert!(!first.join().unwrap());
        lead.let_others(1);
        assert!(lead.is_with(1) && lead.is_wanted(), "who has stopped is not idle");
    }

    #[test]
    fn a_leader_that_waits_calls_for_another_and_the_next_to_come_takes_the_lead_unless_it_goes_on() {
        let lead = Arc::new(Lead::new(0));
        lead.watched_by(thread::current());
        lead.let_others(0);
        thread::park();
        assert!(lead.is_wanted());
        assert!(lead.goes_on(0) && !lead.is_wanted());
        lead.set_complete(true);
        lead.let_others(0);
        assert!(lead.is_wanted(), "it is known that there are too few");
        assert!(wait(&lead, 1).join().unwrap() && lead.is_with(1) && !lead.is_wanted());
        assert!(!lead.goes_on(0));
    }

    #[test]
    fn idle_workers_that_are_too_many_end_but_the_first_and_those_that_are_wanted() {
        let lead = Arc::new(Lead::new(0));
        lead.give(1);
        let (first, third) = (wait(&lead, 0), wait(&lead, 2));
        await_idle(&lead, 2);
        lead.set_surplus(2);
        assert!(!third.join().unwrap());
        assert_eq!(lead.followers().idle.len(), 1);
        lead.let_others(1);
        assert!(first.join().unwrap() && lead.is_with(0));
        lead.let_others(0);
        assert!(wait(&lead, 3).join().unwrap() && lead.is_with(3), "there is one too many, and it is wanted");
    }

    /// Leaders wait, surplus workers end, and others are started: at all times a worker has the lead.
    #[test]
    fn the_lead_is_never_lost() {
        const TURNS: u64 = 20_000;
        let (lead, stop) = (Lead::new(0), AtomicBool::new(false));
        let turns = AtomicU64::new(0);
        let work = |worker: usize| {
            while lead.wait(worker, || stop.load(Relaxed)) {
                while lead.goes_on(worker) && !stop.load(Relaxed) {
                    let turn = turns.fetch_add(1, Relaxed);
                    if !turn.is_multiple_of(3) {
                        lead.let_others(worker);
                    }
                    if turn.is_multiple_of(5) {
                        thread::yield_now();
                    }
                }
            }
        };
        thread::scope(|scope| {
            lead.watched_by(thread::current());
            scope.spawn(|| work(0));
            let mut workers = Vec::new();
            let (mut before, mut since) = (0, std::time::Instant::now());
            while turns.load(Relaxed) < TURNS {
                lead.set_surplus(usize::from(turns.load(Relaxed).is_multiple_of(2)));
                workers.retain(|(_, worker): &(usize, thread::ScopedJoinHandle<'_, ()>)| !worker.is_finished());
                let next = (1..8).find(|n| workers.iter().all(|(other, _)| other != n));
                if let Some(next) = next.filter(|_| lead.is_wanted()) {
                    let work = &work;
                    workers.push((next, scope.spawn(move || work(next))));
                }
                thread::park_timeout(Duration::from_millis(1));
                let now = turns.load(Relaxed);
                if now != before {
                    (before, since) = (now, std::time::Instant::now());
                }
                if since.elapsed() > Duration::from_secs(5) {
                    stop.store(true, Relaxed);
                    lead.rouse();
                    assert_eq!(now, before, "always");
                    unreachable!("the lead is with {} and nothing happens", lead.leader());
                }
            }
            stop.store(true, Relaxed);
            lead.rouse();
        });
    }
}
