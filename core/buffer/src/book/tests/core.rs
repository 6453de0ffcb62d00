//! A core with its book, and a storage node that it writes to and flushes.

use super::*;

/// A storage node as Linux presents it: what was written since the last flush is in the page cache only, and a flush
/// that fails drops it.
pub(super) struct Node {
    pub(super) cached: ReferenceDisk,
    pub(super) durable: ReferenceDisk,
}

impl Node {
    pub(super) fn new() -> Self {
        let size = index(SIZE);
        Self { cached: ReferenceDisk::new(size), durable: ReferenceDisk::new(size) }
    }

    pub(super) fn write(&mut self, at: u64, data: &[u8]) {
        assert!(self.cached.write(index(at), data));
    }

    pub(super) fn flush(&mut self, fails: bool) {
        let all = if fails { &self.durable } else { &self.cached }.read(0, index(SIZE)).unwrap().to_vec();
        assert!(self.cached.write(0, &all) && self.durable.write(0, &all));
    }
}

pub(super) fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

/// A core.
pub(super) struct Core {
    pub(super) book: Book,
    pub(super) generation: u64,
}

pub(super) fn content(seed: u8, len: u64) -> Vec<u8> {
    (seed..=255).cycle().map(|b| b | 1).take(usize::try_from(len).unwrap()).collect()
}

impl Core {
    pub(super) fn new(area: &MortalArea, generation: u64) -> Self {
        Self { book: Book::new(area.geometry(), SIZE), generation }
    }

    /// False: no room.
    pub(super) fn write(&mut self, area: &MortalArea, offset: u64, data: &[u8]) -> bool {
        self.append(area, ExtentKind::Data, offset, data.len() as u64, data)
    }

    pub(super) fn append(&mut self, area: &MortalArea, kind: ExtentKind, offset: u64, len: u64, data: &[u8]) -> bool {
        let Ok(place) = self.book.reserve(area, kind, &(offset..offset + len)) else { return false };
        let (position, generation) = (place.position, self.generation);
        let extent = Extent { kind, offset, len, position, generation, crc: crc32c::crc32c(data) };
        log::publish(area, place.seq, &extent, data);
        self.book.published(area, place.seq, &extent);
        true
    }

    /// Writes past the buffer, where nothing buffered overlaps it.
    pub(super) fn through(&mut self, area: &MortalArea, node: &mut Node, at: u64, data: &[u8]) -> bool {
        let range = at..at + data.len() as u64;
        if self.book.overlaps(&range) {
            return false;
        }
        node.write(at, data);
        self.book.written_through(area, &range);
        true
    }

    /// Sends a batch; the pieces that touch `fails` do not reach the node.
    pub(super) fn send(&mut self, area: &MortalArea, node: &mut Node, bytes: u64, fails: Option<u64>) {
        let batch = self.book.batch(bytes, self.book.head(), 256);
        let mut failed = Vec::new();
        for piece in &batch.pieces {
            if fails.is_some_and(|at| piece.span().contains(&at)) {
                failed.push(piece.span());
                continue;
            }
            let mut data = vec![0; index(piece.len())];
            if piece.kind == ExtentKind::Data {
                copy_out(area, piece, &mut data);
            }
            node.write(piece.start, &data);
        }
        self.book.sent(&batch, &failed);
    }

    pub(super) fn flush(&mut self, area: &MortalArea, node: &mut Node, fails: bool) {
        let mark = self.book.begin_flush(Some(area));
        node.flush(fails);
        if fails {
            self.book.flush_failed(area, |_| true);
            self.book.settle(area);
        } else {
            self.book.flushed(area, &mark, true);
        }
    }

    pub(super) fn send_and_flush(&mut self, area: &MortalArea, node: &mut Node, bytes: u64) {
        self.send(area, node, bytes, None);
        self.flush(area, node, false);
    }

    pub(super) fn read_all(&self, area: &MortalArea, node: &Node) -> Result<Vec<u8>, Unreadable> {
        self.read(area, node, 0..SIZE)
    }

    pub(super) fn read(&self, area: &MortalArea, node: &Node, range: Range<u64>) -> Result<Vec<u8>, Unreadable> {
        let mut found = vec![0; index(range.end - range.start)];
        let gaps = match self.book.read(area, range.start, &mut found)? {
            Gaps::All => std::iter::once(range.clone()).collect(),
            Gaps::Some(gaps) => gaps,
        };
        for gap in gaps {
            let (from, to) = (index(gap.start - range.start), index(gap.end - range.start));
            found[from..to].copy_from_slice(node.cached.read(index(gap.start), to - from).unwrap());
        }
        Ok(found)
    }

    /// Reads what is not lost. Lost ranges have the bytes of `filler`.
    pub(super) fn read_whole(&self, area: &MortalArea, node: &Node, filler: &[u8]) -> Vec<u8> {
        let mut all = filler.to_vec();
        let mut at = 0;
        let end = SIZE..SIZE;
        for lost in self.book.lost().ranges().iter().chain([&end]) {
            all[index(at)..index(lost.start)].copy_from_slice(&self.read(area, node, at..lost.start).unwrap());
            at = lost.end;
        }
        all
    }
}
