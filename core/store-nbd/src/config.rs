//! What an operator may set, and what a server offers.

use std::time::Duration;

use everdisk_proto::nbd::wire::transmission_flag as flag;

use crate::codec::handshake::Blocks;

/// What an operator may set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What it may take to connect, from the resolution of the name to the last reply of the handshake.
    pub connect: Duration,
    /// How long the server may be out of reach before commands complete with [`Kind::Unavailable`](crate::Kind::Unavailable).
    /// It counts from the loss of the last connection to the next answer to a command. Zero: for ever.
    pub unavailable_after: Duration,
    /// Most connections, at least 1. More than one is made only to a server that offers `NBD_FLAG_CAN_MULTI_CONN`.
    pub connections: usize,
    /// Most requests in flight, over all connections, from 1 to 256 ([`everdisk_proto::in_flight::ENTRIES`]).
    pub requests_max: usize,
    /// Most bytes of reads and writes in flight, over all connections. One request is always allowed.
    pub bytes_max: u64,
    /// Time before the first attempt to reconnect that follows a failed one. It doubles with each failure.
    pub backoff_min: Duration,
    /// Longest time between two attempts.
    pub backoff_max: Duration,
    /// Time between the loss of a connection and the resending of the changes that were in flight on it. Within it, a server that
    /// lives on finishes what it had received. Everything else goes on. See [`Client`](crate::Client), "Late writes".
    pub settle: Duration,
    /// A connection without traffic for this time is tried by a read of one block. A server that is asked to end may wait for its
    /// clients to leave, and tells them so in its next reply only.
    pub idle: Duration,
    /// Other processes write to the node as well, and leave it to this one to flush. Then the next flush after each loss of a
    /// connection fails with [`Kind::Unflushed`](crate::Kind::Unflushed), whatever this client itself has written.
    pub others_write: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            unavailable_after: Duration::ZERO,
            connections: 4,
            requests_max: 256,
            bytes_max: 64 << 20,
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(5),
            settle: Duration::ZERO,
            idle: Duration::from_secs(10),
            others_write: false,
        }
    }
}

/// What a server offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Bytes of the export.
    pub size: u64,
    /// [`everdisk_proto::nbd::wire::transmission_flag`]
    pub flags: u16,
    /// Its block sizes; the protocol's defaults where it names none.
    pub blocks: Blocks,
    /// Whether structured replies were agreed upon.
    pub structured: bool,
    /// The number of the context `base:allocation`, if it was agreed upon.
    pub context: Option<u32>,
}

/// Largest payload that is sent or asked for in one request, bytes. Every server can be relied on for it, unless it
/// names a smaller one.
pub(crate) const PAYLOAD_MAX: u32 = 32 << 20;
/// The block sizes of a server that names none.
pub(crate) const DEFAULT_BLOCKS: Blocks = Blocks { min: 1, preferred: 4096, max: PAYLOAD_MAX };

impl Offer {
    /// Bytes that can be used. If the server's minimum block does not divide the export's size, no request can name
    /// the last bytes: they do not count.
    pub fn usable(&self) -> u64 {
        self.size - self.size % u64::from(self.blocks.min)
    }

    /// Whether the server offers this.
    pub(crate) const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Largest payload of one request: whole blocks.
    pub(crate) fn payload_max(&self) -> u32 {
        let max = self.blocks.max.min(PAYLOAD_MAX);
        max - max % self.blocks.min
    }

    /// Why a server that offers `self` cannot go on with what was begun at one that offered `before`.
    pub(crate) fn differs_from(&self, before: &Self) -> Option<String> {
        if self.size != before.size {
            return Some(format!("the export has {} bytes and had {}", self.size, before.size));
        }
        if self.has(flag::READ_ONLY) && !before.has(flag::READ_ONLY) {
            return Some("the export has become read-only".to_owned());
        }
        let names = [
            (flag::SEND_FLUSH, "flush"),
            (flag::SEND_FUA, "FUA"),
            (flag::SEND_TRIM, "trim"),
            (flag::SEND_WRITE_ZEROES, "write zeroes"),
            (flag::SEND_FAST_ZERO, "fast zeroes"),
            (flag::CAN_MULTI_CONN, "multi-conn"),
        ];
        if let Some((_, name)) = names.iter().find(|(flag, _)| before.has(*flag) && !self.has(*flag)) {
            return Some(format!("the server no longer offers {name}"));
        }
        if before.structured && !self.structured {
            return Some("the server no longer offers structured replies".to_owned());
        }
        if before.context.is_some() && self.context.is_none() {
            return Some("the server no longer offers the block status".to_owned());
        }
        let (now, then) = (self.blocks, before.blocks);
        if now.min > then.min {
            return Some(format!("the server's minimum block is {} bytes and was {}", now.min, then.min));
        }
        (now.max < then.max.min(PAYLOAD_MAX))
            .then(|| format!("the server's largest payload is {} bytes and was {}", now.max, then.max))
    }
}
