//! Notices that the threads of a core have stopped (D14). The kernel marks each thread's word in the segment when the
//! thread ends. It does so before it unmaps the process's memory, which takes longer the more there is. The core's
//! pidfd is the fall-back, and reports that the process has ended.
//!
//! ```text
//!  a thread for each core: sleeps on a word ─► one is marked ─► sleeps on each word that still runs ─► none: rings the bell
//!  the loop:               polls the bell, the pidfds, …      ◄──────────────────────────────────────────┘
//! ```
//! The pidfd reports the death where a thread has no word (a core of an earlier build), or where its word is not marked
//! (it hangs in a system call, or died while it was being started).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU32,
            Ordering::{Acquire, Release, SeqCst},
            fence,
        },
    },
    thread,
    time::Duration,
};

use everdisk_proto::{
    ids::Slot,
    segment::{CoreArea, thread_word},
};
use everdisk_sys::{
    memory::SharedSegment,
    wake::{self, Who},
};
use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};

/// A sleep on a word times out after this, so that a wake that does not come blocks nothing.
const SLEEP: Duration = Duration::from_secs(1);

/// Wakes the loop.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    /// A bell that has not rung.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    fn ring(&self) {
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).expect("a counter of rings does not overflow");
    }

    /// Silences the bell.
    pub(crate) fn rest(&self) {
        let read = rustix::io::read(&self.0, &mut [0; 8]);
        assert!(matches!(read, Ok(_) | Err(Errno::AGAIN | Errno::INTR)), "a bell can be read: {read:?}");
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether the threads of a core have stopped, according to their marks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stopped(Arc<AtomicBool>);

impl Stopped {
    /// Whether they have stopped.
    pub(crate) fn is_so(&self) -> bool {
        self.0.load(Acquire)
    }
}

/// Watches the threads of a core from a thread of its own. That ends when they have stopped or the core has lost its
/// slot.
pub(crate) fn watch(segment: &Arc<SharedSegment>, slot: Slot, pid: u32, bell: &Arc<Bell>) -> Stopped {
    let stopped = Stopped::default();
    let (segment, told, bell) = (Arc::clone(segment), stopped.clone(), Arc::clone(bell));
    let body = move || {
        let area = &segment.cores[slot.index()];
        if until_stopped(area, pid) {
            told.0.store(true, Release);
            bell.ring();
        }
    };
    if let Err(error) = thread::Builder::new().name("marks".to_owned()).spawn(body) {
        tracing::warn!(pid, %error, "a core's marks are not watched: its death is noticed when its process has ended");
    }
    stopped
}

/// Sleeps until the threads of a core have stopped. False when the core has lost its slot before.
fn until_stopped(area: &CoreArea, pid: u32) -> bool {
    while area.pid.load(Acquire) == pid {
        let Some((word, seen)) = awaited(&area.threads) else { return true };
        wake::sleep_while(word, seen, SLEEP, Who::All);
    }
    false
}

/// The next word to sleep on, and its value; `None` when the threads have stopped, see [`thread_word`].
fn awaited(words: &[AtomicU32]) -> Option<(&AtomicU32, u32)> {
    // Before the others are checked: from the first mark on, no new thread is started.
    let ends = words.iter().any(|word| thread_word::has_died(word.load(Acquire)));
    // With that of `is_ending` in `everdisk_sys::robust`: a thread that takes a word now is seen, or sees the mark.
    fence(SeqCst);
    let mut seen = words.iter().map(|word| (word, word.load(Acquire)));
    match seen.find(|(_, seen)| thread_word::is_running(*seen)) {
        None if ends => None,
        // The first thread takes the first word.
        None => words.first().map(|first| (first, thread_word::FREE)),
        running => running,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const PID: u32 = 7;

    /// A segment with a core whose first words are these.
    fn core(words: &[u32]) -> Arc<SharedSegment> {
        let segment = SharedSegment::create(0).unwrap();
        segment.cores[0].pid.store(PID, Release);
        segment.cores[0].threads.iter().zip(words).for_each(|(word, value)| word.store(*value, Release));
        Arc::new(segment)
    }

    fn stops(segment: &Arc<SharedSegment>) -> (Stopped, Arc<Bell>) {
        let bell = Arc::new(Bell::new().unwrap());
        (watch(segment, Slot::FIRST, PID, &bell), bell)
    }

    fn soon(stopped: &Stopped) -> bool {
        let end = Instant::now() + Duration::from_secs(20);
        while !stopped.is_so() && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        stopped.is_so()
    }

    /// What the kernel does when a thread ends.
    fn mark(word: &AtomicU32) {
        word.store(thread_word::WAITERS | thread_word::DIED, Release);
        wake::wake(word, Who::All);
    }

    #[test]
    fn d14_a_core_has_stopped_when_every_word_is_marked_or_free_and_one_is_marked() {
        let (one, two) = (thread_word::running(11), thread_word::running(12));
        let died = thread_word::WAITERS | thread_word::DIED;
        for (words, ends) in [
            (&[][..], false),
            (&[one, two], false),
            (&[one, died], false),
            (&[died, one], false),
            (&[died, thread_word::FREE, two], false),
            (&[died, thread_word::STARTING], false),
            (&[died, thread_word::FREE, died], true),
            (&[thread_word::FREE, died], true),
        ] {
            let segment = core(words);
            assert_eq!(awaited(&segment.cores[0].threads).is_none(), ends, "{words:x?}");
        }
    }

    #[test]
    fn d14_the_last_mark_rings_the_bell_and_none_before_does() {
        let segment = core(&[thread_word::running(11), thread_word::running(12), thread_word::running(13)]);
        let (stopped, bell) = stops(&segment);
        let threads = &segment.cores[0].threads;
        mark(&threads[1]);
        // The third thread ends by itself.
        threads[2].store(thread_word::FREE, Release);
        wake::wake(&threads[2], Who::All);
        thread::sleep(SOON);
        assert!(!stopped.is_so(), "a thread still runs");
        mark(&threads[0]);
        assert!(soon(&stopped));
        // The bell is rung a moment later.
        assert!(everdisk_sys::link::wait_readable(bell.as_fd(), Duration::from_secs(20)).unwrap());
        let mut rung = [0; 8];
        assert_eq!(rustix::io::read(&bell.0, &mut rung), Ok(8));
        bell.rest();
    }

    /// The thread that watches a core ends when that core has lost its slot. It reports nothing of the core that has
    /// the slot now.
    #[test]
    fn d14_marks_of_a_later_core_in_the_slot_are_not_the_earlier_ones() {
        let segment = core(&[thread_word::running(11)]);
        let (stopped, _bell) = stops(&segment);
        thread::sleep(SOON);
        crate::cores::strike(&segment, Slot::FIRST);
        crate::cores::enrol(&segment, Slot::FIRST, PID + 1);
        assert!(segment.cores[0].threads.iter().all(|word| word.load(Acquire) == thread_word::FREE));
        mark(&segment.cores[0].threads[0]);
        thread::sleep(SOON);
        assert!(!stopped.is_so());
        assert_eq!(Arc::strong_count(&segment), 1, "its thread has ended");
    }
}
