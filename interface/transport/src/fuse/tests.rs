//! The codec without a kernel: a disk in memory, requests as bytes.

use std::{
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use everdisk_gate::{hold::Hold, ticket};
use everdisk_proto::{
    gate_word::{GateWord, Mode},
    ids::{Generation, Slot},
    segment::FrontArea,
};
use everdisk_sys::{
    memory::SharedSegment,
    wake::{self, Who},
};
use parking_lot::Mutex;
use proptest::prelude::*;
use rustix::io::Errno as Os;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{
    abi::{
        FallocateIn, GetxattrIn, InHeader, InitIn, InitOut, LseekIn, OutHeader, ReadIn, SetattrIn, WriteIn, WriteOut,
        init_flag, opcode, setattr_valid,
    },
    handshake::{self, BadInit},
    operation::{Operations, REPLY_HEAD},
    serve::{Buffers, serve},
};
use crate::{
    channel::Lead,
    disk::{Disk, Errno, Stopped},
    worker::GateAccess,
};

struct Memory(Mutex<Vec<u8>>);

/// A request that is never suspended, or, once it has waited, always.
struct Held {
    comes_back: bool,
}

impl Hold for Held {
    fn synchronous(&self) -> bool {
        false
    }
    fn away(&self) {}
    fn writing(&self) {}
    fn back(&self) -> bool {
        self.comes_back
    }
}

impl Disk for Memory {
    fn size(&self) -> u64 {
        self.0.lock().len() as u64
    }
    fn read(&self, _: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Stopped> {
        let at = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.0.lock()[at..at + buf.len()]);
        Ok(())
    }
    fn write(&self, _: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Stopped> {
        let at = usize::try_from(offset).unwrap();
        self.0.lock()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn flush(&self, hold: &dyn Hold) -> Result<(), Stopped> {
        hold.away();
        if hold.back() { Ok(()) } else { Err(Stopped::Abandoned) }
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
        Ok(if hole { self.size() } else { offset })
    }
    fn adopt(&self, _: u64) {}
    fn probe(&self) -> Result<u32, Errno> {
        Ok(1)
    }
    fn version(&self) -> &'static str {
        "9.9.9"
    }
}

const SIZE: usize = 1 << 16;

fn run(disk: &Memory, code: u32, body: &[u8]) -> (i32, Vec<u8>) {
    let len = u32::try_from(40 + body.len()).unwrap();
    let head = InHeader { len, opcode: code, unique: 1 << 63 | 6, nodeid: 1, ..InHeader::zeroed() };
    let mut reply = vec![0xee; REPLY_HEAD + SIZE];
    let front = FrontArea::new_zeroed();
    let done = Operations { disk, front: &front }.execute(
        &Held { comes_back: true },
        &[head.as_bytes(), body].concat(),
        &mut reply,
    );
    let out = OutHeader::read_from_prefix(&reply).unwrap().0;
    assert_eq!(out.unique, 1 << 63 | 6, "a request that was given out anew keeps its mark in the reply");
    assert_eq!(usize::try_from(out.len).unwrap(), done.reply);
    (out.error, reply[REPLY_HEAD..done.reply].to_vec())
}

fn disk() -> Memory {
    Memory(Mutex::new(vec![7; SIZE]))
}

fn write(disk: &Memory, offset: u64, data: &[u8]) -> (i32, Vec<u8>) {
    let head = WriteIn { offset, size: u32::try_from(data.len()).unwrap(), ..WriteIn::zeroed() };
    run(disk, opcode::WRITE, &[head.as_bytes(), data].concat())
}

#[test]
fn writes_at_the_end_are_those_of_a_block_device() {
    let d = disk();
    let end = SIZE as u64;
    assert_eq!(write(&d, end, b"x").0, -Os::NOSPC.raw_os_error());
    assert_eq!(write(&d, end + (1 << 40), b"x").0, -Os::NOSPC.raw_os_error());
    let (error, reply) = write(&d, end - 2, b"abcd");
    assert_eq!((error, WriteOut::read_from_bytes(&reply).unwrap().size), (0, 2));
    let read = ReadIn { offset: end - 2, size: 4096, ..ReadIn::zeroed() };
    assert_eq!(run(&d, opcode::READ, read.as_bytes()), (0, b"ab".to_vec()));
    let read = ReadIn { offset: end + 5, size: 4096, ..ReadIn::zeroed() };
    assert_eq!(run(&d, opcode::READ, read.as_bytes()), (0, Vec::new()));
}

/// M1, D2: a request whose gate was closed while it waited has no reply; it is kept.
#[test]
fn m1_an_abandoned_request_has_no_reply() {
    let head = InHeader { len: 40, opcode: opcode::FSYNC, unique: 6, nodeid: 1, ..InHeader::zeroed() };
    let mut reply = vec![0xee; REPLY_HEAD + SIZE];
    let front = FrontArea::new_zeroed();
    let disk = disk();
    let done =
        Operations { disk: &disk, front: &front }.execute(&Held { comes_back: false }, head.as_bytes(), &mut reply);
    assert!(done.abandoned && done.reply == 0);
}

#[test]
fn a_write_whose_data_is_cut_short_is_refused() {
    let head = WriteIn { offset: 0, size: 100, ..WriteIn::zeroed() };
    let (error, _) = run(&disk(), opcode::WRITE, &[head.as_bytes(), b"short"].concat());
    assert_eq!(error, -Os::INVAL.raw_os_error());
}

#[test]
fn a_truncate_is_refused_and_one_to_the_same_size_is_not() {
    let set = |size| SetattrIn { valid: setattr_valid::SIZE, size, ..SetattrIn::zeroed() };
    assert_eq!(run(&disk(), opcode::SETATTR, set(0).as_bytes()).0, -Os::PERM.raw_os_error());
    assert_eq!(run(&disk(), opcode::SETATTR, set(SIZE as u64).as_bytes()).0, 0);
}

#[test]
fn fallocate_past_the_end_finds_no_space_and_a_hole_there_is_cut() {
    let ask = |mode, offset, length| {
        run(&disk(), opcode::FALLOCATE, FallocateIn { offset, length, mode, ..FallocateIn::zeroed() }.as_bytes()).0
    };
    let size = SIZE as u64;
    assert_eq!(ask(3, 0, 4096), 0);
    assert_eq!(ask(3, size - 10, 100), 0);
    assert_eq!(ask(3, size + 10, 100), 0);
    assert_eq!(ask(0, size - 10, 100), -Os::NOSPC.raw_os_error());
    assert_eq!(ask(0x10, 0, u64::MAX), -Os::NOSPC.raw_os_error());
    assert_eq!(ask(0x10, 9, u64::MAX), -Os::FBIG.raw_os_error());
    assert_eq!(ask(0x08, 0, 4096), -Os::OPNOTSUPP.raw_os_error());
}

#[test]
fn seeking_past_the_end_is_enxio() {
    let seek = LseekIn { offset: SIZE as u64, whence: 3, ..LseekIn::zeroed() };
    assert_eq!(run(&disk(), opcode::LSEEK, seek.as_bytes()).0, -Os::NXIO.raw_os_error());
}

/// M5: an application can find out through its open file which core serves it.
#[test]
fn m5_the_serving_core_names_itself() {
    let ask = |size, name: &str| {
        let head = GetxattrIn { size, padding: 0 };
        run(&disk(), opcode::GETXATTR, &[head.as_bytes(), name.as_bytes(), b"\0"].concat())
    };
    assert_eq!(ask(64, "user.everdisk.core"), (0, b"9.9.9".to_vec()));
    assert_eq!(ask(0, "user.everdisk.core").1.len(), 8);
    assert_eq!(ask(2, "user.everdisk.core").0, -Os::RANGE.raw_os_error());
    assert_eq!(ask(64, "security.capability").0, -Os::NODATA.raw_os_error());
}

#[test]
fn init_wants_a_kernel_that_gives_requests_out_anew() {
    let ask_as = |alone, major, minor, flags: u64| {
        let [low, high] = [flags & 0xffff_ffff, flags >> 32].map(|half| u32::try_from(half).unwrap());
        let init = InitIn { major, minor, flags: low, flags2: high, ..InitIn::zeroed() };
        let head = InHeader { len: 104, opcode: opcode::INIT, unique: 2, ..InHeader::zeroed() };
        handshake::answer(&[head.as_bytes(), init.as_bytes()].concat(), 1 << 20, alone)
    };
    let ask = |major, minor, flags| ask_as(true, major, minor, flags);
    let all = init_flag::INIT_EXT | init_flag::HAS_RESEND | init_flag::ASYNC_DIO | 1 << 50;
    let out = |reply: &[u8]| InitOut::read_from_bytes(&reply[16..]).unwrap();
    let flags = |out: &InitOut| u64::from(out.flags2) << 32 | u64::from(out.flags);
    let agreed = out(&ask(7, 45, all).unwrap());
    assert_eq!(flags(&agreed), init_flag::INIT_EXT | init_flag::HAS_RESEND | init_flag::ASYNC_DIO);
    assert_eq!(agreed.max_write, 1 << 20);
    assert_eq!(ask(7, 39, init_flag::INIT_EXT), Err(BadInit::NoResend));
    assert_eq!(ask(7, 39, init_flag::HAS_RESEND), Err(BadInit::NoResend), "the second word counts only with INIT_EXT");
    assert_eq!(ask(7, 19, all), Err(BadInit::Version(7, 19)));
    assert_eq!(handshake::answer(b"", 4096, true), Err(BadInit::NotInit));
    // Shared mappings are a cache that other front ends do not see.
    let maps = all | init_flag::DIRECT_IO_ALLOW_MMAP;
    for alone in [true, false] {
        let agreed = out(&ask_as(alone, 7, 45, maps).unwrap());
        assert_eq!(flags(&agreed) & init_flag::DIRECT_IO_ALLOW_MMAP != 0, alone);
    }
}

proptest! {
    #[test]
    fn arbitrary_requests_never_panic(code in 0u32..60, node in 0u64..3, body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let d = disk();
        let len = u32::try_from(40 + body.len()).unwrap();
        let head = InHeader { len, opcode: code, unique: 3, nodeid: node, ..InHeader::zeroed() };
        let front = FrontArea::new_zeroed();
        let mut reply = vec![0; REPLY_HEAD + SIZE];
        let bytes = [head.as_bytes(), body.as_slice()].concat();
        let _ = Operations { disk: &d, front: &front }.execute(&Held { comes_back: true }, &bytes, &mut reply);
        let _ = Operations { disk: &d, front: &front }.execute(&Held { comes_back: true }, &body, &mut reply);
        let _ = handshake::answer(&bytes, 4096, false);
    }
}

/// M4: a core whose first worker has lost the lead to another is given the gate: the other worker probes.
#[test]
fn m4_whoever_leads_probes_when_the_first_worker_is_idle() {
    let (segment, slot) = (SharedSegment::create(0).unwrap(), Slot::FIRST);
    let (lead, stop) = (Lead::new(1), AtomicBool::new(false));
    let (channel, _kernel) = std::os::unix::net::UnixStream::pair().unwrap();
    let disk = Memory(Mutex::new(vec![0; 8192]));
    let area = &segment.cores[slot.index()];
    let work = |index| {
        let mut buffers = Buffers::new().unwrap();
        let access = GateAccess::take(&segment, slot, index, &stop);
        let operations = Operations { disk: &disk, front: &segment.front };
        serve(&access, channel.as_fd(), &lead, &operations, &mut buffers)
    };
    std::thread::scope(|scope| {
        scope.spawn(|| work(0));
        scope.spawn(|| work(1));
        std::thread::sleep(Duration::from_millis(100));
        let probe = GateWord { mode: Mode::Probe, slot, generation: Generation(2) };
        ticket::set(&segment.gate.word, probe);
        // As `suspension::give` of the holder.
        let first_waits = !ticket::is_parked(&area.tickets[0].state);
        area.wake.fetch_add(1, SeqCst);
        wake::wake(&area.wake, if first_waits { Who::All } else { Who::First });
        std::thread::sleep(Duration::from_millis(200));
        let open = segment.gate.word.load(SeqCst) == probe.with(Mode::Open).encode();
        // The leader reads from the channel then, until it ends.
        stop.store(true, SeqCst);
        ticket::set(&segment.gate.word, probe.with(Mode::Closed));
        area.wake.fetch_add(1, SeqCst);
        wake::wake(&area.wake, Who::All);
        let _ = channel.shutdown(std::net::Shutdown::Both);
        lead.rouse();
        assert!(open, "no worker has probed");
    });
}

/// D5: an application that has the answer which tells of a failed flush is not told again by another worker, however soon it asks.
#[test]
fn d5_what_an_answer_has_told_another_worker_does_not_tell_again() {
    let segment = SharedSegment::create(0).unwrap();
    let stop = AtomicBool::new(false);
    let access = |index| GateAccess::take(&segment, Slot::FIRST, index, &stop);
    let (first, moment) = (access(0), Duration::from_millis(50));
    segment.gate.flush_errors.store(1, SeqCst);
    let (answered, got) = std::sync::mpsc::channel();
    let access = &access;
    std::thread::scope(|scope| {
        let second = scope.spawn(move || {
            let access = access(1);
            got.recv().unwrap();
            access.file_told()
        });
        first.tell_file(1, || {
            answered.send(()).unwrap();
            std::thread::sleep(moment);
        });
        assert_eq!(second.join().unwrap(), 1);
    });
}
