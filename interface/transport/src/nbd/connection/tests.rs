//! A connection's memory, as another core left it, is checked before the connection is continued.

use std::os::unix::net::UnixStream;

use everdisk_proto::connection::{Direct, Long};

use super::*;
use crate::nbd::{request::Command, state::Phase};

fn core(memory: &ConnectionMemory) -> Connection {
    let (socket, _) = UnixStream::pair().unwrap();
    let memory = ConnectionMemory::adopt(memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
    Connection::new(LentConnection { number: 1, listener: 0 }, socket.into(), memory, 0).unwrap()
}

const fn request(command: Command, len: u32) -> Request {
    Request { command, flags: 0, cookie: 1, offset: 0, len }
}

/// Whether a core continues from a record that another left, and from the request that this one had put aside.
fn is_taken_over(record: Record, aside: Request, spoil: impl FnOnce(&ConnectionMemory)) -> bool {
    let memory = ConnectionMemory::create().unwrap();
    let before = core(&memory);
    before.write_aside(0, &aside, 0);
    before.commit(&mut before.lock(), record);
    spoil(&memory);
    core(&memory).resume(1, 1 << 20).is_ok()
}

/// D15: what another process wrote is checked here. What passes the check is relied on from then on.
#[test]
fn d15_a_record_that_does_not_make_sense_with_what_it_refers_to_is_not_gone_on_with() {
    let read = request(Command::Read, 100);
    let transmission = Record { negotiated: State::START.with(Phase::Transmission).to_word(), ..Record::default() };
    let aside = Record { aside: 1, ..transmission };
    assert!(is_taken_over(aside, read, |_| ()));
    assert!(!is_taken_over(Record { negotiated: 0, ..aside }, read, |_| ()), "a request before the handshake");
    assert!(!is_taken_over(aside, request(Command::Write, 100), |_| ()), "its data was not received");
    assert!(!is_taken_over(aside, read, |memory| memory.aside[0][0].store(u64::MAX, Relaxed)), "not a request");
    assert!(!is_taken_over(aside, Request { offset: u64::MAX - 50, ..read }, |_| ()), "a range past the end");
    let zeroes = request(Command::WriteZeroes, 100);
    assert!(is_taken_over(aside, zeroes, |_| ()));
    assert!(!is_taken_over(aside, request(Command::BlockStatus, 100), |_| ()), "what was not negotiated");
    let direct = |done, len| Record { direct: Some(Direct { index: 0, done, len }), ..aside };
    assert!(is_taken_over(direct(50, 50), read, |_| ()));
    assert!(!is_taken_over(direct(50, 51), read, |_| ()), "a reply longer than what was asked for");
    assert!(!is_taken_over(direct(50, 50), zeroes, |_| ()), "data for a request that reads none");
    let long = |request: Request, done| Record {
        long: Some(Long { request: request.to_words(), done, error: 0 }),
        ..transmission
    };
    assert!(is_taken_over(long(request(Command::Write, 100), 100), read, |_| ()));
    assert!(!is_taken_over(long(request(Command::Write, 100), 101), read, |_| ()), "more is done than was asked for");
    assert!(!is_taken_over(long(read, 50), read, |_| ()), "only a write is received in pieces");
    assert!(!is_taken_over(
        Record { negotiated: State::START.to_word(), ..long(request(Command::Write, 100), 50) },
        read,
        |_| ()
    ));
    let nonsense = Record { long: Some(Long { request: [u64::MAX; 4], done: 0, error: 0 }), ..transmission };
    assert!(!is_taken_over(nonsense, read, |_| ()));
}
