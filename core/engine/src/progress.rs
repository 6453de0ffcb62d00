//! The progress of sending and flushing, for threads that wait for room or for durability.

use std::time::{Duration, Instant};

use crate::IoError;

/// After a failure the sender waits, at first this long, then twice as long each time.
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// The progress of sending and flushing.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Batches that succeeded.
    pub(crate) batches: u64,
    /// Flushes that retired something, and so made room.
    pub(crate) retired: u64,
    /// Batches begun, whatever their outcome.
    pub(crate) begun: u64,
    /// Batches of which something failed, and the number of the last of them among those begun.
    pub(crate) failures: u64,
    pub(crate) last_failed: u64,
    /// The last failure, since the last success: of sending, and of flushing.
    pub(crate) error: Option<(i32, String)>,
    pub(crate) flush_error: Option<(i32, String)>,
    back_off: Duration,
    not_before: Option<Instant>,
}

impl Progress {
    /// Whether the last failure is too recent to try again.
    pub(crate) fn is_backing_off(&self) -> bool {
        self.not_before.is_some_and(|at| Instant::now() < at)
    }

    /// A thread waits: do not wait any longer because of a failure.
    pub(crate) fn try_again(&mut self) {
        self.not_before = None;
    }

    pub(crate) fn note(&mut self, number: u64, failure: Option<&IoError>) {
        match failure {
            None => {
                self.batches += 1;
                self.error = None;
                self.back_off = Duration::ZERO;
                self.not_before = None;
            }
            Some(error) => {
                self.failures += 1;
                self.last_failed = number;
                self.error = Some((error.errno(), error.to_string()));
                self.back_off = (self.back_off * 2).clamp(BACK_OFF_MIN, BACK_OFF_MAX);
                self.not_before = Some(Instant::now() + self.back_off);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_back_off_and_a_success_forgets_them() {
        let mut progress = Progress::default();
        let error = IoError::NoGate;
        progress.note(1, Some(&error));
        assert!(progress.is_backing_off() && progress.back_off == BACK_OFF_MIN);
        for _ in 0..20 {
            progress.note(2, Some(&error));
        }
        assert_eq!(progress.back_off, BACK_OFF_MAX);
        progress.note(3, None);
        assert!(!progress.is_backing_off() && progress.error.is_none());
    }
}
