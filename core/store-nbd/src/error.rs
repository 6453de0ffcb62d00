//! Why a command failed.

use std::fmt;

use crate::codec::reply::ServerError;

/// What the caller may conclude.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The node has no space left. Later, with more space, the same command may succeed.
    Full,
    /// The node cannot do this, neither now nor later.
    Unsupported,
    /// The node cannot be reached, or the client was closed. Whether the command was executed is unknown.
    Unavailable,
    /// The command does not fit the node: its range, its memory, or a write to a read-only export.
    Invalid,
    /// Of a flush: the server may have lost data that it had acknowledged. See [`Client`](crate::Client), "Loss of a
    /// connection".
    Unflushed,
    /// The server returned with another export under the same address: another size, or fewer features.
    Changed,
    /// The node answered with this error number of the protocol (EPERM 1, EIO 5, ENOMEM 12, EOVERFLOW 75 and others).
    Fault(u32),
}

/// Why a command failed, in words that name the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: Kind,
    /// The node, a colon, a space, the reason.
    words: String,
    /// Where in the words the reason begins.
    reason: usize,
}

impl Error {
    pub(crate) fn new(kind: Kind, node: &str, words: impl fmt::Display) -> Self {
        let words = format!("{node}: {words}");
        Self { kind, words, reason: node.len() + 2 }
    }

    /// An error that the server gave.
    pub(crate) fn of_server(node: &str, doing: &str, error: &ServerError) -> Self {
        let (kind, words) = match error.number {
            28 => (Kind::Full, "no space is left"),
            95 => (Kind::Unsupported, "the server does not support it"),
            22 => (Kind::Invalid, "the server finds it invalid"),
            1 => (Kind::Fault(1), "the server does not permit it"),
            5 => (Kind::Fault(5), "I/O error"),
            12 => (Kind::Fault(12), "the server has no memory for it"),
            75 => (Kind::Fault(75), "the server finds it too large"),
            other => (Kind::Fault(other), "an error without a name"),
        };
        let said = if error.text.is_empty() { String::new() } else { format!(" ({})", error.text) };
        let at = error.offset.map_or_else(String::new, |offset| format!(" at offset {offset}"));
        Self::new(kind, node, format_args!("{doing} failed{at}: {words}, error {}{said}", error.number))
    }

    /// What the caller may conclude.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The words without the node, for a caller that names it in its own way.
    pub fn reason(&self) -> &str {
        &self.words[self.reason..]
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

impl std::error::Error for Error {}
