//! What an export holds: its extents, its first byte that is not zero, and how it comes to read as zeros.

use std::{collections::VecDeque, ops::Range, sync::mpsc};

use everdisk_proto::nbd::wire::transmission_flag as flag;
use everdisk_store_nbd::{Client, Command, Completion, Done, Error, Extent, Kind, Outcome};

/// Bytes of one read of a range that is read through, and the number of them that are under way.
const PIECE: u64 = 1 << 20;
const PIECES_AT_ONCE: usize = 8;
/// Where the server zeroes nothing, data is checked for zeros in pieces of this size.
const CLEARED_PIECE: u64 = 256 << 10;
/// A server that loses its data this often in a row is not waited for.
const LOSSES_MAX: u32 = 3;

/// Executes a command that returns no extents.
pub(super) fn plain(client: &Client, command: Command) -> Result<(), Error> {
    client.call(command).result.map(drop)
}

/// Reads `len` bytes.
pub(super) fn read(client: &Client, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
    let memory = vec![0; usize::try_from(len).expect("a length in memory")];
    let Outcome { memory, result } = client.call(Command::Read { offset, memory });
    result.map(|_| memory)
}

/// Whether the server offers this.
pub(super) fn offers(client: &Client, flag: u16) -> bool {
    client.offer().flags & flag != 0
}

/// The extents of a range, one after the other: a range, and whether it reads as zeros. A server that offers no block status
/// has one extent, of data.
pub(super) struct Extents<'a> {
    client: &'a Client,
    left: Range<u64>,
    known: VecDeque<Extent>,
}

impl<'a> Extents<'a> {
    pub(super) fn new(client: &'a Client, range: Range<u64>) -> Self {
        Self { client, left: range, known: VecDeque::new() }
    }

    fn ask(&mut self) -> Result<(), Error> {
        let Range { start, end } = self.left;
        match self.client.call(Command::BlockStatus { offset: start, len: end - start }).result {
            Ok(Done::Extents(extents)) => self.known = extents.into(),
            Ok(Done::Plain) => unreachable!("a block status returns extents"),
            Err(error) if error.kind() == Kind::Unsupported => {
                self.known = [Extent { len: end - start, hole: false, zero: false }].into();
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<(Range<u64>, bool), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left.is_empty() {
            return None;
        }
        if self.known.is_empty()
            && let Err(error) = self.ask()
        {
            self.left.start = self.left.end;
            return Some(Err(error));
        }
        let extent = self.known.pop_front().expect("a block status covers one byte at least");
        let range = self.left.start..self.left.start + extent.len;
        self.left.start = range.end;
        Some(Ok((range, extent.zero)))
    }
}

/// The first byte of the range that is not zero: its offset, and its value. What is not known to read as zeros is read.
pub(super) fn first_used(client: &Client, range: Range<u64>) -> Result<Option<(u64, u8)>, Error> {
    for extent in Extents::new(client, range) {
        let (range, zero) = extent?;
        if !zero && let Some(found) = first_nonzero(client, range)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The same by reading alone.
fn first_nonzero(client: &Client, range: Range<u64>) -> Result<Option<(u64, u8)>, Error> {
    let (ended, outcomes) = mpsc::channel();
    let begin = |offset: u64, mut memory: Vec<u8>| {
        memory.resize(usize::try_from(PIECE.min(range.end - offset)).expect("a piece is small"), 0);
        let ended = ended.clone();
        // The receiver waits for all of them, unless one has failed.
        let then = move |outcome: Outcome| drop(ended.send((offset, outcome)));
        client.begin(Command::Read { offset, memory }, Completion::new(then));
    };
    let step = usize::try_from(PIECE).expect("a piece is small");
    let mut offsets = range.clone().step_by(step);
    let mut under_way = 0;
    for offset in offsets.by_ref().take(PIECES_AT_ONCE) {
        begin(offset, Vec::new());
        under_way += 1;
    }
    let mut first: Option<(u64, u8)> = None;
    while under_way > 0 {
        let (offset, Outcome { memory, result }) = outcomes.recv().expect("this function has a sender");
        under_way -= 1;
        result?;
        let found = memory.iter().zip(offset..).find(|(byte, _)| **byte != 0).map(|(byte, at)| (at, *byte));
        first = first.into_iter().chain(found).min();
        // They are begun in order, so the first one is in those that were.
        if first.is_none()
            && let Some(next) = offsets.next()
        {
            begin(next, memory);
            under_way += 1;
        }
    }
    Ok(first)
}

/// Makes the range read as zeros, and gives its space back where the server does that. What reads as zeros already is left alone.
pub(super) fn zero(client: &Client, range: Range<u64>) -> Result<(), Error> {
    for extent in Extents::new(client, range) {
        match extent? {
            (_, true) => {}
            (range, false) if offers(client, flag::SEND_WRITE_ZEROES) => {
                let (offset, len) = (range.start, range.end - range.start);
                plain(client, Command::Zeroes { offset, len, may_punch: true, fast: false })?;
            }
            (range, false) => clear(client, range)?,
        }
    }
    Ok(())
}

/// Writes zeros over what is not zero.
pub(super) fn clear(client: &Client, range: Range<u64>) -> Result<(), Error> {
    let mut at = range.start;
    while at < range.end {
        let len = CLEARED_PIECE.min(range.end - at);
        let mut bytes = read(client, at, len)?;
        if bytes.iter().any(|byte| *byte != 0) {
            bytes.fill(0);
            plain(client, Command::Write { offset: at, memory: bytes, fua: false })?;
        }
        at += len;
    }
    Ok(())
}

/// Does what `change` does until a flush after it has succeeded.
pub(super) fn durably(client: &Client, change: impl Fn() -> Result<(), Error>) -> Result<(), Error> {
    let mut losses = 0;
    loop {
        change()?;
        match plain(client, Command::Flush) {
            Err(error) if error.kind() == Kind::Unflushed && losses < LOSSES_MAX => losses += 1,
            done => return done,
        }
    }
}
