//! A command that has begun, and the requests it is made of.

use std::{ops::Range, sync::Arc, time::Instant};

use everdisk_proto::nbd::wire::{cmd, cmd_flag};

use crate::{
    codec::{
        assembly::Assembly,
        reply::{Extent, Violation},
    },
    command::{Completion, Shape},
    error::Error,
};

/// A command between its begin and its completion.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) shape: Shape,
    pub(crate) completion: Completion,
    pub(crate) begun: Instant,
    pub(crate) memory: Memory,
    pub(crate) stage: Stage,
    /// Requests of the stage that have not been answered.
    pub(crate) left: usize,
    /// The first error of a request.
    pub(crate) error: Option<Error>,
    /// Blocks that the range covers in part, as the server has them.
    pub(crate) edges: Vec<Edge>,
    /// What is written: the caller's memory, or whole blocks made of it.
    pub(crate) payload: Option<Payload>,
    /// The epoch of a change: [`super::flushes`].
    pub(crate) epoch: Option<u64>,
    /// Of a flush: what it covers. Of a write with FUA that is made of a write and a flush: the losses of connections
    /// before the write.
    pub(crate) mark: u64,
    /// Of a flush: it has to report that data may be lost.
    pub(crate) suspect: bool,
    pub(crate) extents: Option<Vec<Extent>>,
}

/// Where a task stands.
///
/// ```text
/// Queued ─▶ Waiting ─▶ Main                                    read, flush, trim, block status, zeroes of whole blocks
///                  ├─▶ ReadEdges ─▶ Main [─▶ Flush]            write of parts of blocks
///                  ├─▶ Main [─▶ Flush]                         write of whole blocks
///                  └─▶ Main ─▶ ReadEdges ─▶ WriteEdges         zeroes of parts of blocks
/// ```
/// Flush follows a write with FUA at a server without FUA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// For a place in the window.
    Queued,
    /// For another change of the same blocks, or a flush for changes.
    Waiting,
    ReadEdges,
    Main,
    WriteEdges,
    Flush,
}

/// The caller's memory.
#[derive(Debug)]
pub(crate) enum Memory {
    /// The task has it.
    Here(Vec<u8>),
    /// Requests are being sent from it.
    Shared(Arc<Vec<u8>>),
    /// The one request of a read has it.
    Lent,
}

/// What a write sends from its first block on.
#[derive(Clone, Debug)]
pub(crate) struct Payload {
    pub(crate) bytes: Arc<Vec<u8>>,
    /// Every request sends the same first bytes: they are zeros.
    pub(crate) repeats: bool,
}

/// A block that a change covers in part.
#[derive(Debug)]
pub(crate) struct Edge {
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

/// A request.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) task: usize,
    /// The place in the order in which the requests came about.
    pub(crate) order: u64,
    pub(crate) command: u16,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) data: Data,
    pub(crate) part: Part,
    pub(crate) assembly: Assembly,
    /// The connection it was sent on.
    pub(crate) lane: u64,
    pub(crate) slot: usize,
    /// The entry of a change in the in-flight table of the connection.
    pub(crate) entry: Option<usize>,
}

/// The memory of a request.
#[derive(Debug)]
pub(crate) enum Data {
    None,
    /// A read makes memory of its own when it is sent.
    Later,
    /// A read fills this.
    Fill(Vec<u8>),
    /// The receiver fills it at the moment.
    Lent,
    /// A write sends this.
    Send(Arc<Vec<u8>>, Range<usize>),
}

/// What a request is to its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// It reads into the caller's memory.
    Whole,
    /// It reads a part of the range, or more than the range.
    Some,
    /// It reads this edge.
    Edge(usize),
    /// It returns no data.
    Other,
}

impl Task {
    /// A task that waits for a place in the window.
    pub(crate) fn new(shape: Shape, completion: Completion, memory: Memory, suspect: bool) -> Self {
        Self {
            shape,
            completion,
            begun: Instant::now(),
            memory,
            stage: Stage::Queued,
            left: 0,
            error: None,
            edges: Vec::new(),
            payload: None,
            epoch: None,
            mark: 0,
            suspect,
            extents: None,
        }
    }
}

impl Piece {
    /// A request without data, flags and a connection.
    pub(crate) fn new(task: usize, order: u64, command: u16, range: Range<u64>) -> Self {
        Self {
            task,
            order,
            command,
            flags: 0,
            offset: range.start,
            len: u32::try_from(range.end - range.start).expect("a limit is at most 1 GiB"),
            data: Data::None,
            part: Part::Other,
            assembly: Assembly::default(),
            lane: 0,
            slot: 0,
            entry: None,
        }
    }

    /// Bytes that count in the window.
    pub(crate) const fn bytes(&self) -> u64 {
        match self.command {
            cmd::READ | cmd::WRITE => self.len as u64,
            _ => 0,
        }
    }

    /// Whether it changes the export.
    pub(crate) const fn changes(&self) -> bool {
        matches!(self.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES)
    }

    /// Whether its change is durable when it is answered.
    pub(crate) const fn is_durable(&self) -> bool {
        self.flags & cmd_flag::FUA != 0
    }

    /// The memory to be filled, which [`Self::put_back`] returns. A request that is resent has it again by then.
    pub(crate) fn lend(&mut self) -> Vec<u8> {
        match std::mem::replace(&mut self.data, Data::Lent) {
            Data::Fill(memory) => memory,
            other => unreachable!("only a READ that was sent has data to receive, this has {other:?}"),
        }
    }

    pub(crate) fn put_back(&mut self, memory: Vec<u8>) {
        self.data = Data::Fill(memory);
    }

    /// A small body has come.
    pub(crate) fn small(&mut self, kind: u16, body: &[u8]) -> Result<(), Violation> {
        if let (Some(zeros), Data::Fill(memory)) = (self.assembly.small(kind, body)?, &mut self.data) {
            memory[zeros].fill(0);
        }
        Ok(())
    }
}
