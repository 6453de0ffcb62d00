//! Requests are arbitrary: no panic, what passes the check lies within the export and its limits, and the words in shared
//! memory are the request or nothing.
//!
//! `cargo fuzz run nbd_request --sanitizer none` (cargo-fuzz from crates.io; with a nightly toolchain any sanitizer).
#![no_main]

use everdisk_transport::nbd::{
    protocol::{CHUNK_MAX, PAYLOAD_MAX, REQUEST_MAGIC, cmd_flag},
    request::{Command, Request},
    state::{Phase, State},
};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 1 << 30;

fuzz_target!(|input: ([u8; 28], [u64; 4], bool, bool, bool)| {
    let (mut header, words, magic, structured, base_allocation) = input;
    if let Some(request) = Request::from_words(words) {
        assert_eq!(request.to_words(), words);
    }
    if magic {
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    }
    let Some(request) = Request::decode(&header) else {
        assert!(!magic, "a head with the magic is a request");
        return;
    };
    assert_eq!(Request::from_words(request.to_words()), Some(request));
    let payload = if request.command == Command::Write { request.len } else { 0 };
    assert_eq!(request.payload(), u64::from(payload));
    let state = State { structured, base_allocation, ..State::START.with(Phase::Transmission) };
    if request.check(state, SIZE).is_err() {
        return;
    }
    match request.command {
        Command::Disconnect | Command::Flush => return,
        Command::Unknown(_) => panic!("an unknown command passes"),
        Command::Read | Command::Write => assert!(request.len <= PAYLOAD_MAX),
        Command::BlockStatus => assert!(base_allocation && request.len > 0),
        Command::Trim | Command::Cache | Command::WriteZeroes => {}
    }
    assert!(request.offset.checked_add(request.len.into()).is_some_and(|end| end <= SIZE));
    if request.has(cmd_flag::DF) {
        assert!(request.command == Command::Read && structured && request.len <= CHUNK_MAX);
    }
});
