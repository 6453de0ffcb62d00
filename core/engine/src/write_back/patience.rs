//! How long a write waits for room.

use std::time::{Duration, Instant};

use super::unsent;
use crate::{IoError, sender::Buffer};

/// A write that finds no room times out when nothing has become durable for this long: below the kernel's warning about
/// hung tasks (120 s).
pub(super) const ROOM_LIMIT: Duration = Duration::from_secs(60);
/// The same when a storage node reports that it is full: more time does not help.
const FULL_NODE_LIMIT: Duration = Duration::from_secs(2);
/// Linux's ENOSPC.
pub(super) const ENOSPC: i32 = 28;

/// How long a write waits without progress in durability.
pub(super) struct Patience {
    retired: u64,
    since: Instant,
}

impl Patience {
    pub(super) fn new(buffer: &Buffer) -> Self {
        Self { retired: buffer.progress().retired, since: Instant::now() }
    }

    /// Whether to go on waiting.
    ///
    /// # Errors
    /// The nodes' last error, when nothing became durable for too long.
    pub(super) fn lasts(&mut self, buffer: &Buffer) -> Result<(), IoError> {
        let progress = buffer.progress();
        if progress.retired != self.retired {
            *self = Self { retired: progress.retired, since: Instant::now() };
            return Ok(());
        }
        let waited = self.since.elapsed();
        match progress.error.as_ref().or(progress.flush_error.as_ref()) {
            Some((ENOSPC, reason)) if waited >= FULL_NODE_LIMIT => Err(unsent(ENOSPC, reason.clone())),
            Some((errno, reason)) if waited >= ROOM_LIMIT => Err(unsent(*errno, reason.clone())),
            None if waited >= ROOM_LIMIT => {
                Err(IoError::Late { what: "sending buffered data", limit_s: ROOM_LIMIT.as_secs() })
            }
            _ => Ok(()),
        }
    }
}
