//! Data and holes: the buffer's overlaid on the storage nodes'.

use everdisk_buffer::book::Shown;
use everdisk_store::Sought;

use super::WriteBack;
use crate::{
    IoError,
    gate::{Hold, Stopped, away, back},
};

impl WriteBack {
    /// Offset of the next data or hole at or after `offset`, as in [`Engine::seek`](crate::Engine::seek). Buffered data
    /// is data. A lost range is data as well: a program that copies the volume has to meet the error. A discarded range
    /// is a hole at once.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn seek(&self, hold: &dyn Hold, offset: u64, what: Sought) -> Result<Option<u64>, Stopped> {
        away(hold, self.engine.is_slow_to_read());
        let found = self.seek_now(offset, what);
        back(hold)?;
        Ok(found?)
    }

    fn seek_now(&self, offset: u64, what: Sought) -> Result<Option<u64>, IoError> {
        let size = self.engine.size();
        // The nodes' last answer, and how much was retired by then. What was sent and retired since is no longer in the
        // buffer, and was not on the nodes at that time.
        let mut known: Option<(u64, u64)> = None;
        let mut at = offset;
        while at < size {
            let (shown, end, tail) = {
                let book = self.buffer.read_book();
                let (shown, end) = book.shown(at);
                (shown, end, book.tail())
            };
            match (shown, what) {
                (Shown::Data, Sought::Data) | (Shown::Hole, Sought::Hole) => return Ok(Some(at)),
                (Shown::Data | Shown::Hole, _) => {}
                (Shown::Below, _) => {
                    let stored = match known {
                        Some((stored, when)) if stored >= at && when == tail => stored,
                        _ => self.engine.seek(at, what)?.unwrap_or(size),
                    };
                    if stored < end {
                        return Ok(Some(stored));
                    }
                    known = Some((stored, tail));
                }
            }
            at = end;
        }
        Ok((what == Sought::Hole && offset < size).then_some(size))
    }
}
