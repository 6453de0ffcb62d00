//! The runs of a batch: pieces of one kind that follow each other, each written to the storage nodes in one operation.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
};

use everdisk_buffer::{
    book::{Batch, copy_out},
    index::Piece,
};
use everdisk_proto::buffer::{Extent, ExtentKind};
use everdisk_sys::{process::voluntary_switches, robust};
use parking_lot::Mutex;

use super::Buffer;
use crate::{Engine, IoError, policy::RUN_BYTES};

/// After this many writes of one batch that slept, nodes that counted as quick count as slow.
const SLOW_WRITES: u64 = 3;
/// Threads that send at once, at most.
const SENDERS_MAX: usize = 32;
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
        let outcome = Mutex::new(Outcome::default());
        let next = AtomicUsize::new(0);
        let send_next = |data: &mut Vec<u8>, alone: bool| {
            let Some(run) = runs.get(next.fetch_add(1, Relaxed)) else { return false };
            self.send_run(engine, &batch.pieces[run.clone()], &extents[run.clone()], data, &outcome, alone);
            true
        };
        let mut data = Vec::new();
        if self.nodes_are_quick() || runs.len() == 1 {
            // One thread, until the nodes turn out to be slow. Then others help.
            let before = voluntary_switches();
            while voluntary_switches() - before < SLOW_WRITES && send_next(&mut data, true) {}
        } else if self.progress().batches.is_multiple_of(LONE_EVERY) {
            send_next(&mut data, true);
        }
        let left = runs.len().saturating_sub(next.load(Relaxed));
        if left > 0 {
            let work = || {
                let mut data = Vec::new();
                while send_next(&mut data, false) {}
            };
            thread::scope(|scope| {
                for _ in 1..left.min(SENDERS_MAX) {
                    // Where no further thread can be started, those that run do the work; this one at least.
                    let _ = robust::start_scoped(scope, "send", work);
                }
                work();
            });
        }
        outcome.into_inner()
    }

    /// Sends one run of pieces of one kind that follow each other. A damaged piece is left out.
    fn send_run(
        &self,
        engine: &Engine,
        pieces: &[Piece],
        extents: &[Extent],
        data: &mut Vec<u8>,
        outcome: &Mutex<Outcome>,
        alone: bool,
    ) {
        data.clear();
        let (first, last) = (pieces.first().expect("a run has pieces"), pieces.last().expect("a run has pieces"));
        if first.kind != ExtentKind::Data {
            return Self::zero(engine, first.kind, first.start..last.end, outcome);
        }
        let mut begun = first.start;
        for (piece, extent) in pieces.iter().zip(extents) {
            if self.copy(piece, extent, data) {
                continue;
            }
            outcome.lock().damaged.push(piece.seq);
            self.write(engine, begun, data, outcome, alone);
            data.clear();
            begun = piece.end;
        }
        self.write(engine, begun, data, outcome, alone);
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

    fn zero(engine: &Engine, kind: ExtentKind, range: Range<u64>, outcome: &Mutex<Outcome>) {
        let len = range.end - range.start;
        let done = match kind {
            ExtentKind::Zeroes => engine.zero_and_keep(range.start, len),
            ExtentKind::Discard | ExtentKind::Data => engine.discard_or_zero(range.start, len),
        };
        if let Err(error) = done {
            let mut outcome = outcome.lock();
            outcome.failed.push(range);
            outcome.error.get_or_insert(error);
        }
    }

    fn write(&self, engine: &Engine, at: u64, data: &[u8], outcome: &Mutex<Outcome>, alone: bool) {
        if data.is_empty() {
            return;
        }
        let look = self.begin_write();
        let written = engine.write(at, data);
        if written.is_ok() {
            self.note_write(&look, !alone);
        }
        if let Err(error) = written {
            let mut outcome = outcome.lock();
            outcome.failed.push(at..at + data.len() as u64);
            outcome.error.get_or_insert(error);
        }
    }
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
