//! The right to carry out one request, as the engine gets it from a front end.

use core::fmt;

/// The right to carry out one request, while it lasts. A request that waits for a storage node goes away. A drain does
/// not wait for it then, and the request has to come back before it changes or answers anything.
pub trait Hold {
    /// Whether, at this moment, writes have to go through to the storage nodes before they are acknowledged (M3).
    fn synchronous(&self) -> bool;

    /// From here on the request changes and answers nothing, until [`Hold::back`].
    fn away(&self);

    /// As [`Hold::away`], but the request writes to a storage node: another core may repeat that write.
    fn writing(&self);

    /// After [`Hold::away`] or [`Hold::writing`]: whether the request may go on. If not, return [`Stopped::Abandoned`].
    #[must_use]
    fn back(&self) -> bool;

    /// The wait that begins now usually takes long: the client's next request may go on beside it.
    fn waits(&self) {}

    /// Number of failed flushes that the client was told of; `None`: this request reports none.
    fn errors_told(&self) -> Option<u64> {
        None
    }

    /// The answer to this request tells the client of this number of failed flushes. It counts once the answer is given.
    fn tells_errors(&self, _errors: u64) {}
}

/// Why a request was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped<E> {
    /// It failed, and the application gets the error.
    Failed(E),
    /// The gate was closed while the request waited: it stays unanswered, and the core that has the gate next carries it out.
    Abandoned,
}

impl<E> Stopped<E> {
    /// The same outcome with another error.
    pub fn map<F>(self, error: impl FnOnce(E) -> F) -> Stopped<F> {
        match self {
            Self::Failed(failed) => Stopped::Failed(error(failed)),
            Self::Abandoned => Stopped::Abandoned,
        }
    }
}

impl<E> From<E> for Stopped<E> {
    fn from(error: E) -> Self {
        Self::Failed(error)
    }
}

impl<E: fmt::Display> fmt::Display for Stopped<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => error.fmt(f),
            Self::Abandoned => f.write_str("the gate was closed while the request waited"),
        }
    }
}

impl<E: core::error::Error> core::error::Error for Stopped<E> {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Failed(error) => error.source(),
            Self::Abandoned => None,
        }
    }
}
