//! Questions to a volume's interface module, over its own socket: it knows the times of the last suspension.

use std::{path::PathBuf, time::Duration};

use everdisk_harness::interrupt::Interrupt;
use everdisk_proto::frame::{Answer, CoreStatus, FromInterface, GateState, InterfaceStatus, Request, ToInterface};
use everdisk_sys::link::Link;

use crate::{Error, Result};

/// It answers within this time.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// A standby is started and armed within this time.
const STANDBY_WITHIN: Duration = Duration::from_secs(20);
/// Interval of the polls for it: long enough that they are no load.
const POLL_INTERVAL: Duration = Duration::from_millis(25);

/// A volume's interface.
#[derive(Debug)]
pub struct Interface {
    socket: PathBuf,
    link: Option<Link<ToInterface, FromInterface>>,
}

impl Interface {
    /// The interface that listens at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, link: None }
    }

    /// How it stands.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&mut self) -> Result<InterfaceStatus> {
        let lost = |e: &dyn std::fmt::Display| Error::Failed(format!("the interface does not answer: {e}"));
        let mut link = match self.link.take() {
            Some(link) => link,
            None => Link::connect(&self.socket).map_err(|e| lost(&e))?,
        };
        match link.ask(ToInterface::Request(Request::Status), ANSWER_WITHIN).map_err(|e| lost(&e))? {
            FromInterface::Answer(Answer::Status(status)) => {
                self.link = Some(link);
                Ok(*status)
            }
            other => Err(lost(&format!("{other:?}"))),
        }
    }

    /// Waits until a core serves and another one is armed; gives the process ids of both.
    ///
    /// # Errors
    /// Not in time, or interrupted.
    pub fn standby(&mut self, interrupt: &Interrupt) -> Result<Pair> {
        interrupt.wait_for("a core on standby", STANDBY_WITHIN, POLL_INTERVAL, || {
            let status = self.status()?;
            Ok(Pair::of(&status))
        })
    }
}

/// The core that serves and the one that could.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Serves.
    pub serving: CoreStatus,
    /// Armed.
    pub standby: CoreStatus,
    /// Deaths survived until then.
    pub crashes: u64,
}

impl Pair {
    fn of(status: &InterfaceStatus) -> Option<Self> {
        let pid = status.serving.filter(|_| status.gate == GateState::Serving)?;
        let serving = status.cores.iter().find(|core| core.pid == pid)?.clone();
        let standby = status.cores.iter().find(|core| core.pid != pid && core.armed)?.clone();
        Some(Self { serving, standby, crashes: status.crashes_survived })
    }
}
