//! What keeps connections beyond the death of this process, for the fence of a successor.

use std::{fmt, io, os::fd::BorrowedFd};

/// Holds duplicates of the sockets and in-flight tables of a client's connections (`everdisk_proto::in_flight`), outside of this process.
///
/// A server goes on executing what it has received when its client dies, and a new connection is no barrier for that. The only
/// statement that a change has ended is its reply. So the keeper reads on, on the duplicate, until every change that stands in the table
/// is answered; until then the successor changes nothing.
pub trait Keeper: fmt::Debug + Send + Sync {
    /// Takes duplicates. No change is sent on the connection before.
    ///
    /// # Errors
    /// It cannot be kept; then it is closed, and another one is tried later.
    fn keep(&self, connection: u64, socket: BorrowedFd<'_>, table: BorrowedFd<'_>) -> io::Result<()>;

    /// Nothing is in flight on the connection any more, and nothing will be.
    fn drop(&self, connection: u64);
}
