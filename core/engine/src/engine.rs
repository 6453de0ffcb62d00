//! The operations on an open volume, each of which has ended when it returns (M7), but for those that are begun.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use everdisk_proto::{frame::NodeStatus, limits::BLOCK, node::NodeState};
use everdisk_store::{ErrorKind, Keeper, Lent, Op, Pending, Sought, Store};
use everdisk_sys::{file::FileRange, robust};

use crate::{
    IoError, OpenError,
    health::Kind,
    layout::{Extent, Layout},
    node::{Node, kind},
};

/// Bytes of a block that [`Engine::verify`] and [`Engine::probe`] read.
const BLOCK_BYTES: usize = 4096;
const _: () = assert!(BLOCK_BYTES as u64 == BLOCK);
/// 2⁶⁴ divided by the golden ratio: its multiples are spread evenly over any range.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A probe ahead counts for this time. A test may be kept from the CPU for longer.
const PROBED_WITHIN: Duration = Duration::from_secs(if cfg!(test) { 600 } else { 1 });
/// Blocks that [`Engine::verify`] reads at once.
const VERIFIED_AT_ONCE: usize = 32;

/// Linux's EOPNOTSUPP and ENOSPC.
const EOPNOTSUPP: i32 = 95;
const ENOSPC: i32 = 28;

/// Some nodes could not make durable what was written to them.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NotFlushed {
    /// Which: bit i stands for node i.
    pub nodes: u64,
    /// Whether each of them works, and has only lost what was not durable.
    pub only_forgot: bool,
    /// The first one's error.
    pub error: IoError,
}

/// An open volume. All operations may be called from many threads at once.
pub struct Engine {
    size: u64,
    layout: Layout,
    pub(crate) nodes: Vec<Arc<Node>>,
    probes: AtomicU64,
    /// Operations of each kind that were done side by side.
    turns: [AtomicUsize; Kind::COUNT],
}

/// A part of an operation: the node it is for, and where on it.
type Part<'a> = (usize, u64, Lent<'a>);

impl Engine {
    pub(crate) fn new(size: u64, layout: Layout, stores: Vec<Arc<dyn Store>>) -> Self {
        let nodes = stores.into_iter().map(|store| Arc::new(Node::new(store))).collect();
        Self { size, layout, nodes, probes: AtomicU64::new(u64::from(std::process::id())), turns: Default::default() }
    }

    /// Before the first operation of a core that serves: connects to the nodes that have connections. `keeper`: what keeps those of
    /// a node, by its index, beyond the death of this process.
    ///
    /// # Errors
    /// [`OpenError`] names the first node that is something else.
    pub fn serve(&self, keeper: impl Fn(u8) -> Option<Arc<dyn Keeper>>) -> Result<(), OpenError> {
        // Side by side: a server that is out of reach is waited for.
        std::thread::scope(|scope| {
            let begun = self.nodes.iter().enumerate().map(|(index, node)| {
                let index = u8::try_from(index).expect("a volume has at most 64 nodes");
                let (store, keeper) = (Arc::clone(&node.store), keeper(index));
                robust::start_scoped(scope, "nodes", move || store.serve(keeper))
            });
            let begun: Vec<_> = begun.collect();
            begun.into_iter().try_for_each(|begun| {
                let served = begun.map_err(OpenError::Thread)?;
                Ok(served.join().expect("a panic ends the process")?)
            })
        })
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

    /// As [`Engine::read`]; `waits` is called before a wait for nodes that usually take long.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn read_beside(&self, offset: u64, buf: &mut [u8], waits: &dyn Fn()) -> Result<(), IoError> {
        self.inside(offset, buf.len() as u64)?;
        if let Some((node, at)) = self.layout.single(offset, buf.len()) {
            return self.nodes[node].read(at, buf, waits);
        }
        let (mut rest, mut slow) = (buf, Vec::new());
        for Extent { node, node_offset, len, .. } in self.layout.extents(offset, rest.len()) {
            let (part, next) = rest.split_at_mut(len);
            rest = next;
            if !self.nodes[node].is_slow(Kind::Read) {
                self.nodes[node].perform(node_offset, Op::Read(part))?;
            } else if !self.nodes[node].read_at_once(node_offset, part)? {
                slow.push((node, node_offset, Op::Read(part)));
            }
        }
        if slow.is_empty() {
            return Ok(());
        }
        waits();
        self.side_by_side(slow).into_iter().try_for_each(|outcome| outcome.map(drop))
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
            return self.nodes[node].perform(at, Op::Write(data)).map(drop);
        }
        let part = |e: Extent| (e.node, e.node_offset, Op::Write(&data[e.position..e.position + e.len]));
        self.run(self.layout.extents(offset, data.len()).map(part))
    }

    /// As [`Engine::write`], one node after the other however long each takes, so that only the nodes decide how long it takes.
    ///
    /// # Errors
    /// [`IoError`].
    pub(crate) fn write_in_turn(&self, offset: u64, data: &[u8]) -> Result<(), IoError> {
        self.inside(offset, data.len() as u64)?;
        self.layout.extents(offset, data.len()).try_for_each(|e| {
            let part = &data[e.position..e.position + e.len];
            self.nodes[e.node].perform(e.node_offset, Op::Write(part)).map(drop)
        })
    }

    /// Begins to make a range inside the volume read as zeros, and to give its space back. Does not wait.
    pub(crate) fn begin_discard(&self, offset: u64, len: u64) -> Writing {
        let ranges = (0..self.nodes.len()).map(|node| (node, self.layout.on_node(node, offset, len)));
        let some = ranges.filter(|(_, range)| !range.is_empty());
        Writing(some.map(|(node, r)| self.nodes[node].begin(r.start, Op::Discard(r.end - r.start))).collect())
    }

    /// Begins to write `data` at `offset`, which is inside the volume. Does not wait.
    pub(crate) fn begin_write(&self, offset: u64, data: Vec<u8>) -> Writing {
        if let Some((node, at)) = self.layout.single(offset, data.len()) {
            return Writing(vec![self.nodes[node].begin(at, Op::Write(data))]);
        }
        let extents = self.layout.extents(offset, data.len());
        let part = |e: Extent| data[e.position..e.position + e.len].to_vec();
        Writing(extents.map(|e| self.nodes[e.node].begin(e.node_offset, Op::Write(part(e)))).collect())
    }

    /// Makes everything written so far durable on every node, on all at once where that takes long. Every node is tried.
    ///
    /// # Errors
    /// [`NotFlushed`].
    pub fn flush(&self) -> Result<(), NotFlushed> {
        let outcomes: Vec<_> = if self.is_quick_to_flush() {
            self.nodes.iter().map(|node| node.perform(0, Op::Flush)).collect()
        } else {
            self.side_by_side((0..self.nodes.len()).map(|node| (node, 0, Op::Flush)).collect())
        };
        let mut failure: Option<NotFlushed> = None;
        for (node, error) in outcomes.into_iter().enumerate().filter_map(|(node, done)| Some((node, done.err()?))) {
            let forgot = matches!(&error, IoError::Store(e) if e.kind() == ErrorKind::Unflushed);
            let failure = failure.get_or_insert(NotFlushed { nodes: 0, only_forgot: true, error });
            failure.nodes |= 1 << node;
            failure.only_forgot &= forgot;
        }
        failure.map_or(Ok(()), Err)
    }

    /// Whether a node can lose what it has acknowledged and not made durable, see
    /// [`Store::may_forget`].
    pub(crate) fn may_forget(&self) -> bool {
        self.nodes.iter().any(|node| node.store.may_forget())
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
        self.on_each(offset, len, Op::Discard)
    }

    /// Makes the range read as zero and keeps its space where the nodes can.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.on_each(offset, len, Op::WriteZeroes)
    }

    /// Reserves space for the range. No byte changes.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn allocate(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.on_each(offset, len, Op::Allocate)
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
        let from = |node| self.layout.node_len(node, offset);
        let parts = (0..self.nodes.len()).map(|node| (node, from(node), Op::Seek(what)));
        let outcomes: Vec<_> = if self.is_slow_to_read() {
            self.side_by_side(parts.collect())
        } else {
            parts.map(|(node, at, op)| self.nodes[node].perform(at, op)).collect()
        };
        let mut nearest = (what == Sought::Hole).then_some(self.size);
        for (node, found) in outcomes.into_iter().enumerate() {
            let (from, found) = (from(node), found?);
            assert!(found.is_none_or(|at| at >= from), "a store searches forward: from {from} it has found {found:?}");
            // A node's end is a hole of the node. It maps to the volume's end or beyond, so it is never the nearest.
            let found = found.map(|at| self.layout.volume_offset(node, at));
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
        let is_slow = self.is_slow_to_read();
        let do_all = |parts: Vec<Part<'_>>| -> Result<(), IoError> {
            if is_slow {
                return self.side_by_side(parts).into_iter().try_for_each(|outcome| outcome.map(drop));
            }
            parts.into_iter().try_for_each(|(node, at, op)| self.nodes[node].perform(at, op).map(drop))
        };
        do_all((0..self.nodes.len()).map(|node| (node, 0, Op::Identify)).collect())?;
        let total = self.size / BLOCK;
        let parts = u64::from(blocks).min(total);
        let start = |part: u64| part * (total / parts) + part.min(total % parts);
        // Not the first block of each part: with equal strides they might all lie on one node.
        let block = |part: u64| start(part) + part.wrapping_mul(GOLDEN) % (start(part + 1) - start(part));
        let blocks: Vec<u64> = (0..parts).map(block).collect();
        for some in blocks.chunks(VERIFIED_AT_ONCE) {
            let mut memory = vec![[0; BLOCK_BYTES]; some.len()];
            let read = some.iter().zip(&mut memory).map(|(block, memory)| {
                let (node, at) = self.layout.locate(block * BLOCK);
                (node, at, Op::Read(&mut memory[..]))
            });
            do_all(read.collect())?;
        }
        Ok(u32::try_from(parts).expect("no more than were asked for"))
    }

    /// Reads one block of 4 KiB from every node that holds any and is not known to fail or to stall, at each call a
    /// different one. A node that [`Engine::probe_ahead`] has read a moment ago is not read again. Returns the number of
    /// nodes that were probed. Short, and allocates no memory.
    ///
    /// # Errors
    /// [`IoError`].
    pub fn probe(&self) -> Result<u32, IoError> {
        let turn = self.probe_turn();
        let mut buf = [0; BLOCK_BYTES];
        let mut probed = 0;
        for node in self.nodes.iter().filter(|node| node.health.is_good()) {
            if let Some(block) = turn.checked_rem(node.store.size() / BLOCK) {
                if !node.was_probed(PROBED_WITHIN) {
                    node.perform(block * BLOCK, Op::Read(&mut buf))?;
                }
                probed += 1;
            }
        }
        Ok(probed)
    }

    /// Reads what [`Engine::probe`] would, from all nodes at once, so that a probe within the next second need not: it is done
    /// while applications wait, and this is not. Waits for `limit` at most. A node that fails or hangs is left to the
    /// probe.
    pub fn probe_ahead(&self, limit: Duration) {
        let (turn, deadline) = (self.probe_turn(), Instant::now() + limit);
        let (done, ended) = mpsc::channel();
        for node in self.nodes.iter().filter(|node| node.health.is_good()) {
            if let Some(block) = turn.checked_rem(node.store.size() / BLOCK) {
                let done = done.clone();
                node.probe_ahead(block * BLOCK, BLOCK_BYTES, move || {
                    // The receiver has gone when the limit is over.
                    let _ = done.send(());
                });
            }
        }
        drop(done);
        while ended.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok() {}
    }

    fn probe_turn(&self) -> u64 {
        self.probes.fetch_add(1, Ordering::Relaxed).wrapping_mul(GOLDEN)
    }

    /// Whether a read of a node usually takes long.
    pub(crate) fn is_slow_to_read(&self) -> bool {
        self.nodes.iter().any(|node| node.is_slow(Kind::Read))
    }

    /// Whether a change of a node usually takes long.
    pub(crate) fn is_slow_to_change(&self) -> bool {
        self.nodes.iter().any(|node| node.is_slow(Kind::Write))
    }

    /// Whether flushes of all nodes have been measured as quick.
    pub(crate) fn is_quick_to_flush(&self) -> bool {
        self.nodes.iter().all(|node| node.is_quick(Kind::Flush))
    }

    /// Whether a flush of a node usually takes long.
    pub(crate) fn is_slow_to_flush(&self) -> bool {
        self.nodes.iter().any(|node| node.is_slow(Kind::Flush))
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
        let status = |node: &Arc<Node>| {
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
    fn on_each(&self, offset: u64, len: u64, op: impl Fn(u64) -> Lent<'static>) -> Result<(), IoError> {
        self.inside(offset, len)?;
        let ranges = (0..self.nodes.len()).map(|node| (node, self.layout.on_node(node, offset, len)));
        let some = ranges.filter(|(_, range)| !range.is_empty());
        self.run(some.map(|(node, range)| (node, range.start, op(range.end - range.start))))
    }

    /// Does the parts of a change: one after the other up to the first error, or side by side where that takes long.
    fn run<'a>(&self, mut parts: impl Iterator<Item = Part<'a>>) -> Result<(), IoError> {
        if self.is_slow_to_change() {
            return self.side_by_side(parts.collect()).into_iter().try_for_each(|outcome| outcome.map(drop));
        }
        parts.try_for_each(|(node, at, op)| self.nodes[node].perform(at, op).map(drop))
    }

    /// Does all the parts side by side, one of them on this thread: each in turn, because only that one shows how long the
    /// node takes. The outcomes have the order of the parts.
    fn side_by_side(&self, mut parts: Vec<Part<'_>>) -> Vec<Result<Option<u64>, IoError>> {
        let Some((.., first)) = parts.first() else { return Vec::new() };
        // A counter for each kind: two kinds in turn would have each of them done here at always the same nodes.
        let turn = self.turns[kind(first) as usize].fetch_add(1, Ordering::Relaxed) % parts.len();
        let (node, at, op) = parts.remove(turn);
        let begin = |(node, at, op): &mut Part<'_>| self.nodes[*node].begin(*at, op.copied());
        let begun: Vec<_> = parts.iter_mut().map(begin).collect();
        let here = self.nodes[node].perform(at, op);
        // Every part is waited for, also after one has failed.
        let ended = parts.into_iter().zip(begun).map(|((.., mut op), begun)| {
            let (copy, outcome) = begun.wait();
            op.take_over(&copy);
            outcome.map_err(IoError::from)
        });
        let mut outcomes: Vec<_> = ended.collect();
        outcomes.insert(turn, here);
        outcomes
    }
}

/// A write or a discard that was begun.
#[derive(Debug)]
#[must_use]
pub(crate) struct Writing(Vec<Pending>);

impl Writing {
    /// Waits for its end.
    ///
    /// # Errors
    /// As [`Engine::write`].
    pub(crate) fn wait(self) -> Result<(), IoError> {
        let outcomes: Vec<_> = self.0.into_iter().map(|part| part.wait().1).collect();
        outcomes.into_iter().try_for_each(|outcome| Ok(outcome.map(drop)?))
    }
}
