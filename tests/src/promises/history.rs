//! What was asked of a region of the volume, what was acknowledged, what was seen; and what may therefore be read.
//!
//! A region has one writer, so the writes to a block have an order, and all but the last are acknowledged or will never
//! be. Of each block the history keeps, as numbers of writes:
//!
//! ```text
//!  durable  ≤  acknowledged  ≤  started          seen ≤ started
//!  └ acknowledged before the last acknowledged fsync began
//! ```
//! A read may show any write from max(acknowledged, seen), as they stood when the read began, to `started`, as it stands
//! when the read has ended; after a loss of the buffer anything from `durable` to `started`. Only a read that meets a
//! write of the same block half way may show a torn block: no disk keeps the two apart.

use std::{fmt, ops::Range};

use super::{
    Loss,
    content::{self, Content},
};

/// What is known of a block. Write 0 is the state before the first write.
#[derive(Clone, Debug, Default)]
struct Block {
    started: u64,
    acknowledged: u64,
    seen: u64,
    durable: u64,
    /// The writes that made it zero, in order.
    zeros: Vec<u64>,
}

impl Block {
    /// The oldest write from `floor` on that the content can be; `None` when there is none that was started.
    fn place(&self, content: Content, floor: u64) -> Option<u64> {
        let write = match content {
            Content::Write(write) => write,
            Content::Zero => *self.zeros.get(self.zeros.partition_point(|zero| *zero < floor))?,
            Content::Elsewhere { .. } | Content::Torn => return None,
        };
        (floor..=self.started).contains(&write).then_some(write)
    }
}

/// What may not be older in a read: for each of its blocks the newest write that was acknowledged or seen when it began.
#[derive(Clone, Debug)]
#[must_use]
pub struct Floor {
    range: Range<u64>,
    writes: Vec<u64>,
}

/// What a flush makes durable: for each block of the region the last write acknowledged when the flush began.
#[derive(Clone, Debug)]
#[must_use]
pub struct Mark(Vec<u64>);

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The block.
    pub block: u64,
    /// What it holds.
    pub content: Content,
    /// The oldest write it may show.
    pub oldest: u64,
    /// The newest.
    pub newest: u64,
    /// Why none older.
    pub why: &'static str,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block, content, oldest, newest, why } = self;
        write!(f, "block {block} holds {content:?}; it may show writes {oldest} ({why}) to {newest}")
    }
}

/// The history of one region.
#[derive(Debug)]
pub struct History {
    seed: u64,
    first: u64,
    block_len: usize,
    blocks: Vec<Block>,
    /// The last write begun.
    last: u64,
}

impl History {
    /// Of `blocks` blocks from `first` on that were never written.
    pub fn new(seed: u64, first: u64, blocks: u64, block_len: usize) -> Self {
        let blocks = (0..blocks).map(|_| Block { zeros: vec![0], ..Block::default() }).collect();
        Self { seed, first, block_len, blocks, last: 0 }
    }

    /// The blocks of the region.
    pub fn range(&self) -> Range<u64> {
        self.first..self.first + self.blocks.len() as u64
    }

    fn indices(&self, range: &Range<u64>) -> Range<usize> {
        let index = |block: u64| usize::try_from(block - self.first).expect("a small region");
        index(range.start)..index(range.end)
    }

    fn of(&mut self, range: &Range<u64>) -> &mut [Block] {
        let indices = self.indices(range);
        &mut self.blocks[indices]
    }

    /// The writer is about to write these blocks. Returns the number of the write.
    pub fn begin_write(&mut self, range: &Range<u64>) -> u64 {
        self.last += 1;
        let write = self.last;
        self.of(range).iter_mut().for_each(|block| block.started = write);
        write
    }

    /// The writer is about to make these blocks zero. Returns the number of the write.
    pub fn begin_zero(&mut self, range: &Range<u64>) -> u64 {
        let write = self.begin_write(range);
        self.of(range).iter_mut().for_each(|block| block.zeros.push(write));
        write
    }

    /// The write was acknowledged.
    pub fn acknowledge(&mut self, range: &Range<u64>, write: u64) {
        self.of(range).iter_mut().for_each(|block| block.acknowledged = block.acknowledged.max(write));
    }

    /// A flush is about to be asked for.
    pub fn begin_flush(&self) -> Mark {
        Mark(self.blocks.iter().map(|block| block.acknowledged).collect())
    }

    /// The flush was acknowledged.
    pub fn flushed(&mut self, mark: &Mark) {
        self.blocks.iter_mut().zip(&mark.0).for_each(|(block, write)| block.durable = block.durable.max(*write));
    }

    /// A read of these blocks is about to begin.
    pub fn floor(&self, range: Range<u64>) -> Floor {
        let blocks = &self.blocks[self.indices(&range)];
        Floor { range, writes: blocks.iter().map(|block| block.acknowledged.max(block.seen)).collect() }
    }

    /// A read has ended with these bytes.
    ///
    /// # Errors
    /// A promise that is broken.
    pub fn read(&mut self, floor: &Floor, bytes: &[u8]) -> Result<(), Broken> {
        let (seed, len) = (self.seed, self.block_len);
        let blocks = self.of(&floor.range).iter_mut();
        for (((number, block), bytes), oldest) in
            floor.range.clone().zip(blocks).zip(bytes.chunks_exact(len)).zip(&floor.writes)
        {
            let content = content::read(seed, number, bytes);
            let why = "acknowledged or read before";
            let broken = || Broken { block: number, content, oldest: *oldest, newest: block.started, why };
            if content == Content::Torn && block.started > *oldest {
                continue;
            }
            let write = block.place(content, *oldest).ok_or_else(broken)?;
            block.seen = block.seen.max(write);
        }
        Ok(())
    }

    /// The buffer was lost, nothing is under way, and the region holds these bytes: now they are what was acknowledged.
    ///
    /// # Errors
    /// A promise that is broken.
    pub fn lose(&mut self, bytes: &[u8]) -> Result<Loss, Broken> {
        let (seed, range) = (self.seed, self.range());
        let mut loss = Loss::default();
        for ((number, block), bytes) in range.zip(&mut self.blocks).zip(bytes.chunks_exact(self.block_len)) {
            let content = content::read(seed, number, bytes);
            let Block { started, acknowledged, durable, .. } = *block;
            let why = "acknowledged before the last acknowledged fsync began";
            let broken = || Broken { block: number, content, oldest: durable, newest: started, why };
            let write = block.place(content, durable).ok_or_else(broken)?;
            loss.of += u64::from(started > 0);
            // Zeros may be any of several writes; the newest tells what was surely lost.
            let newest = if content == Content::Zero { block.zeros.last().copied().unwrap_or(write) } else { write };
            loss.blocks += u64::from(newest < acknowledged);
            // Whatever it is, it was read from the storage nodes, and nothing older can come back.
            let zeros = if content == Content::Zero { vec![write] } else { Vec::new() };
            *block = Block { started: write, acknowledged: write, seen: write, durable: write, zeros };
        }
        Ok(loss)
    }
}
