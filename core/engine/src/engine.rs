//! The operations on an open volume, each completed on the caller's thread when it returns (M7).

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use everdisk_proto::{frame::NodeStatus, limits::BLOCK, node::NodeState};
use everdisk_store::{Sought, Store, StoreError};
use everdisk_sys::{file::FileRange, robust};

use crate::{
    IoError,
    health::{Health, Kind},
    layout::Layout,
    pace::Pace,
};

/// Bytes of a block that [`Engine::verify`] and [`Engine::probe`] read.
const BLOCK_BYTES: usize = 4096;
const _: () = assert!(BLOCK_BYTES as u64 == BLOCK);
/// 2⁶⁴ divided by the golden ratio: its multiples are spread evenly over any range.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Linux's EOPNOTSUPP and ENOSPC.
const EOPNOTSUPP: i32 = 95;
const ENOSPC: i32 = 28;

/// Some nodes could not make durable what was written to them.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NotFlushed {
    /// Which: bit i stands for node i.
    pub nodes: u64,
    /// The first one's error.
    pub error: IoError,
}

/// An open volume. All operations may be called from many threads at once.
pub struct Engine {
    size: u64,
    layout: Layout,
    nodes: Vec<Node>,
    probes: AtomicU64,
}

struct Node {
    store: Box<dyn Store>,
    health: Health,
    reads: Pace,
    changes: Pace,
    flushes: Pace,
}

impl Node {
    /// Runs an operation that changes nothing.
    #[inline]
    fn run<T>(&self, operation: impl FnOnce(&dyn Store) -> Result<T, StoreError>) -> Result<T, IoError> {
        self.run_kind(Kind::Read, operation)
    }

    #[inline]
    fn run_kind<T>(
        &self,
        kind: Kind,
        operation: impl FnOnce(&dyn Store) -> Result<T, StoreError>,
    ) -> Result<T, IoError> {
        self.health.begin();
        let outcome = operation(&*self.store);
        self.health.end(kind, &outcome);
        Ok(outcome?)
    }

    /// Reads; `waits` is called before a wait that takes long.
    #[inline]
    fn read(&self, offset: u64, buf: &mut [u8], waits: &dyn Fn()) -> Result<(), IoError> {
        if self.reads.is_slow() {
            match self.store.read_at_once(offset, buf) {
                // Nothing is known of this node's pace yet.
                Ok(false) => {}
                read => return self.run(|_| read.map(drop)),
            }
            waits();
        }
        self.reads.time(buf.len(), || self.run(|store| store.read_at(offset, buf)))
    }

    #[inline]
    fn change(
        &self,
        copied: usize,
        operation: impl FnOnce(&dyn Store) -> Result<(), StoreError>,
    ) -> Result<(), IoError> {
        self.changes.time(copied, || self.run_kind(Kind::Write, operation))
    }
}

impl Engine {
    pub(crate) fn new(size: u64, layout: Layout, stores: Vec<Box<dyn Store>>) -> Self {
        let node = |store| Node {
            store,
            health: Health::default(),
            reads: Pace::default(),
            changes: Pace::default(),
            flushes: Pace::default(),
        };
        let nodes = stores.into_iter().map(node).collect();
        Self { size, layout, nodes, probes: AtomicU64::new(u64::from(std::process::id())) }
    }

    /// Bytes of the volume.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.read_beside(offset, buf, &|| ())
    }

    /// As [`Engine::read`]; `waits` is called before each wait for a node that usually takes long.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn read_beside(&self, offset: u64, buf: &mut [u8], waits: &dyn Fn()) -> Result<(), IoError> {
        self.inside(offset, buf.len() as u64)?;
        if let Some((node, at)) = self.layout.single(offset, buf.len()) {
            return self.nodes[node].read(at, buf, waits);
        }
        for extent in self.layout.extents(offset, buf.len()) {
            let part = &mut buf[extent.position..extent.position + extent.len];
            self.nodes[extent.node].read(extent.node_offset, part, waits)?;
        }
        Ok(())
    }

    /// The bytes as a part of a node's file, where they are one range there and lie in memory. See
    /// [`Store::in_memory`].
    pub fn in_memory(&self, offset: u64, len: u64) -> Option<FileRange<'_>> {
        self.inside(offset, len).ok()?;
        let (node, at) = self.layout.single(offset, usize::try_from(len).ok()?)?;
        self.nodes[node].store.in_memory(at, len)
    }

    /// Writes `data` at `offset`. After an error any part of the range may hold the old or the new bytes.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), IoError> {
        self.inside(offset, data.len() as u64)?;
        if let Some((node, at)) = self.layout.single(offset, data.len()) {
            return self.nodes[node].change(data.len(), |store| store.write_at(at, data));
        }
        for extent in self.layout.extents(offset, data.len()) {
            let part = &data[extent.position..extent.position + extent.len];
            self.nodes[extent.node].change(part.len(), |store| store.write_at(extent.node_offset, part))?;
        }
        Ok(())
    }

    /// Makes everything written so far durable on every node, on all at once where that takes long. Every node is tried.
    ///
    /// # Errors
    /// [`NotFlushed`].
    pub fn flush(&self) -> Result<(), NotFlushed> {
        let flush = |node: &Node| node.flushes.time(0, || node.run_kind(Kind::Flush, |store| store.flush()));
        let outcomes: Vec<Result<(), IoError>> = if self.nodes.len() == 1 || self.is_quick_to_flush() {
            self.nodes.iter().map(flush).collect()
        } else {
            thread::scope(|scope| {
                let begun = self.nodes[1..].iter().map(|node| {
                    // Where no thread can be started, this one flushes the node.
                    robust::start_scoped(scope, "flush", || flush(node)).map_err(|_| node)
                });
                let begun: Vec<_> = begun.collect();
                let first = flush(&self.nodes[0]);
                let ended = begun.into_iter().map(|begun| match begun {
                    Ok(thread) => thread.join().expect("a panic ends the process"),
                    Err(node) => flush(node),
                });
                std::iter::once(first).chain(ended).collect()
            })
        };
        let mut failure: Option<NotFlushed> = None;
        for (node, error) in outcomes.into_iter().enumerate().filter_map(|(node, done)| Some((node, done.err()?))) {
            failure.get_or_insert(NotFlushed { nodes: 0, error }).nodes |= 1 << node;
        }
        failure.map_or(Ok(()), Err)
    }

    /// Whether a range lies on any of these nodes: bit i stands for node i.
    pub(crate) fn touches(&self, nodes: u64, range: &Range<u64>) -> bool {
        let on = |node: &usize| !self.layout.on_node(*node, range.start, range.end - range.start).is_empty();
        (0..self.nodes.len()).filter(|node| nodes >> node & 1 == 1).any(|node| on(&node))
    }

    /// From now on flushes do not report an error that another core has been told of already.
    ///
    /// # Errors
    /// The first [`IoError`]; then flushes may report such an error again.
    pub(crate) fn forget_errors(&self) -> Result<(), IoError> {
        // It says nothing about the nodes' health.
        self.nodes.iter().try_for_each(|node| Ok(node.store.forget_errors()?))
    }

    /// Makes the range read as zero and reserves its space, where the nodes can: a file system that has no other way to zero a range
    /// makes a hole of it.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn zero_and_keep(&self, offset: u64, len: u64) -> Result<(), IoError> {
        let no_room = |error: &IoError| [EOPNOTSUPP, ENOSPC].contains(&error.errno());
        match self.write_zeroes(offset, len).and_then(|()| self.allocate(offset, len)) {
            // The zeros were acknowledged; the space for them was not.
            Err(error) if no_room(&error) => self.discard_or_zero(offset, len),
            done => done,
        }
    }

    /// Makes the range read as zero and gives its space back, where the nodes can.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn discard_or_zero(&self, offset: u64, len: u64) -> Result<(), IoError> {
        match self.discard(offset, len) {
            Err(error) if error.errno() == EOPNOTSUPP => self.write_zeroes(offset, len),
            done => done,
        }
    }

    /// Makes the range read as zero and gives its space back.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.on_each(offset, len, |store, at, len| store.discard(at, len))
    }

    /// Makes the range read as zero and keeps its space where the nodes can.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.on_each(offset, len, |store, at, len| store.write_zeroes(at, len))
    }

    /// Reserves space for the range. No byte changes.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn allocate(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.on_each(offset, len, |store, at, len| store.allocate(at, len))
    }

    /// Offset of the next data or hole at or after `offset`, as in lseek(2). The volume's end is a hole, and `None`
    /// (ENXIO) means that there is no more data or `offset` is not inside the volume. One query to each node.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn seek(&self, offset: u64, what: Sought) -> Result<Option<u64>, IoError> {
        if offset >= self.size {
            return Ok(None);
        }
        let mut nearest = (what == Sought::Hole).then_some(self.size);
        for (index, node) in self.nodes.iter().enumerate() {
            let from = self.layout.node_len(index, offset);
            let found = node.run(|store| store.next(from, what))?;
            assert!(found.is_none_or(|at| at >= from), "a store searches forward: from {from} it has found {found:?}");
            // A node's end is a hole of the node. It maps to the volume's end or beyond, so it is never the nearest.
            let found = found.map(|at| self.layout.volume_offset(index, at));
            nearest = nearest.into_iter().chain(found).min();
        }
        Ok(nearest)
    }

    /// Reads every node's identity anew. Then divides the volume into `blocks` equal parts and reads one block of 4 KiB
    /// from each (all blocks there are, if fewer). Returns the number of blocks read.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn verify(&self, blocks: u32) -> Result<u32, IoError> {
        for node in &self.nodes {
            node.run(|store| store.recheck())?;
        }
        let total = self.size / BLOCK;
        let parts = u64::from(blocks).min(total);
        let start = |part: u64| part * (total / parts) + part.min(total % parts);
        let mut buf = [0; BLOCK_BYTES];
        let mut read = 0;
        for part in 0..parts {
            // Not the first block of each part: with equal strides they might all lie on one node.
            let block = start(part) + part.wrapping_mul(GOLDEN) % (start(part + 1) - start(part));
            self.read(block * BLOCK, &mut buf)?;
            read += 1;
        }
        Ok(read)
    }

    /// Reads one block of 4 KiB from every node that holds any and is not known to fail or to stall, at each call a
    /// different one. Returns the number of blocks read. Short, and allocates no memory.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn probe(&self) -> Result<u32, IoError> {
        let turn = self.probes.fetch_add(1, Ordering::Relaxed).wrapping_mul(GOLDEN);
        let mut buf = [0; BLOCK_BYTES];
        let mut read = 0;
        for node in self.nodes.iter().filter(|node| node.health.is_good()) {
            if let Some(block) = turn.checked_rem(node.store.size() / BLOCK) {
                node.run(|store| store.read_at(block * BLOCK, &mut buf))?;
                read += 1;
            }
        }
        Ok(read)
    }

    /// Whether a read of a node usually takes long.
    pub(crate) fn is_slow_to_read(&self) -> bool {
        self.nodes.iter().any(|node| node.reads.is_slow())
    }

    /// Whether a change of a node usually takes long.
    pub(crate) fn is_slow_to_change(&self) -> bool {
        self.nodes.iter().any(|node| node.changes.is_slow())
    }

    /// Whether flushes of all nodes have been measured as quick.
    pub(crate) fn is_quick_to_flush(&self) -> bool {
        self.nodes.iter().all(|node| node.flushes.is_quick())
    }

    /// Whether a flush of a node usually takes long.
    pub(crate) fn is_slow_to_flush(&self) -> bool {
        self.nodes.iter().any(|node| node.flushes.is_slow())
    }

    /// Checks whether the nodes end the operations under way. To be called several times a second, from a thread that
    /// does no I/O on a node: a hanging node must not block the check.
    pub fn watch(&self) {
        let now = Instant::now();
        self.nodes.iter().for_each(|node| node.health.watch(now));
    }

    /// Whether no node fails or stalls.
    pub fn is_good(&self) -> bool {
        self.nodes.iter().all(|node| node.health.is_good())
    }

    /// Every node as the core sees it, in the order of the layout: `in-step`, `stalled` while an operation on it does not end,
    /// or `failed` while the last operation on it failed.
    pub fn nodes(&self) -> Vec<NodeStatus> {
        let status = |node: &Node| {
            let error = node.health.error();
            let state = match (&error, node.health.is_stalled()) {
                (_, true) => NodeState::Stalled,
                (Some(_), false) => NodeState::Failed,
                (None, false) => NodeState::InStep,
            };
            NodeStatus {
                url: node.store.url().to_string(),
                uuid: node.store.uuid(),
                state,
                error,
                written: node.health.has_written(),
            }
        };
        self.nodes.iter().map(status).collect()
    }

    #[inline]
    pub(crate) fn inside(&self, offset: u64, len: u64) -> Result<(), IoError> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size) {
            Ok(())
        } else {
            Err(IoError::OutOfRange { offset, len, size: self.size })
        }
    }

    /// One operation per node on its part of the range, whatever the number of stripes.
    fn on_each(
        &self,
        offset: u64,
        len: u64,
        operation: impl Fn(&dyn Store, u64, u64) -> Result<(), StoreError>,
    ) -> Result<(), IoError> {
        self.inside(offset, len)?;
        for (index, node) in self.nodes.iter().enumerate() {
            let range = self.layout.on_node(index, offset, len);
            if !range.is_empty() {
                node.change(0, |store| operation(store, range.start, range.end - range.start))?;
            }
        }
        Ok(())
    }
}
