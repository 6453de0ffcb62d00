//! Threads for operations that would keep their caller waiting: those of stores that have no asynchronous form, such as
//! a directory.
//!
//! One pool serves all nodes of a core. A thread is started when an operation finds no idle one, and ends when it has
//! been idle for a while. A thread of a core has a word in the segment, so the death of the core is noticed when its
//! pool's threads have stopped too, and with them their writes (D14).

use std::{collections::VecDeque, sync::Arc, time::Duration};

use everdisk_sys::robust;
use parking_lot::{Condvar, Mutex};

use crate::{Completion, Owned, Store};

/// The most threads. A core has words for [`THREADS_MAX`](everdisk_proto::limits::THREADS_MAX), its workers' among them.
const THREADS_MAX: usize = 64;
/// An idle thread ends after this time.
const IDLE_MAX: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

static POOL: Pool =
    Pool { state: Mutex::new(State { jobs: VecDeque::new(), threads: 0, idle: 0 }), changed: Condvar::new() };

struct Pool {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// In the order in which they were begun.
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// Does `job` on a thread of the pool: at once, unless all its threads are busy and there can be no more. Where not even one
/// thread can be started, the caller does it. A job waits for no other job.
fn run(job: impl FnOnce() + Send + 'static) {
    let is_short_of_threads = {
        let mut state = POOL.state.lock();
        state.jobs.push_back(Box::new(job));
        let short = state.jobs.len() > state.idle && state.threads < THREADS_MAX;
        state.threads += usize::from(short);
        short
    };
    if !is_short_of_threads {
        POOL.changed.notify_one();
        return;
    }
    if robust::start("store", work).is_ok() {
        return;
    }
    let mut state = POOL.state.lock();
    state.threads -= 1;
    if state.threads == 0 {
        let jobs = std::mem::take(&mut state.jobs);
        drop(state);
        jobs.into_iter().for_each(|job| job());
    }
}

/// [`Store::begin`] of a store that has only [`Store::perform`].
pub fn begin<S: Store>(store: Arc<S>, offset: u64, mut op: Owned, completion: Completion) {
    run(move || {
        let outcome = store.perform(offset, op.lend());
        completion.complete(op, outcome);
    });
}

fn work() {
    let mut state = POOL.state.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = POOL.state.lock();
            continue;
        }
        state.idle += 1;
        let is_over = POOL.changed.wait_for(&mut state, IDLE_MAX).timed_out();
        state.idle -= 1;
        if is_over && state.jobs.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, mpsc};

    use super::*;

    #[test]
    fn as_many_jobs_run_at_once_as_there_may_be_threads_and_the_others_follow() {
        let together = Arc::new(Barrier::new(THREADS_MAX));
        let (done, ended) = mpsc::channel();
        for _ in 0..2 * THREADS_MAX {
            let (together, done) = (Arc::clone(&together), done.clone());
            run(move || {
                together.wait();
                done.send(()).unwrap();
            });
        }
        for _ in 0..2 * THREADS_MAX {
            ended.recv_timeout(Duration::from_secs(60)).expect("every job is done");
        }
        assert_eq!(POOL.state.lock().threads, THREADS_MAX);
    }
}
