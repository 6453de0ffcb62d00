//! When to look again and when to sleep. A wake costs more than a small request, so a worker looks for the next one for a
//! moment before it sleeps; where looking does not pay, or others want the CPU, it gives that up.

use std::time::{Duration, Instant};

/// So long a worker looks: about what a sleep and a wake cost.
const SPIN_TIME: Duration = Duration::from_micros(50);
/// A look in between that took this long was an interruption: somebody else wants the CPU.
const INTERRUPTED: Duration = Duration::from_micros(20);
/// The most sleeps without a look before them.
const FORBEAR_MAX: u32 = 64;

/// One worker's experience with looking.
#[derive(Debug, Default)]
pub(super) struct Spin {
    /// So many sleeps more without a look before them.
    forbear: u32,
    /// What `forbear` is set to after the next look in vain.
    penalty: u32,
}

impl Spin {
    /// Looks until `look` finds something; `None` when it did not, or was not tried.
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

    /// After a sleep: one that was as short as a look would have been better looked through.
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
