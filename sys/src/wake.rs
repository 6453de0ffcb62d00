//! Futexes in shared memory: sleeping on a word that another process changes.

use std::{num::NonZeroU32, sync::atomic::AtomicU32, time::Duration};

use rustix::thread::futex::{Flags, Timespec, wait_bitset, wake_bitset};

use crate::clock::monotonic_ns;

/// Which sleepers on one word are to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The first worker of a core, which probes.
    First,
    /// The other workers.
    Others,
    /// All of them.
    All,
}

impl Who {
    const fn bits(self) -> NonZeroU32 {
        match self {
            Self::First => NonZeroU32::MIN,
            Self::Others => NonZeroU32::MIN.saturating_add(1),
            Self::All => NonZeroU32::MAX,
        }
    }
}

/// Sleeps while `word` is `seen`, at most for `limit`. May return spuriously: check again.
pub fn sleep_while(word: &AtomicU32, seen: u32, limit: Duration, who: Who) {
    let end = u128::from(monotonic_ns()) + limit.as_nanos();
    let timeout = Timespec {
        tv_sec: i64::try_from(end / 1_000_000_000).expect("a time within 292 billion years"),
        tv_nsec: i64::try_from(end % 1_000_000_000).expect("less than a second"),
    };
    // Every error (the word has changed, interrupted, timed out) means the same to the caller: check again.
    let _ = wait_bitset(word, Flags::empty(), seen, Some(&timeout), who.bits());
}

/// Wakes the sleepers on `word`.
pub fn wake(word: &AtomicU32, who: Who) {
    // How many slept does not matter.
    let _ = wake_bitset(word, Flags::empty(), i32::MAX.unsigned_abs(), who.bits());
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::Ordering::SeqCst, thread, time::Instant};

    use super::*;

    #[test]
    fn only_those_meant_are_woken_and_a_limit_ends_the_sleep() {
        static WORD: AtomicU32 = AtomicU32::new(0);
        let start = Instant::now();
        sleep_while(&WORD, 1, Duration::from_secs(60), Who::All);
        sleep_while(&WORD, 0, Duration::from_millis(5), Who::All);
        assert!(start.elapsed() < Duration::from_secs(30));
        let first = thread::spawn(|| {
            while WORD.load(SeqCst) == 0 {
                sleep_while(&WORD, 0, Duration::from_secs(60), Who::First);
            }
        });
        thread::sleep(Duration::from_millis(50));
        wake(&WORD, Who::Others);
        thread::sleep(Duration::from_millis(20));
        assert!(!first.is_finished());
        WORD.store(1, SeqCst);
        wake(&WORD, Who::First);
        first.join().unwrap();
    }
}
