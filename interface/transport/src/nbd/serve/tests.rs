//! Real sockets, real memory, a real gate; two cores as two threads, and a disk that is a file.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    sync::{
        Arc,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    thread::{self, JoinHandle},
};

use everdisk_gate::{hold::Hold, ticket};
use everdisk_proto::{
    frame::LentConnection,
    gate_word::{GateWord, Mode},
    ids::{Generation, Slot},
};
use everdisk_sys::{
    cache::Resident,
    connection::ConnectionMemory,
    file::FileRange,
    memory::SharedSegment,
    signal,
    wake::{self, Who},
};
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::nbd::{
    death::{Death, await_death},
    protocol::{REQUEST_MAGIC, cmd},
};

mod death;
mod team;

const SIZE: u64 = 4 << 20;
const SOON: Duration = Duration::from_secs(20);

/// A volume that is one file.
struct FileDisk(File, Option<Resident>, Fence);

/// A write waits for the end of all writes that were let in before it. One of the previous core may still be under way
/// when the next core serves, and would land on top of what that has written. In a core the engine has this fence.
#[derive(Default)]
struct Fence(Mutex<(u64, BTreeSet<u64>)>);

impl Fence {
    /// To be called while no worker can be let in; [`Fence::pass`] afterwards.
    fn enter(&self) -> u64 {
        let mut writes = self.0.lock();
        writes.0 += 1;
        let number = writes.0;
        writes.1.insert(number);
        number
    }

    fn pass(&self, number: u64, write: impl FnOnce()) {
        until("earlier writes have ended", || self.0.lock().1.first() == Some(&number));
        write();
        self.0.lock().1.remove(&number);
    }
}

impl FileDisk {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        let pattern: Vec<u8> = (0..1 << 20).map(|i: u32| u8::try_from(i * 7 % 251).unwrap()).collect();
        file.write_all_at(&pattern, 0).unwrap();
        let resident = Resident::new(file.try_clone().unwrap()).ok();
        Self(file, resident, Fence::default())
    }
}

impl Disk for FileDisk {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read(&self, hold: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Stopped> {
        hold.away();
        self.0.read_exact_at(buf, offset).unwrap();
        if hold.back() { Ok(()) } else { Err(Stopped::Abandoned) }
    }
    fn in_memory(&self, offset: u64, len: u64) -> Option<FileRange<'_>> {
        // Half of the data that could be sent from memory is read instead, so that both paths are taken.
        let resident = self.1.as_ref().filter(|file| (offset / 4096).is_multiple_of(2) && file.has(offset, len))?;
        Some(FileRange { file: resident.as_fd(), offset, len })
    }
    fn write(&self, hold: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Stopped> {
        let number = self.2.enter();
        hold.writing();
        self.2.pass(number, || self.0.write_all_at(data, offset).unwrap());
        if hold.back() { Ok(()) } else { Err(Stopped::Abandoned) }
    }
    fn flush(&self, _: &dyn Hold) -> Result<(), Stopped> {
        Ok(())
    }
    fn discard(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.write(hold, offset, &vec![0; usize::try_from(len).unwrap()])
    }
    fn write_zeroes(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.discard(hold, offset, len)
    }
    fn allocate(&self, _: &dyn Hold, _: u64, _: u64) -> Result<(), Stopped> {
        Ok(())
    }
    fn seek(&self, _: &dyn Hold, offset: u64, hole: bool) -> Result<u64, Stopped> {
        Ok(if hole { (offset / 65536 + 1) * 65536 } else { offset.next_multiple_of(65536) }.min(SIZE))
    }
    fn adopt(&self, _: u64) {}
    fn probe(&self) -> Result<u32, Errno> {
        Ok(0)
    }
    fn version(&self) -> &'static str {
        "test"
    }
}

/// A connection, and two cores that can serve it.
struct Stage {
    segment: Arc<SharedSegment>,
    memory: ConnectionMemory,
    client: UnixStream,
    cores: Vec<(Arc<AtomicBool>, Option<JoinHandle<Ended>>)>,
    generation: u64,
}

impl Stage {
    fn new(disk: &Arc<FileDisk>) -> Self {
        Self::with(disk, None)
    }

    /// How the core that serves first dies, if it is to.
    fn with(disk: &Arc<FileDisk>, mut death: Option<Death>) -> Self {
        signal::install_evict().unwrap();
        let segment = Arc::new(SharedSegment::create(0).unwrap());
        let memory = ConnectionMemory::create().unwrap();
        let (client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        client.set_nonblocking(true).unwrap();
        // As small as the kernel allows: replies are cut everywhere.
        rustix::net::sockopt::set_socket_send_buffer_size(&server, 1).unwrap();
        let mut stage = Self { segment, memory, client, cores: Vec::new(), generation: 0 };
        for index in 0..2 {
            let stop = Arc::new(AtomicBool::new(false));
            let (segment, disk) = (Arc::clone(&stage.segment), Arc::clone(disk));
            let memory = ConnectionMemory::adopt(stage.memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
            let socket = server.try_clone().unwrap().into();
            let stopped = Arc::clone(&stop);
            let death = if index == 1 { death.take() } else { None };
            let thread = thread::spawn(move || {
                if let Some(death) = death {
                    await_death(death);
                }
                let connection = Connection::new(LentConnection { number: 1, listener: 0 }, socket, memory, 0).unwrap();
                let access = GateAccess::take(&segment, Slot::new(index).unwrap(), 0, &stopped);
                serve(&access, &connection, "v", &*disk, &mut Buffers::default())
            });
            stage.cores.push((stop, Some(thread)));
        }
        stage.hand_over();
        stage
    }

    fn slot(&self) -> usize {
        usize::try_from(self.generation % 2).unwrap()
    }

    fn rouse(&self, slot: usize) {
        let area = &self.segment.cores[slot];
        area.wake.fetch_add(1, Release);
        wake::wake(&area.wake, Who::All);
    }

    /// What the interface does: closes the gate, waits until the worker is in, and opens it for the other core.
    fn hand_over(&mut self) {
        let word = |mode, slot, generation| GateWord {
            mode,
            slot: Slot::new(slot).unwrap(),
            generation: Generation(generation),
        };
        let old = self.slot();
        ticket::set(&self.segment.gate.word, word(Mode::Closed, old, self.generation));
        let worker = &self.segment.cores[old].tickets[0];
        until("the worker is in", || {
            if ticket::may_be_reading(&worker.state) {
                signal::evict(std::process::id(), worker.tid.load(Relaxed));
                thread::sleep(Duration::from_micros(20));
            }
            ticket::is_in(&worker.state)
        });
        self.generation += 1;
        let new = self.slot();
        ticket::set(&self.segment.gate.word, word(Mode::Open, new, self.generation));
        self.rouse(new);
    }

    /// Sends. Where the server takes no more before it can send some replies, reads those.
    fn send(&mut self, bytes: &[u8], got: &mut Vec<u8>) {
        let mut left = bytes;
        until("the server takes what is sent", || {
            while let Ok(n) = self.client.write(left) {
                left = &left[n..];
                if left.is_empty() {
                    return true;
                }
            }
            self.read(got, 10_000);
            false
        });
    }

    /// Reads what there is, at most `max` bytes.
    fn read(&mut self, into: &mut Vec<u8>, max: usize) -> bool {
        let mut chunk = vec![0; max];
        match self.client.read(&mut chunk) {
            Ok(0) => false,
            Ok(n) => {
                into.extend_from_slice(&chunk[..n]);
                true
            }
            Err(_) => {
                thread::yield_now();
                true
            }
        }
    }

    /// Reads to the end.
    fn finish(mut self, mut got: Vec<u8>) -> Vec<u8> {
        let begin = Instant::now();
        while self.read(&mut got, 1 << 16) {
            assert!(begin.elapsed() < SOON, "no end of the stream after {} bytes", got.len());
        }
        got
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.client.shutdown(std::net::Shutdown::Both);
        for index in 0..self.cores.len() {
            self.cores[index].0.store(true, Release);
            self.rouse(index);
            let worker = &self.segment.cores[index].tickets[0];
            signal::evict(std::process::id(), worker.tid.load(Acquire));
            // A core that died was buried before.
            let Some(core) = self.cores[index].1.take() else { continue };
            let ended = core.join();
            assert!(ended.is_ok() || thread::panicking());
        }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < SOON, "{what}: not within {SOON:?}");
        thread::yield_now();
    }
}

fn option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.extend_from_slice(b"IHAVEOPT");
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    out.extend_from_slice(data);
}

fn request(out: &mut Vec<u8>, command: u16, flags: u16, offset: u64, len: u32, data: &[u8]) {
    let cookie = out.len() as u64;
    out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
}

fn write(out: &mut Vec<u8>, flags: u16, offset: u64, len: u32) {
    let data: Vec<u8> = (0..len).map(|i| u8::try_from((i + 3) % 253).unwrap()).collect();
    request(out, cmd::WRITE, flags, offset, len, &data);
}

fn handshake(structured: bool) -> Vec<u8> {
    let mut out = 3_u32.to_be_bytes().to_vec();
    option(&mut out, 0xdead, b"nobody knows this one");
    if structured {
        option(&mut out, 8, b"");
        let context = b"base:allocation";
        let query = [&[0, 0, 0, 1, b'v', 0, 0, 0, 1, 0, 0, 0, 15][..], context].concat();
        option(&mut out, 10, &query);
    }
    option(&mut out, 7, &[0, 0, 0, 1, b'v', 0, 1, 0, 3]);
    out
}

/// Every command, every kind of reply, and errors, without waiting for a reply.
fn conversation(structured: bool) -> Vec<u8> {
    let mut out = handshake(structured);
    write(&mut out, 0, 1_000_000, 300);
    request(&mut out, cmd::READ, 0, 999_900, 700, b"");
    write(&mut out, 1, 1_000_010, 5);
    request(&mut out, cmd::FLUSH, 0, 0, 0, b"");
    request(&mut out, 77, 0, 0, 10, b"");
    write(&mut out, 0, SIZE - 10, 20);
    request(&mut out, cmd::READ, 0, 5, 100_000, b"");
    request(&mut out, cmd::READ, 0, SIZE, 1, b"");
    request(&mut out, cmd::TRIM, 0, 1_000_020, 100, b"");
    request(&mut out, cmd::WRITE_ZEROES, 2, 1_000_150, 50, b"");
    request(&mut out, cmd::BLOCK_STATUS, 0, 4096, 500_000, b"");
    request(&mut out, cmd::CACHE, 0, 0, 8192, b"");
    request(&mut out, cmd::READ, 0, 0, 0, b"");
    request(&mut out, cmd::READ, 0, 8192, 70_000, b"");
    request(&mut out, cmd::READ, 0, 999_900, 700, b"");
    request(&mut out, cmd::DISC, 0, 0, 0, b"");
    out
}

/// The replies without an interruption.
fn expected(bytes: &[u8]) -> Vec<u8> {
    let mut stage = Stage::new(&Arc::new(FileDisk::new()));
    let mut got = Vec::new();
    stage.send(bytes, &mut got);
    let got = stage.finish(got);
    assert!(got.starts_with(b"NBDMAGIC"));
    got
}

/// M5, M6, beyond 7: a hand-over after any byte of a pipelined conversation changes no byte of the replies.
#[test]
fn m5_m6_beyond7_a_hand_over_at_every_byte_of_the_requests_changes_no_byte_of_the_replies() {
    for structured in [false, true] {
        let bytes = conversation(structured);
        let expected = expected(&bytes);
        assert!(expected.len() > 170_000, "{}", expected.len());
        for at in 0..bytes.len() {
            let mut stage = Stage::new(&Arc::new(FileDisk::new()));
            let mut got = Vec::new();
            stage.send(&bytes[..at], &mut got);
            until("the server has it", || {
                stage.read(&mut got, 1 << 16);
                stage.memory.received() == at as u64
            });
            stage.hand_over();
            stage.send(&bytes[at..], &mut got);
            let got = stage.finish(got);
            assert!(got == expected, "after byte {at}: {} bytes instead of {}", got.len(), expected.len());
        }
    }
}

/// … nor does one after every byte of the same conversation.
#[test]
fn m5_beyond7_a_hand_over_after_each_byte_of_one_conversation_changes_no_byte_of_the_replies() {
    let bytes = conversation(true);
    let expected = expected(&bytes);
    let mut stage = Stage::new(&Arc::new(FileDisk::new()));
    let mut got = Vec::new();
    for byte in &bytes {
        stage.send(&[*byte], &mut got);
        stage.read(&mut got, 1 << 16);
        stage.hand_over();
        until("the next core serves", || {
            let page = &stage.memory;
            page.generation.load(Relaxed) == stage.generation || page.has_ended()
        });
    }
    assert!(stage.memory.carried.load(Relaxed) > bytes.len() as u64 - 10);
    assert!(stage.finish(got) == expected);
}

/// … nor does one when a client has read any part of the replies.
#[test]
fn m5_beyond7_a_hand_over_at_many_bytes_of_the_replies_changes_none_of_them() {
    let bytes = conversation(true);
    let expected = expected(&bytes);
    for stride in [1, 37, 1009, 4099] {
        let mut stage = Stage::new(&Arc::new(FileDisk::new()));
        let mut got = Vec::new();
        stage.send(&bytes, &mut got);
        // At a stride of one byte the heads are what matters.
        while got.len() < if stride == 1 { 2000 } else { expected.len() } {
            if !stage.read(&mut got, stride) {
                break;
            }
            stage.hand_over();
        }
        assert!(stage.finish(got) == expected, "stride {stride}");
    }
}

/// Requests longer than what is carried out at once.
#[test]
fn beyond7_long_writes_and_reads_go_on_in_the_next_core() {
    for structured in [false, true] {
        let mut bytes = handshake(structured);
        write(&mut bytes, 1, 1000, (3 << 20) - 17);
        request(&mut bytes, cmd::READ, 0, 3, (3 << 20) + 5, b"");
        // It is refused, and its data has to be discarded.
        write(&mut bytes, 0, SIZE - 4096, 1 << 20);
        request(&mut bytes, cmd::READ, 0, 1000, 64, b"");
        request(&mut bytes, cmd::DISC, 0, 0, 0, b"");
        let expected = expected(&bytes);
        assert!(expected.len() > 3 << 20);
        let mut stage = Stage::new(&Arc::new(FileDisk::new()));
        let mut got = Vec::new();
        for (turn, piece) in bytes.chunks(70_001).enumerate() {
            stage.send(piece, &mut got);
            stage.read(&mut got, 50_000);
            if turn % 3 == 0 {
                stage.hand_over();
            }
        }
        while got.len() < expected.len() && stage.read(&mut got, 90_001) {
            stage.hand_over();
        }
        assert!(stage.finish(got) == expected);
    }
}

#[test]
fn who_sends_something_else_than_a_request_is_cut_off() {
    for nonsense in [&b"GET / HTTP/1.1\r\nHost: v\r\n\r\n............................."[..], &[0xff; 64]] {
        let mut stage = Stage::new(&Arc::new(FileDisk::new()));
        let mut got = Vec::new();
        stage.send(nonsense, &mut got);
        let got = stage.finish(got);
        assert!(got.len() <= 18, "{got:?}");
        let mut stage = Stage::new(&Arc::new(FileDisk::new()));
        let mut got = Vec::new();
        stage.send(&[&handshake(true)[..], nonsense].concat(), &mut got);
        assert!(stage.finish(got).len() > 18);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Any order of sending, reading and hand-overs.
    #[test]
    fn beyond7_any_schedule_of_sends_reads_and_hand_overs_gives_the_same_bytes(
        steps in proptest::collection::vec((0_u8..3, 1_usize..3000), 1..200),
        structured: bool,
    ) {
        let bytes = conversation(structured);
        let expected = expected(&bytes);
        let mut stage = Stage::new(&Arc::new(FileDisk::new()));
        let (mut got, mut sent) = (Vec::new(), 0);
        for (kind, amount) in steps {
            match kind {
                0 => {
                    let end = (sent + amount).min(bytes.len());
                    stage.send(&bytes[sent..end], &mut got);
                    sent = end;
                }
                1 => {
                    stage.read(&mut got, amount);
                }
                _ => stage.hand_over(),
            }
        }
        stage.send(&bytes[sent..], &mut got);
        prop_assert!(stage.finish(got) == expected);
    }
}
