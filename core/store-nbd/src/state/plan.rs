//! The requests that a command is made of.

use std::{ops::Range, sync::Arc};

use everdisk_proto::nbd::wire::{cmd, cmd_flag, transmission_flag as flag};

use super::{
    State, Work,
    task::{Data, Edge, Memory, Part, Payload, Piece, Stage},
};
use crate::{command::Shape, error::Kind};

/// Largest range of a request without a payload, bytes: a multiple of every block size.
const RANGE_MAX: u64 = 1 << 30;
/// Zeros that one request sends to a server without WRITE_ZEROES, bytes, at most.
const ZEROES_MAX: u64 = 1 << 20;

/// The requests of one stage.
struct Batch<'a> {
    command: u16,
    flags: u16,
    range: Range<u64>,
    /// Bytes of one request at most.
    limit: u64,
    payload: Option<&'a Payload>,
    part: Part,
}

impl State {
    /// The blocks that a range touches.
    pub(super) fn outward(&self, offset: u64, len: u64) -> Range<u64> {
        let block = u64::from(self.offer.blocks.min);
        offset - offset % block..(offset + len).next_multiple_of(block)
    }

    /// The blocks that a range covers; may be empty.
    fn inward(&self, offset: u64, len: u64) -> Range<u64> {
        let block = u64::from(self.offer.blocks.min);
        let (start, end) = (offset.next_multiple_of(block), offset + len);
        start..(end - end % block).max(start)
    }

    /// Offsets of the blocks that a range covers in part: none, one or two.
    fn edges(&self, offset: u64, len: u64) -> Vec<Edge> {
        let block = u64::from(self.offer.blocks.min);
        let end = offset + len;
        let mut edges = Vec::new();
        if !offset.is_multiple_of(block) {
            edges.push(Edge { offset: offset - offset % block, bytes: Vec::new() });
        }
        let last = end - end % block;
        if last != end && edges.first().is_none_or(|edge| edge.offset != last) {
            edges.push(Edge { offset: last, bytes: Vec::new() });
        }
        edges
    }

    /// The first stage of a task that may begin.
    pub(super) fn start(&mut self, key: usize, work: &mut Work) {
        let (shape, mut stage) = (self.tasks[key].shape, Stage::Main);
        if let (Shape::Write { offset, len, .. } | Shape::Zeroes { offset, len, .. }, true) =
            (shape, self.offer.blocks.min > 1)
        {
            let edges = self.edges(offset, len);
            if matches!(shape, Shape::Write { .. }) && !edges.is_empty() {
                stage = Stage::ReadEdges;
            }
            self.tasks[key].edges = edges;
        }
        self.enter(key, stage, work);
    }

    /// The requests of a stage have been answered.
    pub(super) fn after(&mut self, key: usize, work: &mut Work) {
        let task = &self.tasks[key];
        if task.error.is_some() {
            return self.finish(key, work);
        }
        let next = match (task.shape, task.stage) {
            (Shape::Write { .. }, Stage::ReadEdges) => Stage::Main,
            (Shape::Write { fua: true, .. }, Stage::Main) if !self.offer.has(flag::SEND_FUA) => Stage::Flush,
            // The server may have lost what it had answered before the flush.
            (Shape::Write { .. }, Stage::Flush) if task.mark != self.losses => Stage::Main,
            (Shape::Zeroes { .. }, Stage::Main) if !task.edges.is_empty() => Stage::ReadEdges,
            (Shape::Zeroes { .. }, Stage::ReadEdges) => Stage::WriteEdges,
            _ => return self.finish(key, work),
        };
        self.enter(key, next, work);
    }

    fn enter(&mut self, key: usize, stage: Stage, work: &mut Work) {
        self.tasks[key].stage = stage;
        match (stage, self.tasks[key].shape) {
            (Stage::Queued | Stage::Waiting, _) => unreachable!("a task that begins does not wait"),
            (Stage::ReadEdges, _) => self.read_edges(key),
            (Stage::WriteEdges, shape) => self.write_edges(key, shape),
            (Stage::Flush, _) | (Stage::Main, Shape::Flush) => self.add(key, &Batch::one(cmd::FLUSH, 0..0)),
            (Stage::Main, Shape::Read { offset, len }) => self.read(key, offset, len),
            (Stage::Main, Shape::Write { offset, len, fua }) => self.write(key, offset, len, fua),
            (Stage::Main, Shape::Trim { offset, len }) => {
                self.add(key, &Batch::one(cmd::TRIM, self.inward(offset, len)));
            }
            (Stage::Main, Shape::Zeroes { offset, len, may_punch, fast }) => {
                let flags = if may_punch { 0 } else { cmd_flag::NO_HOLE } | if fast { cmd_flag::FAST_ZERO } else { 0 };
                self.zero(key, self.inward(offset, len), flags);
            }
            (Stage::Main, Shape::Status { offset, len }) => {
                let range = self.outward(offset, len);
                let end = range.end.min(range.start + RANGE_MAX);
                self.add(key, &Batch::one(cmd::BLOCK_STATUS, range.start..end));
            }
        }
        if self.tasks[key].left == 0 {
            self.after(key, work);
        }
    }

    fn read(&mut self, key: usize, offset: u64, len: u64) {
        let (range, limit) = (self.outward(offset, len), u64::from(self.offer.payload_max()));
        let fits = range == (offset..offset + len) && len <= limit;
        let part = if fits { Part::Whole } else { Part::Some };
        self.add(key, &Batch { limit, part, ..Batch::one(cmd::READ, range) });
        if fits && let Memory::Here(memory) = std::mem::replace(&mut self.tasks[key].memory, Memory::Lent) {
            self.ready.back_mut().expect("it was added a moment ago").data = Data::Fill(memory);
        }
    }

    fn read_edges(&mut self, key: usize) {
        let block = u64::from(self.offer.blocks.min);
        let offsets: Vec<u64> = self.tasks[key].edges.iter().map(|edge| edge.offset).collect();
        for (index, offset) in offsets.into_iter().enumerate() {
            self.add(key, &Batch { part: Part::Edge(index), ..Batch::one(cmd::READ, offset..offset + block) });
        }
    }

    fn write(&mut self, key: usize, offset: u64, len: u64, fua: bool) {
        let range = self.outward(offset, len);
        let losses = self.losses;
        let task = &mut self.tasks[key];
        task.mark = losses;
        let payload = task.payload.take().unwrap_or_else(|| {
            let memory = match std::mem::replace(&mut task.memory, Memory::Lent) {
                Memory::Here(memory) => Arc::new(memory),
                other => unreachable!("a write has its memory until it is sent, not {other:?}"),
            };
            task.memory = Memory::Shared(Arc::clone(&memory));
            let bytes =
                if task.edges.is_empty() { memory } else { Arc::new(merged(&task.edges, &range, offset, &memory)) };
            Payload { bytes, repeats: false }
        });
        let flags = if fua && self.offer.has(flag::SEND_FUA) { cmd_flag::FUA } else { 0 };
        let limit = self.offer.payload_max().into();
        self.add(key, &Batch { flags, limit, payload: Some(&payload), ..Batch::one(cmd::WRITE, range) });
        self.tasks[key].payload = Some(payload);
    }

    fn zero(&mut self, key: usize, range: Range<u64>, flags: u16) {
        if self.offer.has(flag::SEND_WRITE_ZEROES) {
            return self.add(key, &Batch { flags, ..Batch::one(cmd::WRITE_ZEROES, range) });
        }
        let max = u64::from(self.offer.payload_max());
        let limit = max.min(ZEROES_MAX.max(self.offer.blocks.min.into()));
        let zeros = vec![0; usize::try_from(limit.min(range.end - range.start)).expect("1 MiB")];
        let payload = Payload { bytes: Arc::new(zeros), repeats: true };
        self.add(key, &Batch { limit, payload: Some(&payload), ..Batch::one(cmd::WRITE, range) });
    }

    fn write_edges(&mut self, key: usize, shape: Shape) {
        let (offset, len) = shape.range().expect("zeroes have a range");
        for mut edge in std::mem::take(&mut self.tasks[key].edges) {
            let end = edge.offset + u64::try_from(edge.bytes.len()).expect("a block");
            let (from, to) = (offset.max(edge.offset), (offset + len).min(end));
            edge.bytes[index(from - edge.offset)..index(to - edge.offset)].fill(0);
            let payload = Payload { bytes: Arc::new(edge.bytes), repeats: false };
            self.add(key, &Batch { payload: Some(&payload), ..Batch::one(cmd::WRITE, edge.offset..end) });
        }
    }

    /// Adds the requests of a batch to those that are ready.
    fn add(&mut self, key: usize, batch: &Batch<'_>) {
        let mut start = batch.range.start;
        loop {
            let len = (batch.range.end - start).min(batch.limit);
            if len == 0 && batch.command != cmd::FLUSH {
                return;
            }
            let data = match (batch.command, batch.payload) {
                (cmd::READ, _) => Data::Later,
                (_, Some(payload)) if payload.repeats => Data::Send(Arc::clone(&payload.bytes), 0..index(len)),
                (_, Some(payload)) => {
                    let at = index(start - batch.range.start);
                    Data::Send(Arc::clone(&payload.bytes), at..at + index(len))
                }
                (_, None) => Data::None,
            };
            let piece = Piece::new(key, self.order, batch.command, start..start + len);
            self.ready.push_back(Piece { flags: batch.flags, data, part: batch.part, ..piece });
            self.order += 1;
            self.tasks[key].left += 1;
            start += len;
            if start >= batch.range.end {
                return;
            }
        }
    }

    /// Whether the node can do it at all.
    pub(super) fn check(&self, shape: Shape) -> Result<(), (Kind, String)> {
        if let Some((offset, len)) = shape.range()
            && offset.checked_add(len).is_none_or(|end| end > self.offer.usable())
        {
            let size = self.offer.usable();
            let what = shape.name();
            return Err((
                Kind::Invalid,
                format!("{what} of {len} bytes from offset {offset}: the node has {size} bytes"),
            ));
        }
        if shape.changes() && self.offer.has(flag::READ_ONLY) {
            return Err((Kind::Invalid, format!("{}: the export is read-only", shape.name())));
        }
        let needs = match shape {
            Shape::Flush => Some(flag::SEND_FLUSH),
            Shape::Write { fua: true, .. } if !self.offer.has(flag::SEND_FUA) => Some(flag::SEND_FLUSH),
            Shape::Trim { .. } => Some(flag::SEND_TRIM),
            Shape::Zeroes { fast: true, .. } => Some(flag::SEND_FAST_ZERO),
            Shape::Read { .. } | Shape::Write { .. } | Shape::Zeroes { .. } | Shape::Status { .. } => None,
        };
        let lacks_context = matches!(shape, Shape::Status { .. }) && self.offer.context.is_none();
        if lacks_context || needs.is_some_and(|needed| !self.offer.has(needed)) {
            return Err((Kind::Unsupported, format!("the server offers nothing for {}", shape.name())));
        }
        Ok(())
    }
}

impl Batch<'_> {
    /// One request, without a payload of its own.
    const fn one(command: u16, range: Range<u64>) -> Self {
        Self { command, flags: 0, range, limit: RANGE_MAX, payload: None, part: Part::Other }
    }
}

/// Whole blocks: the caller's bytes, and around them what the server has.
fn merged(edges: &[Edge], range: &Range<u64>, offset: u64, memory: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; index(range.end - range.start)];
    for edge in edges {
        let at = index(edge.offset - range.start);
        bytes[at..at + edge.bytes.len()].copy_from_slice(&edge.bytes);
    }
    let at = index(offset - range.start);
    bytes[at..at + memory.len()].copy_from_slice(memory);
    bytes
}

/// A distance within memory.
pub(super) fn index(distance: u64) -> usize {
    usize::try_from(distance).expect("64-bit memory")
}
