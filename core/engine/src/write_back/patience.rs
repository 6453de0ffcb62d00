//! How long a write waits for room.

use std::time::Instant;

use everdisk_proto::volume::Timeouts;

use super::unsent;
use crate::{IoError, sender::Buffer};

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
    pub(super) fn lasts(&mut self, buffer: &Buffer, timeouts: &Timeouts) -> Result<(), IoError> {
        let progress = buffer.progress();
        if progress.retired != self.retired {
            *self = Self { retired: progress.retired, since: Instant::now() };
            return Ok(());
        }
        let waited = self.since.elapsed();
        match progress.error.as_ref().or(progress.flush_error.as_ref()) {
            Some((ENOSPC, reason)) if waited >= timeouts.full_node() => Err(unsent(ENOSPC, reason.clone())),
            Some((errno, reason)) if waited >= timeouts.room() => Err(unsent(*errno, reason.clone())),
            None if waited >= timeouts.room() => {
                Err(IoError::Late { what: "sending buffered data", limit: timeouts.room() })
            }
            _ => Ok(()),
        }
    }
}
