//! The runs of a batch: pieces of one kind that follow each other, each written to the storage nodes in one operation.

use std::{collections::VecDeque, ops::Range};

use everdisk_buffer::{
    book::{Batch, copy_out},
    index::Piece,
};
use everdisk_proto::buffer::{Extent, ExtentKind};
use everdisk_sys::process::voluntary_switches;

use super::{Buffer, Look};
use crate::{Engine, IoError, engine::Writing, policy::RUN_BYTES};

/// After this many writes of one batch that slept, nodes that counted as quick count as slow.
const SLOW_WRITES: u64 = 3;
/// Writes of one batch that are under way at once, at most.
const WINDOW: usize = 32;
/// One batch to slow nodes in this many begins with a write that has the nodes to itself. That write shows whether they
/// still are slow. Parallel writes cannot show it: they wait for each other where a node takes one at a time.
const LONE_EVERY: u64 = 8;

impl Buffer {
    /// Sends the runs, several at once where the nodes are slow.
    pub(super) fn send_runs(
        &self,
        engine: &Engine,
        batch: &Batch,
        extents: &[Extent],
        runs: &[Range<usize>],
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let mut runs = runs.iter().map(|run| (&batch.pieces[run.clone()], &extents[run.clone()]));
        let mut data = Vec::new();
        let mut alone = |(pieces, extents): (&[Piece], &[Extent]), outcome: &mut Outcome| {
            self.send_run(engine, pieces, extents, &mut data, outcome, |at, data, outcome| {
                let look = self.begin_write();
                let written = engine.write_in_turn(at, data);
                self.ended(at..at + data.len() as u64, Some(&look), written, false, outcome);
            });
        };
        if self.nodes_are_quick() || runs.len() == 1 {
            // One after the other, until the nodes turn out to be slow.
            let before = voluntary_switches();
            while voluntary_switches() - before < SLOW_WRITES {
                let Some(run) = runs.next() else { return outcome };
                alone(run, &mut outcome);
            }
        } else if self.progress().batches.is_multiple_of(LONE_EVERY) {
            runs.next().into_iter().for_each(|run| alone(run, &mut outcome));
        }
        let mut window = VecDeque::new();
        for (pieces, extents) in runs {
            let (first, last) = (&pieces[0], &pieces[pieces.len() - 1]);
            if first.kind == ExtentKind::Discard {
                if window.len() == WINDOW {
                    self.first_of(engine, &mut window, &mut outcome);
                }
                let range = first.start..last.end;
                let writing = engine.begin_discard(range.start, range.end - range.start);
                window.push_back(UnderWay { range, look: None, writing });
                continue;
            }
            self.send_run(engine, pieces, extents, &mut Vec::new(), &mut outcome, |at, data, outcome| {
                let data = std::mem::take(data);
                if window.len() == WINDOW {
                    self.first_of(engine, &mut window, outcome);
                }
                let (range, look) = (at..at + data.len() as u64, Some(self.begin_write()));
                window.push_back(UnderWay { range, look, writing: engine.begin_write(at, data) });
            });
        }
        while !window.is_empty() {
            self.first_of(engine, &mut window, &mut outcome);
        }
        outcome
    }

    /// Waits for the write that was begun first.
    fn first_of(&self, engine: &Engine, window: &mut VecDeque<UnderWay>, outcome: &mut Outcome) {
        let first = window.pop_front().expect("a write is under way");
        let mut written = first.writing.wait();
        if first.look.is_none() && written.is_err() {
            // A node may not be able to discard.
            written = engine.discard_or_zero(first.range.start, first.range.end - first.range.start);
        }
        self.ended(first.range, first.look.as_ref(), written, true, outcome);
    }

    /// A write has ended. `beside`: it was one of many at once.
    fn ended(
        &self,
        range: Range<u64>,
        look: Option<&Look>,
        written: Result<(), IoError>,
        beside: bool,
        outcome: &mut Outcome,
    ) {
        match written {
            Ok(()) => look.into_iter().for_each(|look| self.note_write(look, beside)),
            Err(error) => {
                outcome.failed.push(range);
                outcome.error.get_or_insert(error);
            }
        }
    }

    /// Sends one run of pieces of one kind that follow each other: `write` gets the place and the data, in `memory`, which
    /// it may keep. A damaged piece is left out.
    fn send_run(
        &self,
        engine: &Engine,
        pieces: &[Piece],
        extents: &[Extent],
        memory: &mut Vec<u8>,
        outcome: &mut Outcome,
        mut write: impl FnMut(u64, &mut Vec<u8>, &mut Outcome),
    ) {
        let (first, last) = (pieces.first().expect("a run has pieces"), pieces.last().expect("a run has pieces"));
        if first.kind != ExtentKind::Data {
            return Self::zero(engine, first.kind, first.start..last.end, outcome);
        }
        memory.clear();
        let mut begun = first.start;
        for (piece, extent) in pieces.iter().zip(extents) {
            if self.copy(piece, extent, memory) {
                continue;
            }
            outcome.damaged.push(piece.seq);
            if !memory.is_empty() {
                write(begun, memory, outcome);
                memory.clear();
            }
            begun = piece.end;
        }
        if !memory.is_empty() {
            write(begun, memory, outcome);
        }
    }

    /// Appends a piece's data; false when its extent's data does not have its checksum.
    fn copy(&self, piece: &Piece, extent: &Extent, data: &mut Vec<u8>) -> bool {
        let before = data.len();
        data.resize(before + usize::try_from(piece.len()).expect("a piece lies in the ring"), 0);
        let copied = &mut data[before..];
        copy_out(&self.area, piece, copied);
        let sound = if piece.len() == extent.len {
            crc32c::crc32c(copied) == extent.crc
        } else {
            everdisk_buffer::log::data_is_sound(&self.area, extent)
        };
        if !sound {
            data.truncate(before);
        }
        sound
    }

    fn zero(engine: &Engine, kind: ExtentKind, range: Range<u64>, outcome: &mut Outcome) {
        let len = range.end - range.start;
        let done = match kind {
            ExtentKind::Zeroes => engine.zero_and_keep(range.start, len),
            ExtentKind::Discard | ExtentKind::Data => engine.discard_or_zero(range.start, len),
        };
        if let Err(error) = done {
            outcome.failed.push(range);
            outcome.error.get_or_insert(error);
        }
    }
}

/// A write or a discard of the window.
struct UnderWay {
    range: Range<u64>,
    /// None: a discard.
    look: Option<Look>,
    writing: Writing,
}

/// The outcome of the runs of a batch.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) failed: Vec<Range<u64>>,
    pub(super) damaged: Vec<u64>,
    pub(super) error: Option<IoError>,
}

/// Groups the pieces of a batch into runs: of one kind, without a gap, of data at most [`RUN_BYTES`]. Ranges of
/// indices.
pub(super) fn runs(pieces: &[Piece]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut run: Option<Piece> = None;
    for (index, piece) in pieces.iter().enumerate() {
        match (&mut run, runs.last_mut()) {
            (Some(run), Some(last)) if continues(run, piece) => {
                last.end = index + 1;
                run.end = piece.end;
            }
            _ => {
                runs.push(index..index + 1);
                run = Some(*piece);
            }
        }
    }
    runs
}

fn continues(run: &Piece, piece: &Piece) -> bool {
    let fits = piece.kind != ExtentKind::Data || piece.end - run.start <= RUN_BYTES;
    run.end == piece.start && run.kind == piece.kind && fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_no_gaps_and_a_bounded_length() {
        let kinds =
            |start: u64, len: u64, kind| Piece { start, end: start + len, seq: 1, position: 0, kind, written: 0 };
        let piece = |start: u64, len: u64| kinds(start, len, ExtentKind::Data);
        let third = RUN_BYTES / 3;
        let pieces =
            vec![piece(0, 10), piece(10, 5), piece(20, third), piece(20 + third, third), piece(20 + 2 * third, third)];
        assert_eq!(runs(&pieces), [0..2, 2..5]);
        let pieces = vec![piece(0, RUN_BYTES), piece(RUN_BYTES, 1)];
        assert_eq!(runs(&pieces), [0..1, 1..2]);
        let zeroes = |start, len| kinds(start, len, ExtentKind::Zeroes);
        let pieces = vec![piece(0, 10), zeroes(10, RUN_BYTES), zeroes(10 + RUN_BYTES, RUN_BYTES)];
        assert_eq!(runs(&pieces), [0..1, 1..3]);
    }
}
