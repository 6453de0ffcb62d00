//! What an answer of the server does to its command.

use everdisk_proto::nbd::wire::cmd;

use super::{
    Finished, State, Work,
    plan::index,
    task::{Data, Memory, Part, Piece, Task},
};
use crate::{
    codec::{
        assembly::{Answer, Asked},
        reply::Extent,
    },
    command::{Done, Shape},
    error::{Error, Kind},
    lane::Agreed,
    receive::Lost,
};

/// `NBD_ESHUTDOWN`: the request was not executed, and the connection will end.
const SHUTDOWN: u32 = 108;

impl State {
    /// The last part of the reply to a request has come.
    pub(crate) fn answered(&mut self, cookie: u64, work: &mut Work) -> Result<(), Lost> {
        let piece = self.sent.get_mut(&cookie).expect("the caller has looked it up");
        let answer = piece.assembly.finish()?;
        if matches!(&answer, Answer::Failed(error) if error.number == SHUTDOWN) {
            // The request stays outstanding, and is sent to the server that follows.
            return Err(Lost::ShuttingDown);
        }
        let piece = self.sent.remove(&cookie).expect("looked up above");
        let slot = &mut self.slots[piece.slot];
        slot.load -= 1;
        if let Some(entry) = piece.entry {
            slot.lane.as_ref().expect("its reply has just come on it").forget(entry);
            slot.entries.push(entry);
        }
        slot.failures = 0;
        self.trouble = None;
        self.bytes -= piece.bytes();
        // A change that failed may have been made in part.
        if piece.changes() && !piece.is_durable() {
            self.flushes.answered();
        }
        let key = piece.task;
        self.absorb(piece, answer);
        self.tasks[key].left -= 1;
        if self.tasks[key].left == 0 {
            self.after(key, work);
        }
        Ok(())
    }

    fn absorb(&mut self, piece: Piece, answer: Answer) {
        let task = &mut self.tasks[piece.task];
        let succeeded = match answer {
            Answer::Done => true,
            Answer::Extents(extents) => {
                task.extents = Some(extents);
                true
            }
            Answer::Failed(error) => {
                task.error.get_or_insert_with(|| Error::of_server(&self.node, task.shape.name(), &error));
                false
            }
        };
        if piece.command == cmd::FLUSH && succeeded && task.shape == Shape::Flush {
            self.flushes.flushed(task.mark);
        }
        let Data::Fill(memory) = piece.data else { return };
        match (piece.part, &mut task.memory) {
            (Part::Whole, caller) => *caller = Memory::Here(memory),
            (Part::Edge(edge), _) => task.edges[edge].bytes = memory,
            (Part::Some, Memory::Here(caller)) if succeeded => {
                let (offset, len) = task.shape.range().expect("a read has a range");
                let (from, to) = (offset.max(piece.offset), (offset + len).min(piece.offset + u64::from(piece.len)));
                caller[index(from - offset)..index(to - offset)]
                    .copy_from_slice(&memory[index(from - piece.offset)..index(to - piece.offset)]);
            }
            (Part::Some | Part::Other, _) => {}
        }
    }

    /// The command has ended.
    pub(super) fn finish(&mut self, key: usize, work: &mut Work) {
        let Task { shape, completion, memory, error, epoch, suspect, extents, .. } = self.tasks.remove(key);
        self.active -= 1;
        let result = match (error, shape) {
            (Some(error), _) => Err(error),
            (None, Shape::Flush) if suspect => {
                self.flushes.reported();
                let words = "the connection was lost after data had been written and before they were flushed: the \
                             server may have lost them; write them again, then flush";
                Err(Error::new(Kind::Unflushed, &self.node, words))
            }
            (None, Shape::Status { offset, len }) => {
                let before = offset - self.outward(offset, len).start;
                Ok(Done::Extents(clipped(extents.expect("a block status has extents"), before, len)))
            }
            (None, _) => Ok(Done::Plain),
        };
        work.finished.push(Finished { completion, memory, result });
        let mut begin = Vec::new();
        if let Some(epoch) = epoch {
            if self.offer.blocks.min > 1 {
                begin = self.ranges.release(key);
            }
            begin.extend(self.flushes.end_change(epoch));
        }
        for next in begin {
            self.start(next, work);
        }
    }
}

impl Piece {
    /// The request, as it is sent on a connection where this was agreed upon.
    pub(super) const fn asked(&self, agreed: Agreed) -> Asked {
        let Agreed { structured, context } = agreed;
        Asked { command: self.command, offset: self.offset, len: self.len, structured, context }
    }
}

/// The extents without what lies before and behind the caller's range.
fn clipped(extents: Vec<Extent>, before: u64, len: u64) -> Vec<Extent> {
    let (mut skip, mut left) = (before, len);
    let mut clipped = Vec::with_capacity(extents.len());
    for mut extent in extents {
        let cut = extent.len.min(skip);
        skip -= cut;
        extent.len = (extent.len - cut).min(left);
        left -= extent.len;
        if extent.len > 0 {
            clipped.push(extent);
        }
    }
    clipped
}
