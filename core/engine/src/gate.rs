//! The gate as the engine sees it: which core has it, and the requests that were let in.

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

    /// Buffered data is no longer sent.
    fn end_sending(&self);

    /// Whether no other core still writes to the storage nodes. This core has announced itself.
    fn may_write(&self) -> bool;

    /// Asks for leave to change the segment for work that is no request. Until [`Gate::leave`] no other core is given
    /// the gate. False when this core does not have the gate under this generation, or the gate is closed. One thread
    /// at a time asks for each kind of work.
    #[must_use]
    fn enter(&self, work: Work, generation: u64) -> bool;

    /// After [`Gate::enter`].
    fn leave(&self, work: Work);

    /// Bit i: the server of node i ended the connection of a core that is dead, and may have lost what was not flushed.
    fn lost_nodes(&self) -> u64 {
        0
    }

    /// A flush has failed because of these.
    fn lost_nodes_reported(&self, _nodes: u64) {}

    /// The buffer was adopted, with this many bytes in it.
    fn taken_over(&self, bytes: u64);
}

/// Work without a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Buffered data is sent to the storage nodes.
    Sending,
    /// The storage nodes are flushed.
    Flushing,
}

/// Why an operation was not done.
pub type Stopped = hold::Stopped<IoError>;

/// The request goes away to wait for a storage node. Where such a wait usually takes long, other requests go on beside
/// it.
pub(crate) fn away(hold: &dyn Hold, is_slow: bool) {
    hold.away();
    if is_slow {
        hold.waits();
    }
}

/// The request comes back from having been away.
pub(crate) fn back(hold: &dyn Hold) -> Result<(), Stopped> {
    if hold.back() { Ok(()) } else { Err(Stopped::Abandoned) }
}
