//! What another core left in the write buffer is arbitrary: no panic, and no byte is served that no checksum vouches for.
//!
//! `cargo fuzz run segment_scan --sanitizer none` (cargo-fuzz from crates.io; with a nightly toolchain any sanitizer).
#![no_main]

use everdisk_buffer::{
    area::Area,
    book::{Book, Gaps},
    log::{self, Slot},
    testing::MortalArea,
};
use everdisk_proto::buffer::{Extent, ExtentKind, Geometry, SlotState, word};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 4096;
const TINY: Geometry = Geometry { capacity: 1024, slots: 6 };

fn number(bytes: &mut &[u8], len: usize) -> u64 {
    let (now, rest) = bytes.split_at(len.min(bytes.len()));
    *bytes = rest;
    now.iter().fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let area = MortalArea::with(TINY);
    // Head, tail, lost ranges; then slots, some of them with a right check of wrong fields, some with right data.
    for index in [word::HEAD, word::TAIL, word::LOST, word::LOST_RANGES, word::LOST_RANGES + 1] {
        let len = usize::try_from(number(&mut input, 1) % 9).unwrap_or(0);
        area.words()[index] = number(&mut input, len);
    }
    let ring: Vec<u8> = (0..1024).map(|_| u8::try_from(number(&mut input, 1)).unwrap_or(0)).collect();
    area.data().copy_from_slice(&ring);
    while !input.is_empty() {
        let seq = number(&mut input, 1) % 16;
        let slot = TINY.slot_word(seq);
        let (offset, len, position) = (number(&mut input, 2), number(&mut input, 2), number(&mut input, 3));
        let place = usize::try_from(position % 1024).unwrap_or(0);
        let data = ring.get(place..).and_then(|rest| rest.get(..usize::try_from(len).unwrap_or(0)));
        let crc = if number(&mut input, 1) % 2 == 0 { data.map_or(0, crc32c::crc32c) } else { 0 };
        let kind = [ExtentKind::Data, ExtentKind::Discard, ExtentKind::Zeroes][usize::try_from(len % 3).unwrap_or(0)];
        let extent = Extent { kind, offset, len, position, generation: 1, crc };
        area.words()[slot] = if number(&mut input, 1) % 8 == 0 { seq } else { SlotState::Published(seq).encode() };
        area.words()[slot + 1..slot + 7].copy_from_slice(&extent.encode(seq));
    }
    let mut book = Book::new(TINY, SIZE);
    book.follow(&area, 100);
    book.adopt(&area);
    for at in 0..SIZE {
        let mut byte = [0xEE];
        if let Ok(Gaps::Some(gaps)) = book.read(&area, at, &mut byte)
            && gaps.is_empty()
        {
            // Some published extent with sound data covers it and holds this very byte.
            let vouched = (1..=log::head(&area)).rev().take(6).any(|seq| {
                let Slot::Extent(extent) = log::look(&area, seq) else { return false };
                let covers = extent.offset <= at && at < extent.end();
                covers && extent.kind != ExtentKind::Data && byte == [0] || covers && log::data_is_sound(&area, &extent) && {
                    let mut found = [0];
                    area.read((extent.position + at - extent.offset) % TINY.capacity, &mut found);
                    found == byte
                }
            });
            assert!(vouched, "byte {at} is served and nothing vouches for it");
        }
    }
    for _ in 0..8 {
        let batch = book.batch(500, book.head(), 256);
        book.sent(&batch, &[]);
        let mark = book.begin_flush(Some(&area));
        book.flushed(&area, &mark, true);
        if let Ok(place) = book.reserve(&area, ExtentKind::Data, 100) {
            let data = [7; 100];
            let (kind, position, crc) = (ExtentKind::Data, place.position, crc32c::crc32c(&data));
            let extent = Extent { kind, offset: 0, len: 100, position, generation: 2, crc };
            log::publish(&area, place.seq, &extent, &data);
            book.published(&area, place.seq, &extent);
            let mut found = [0; 100];
            assert_eq!(book.read(&area, 0, &mut found), Ok(Gaps::Some(Vec::new())));
            assert_eq!(found, data);
        }
    }
});
