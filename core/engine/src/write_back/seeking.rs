//! Data and holes: what the buffer says laid over what the storage nodes say.

use everdisk_buffer::book::Shown;
use everdisk_store::Sought;

use super::WriteBack;
use crate::{
    IoError,
    gate::{Hold, Stopped, away, back},
};

impl WriteBack {
    /// Offset of the next data or hole at or after `offset`, as [`Engine::seek`](crate::Engine::seek) has it. What is buffered is data,
    /// and so is what is lost: whoever copies the volume has to meet the error. What was discarded is a hole at once.
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
        // What the nodes said last, and how much was retired then: what was sent and retired since is not in the buffer any more, and
        // was not on the nodes yet.
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
