//! Why the interface ends.

use std::io;

use everdisk_proto::identity::Identity;
use everdisk_sys::lock::Holders;

/// Why the interface ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fatal {
    /// The volume's description cannot be used.
    #[error("{0}: {1}")]
    Volume(String, String),
    /// The socket cannot be made.
    #[error("cannot listen at {0}: {1}")]
    Socket(String, io::Error),
    /// Another interface keeps the volume.
    #[error("another interface keeps this volume (it holds the lock beside {0}): {1}; end it first")]
    Second(String, Holders),
    /// The operating system failed: memory, poll.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The cores serve a segment that this program cannot adopt.
    #[error(
        "this volume's segment is of {segment}, and {identity} cannot adopt it: I/O goes on, but nobody handles the death of a core. Install \
         an everdisk-interface that can, beside everdiskd: it is started in turn with this one. Or detach the volume by force and attach it \
         again"
    )]
    ForeignSegment {
        /// Its ABI and buffer, in words.
        segment: String,
        /// This program.
        identity: Identity,
    },
    /// Nothing to restore.
    #[error("no core of the volume gave the descriptors back: attach the volume again")]
    NothingToRestore,
}
