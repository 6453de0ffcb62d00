//! The gate as the engine sees it: who has it, and the requests that were let in.

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

/// Who waits for an operation: a request under the gate. See `Hold` of everdisk-transport.
pub trait Caller {
    /// Whether writes have to go through before they are acknowledged.
    fn synchronous(&self) -> bool;
    /// Nothing is changed or answered until [`Caller::back`].
    fn away(&self);
    /// As `away`, and a storage node is written to.
    fn writing(&self);
    /// Whether the operation may go on.
    #[must_use]
    fn back(&self) -> bool;
    /// What the operation waits for now usually takes long: others may go on meanwhile.
    fn waits(&self) {}
    /// Of how many failed flushes whoever made the request was told; `None`: it is nobody who has to be told.
    fn errors_told(&self) -> Option<u64> {
        None
    }
    /// The answer to this request tells of so many.
    fn tells_errors(&self, _errors: u64) {}
}

/// Why an operation was not done.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// It failed.
    #[error(transparent)]
    Failed(#[from] IoError),
    /// The gate was closed while it waited: another core does it.
    #[error("the gate was closed meanwhile")]
    Abandoned,
}

/// Goes away to wait for a storage node; others go on meanwhile where such a wait usually takes long.
pub(crate) fn away(caller: &dyn Caller, is_slow: bool) {
    caller.away();
    if is_slow {
        caller.waits();
    }
}

/// After having been away.
pub(crate) fn back(caller: &dyn Caller) -> Result<(), Stopped> {
    if caller.back() { Ok(()) } else { Err(Stopped::Abandoned) }
}
