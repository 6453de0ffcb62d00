//! The gate as the engine sees it: who has it, and the requests that were let in.

use everdisk_gate::hold;
pub use everdisk_gate::hold::Hold;

use crate::IoError;

/// Who has the gate, and the fence between cores.
pub trait Gate: Send + Sync {
    /// The generation in force, if this core has the gate, open or closed.
    fn generation(&self) -> Option<u64>;

    /// Announces that buffered data is sent from now on; false when this core does not have the gate under this generation.
    #[must_use]
    fn begin_sending(&self, generation: u64) -> bool;

    /// No longer.
    fn end_sending(&self);

    /// Whether no other core still writes to the storage nodes. This core has announced itself.
    fn may_write(&self) -> bool;

    /// Asks to change the segment, for what is no request: until [`Gate::leave`] no other core is given the gate. False when this core
    /// does not have the gate under this generation, or it is closed. One thread at a time asks for each kind of work.
    #[must_use]
    fn enter(&self, work: Work, generation: u64) -> bool;

    /// After [`Gate::enter`].
    fn leave(&self, work: Work);

    /// The buffer was taken over, with this many bytes in it.
    fn taken_over(&self, bytes: u64);
}

/// What goes on without a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Buffered data is sent to the storage nodes.
    Sending,
    /// The storage nodes are flushed.
    Flushing,
}

/// Why an operation was not done.
pub type Stopped = hold::Stopped<IoError>;

/// Goes away to wait for a storage node; others go on meanwhile where such a wait usually takes long.
pub(crate) fn away(hold: &dyn Hold, is_slow: bool) {
    hold.away();
    if is_slow {
        hold.waits();
    }
}

/// After having been away.
pub(crate) fn back(hold: &dyn Hold) -> Result<(), Stopped> {
    if hold.back() { Ok(()) } else { Err(Stopped::Abandoned) }
}
