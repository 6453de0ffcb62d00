//! The memory of one NBD connection (a memfd). It holds everything that a core needs to continue a connection which
//! another core has served, wherever in the streams that core stopped or died.
//!
//! ```text
//! 0      page     cursors, the record twice, the table of requests that are put aside
//! 4 KiB  input    a ring: received and not processed yet
//! … 2 MiB output  a ring: replies not sent yet
//! ```
//! No step on it is ever half done:
//!
//! * **How far the socket was read and written** is recorded by the kernel itself, inside the system call: `recvmmsg`
//!   and `sendmmsg` store the number of bytes into the `msg_len` of their argument before they return (net/socket.c,
//!   `do_recvmmsg`, `__sys_sendmmsg`), `sendfile` stores the new offset (fs/read_write.c), and both lie in this memory.
//!   A thread that is killed during the call leaves the number behind. See [`Cursor`].
//! * **What the core made of it** is the *record*. There are two copies, and one store says which of them is valid
//!   ([`Page::turn`]). A step (read a request, carry it out, put its reply into the output) is one new record. A core
//!   that finds the old one does the step again.
//!
//! Positions count the bytes of a stream from its beginning. The input's byte at position p lies at
//! ([`Record::input_base`] and p's distance from it) modulo the ring, the output's byte at p modulo the ring.
//!
//! Version 2, since ABI 4: [`Record::errors_told`]. Version 1 (ABI 3) was never released.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed},
};

use zerocopy::{FromBytes, KnownLayout};

/// `"EVDNBD\0\0"` little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"EVDNBD\0\0");
/// Version of the layout.
pub const VERSION: u32 = 2;
/// Bytes of the page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of the input ring: twice the largest piece that is carried out at once, so that one piece is received while
/// another is written.
pub const INPUT_BYTES: usize = 2 << 20;
/// Bytes of the output ring. Replies larger than a quarter of it do not go through it.
pub const OUTPUT_BYTES: usize = 256 << 10;
/// Bytes of the whole memory.
pub const BYTES: usize = PAGE_BYTES + INPUT_BYTES + OUTPUT_BYTES;
/// Requests that can be put aside.
pub const ASIDE_MAX: usize = 32;

/// The page.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C, align(64))]
pub struct Page {
    /// [`MAGIC`], stored last.
    pub magic: AtomicU64,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// [`ended`]; anything but 0: the connection has ended, its socket is shut down, and what was lent may be closed.
    pub ended: AtomicU32,
    /// Times the connection went on under another generation.
    pub carried: AtomicU64,
    /// The generation that served it last.
    pub generation: AtomicU64,
    _pad0: [AtomicU64; 4],
    /// How far the socket was read.
    pub received: Cursor,
    /// How far it was written.
    pub sent: Cursor,
    /// Number of records written; `records[turn % 2]` is valid.
    pub turn: AtomicU64,
    _pad1: [AtomicU64; 7],
    /// The two copies of the record.
    pub records: [[AtomicU64; Record::WORDS]; 2],
    /// Requests that were put aside because they take long. Those whose bit is set in [`Record::aside`] are valid.
    pub aside: [[AtomicU64; 8]; ASIDE_MAX],
    _pad2: [AtomicU64; 160],
}

/// Values of [`Page::ended`].
pub mod ended {
    /// It ended normally.
    pub const IN_ORDER: u32 = 1;
    /// It was given up, because this memory was invalid.
    pub const BROKEN: u32 = 2;
}

impl Page {
    /// Whether the connection has ended, here or in another core.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Acquire) != 0
    }

    /// The index of the record that `turn` makes valid.
    pub const fn place_of(&self, turn: u64) -> &[AtomicU64; Record::WORDS] {
        let [even, odd] = &self.records;
        if turn % 2 == 1 { odd } else { even }
    }

    /// [`Record::parsed`] of the valid record, unchecked: for a process that reads it while a core serves the
    /// connection.
    pub fn parsed(&self) -> u64 {
        self.place_of(self.turn.load(Acquire))[Record::PARSED].load(Relaxed)
    }
}

/// The position of a stream: the sum of `base` and the bytes moved by the current call. A new call is prepared beside
/// it, with a `msg_len` of 0, and then made the current one by one store.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C, align(64))]
pub struct Cursor {
    /// Which of the two calls is the current one: 0 or 1.
    pub current: AtomicU32,
    _pad: AtomicU32,
    /// Position at which each call began.
    pub base: [AtomicU64; 2],
    _pad1: [AtomicU64; 5],
    /// `struct mmsghdr` of each call, in the layout of 64-bit kernels. Its pointers are valid for the calling thread
    /// during the call only. The low half of the last word is `msg_len`. A sendfile is no message and uses the first
    /// two words: the offset at which it began, and the one that the kernel writes. For a message the two are equal.
    pub calls: [[AtomicU64; 8]; 2],
}

/// Word of a `struct mmsghdr` whose low half is `msg_len`.
pub const CALL_LEN: usize = 7;

/// The state of a connection after the steps so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The outcome of the negotiation (a word of the front end's own; 0 before the first step).
    pub negotiated: u64,
    /// Input before this position has been processed, or put aside.
    pub parsed: u64,
    /// Output before this position is final.
    pub committed: u64,
    /// Bit i: the request `aside[i]` is not answered yet.
    pub aside: u32,
    /// A position of the input whose byte lies at the beginning of the ring.
    pub input_base: u64,
    /// This many bytes of input from `parsed` on are to be discarded.
    pub skip: u64,
    /// A write that is carried out in pieces while its data arrives.
    pub long: Option<Long>,
    /// A reply whose data goes to the socket without passing through the output ring.
    pub direct: Option<Direct>,
    /// The value of [`crate::segment::GateArea::flush_errors`] that was reported to the client. Since version 2.
    pub errors_told: u64,
}

/// A write that is carried out in pieces. Its data begins at [`Record::parsed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Long {
    /// The request, in the front end's four words.
    pub request: [u64; 4],
    /// Bytes that are done.
    pub done: u32,
    /// The protocol's error of the first piece that failed; 0 when none did. After it the rest is discarded.
    pub error: u32,
}

/// The data of a reply that goes out next, from the position [`Record::committed`] on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// Index in the table of the request that is answered.
    pub index: u8,
    /// Bytes of the request that were answered before.
    pub done: u32,
    /// Bytes that go out.
    pub len: u32,
}

impl Record {
    /// Words of a record.
    pub const WORDS: usize = 16;
    /// The word that is [`Record::parsed`].
    const PARSED: usize = 1;

    /// The words.
    pub fn encode(&self) -> [u64; Self::WORDS] {
        let long = self.long.unwrap_or(Long { request: [0; 4], done: 0, error: 0 });
        let [a, b, c, d] = long.request;
        let (direct, amount) = self.direct.map_or((0, 0), |d| (u64::from(d.index) + 1, pair(d.done, d.len)));
        [
            self.negotiated,
            self.parsed,
            self.committed,
            pair(self.aside, u32::from(self.long.is_some())),
            self.input_base,
            self.skip,
            a,
            b,
            c,
            d,
            pair(long.done, long.error),
            direct,
            amount,
            self.errors_told,
            0,
            0,
        ]
    }

    /// Reads the words; `None` when they are not a valid record.
    pub fn decode(words: &[u64; Self::WORDS]) -> Option<Self> {
        let [
            negotiated,
            parsed,
            committed,
            flags,
            input_base,
            skip,
            a,
            b,
            c,
            d,
            progress,
            direct,
            amount,
            errors_told,
            ..,
        ] = *words;
        let (aside, is_long) = halves(flags);
        let (done, error) = halves(progress);
        let direct = match direct {
            0 => None,
            n => {
                let index = u8::try_from(n - 1).ok().filter(|i| usize::from(*i) < ASIDE_MAX && aside >> i & 1 == 1)?;
                let (done, len) = halves(amount);
                Some(Direct { index, done, len })
            }
        };
        let long = match is_long {
            0 => None,
            1 => Some(Long { request: [a, b, c, d], done, error }),
            _ => return None,
        };
        (input_base <= parsed).then_some(Self {
            negotiated,
            parsed,
            committed,
            aside,
            input_base,
            skip,
            long,
            direct,
            errors_told,
        })
    }
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// The low and the high half.
fn halves(word: u64) -> (u32, u32) {
    let half = |bits: u64| u32::try_from(bits & 0xffff_ffff).expect("32 bits");
    (half(word), half(word >> 32))
}

const _: () = {
    assert!(size_of::<Page>() == PAGE_BYTES);
    assert!(size_of::<Cursor>() == 192);
    assert!(core::mem::offset_of!(Page, received) == 64);
    assert!(core::mem::offset_of!(Page, sent) == 256);
    assert!(core::mem::offset_of!(Page, turn) == 448);
    assert!(core::mem::offset_of!(Page, records) == 512);
    assert!(core::mem::offset_of!(Page, aside) == 768);
};

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    use super::*;

    fn sample() -> Record {
        Record {
            negotiated: 0x0105,
            parsed: 4096,
            committed: 77,
            aside: 0b101,
            input_base: 128,
            skip: 9,
            long: Some(Long { request: [1, 2, 3, 4], done: 5, error: 28 }),
            direct: Some(Direct { index: 2, done: 6, len: 7 }),
            errors_told: 8,
        }
    }

    fn is_golden(golden: &str, record: Record) {
        let text: String = record.encode().iter().map(|word| format!("{word:016x}\n")).collect();
        assert_eq!(text, golden);
        let words: Vec<u64> = golden.lines().map(|l| u64::from_str_radix(l, 16).unwrap()).collect();
        assert_eq!(Record::decode(&words.try_into().unwrap()), Some(record));
    }

    /// A record of version 1 is one of version 2 whose client was told of no failure.
    pub(crate) fn golden_record_of_version_1(golden: &str) {
        is_golden(golden, Record { errors_told: 0, ..sample() });
    }

    pub(crate) fn golden_record_of_version_2(golden: &str) {
        is_golden(golden, sample());
    }

    #[test]
    fn the_valid_record_is_found_on_the_page() {
        let page = Page::new_zeroed();
        for (turn, parsed) in [(0, 11), (1, 22), (2, 33), (u64::MAX, 44)] {
            let record = Record { parsed, ..sample() };
            page.place_of(turn).iter().zip(record.encode()).for_each(|(place, word)| place.store(word, Relaxed));
            page.turn.store(turn, Relaxed);
            assert_eq!((page.parsed(), page.has_ended()), (parsed, false));
        }
        page.ended.store(ended::BROKEN, Relaxed);
        assert!(page.has_ended());
    }

    #[test]
    fn a_zeroed_page_is_a_connection_at_its_beginning() {
        assert_eq!(Record::decode(&[0; Record::WORDS]), Some(Record::default()));
    }

    proptest! {
        #[test]
        fn any_words_are_a_record_or_none(words in any::<[u64; Record::WORDS]>()) {
            if let Some(record) = Record::decode(&words) {
                prop_assert_eq!(Record::decode(&record.encode()), Some(record));
            }
        }
    }
}
