//! When to poll and when to sleep. A wake costs more than a small request, so a worker polls for the next request for a
//! moment before it sleeps. Where polling does not pay, or another thread wants the CPU, the worker stops polling.

use std::time::{Duration, Instant};

/// A worker polls for this long: about the cost of a sleep and a wake.
const SPIN_TIME: Duration = Duration::from_micros(50);
/// A gap between two polls of this length was an interruption: another thread wants the CPU.
const INTERRUPTED: Duration = Duration::from_micros(20);
/// The most sleeps in a row without polling before them.
const FORBEAR_MAX: u32 = 64;

/// One worker's experience with polling.
#[derive(Debug, Default)]
pub(super) struct Spin {
    /// Number of sleeps still to come without polling before them.
    forbear: u32,
    /// The value of `forbear` after the next poll in vain.
    penalty: u32,
}

impl Spin {
    /// Polls `look` until it returns a value. `None`: the time was over, or polling was not tried.
    pub(super) fn until<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if self.forbear > 0 {
            self.forbear -= 1;
            return None;
        }
        let begin = Instant::now();
        let mut last = begin;
        loop {
            if let Some(found) = look() {
                self.penalty /= 2;
                return Some(found);
            }
            let now = Instant::now();
            let interrupted = now - last > INTERRUPTED;
            if interrupted || now - begin > SPIN_TIME {
                self.penalty = (self.penalty * 2 + 1).min(FORBEAR_MAX);
                self.forbear = self.penalty;
                return None;
            }
            last = now;
            std::hint::spin_loop();
        }
    }

    /// After a sleep: for one as short as a poll, polling would have been better.
    pub(super) fn slept(&mut self, time: Duration) {
        if time < SPIN_TIME {
            self.forbear = 0;
            self.penalty /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_in_vain_becomes_rare_and_pays_again_after_short_sleeps() {
        let mut spin = Spin::default();
        let mut tried = 0;
        for _ in 0..1000 {
            let mut looked = false;
            let found: Option<()> = spin.until(|| {
                looked = true;
                None
            });
            assert!(found.is_none());
            tried += u32::from(looked);
        }
        assert!((1..=25).contains(&tried), "{tried}");
        spin.slept(Duration::from_micros(5));
        assert_eq!(spin.until(|| Some(7)), Some(7));
    }
}
