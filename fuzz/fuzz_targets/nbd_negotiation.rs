//! A client's handshake is arbitrary and arrives in arbitrary pieces: no panic, bounded memory, and the pieces make no
//! difference.
//!
//! `cargo fuzz run nbd_negotiation --sanitizer none` (cargo-fuzz from crates.io; with a nightly toolchain any sanitizer).
#![no_main]

use everdisk_transport::nbd::{
    negotiation::{OPTION_BYTES_MAX, Step, output_max, step},
    state::{Export, Phase, State},
};
use libfuzzer_sys::fuzz_target;

const EXPORT: Export<'static> = Export { name: "vol", size: 1 << 30 };
const OPTION_HEAD: usize = 16;

struct Connection {
    state: State,
    received: Vec<u8>,
    skip: u64,
    sent: Vec<u8>,
}

impl Connection {
    fn new() -> Self {
        Self { state: State::START, received: Vec::new(), skip: 0, sent: Vec::new() }
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
        loop {
            let skipped = self.received.len().min(usize::try_from(self.skip).unwrap_or(usize::MAX));
            self.received.drain(..skipped);
            self.skip -= skipped as u64;
            if self.skip > 0 {
                return;
            }
            let before = self.sent.len();
            match step(self.state, &EXPORT, &self.received, &mut self.sent) {
                Step::Need(bytes) => {
                    assert!(bytes > self.received.len(), "what is needed is there");
                    assert!(bytes <= OPTION_HEAD + OPTION_BYTES_MAX as usize, "too much is to be kept");
                    assert_eq!(before, self.sent.len(), "half a reply");
                    return;
                }
                Step::Done { consumed, skip, next } => {
                    assert!(self.sent.len() - before <= output_max(&EXPORT), "too much is said");
                    assert_eq!(State::from_word(next.to_word()), Some(next));
                    self.received.drain(..consumed);
                    (self.skip, self.state) = (skip, next);
                    if matches!(next.phase, Phase::Transmission | Phase::Ended) {
                        return;
                    }
                }
            }
        }
    }
}

/// What the client sends: flags, then options whose magic and length are right, else hardly an input would get past them, and
/// bytes as they are. The last option may lack some of its data.
fn stream(input: &[u8]) -> Vec<u8> {
    let Some((flags, mut input)) = input.split_first() else { return Vec::new() };
    let mut stream = vec![0, 0, 0, flags % 5];
    while let Some(([kind, high, low], rest)) = input.split_first_chunk() {
        let len = u16::from_be_bytes([*high, *low]);
        let (data, rest) = rest.split_at(rest.len().min(len.into()));
        if *kind < 128 {
            stream.extend_from_slice(b"IHAVEOPT");
            stream.extend_from_slice(&u32::from(kind % 13).to_be_bytes());
            stream.extend_from_slice(&u32::from(len).to_be_bytes());
        }
        stream.extend_from_slice(data);
        input = rest;
    }
    stream
}

fuzz_target!(|input: &[u8]| {
    let Some((sizes, input)) = input.split_first_chunk::<4>() else { return };
    let stream = stream(input);
    let (mut cut, mut whole) = (Connection::new(), Connection::new());
    let (mut rest, mut sizes) = (&stream[..], sizes.iter().cycle());
    while let Some(size) = sizes.next().filter(|_| !rest.is_empty()) {
        let (piece, later) = rest.split_at(rest.len().min(usize::from(*size) + 1));
        cut.feed(piece);
        rest = later;
    }
    whole.feed(&stream);
    assert!(stream.is_empty() || (&cut.sent, cut.state, &cut.received) == (&whole.sent, whole.state, &whole.received));
});
