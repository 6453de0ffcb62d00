//! What the machine asks of the world. The control module implements it with processes and sockets, the tests with a
//! model.

use std::time::Duration;

use everdisk_proto::{frame::HandoverReport, identity::Build, journal::Event};

use crate::{health::Observation, policy::Buffer, report::Report, step::Step};

/// Why an act failed: what is wrong and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Fault(pub String);

/// A new core that has armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Armed {
    /// Process id.
    pub pid: u32,
    /// Blocks it has read and found readable.
    pub verified_blocks: u32,
}

/// The gate is not with the new core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenBack {
    /// It was there before.
    pub had_switched: bool,
}

/// The acts. Each keeps to its limit; each undo is idempotent.
pub trait Act {
    /// Microseconds of a clock that never goes back.
    fn now_us(&mut self) -> u64;
    /// Waits.
    fn sleep(&mut self, time: Duration);
    /// Reports that a step begins.
    fn begins(&mut self, step: Step);
    /// Appends to the journal and makes it durable.
    ///
    /// # Errors
    /// When it cannot be made durable; the act it announces does not happen then.
    fn record(&mut self, event: Event) -> Result<(), Fault>;

    /// [`Step::Stage`].
    ///
    /// # Errors
    /// The program cannot be read or copied.
    fn stage(&mut self, limit: Duration) -> Result<(), Fault>;
    /// [`Step::Verify`].
    ///
    /// # Errors
    /// It is no core, or none that can serve here.
    fn verify(&mut self, limit: Duration) -> Result<Build, Fault>;
    /// The volume's write buffer; none when it has none.
    ///
    /// # Errors
    /// Unknown.
    fn buffer(&mut self) -> Result<Option<Buffer>, Fault>;
    /// Starts the new core and waits until it is armed. The first half of [`Step::Standby`].
    ///
    /// # Errors
    /// It does not start, ends, or does not arm in time.
    fn start(&mut self, limit: Duration) -> Result<u32, Fault>;
    /// Has the new core read its stores. The second half of [`Step::Standby`].
    ///
    /// # Errors
    /// It does not answer, or cannot read.
    fn read_stores(&mut self, pid: u32, limit: Duration) -> Result<u32, Fault>;
    /// What the serving core reports as wrong with the storage nodes. None: it reads well, or there is no report.
    fn ailing(&mut self) -> Option<String>;
    /// Has writes go through to the storage nodes before they are acknowledged (M3). The first half of [`Step::Flush`].
    ///
    /// # Errors
    /// The interface did not do it, or it is unknown whether it did.
    fn synchronous(&mut self) -> Result<(), Fault>;
    /// Has the core that serves make everything acknowledged durable on the storage nodes (M8), while I/O goes on. The
    /// second half of [`Step::Flush`].
    ///
    /// # Errors
    /// A storage node did not take it, or not in time.
    fn flush(&mut self, limit: Duration) -> Result<(), Fault>;
    /// Has the new core follow the write buffer, so that little is left to adopt when it is given the gate.
    /// A core that does not follow is no obstacle.
    fn follow(&mut self, pid: u32);
    /// [`Step::Suspend`] to [`Step::Resume`]. If the new core has the gate already (its predecessor died), that is
    /// success.
    ///
    /// # Errors
    /// It is unknown which core serves; [`Act::hand_back`] settles it.
    fn hand_over(&mut self, to: u32, budget: Duration) -> Result<HandoverReport, Fault>;
    /// Observes the volume once.
    ///
    /// # Errors
    /// The interface does not answer.
    fn observe(&mut self, new: u32) -> Result<Observation, Fault>;
    /// Whether the core with this process id runs this program, as far as that is on record.
    fn runs(&mut self, pid: u32, build: &Build) -> bool;
    /// Keeps what is known of a switched upgrade beside the journal, for a control module that takes it up.
    fn keep(&mut self, report: &Report);
    /// [`Step::Commit`]: a standby of the new version is started, every core of another one is dismissed, so that whichever core dies the new
    /// version serves, and the new program is recorded as current, which is the point of no return. Where no standby can be had,
    /// the others are dismissed after the record. What could not be cleared away is no error.
    ///
    /// # Errors
    /// The new core does not serve, or cannot be recorded. Whatever can be checked of that is checked before any core is dismissed.
    fn commit(&mut self, to: &Build, pid: u32, limit: Duration) -> Result<(), Fault>;

    /// Undo of the hand-over: an old core has the gate afterwards, if need be a freshly started one and if need be by
    /// the death of the new core. Does nothing when the new core does not have the gate.
    ///
    /// # Errors
    /// No old core can take the gate, and the new one serves.
    fn hand_back(&mut self) -> Result<GivenBack, Fault>;
    /// Undo of the flush: writes are buffered again, where the volume has a write buffer.
    fn end_synchronous(&mut self);
    /// Undo of the standby: the new core has gone when this returns.
    fn dismiss(&mut self);
    /// Undo of staging.
    fn unstage(&mut self);
}
