//! Threads for operations that would keep their caller waiting: those of stores that have no asynchronous form, such as
//! a directory.
//!
//! Each store has a [`Pool`] of its own, so a node that hangs takes no thread from another. The pools of a process share a
//! number of threads equally. A thread is started when an operation finds no idle one, and ends when it has been idle for a
//! while. A thread of a core has a word in the segment, so the death of the core is noticed when its pools' threads have
//! stopped too, and with them their writes (D14).

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use everdisk_proto::limits::NODES_MAX;
use everdisk_sys::robust;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{Completion, Owned, Store};

/// Threads of all pools together, where each pool's share is not below [`SHARE_MIN`].
const THREADS_MAX: usize = 64;
/// The least share of a pool.
const SHARE_MIN: usize = 2;
// Together with the workers and the other threads of a core (`limits::THREADS_MAX`).
const _: () = assert!(SHARE_MIN * NODES_MAX <= 2 * THREADS_MAX);
/// An idle thread ends after this time. Each thread lengthens the death of a core, so they do not stay for long.
const IDLE_MAX: Duration = Duration::from_secs(1);

/// Pools that have been used.
static USED: AtomicUsize = AtomicUsize::new(0);

type Job = Box<dyn FnOnce() + Send>;

/// The threads of one store.
#[derive(Default)]
pub struct Pool(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// In the order in which they were begun.
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    is_used: bool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        USED.fetch_sub(usize::from(self.0.state.lock().is_used), Relaxed);
    }
}

impl Pool {
    /// [`Store::begin`] of a store that has only [`Store::perform`]. At once, unless all the threads that the store may have
    /// are busy. Where no thread can be started, the caller performs an operation.
    pub fn begin<S: Store>(&self, store: Arc<S>, offset: u64, mut op: Owned, completion: Completion) {
        self.run(Box::new(move || {
            let outcome = store.perform(offset, op.lend());
            completion.complete(op, outcome);
        }));
    }

    /// A job waits for no other job.
    fn run(&self, job: Job) {
        let mut state = self.0.state.lock();
        if !std::mem::replace(&mut state.is_used, true) {
            USED.fetch_add(1, Relaxed);
        }
        state.jobs.push_back(job);
        self.0.attend(state);
    }
}

impl Shared {
    /// Has a thread come to the jobs.
    fn attend(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let share = (THREADS_MAX / USED.load(Relaxed).max(1)).max(SHARE_MIN);
        if state.jobs.len() <= state.idle || state.threads >= share {
            drop(state);
            self.changed.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = Arc::clone(self);
        if robust::start("store", move || shared.work()).is_ok() {
            return;
        }
        let job = {
            let mut state = self.state.lock();
            state.threads -= 1;
            state.jobs.pop_back()
        };
        if let Some(job) = job {
            job();
        }
    }

    fn work(self: &Arc<Self>) {
        // Before its process joined as a core, a thread has no word, and must do nothing for that core.
        let joined = robust::has_joined();
        let mut state = self.state.lock();
        loop {
            if joined != robust::has_joined() {
                state.threads -= 1;
                if !state.jobs.is_empty() {
                    self.attend(state);
                }
                return;
            }
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
                continue;
            }
            state.idle += 1;
            let is_over = self.changed.wait_for(&mut state, IDLE_MAX).timed_out();
            state.idle -= 1;
            if is_over && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, mpsc};

    use super::*;

    /// As many run at once as there may be threads, and the others follow.
    #[test]
    fn every_job_is_done_and_many_at_once() {
        let pool = Pool::default();
        let together = Arc::new(Barrier::new(SHARE_MIN));
        let (done, ended) = mpsc::channel();
        for _ in 0..2 * THREADS_MAX {
            let (together, done) = (Arc::clone(&together), done.clone());
            pool.run(Box::new(move || {
                together.wait();
                done.send(()).unwrap();
            }));
        }
        for _ in 0..2 * THREADS_MAX {
            ended.recv_timeout(Duration::from_secs(60)).expect("every job is done");
        }
    }

    /// beyond 4: a node that hangs takes no thread from another.
    #[test]
    fn beyond4_a_full_pool_holds_up_no_other() {
        let (hung, healthy) = (Pool::default(), Pool::default());
        let (release, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        for _ in 0..2 * THREADS_MAX {
            let wait = Arc::clone(&wait);
            hung.run(Box::new(move || {
                // It ends in an error, when the sender has gone.
                let _ = wait.lock().recv();
            }));
        }
        let (done, ended) = mpsc::channel();
        healthy.run(Box::new(move || done.send(()).unwrap()));
        ended.recv_timeout(Duration::from_secs(60)).expect("the job of the other pool is done");
        drop(release);
    }
}
