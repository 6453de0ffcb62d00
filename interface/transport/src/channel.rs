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

/// An idle worker looks around this often even if nobody wakes it.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// The lead of one channel. Workers are told apart by the index of their ticket.
///
/// It changes hands under the lock only, and only to a worker that is idle then: so it is never with one that has ended.
#[derive(Debug)]
pub struct Lead {
    first: usize,
    leader: AtomicUsize,
    /// How often it went to another worker.
    passed: AtomicU64,
    followers: Mutex<Followers>,
    /// The leader waits, and nobody was idle: whoever comes takes the lead.
    is_wanted: AtomicBool,
    /// There will be no more workers.
    is_complete: AtomicBool,
    /// Who brings more workers.
    watcher: OnceLock<Thread>,
}

#[derive(Debug)]
struct Followers {
    /// The last to become idle is the first to lead: its memory is still in the CPU's cache.
    idle: Vec<(usize, Thread)>,
    /// So many are to end when they are idle.
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

    /// This thread brings more workers from now on: it is unparked when one is wanted.
    ///
    /// # Panics
    /// On a second call.
    pub fn watched_by(&self, watcher: Thread) {
        self.watcher.set(watcher).expect("a channel is watched by one thread");
    }

    fn followers(&self) -> MutexGuard<'_, Followers> {
        self.followers.lock()
    }

    /// Who leads.
    pub fn leader(&self) -> usize {
        self.leader.load(Relaxed)
    }

    /// Whether this worker leads.
    #[inline]
    pub fn is_with(&self, worker: usize) -> bool {
        self.leader.load(Relaxed) == worker
    }

    /// Whether this worker leads, which is about to go on: nobody has to take the lead from it any more.
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

    /// Waits until this worker leads; false when `stop` says that it is to end, or there are too many.
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

    /// The request of `worker` takes long: if it leads, another worker goes on; where nobody is idle, the next who is, or one more
    /// that is called for.
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

    /// Whether the leader waits and nobody has come yet.
    pub fn is_wanted(&self) -> bool {
        self.is_wanted.load(Relaxed)
    }

    /// Whether it is in vain to call for more workers: nobody is roused for it.
    pub fn set_complete(&self, is_complete: bool) {
        self.is_complete.store(is_complete, Relaxed);
    }

    /// How often it went to another worker.
    pub fn passed(&self) -> u64 {
        self.passed.load(Relaxed)
    }

    /// So many workers are too many: they end as soon as they are idle and not wanted.
    pub fn set_surplus(&self, workers: usize) {
        let mut followers = self.followers();
        let more = workers > followers.surplus;
        followers.surplus = workers;
        if more {
            followers.rouse();
        }
    }

    /// Wakes those who wait, because what they wait for may have ended.
    pub fn rouse(&self) {
        // Whoever has looked and is not idle yet holds the lock.
        self.followers().rouse();
    }

    /// Gives the lead to this worker, whoever has it.
    #[cfg(test)]
    pub(crate) fn give(&self, worker: usize) {
        let followers = self.followers();
        self.hand_to(worker);
        followers.rouse();
    }
}

impl Followers {
    /// Whether this worker, which is idle, is to end because there are too many. The first one stays.
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

    /// Leaders wait, workers end because they are too many, and others are brought: the lead is never with nobody.
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
