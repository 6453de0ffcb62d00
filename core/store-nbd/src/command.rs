//! Commands, and what comes back.

use crate::{codec::reply::Extent, error::Error};

/// A command. It owns its memory until it is completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Fills the memory with the bytes from `offset` on.
    Read {
        /// First byte.
        offset: u64,
        /// As long as the range.
        memory: Vec<u8>,
    },
    /// Writes the memory.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        memory: Vec<u8>,
        /// Completed only when the bytes are durable.
        fua: bool,
    },
    /// Makes durable what was written by every write, trim and zeroing begun before this flush. It is sent when those have been
    /// answered.
    Flush,
    /// The range is no longer needed. What it reads as is undefined. Blocks of the server that the range covers in part
    /// are left alone.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Makes the range read as zeros.
    Zeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The server may give the space back.
        may_punch: bool,
        /// Fails with [`Kind::Unsupported`](crate::Kind::Unsupported), without a change, if it would take as long as writing zeros.
        fast: bool,
    },
    /// Asks which parts of the range take space.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    /// The memory of a read or write, whether it succeeded or not; empty for other commands. That of a failed read has
    /// undefined contents.
    pub memory: Vec<u8>,
    /// The result.
    pub result: Result<Done, Error>,
}

/// What a successful command returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    /// It was done.
    Plain,
    /// The extents from the first byte of a [`Command::BlockStatus`] on. They cover one byte at least, and not more than the
    /// range. For the rest, ask again.
    Extents(Vec<Extent>),
}

/// What is called when a command ends: exactly once, on any thread, without a lock held. It must not block, since
/// the thread that calls it reads the replies of a connection. It may begin commands.
pub struct Completion(Box<dyn FnOnce(Outcome) + Send>);

impl Completion {
    /// A completion that calls `then`.
    pub fn new(then: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self(Box::new(then))
    }

    pub(crate) fn complete(self, outcome: Outcome) {
        (self.0)(outcome);
    }
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Completion")
    }
}

/// The range and flags of a command, without its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Read { offset: u64, len: u64 },
    Write { offset: u64, len: u64, fua: bool },
    Flush,
    Trim { offset: u64, len: u64 },
    Zeroes { offset: u64, len: u64, may_punch: bool, fast: bool },
    Status { offset: u64, len: u64 },
}

impl Command {
    pub(crate) fn split(self) -> (Shape, Vec<u8>) {
        let bytes = |memory: &Vec<u8>| u64::try_from(memory.len()).expect("a length in memory");
        match self {
            Self::Read { offset, memory } => (Shape::Read { offset, len: bytes(&memory) }, memory),
            Self::Write { offset, memory, fua } => (Shape::Write { offset, len: bytes(&memory), fua }, memory),
            Self::Flush => (Shape::Flush, Vec::new()),
            Self::Trim { offset, len } => (Shape::Trim { offset, len }, Vec::new()),
            Self::Zeroes { offset, len, may_punch, fast } => {
                (Shape::Zeroes { offset, len, may_punch, fast }, Vec::new())
            }
            Self::BlockStatus { offset, len } => (Shape::Status { offset, len }, Vec::new()),
        }
    }
}

impl Shape {
    /// Offset and bytes; `None` for a flush.
    pub(crate) const fn range(self) -> Option<(u64, u64)> {
        match self {
            Self::Read { offset, len }
            | Self::Write { offset, len, .. }
            | Self::Trim { offset, len }
            | Self::Zeroes { offset, len, .. }
            | Self::Status { offset, len } => Some((offset, len)),
            Self::Flush => None,
        }
    }

    /// Whether it changes the export.
    pub(crate) const fn changes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::Zeroes { .. })
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Read { .. } => "a read",
            Self::Write { .. } => "a write",
            Self::Flush => "a flush",
            Self::Trim { .. } => "a trim",
            Self::Zeroes { .. } => "a zeroing",
            Self::Status { .. } => "a query of the block status",
        }
    }
}
