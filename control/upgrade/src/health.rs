//! The verdict of the soak: whether the new core goes on serving as it should.

use std::time::Duration;

/// Interval between two observations of the soak.
pub const INTERVAL: Duration = Duration::from_millis(100);
/// Most observations in a row that may find no serving core or get no answer (the interface may be on its way back).
pub const BLIND_MAX: u32 = 50;

/// What one observation found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Process id of the core that has the gate.
    pub serving: Option<u32>,
    /// Requests the new core has ended with EIO, while it is known to the interface.
    pub io_errors: Option<u64>,
    /// The operator wants the old core back.
    pub rollback_wanted: bool,
}

/// Watches a new core.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    new: u32,
    io_errors: Option<u64>,
    blind: u32,
}

impl Watch {
    /// Watches the core with process id `new`, which had ended `io_errors` requests with EIO before it was given the
    /// gate.
    pub const fn new(new: u32, io_errors: Option<u64>) -> Self {
        Self { new, io_errors, blind: 0 }
    }

    /// Takes one observation into account; `None` when there was no answer.
    ///
    /// # Errors
    /// Why the old core should have the gate.
    pub fn see(&mut self, look: Option<Observation>) -> Result<(), String> {
        if look.is_some_and(|seen| seen.rollback_wanted) {
            return Err("a rollback was asked for".to_owned());
        }
        let Some((seen, serving)) = look.and_then(|seen| Some((seen, seen.serving?))) else {
            self.blind += 1;
            if self.blind > BLIND_MAX {
                return Err("no core was seen serving for too long".to_owned());
            }
            return Ok(());
        };
        self.blind = 0;
        if serving != self.new {
            return Err(format!("the new core (process {}) no longer serves: it died or lost the gate", self.new));
        }
        match (self.io_errors, seen.io_errors) {
            (Some(before), Some(now)) if now > before => {
                Err(format!("the new core ended {} requests with an I/O error", now - before))
            }
            (None, now) => {
                self.io_errors = now;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(serving: u32, io_errors: u64) -> Option<Observation> {
        Some(Observation { serving: Some(serving), io_errors: Some(io_errors), rollback_wanted: false })
    }

    #[test]
    fn errors_that_grow_and_a_lost_gate_are_seen_and_old_errors_are_not() {
        let mut watch = Watch::new(7, Some(3));
        assert_eq!(watch.see(look(7, 3)), Ok(()));
        assert!(watch.see(look(7, 4)).unwrap_err().contains("1 requests"));
        assert!(watch.see(look(8, 3)).unwrap_err().contains("no longer serves"));
    }

    #[test]
    fn a_short_blindness_is_borne_and_a_long_one_is_not() {
        let mut watch = Watch::new(7, None);
        for _ in 0..BLIND_MAX {
            assert_eq!(watch.see(None), Ok(()));
        }
        assert_eq!(watch.see(look(7, 5)), Ok(()));
        for _ in 0..BLIND_MAX {
            assert_eq!(watch.see(None), Ok(()));
        }
        assert!(watch.see(None).is_err());
    }

    #[test]
    fn the_operator_is_heard() {
        let wanted = Observation { serving: Some(7), io_errors: Some(0), rollback_wanted: true };
        assert!(Watch::new(7, None).see(Some(wanted)).is_err());
    }
}
