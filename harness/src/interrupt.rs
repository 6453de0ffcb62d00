//! Ctrl-C and its kin: noticed between two steps, so that everything can be cleared away first.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::{Error, Result};

/// Interval between two polls while waiting.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Whether this program was asked to end.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP from now on.
    ///
    /// # Errors
    /// The operating system's.
    pub fn install() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&flag)).map_err(Error::io("take signals"))?;
        }
        Ok(Self(flag))
    }

    /// # Errors
    /// [`Error::Interrupted`] once a signal came.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Sleeps.
    ///
    /// # Errors
    /// [`Error::Interrupted`], at once when a signal comes.
    pub fn sleep(&self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        loop {
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(POLL_INTERVAL));
        }
    }

    /// Polls `look` every `pause` until it returns a value.
    ///
    /// # Errors
    /// The closure's error. [`Error::Interrupted`]. `what` did not happen within `limit`.
    pub fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        pause: Duration,
        mut look: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            if Instant::now() >= deadline {
                return Err(Error::Failed(format!("{what}: not within {limit:?}")));
            }
            self.sleep(pause)?;
        }
    }
}
