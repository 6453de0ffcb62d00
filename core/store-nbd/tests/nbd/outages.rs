//! Servers that die, return, return as another one, or hang.

use std::{
    fs,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
        mpsc,
    },
    time::{Duration, Instant},
};

use everdisk_harness::{processes::freeze, wait::until_true};
use everdisk_proto::nbd::wire::cmd;
use everdisk_store_nbd::{Client, Command, Config, Kind};

use crate::{
    honest::{Fake, handshake, read_request, send, simple},
    kit::{Pending, begin, fail, pattern, read, succeed, write},
    servers::Server,
};

const SIZE: u64 = 8 << 20;
const LEN: usize = 40_000;

fn quick() -> Config {
    Config { backoff_min: Duration::from_millis(2), backoff_max: Duration::from_millis(50), ..Config::default() }
}

/// Writes of which some are at the server.
fn writes_under_way(client: &Client, count: u64) -> Vec<Pending> {
    let pending = (0..count).map(|index| begin(client, write(index * 40_000, LEN, index))).collect();
    until_true("a write is at the server", || !client.outstanding_writes().is_empty());
    pending
}

/// As [`writes_under_way`], at a server that would be too quick: it stands before the last ones.
fn writes_to_a_quick_server(server: &Server, client: &Client, count: u64) -> Vec<Pending> {
    let begin = |index| begin(client, write(index * 40_000, LEN, index));
    let mut pending: Vec<_> = (0..count / 2).map(begin).collect();
    let frozen = freeze(server.pid());
    pending.extend((count / 2..count).map(begin));
    assert!(!client.outstanding_writes().is_empty());
    // It is killed as it stands.
    std::mem::forget(frozen);
    pending
}

fn killed_in_the_middle(server: &mut Server, config: Config, is_quick: bool, end: fn(&mut Server)) {
    let client = server.client(config);
    for round in 1..=3 {
        let pending =
            if is_quick { writes_to_a_quick_server(server, &client, 100) } else { writes_under_way(&client, 100) };
        end(server);
        server.start();
        for pending in pending {
            let outcome = pending.wait();
            assert_eq!(outcome.memory.len(), LEN);
            outcome.result.unwrap();
        }
        let image = fs::read(server.image()).unwrap();
        for index in 0..100_u64 {
            let expected = pattern(LEN, index);
            assert!(read(&client, index * 40_000, LEN) == expected, "round {round}, write {index}");
            let at = usize::try_from(index * 40_000).unwrap();
            assert!(image[at..at + LEN] == expected, "round {round}, write {index}, in the file");
        }
        assert!(client.losses() >= round);
        succeed(&client, Command::Zeroes { offset: 0, len: SIZE, may_punch: false, fast: false });
        // What was lost by then is reported once.
        let _ = begin(&client, Command::Flush).wait();
        succeed(&client, Command::Flush);
    }
}

#[test]
fn nbdkit_killed_in_the_middle_of_writes() {
    let mut server = Server::nbdkit_file(SIZE, &["--filter=delay", "delay-write=10ms"]);
    killed_in_the_middle(&mut server, quick(), false, |server| server.kill());
}

#[test]
fn nbdkit_ended_in_the_middle_of_writes() {
    let mut server = Server::nbdkit_file(SIZE, &["--filter=delay", "delay-write=10ms"]);
    killed_in_the_middle(&mut server, quick(), false, |server| server.terminate());
}

#[test]
fn nbdkit_killed_in_the_middle_of_writes_of_parts_of_blocks() {
    let mut server = Server::nbdkit_file(
        SIZE,
        &[
            "--filter=blocksize-policy",
            "--filter=delay",
            "delay-write=5ms",
            "delay-read=1ms",
            "blocksize-minimum=4096",
            "blocksize-error-policy=error",
        ],
    );
    killed_in_the_middle(&mut server, quick(), false, |server| server.kill());
}

#[test]
fn qemu_nbd_killed_in_the_middle_of_writes() {
    killed_in_the_middle(&mut Server::qemu_nbd(SIZE), Config { requests_max: 8, ..quick() }, true, |server| {
        server.kill();
    });
}

#[test]
fn a_server_that_shuts_down_has_its_commands_sent_again() {
    let server = Server::nbdkit(&["--filter=error", "memory", "1M", "error=ESHUTDOWN", "error-pwrite-rate=50%"]);
    let client = server.client(quick());
    for index in 0..20 {
        succeed(&client, write(index * 100, 100, index));
    }
    assert!(client.losses() > 0);
    for index in 0..20 {
        assert_eq!(read(&client, index * 100, 100), pattern(100, index));
    }
}

#[test]
fn a_flush_after_a_loss_reports_what_was_not_flushed_once() {
    let mut server = Server::nbdkit_file(SIZE, &[]);
    let client = server.client(Config { connections: 1, ..quick() });
    // Nothing written: nothing lost.
    server.kill();
    server.start();
    succeed(&client, Command::Flush);
    assert_eq!(client.losses(), 1);
    // Written and flushed: nothing lost.
    succeed(&client, write(0, LEN, 1));
    succeed(&client, Command::Flush);
    server.kill();
    server.start();
    succeed(&client, Command::Flush);
    // Written with FUA: nothing lost.
    succeed(&client, Command::Write { offset: 0, memory: pattern(LEN, 1), fua: true });
    server.kill();
    server.start();
    succeed(&client, Command::Flush);
    // Written and not flushed.
    succeed(&client, write(0, LEN, 2));
    server.kill();
    server.start();
    let error = fail(&client, Command::Flush);
    assert_eq!(error.kind(), Kind::Unflushed, "{error}");
    succeed(&client, write(0, LEN, 2));
    succeed(&client, Command::Flush);
    assert_eq!(client.losses(), 4);
}

/// The report is kept while flushes fail for other reasons.
#[test]
fn a_flush_that_fails_otherwise_does_not_take_the_report_with_it() {
    let fake = Fake::new(Box::new(|number, mut stream: UnixStream| {
        if !handshake(&mut stream, false) {
            return;
        }
        let mut flushes = 0;
        while let Some(request) = read_request(&mut stream) {
            let is_flush = request.command == cmd::FLUSH;
            flushes += u32::from(is_flush);
            let error = if number > 0 && flushes == 1 { 5 } else { 0 };
            if number == 0 && is_flush || !send(&mut stream, &simple(request.cookie, error)) {
                return;
            }
        }
    }));
    let client = fake.client(quick());
    succeed(&client, write(0, LEN, 1));
    assert_eq!(fail(&client, Command::Flush).kind(), Kind::Fault(5));
    assert_eq!(fail(&client, Command::Flush).kind(), Kind::Unflushed);
    succeed(&client, Command::Flush);
}

/// A write with FUA at a server without it is a write and a flush: after a loss between the two it is written again.
#[test]
fn a_durable_write_survives_a_loss_before_its_flush() {
    let written = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&written);
    let fake = Fake::new(Box::new(move |number, mut stream: UnixStream| {
        if !handshake(&mut stream, false) {
            return;
        }
        while let Some(request) = read_request(&mut stream) {
            if request.command == cmd::WRITE {
                count.fetch_add(1, Relaxed);
            }
            if number == 0 && request.command == cmd::FLUSH || !send(&mut stream, &simple(request.cookie, 0)) {
                return;
            }
        }
    }));
    let client = fake.client(quick());
    let outcome = begin(&client, Command::Write { offset: 0, memory: pattern(LEN, 1), fua: true }).wait();
    outcome.result.unwrap();
    assert_eq!(outcome.memory, pattern(LEN, 1));
    assert_eq!(written.load(Relaxed), 2);
}

/// A server that lives on is given time for the writes that it had received. The bound is a lower one, so that a slow machine
/// cannot break it.
#[test]
fn writes_are_not_sent_again_before_the_server_has_settled() {
    let settle = Duration::from_millis(300);
    let (events, event) = mpsc::channel();
    let fake = Fake::new(Box::new(move |number, mut stream: UnixStream| {
        if !handshake(&mut stream, false) {
            return;
        }
        while let Some(request) = read_request(&mut stream) {
            events.send((number, Instant::now())).unwrap();
            if number == 0 || !send(&mut stream, &simple(request.cookie, 0)) {
                return;
            }
        }
    }));
    let client = fake.client(Config { settle, ..quick() });
    succeed(&client, write(0, LEN, 1));
    let [(0, received), (1, again)] = [event.recv().unwrap(), event.recv().unwrap()] else { panic!("sent once each") };
    assert!(again - received >= settle, "sent again after {:?}", again - received);
}

/// What is agreed upon is agreed upon for one connection.
#[test]
fn a_server_that_returns_with_more_is_used_with_more() {
    let mut server = Server::nbdkit_file(SIZE, &["--no-sr"]);
    // Each connection is a loss of its own.
    let client = server.client(Config { connections: 1, ..quick() });
    succeed(&client, write(0, LEN, 1));
    server.kill();
    let line: Vec<String> = server.line().into_iter().filter(|part| part != "--no-sr").collect();
    server.start_with(&line);
    assert_eq!(read(&client, 0, LEN), pattern(LEN, 1));
    assert_eq!(client.losses(), 1);
}

#[test]
fn a_flush_that_is_under_way_at_the_loss_reports_it_too() {
    let mut server = Server::nbdkit_file(SIZE, &["--filter=delay", "delay-write=300ms"]);
    let client = server.client(quick());
    succeed(&client, write(0, LEN, 1));
    let slow = begin(&client, write(LEN.try_into().unwrap(), LEN, 2));
    let flushes = [begin(&client, Command::Flush), begin(&client, Command::Flush)];
    assert!(flushes[0].is_outstanding(), "a flush waits for the writes before it");
    server.kill();
    server.start();
    slow.wait().result.unwrap();
    for flush in flushes {
        assert_eq!(flush.wait().result.unwrap_err().kind(), Kind::Unflushed);
    }
    succeed(&client, Command::Flush);
}

#[test]
fn a_server_that_stays_away_makes_commands_fail_until_it_returns() {
    let mut server = Server::nbdkit_file(SIZE, &[]);
    let client = server.client(Config { unavailable_after: Duration::from_millis(300), ..quick() });
    let pending = writes_to_a_quick_server(&server, &client, 200);
    let reads = (0..50).map(|_| begin(&client, Command::Read { offset: 0, memory: vec![1; 9000] }));
    let reads: Vec<_> = reads.collect();
    let flush = begin(&client, Command::Flush);
    server.kill();
    let mut failed = 0;
    for (index, pending) in (0..).zip(pending) {
        let outcome = pending.wait();
        assert_eq!(outcome.memory, pattern(LEN, index));
        if let Err(error) = outcome.result {
            assert_eq!(error.kind(), Kind::Unavailable);
            assert!(error.to_string().contains(&server.address.server.to_string()), "{error}");
            failed += 1;
        }
    }
    assert!(failed >= 100, "{failed} failed");
    for read in reads {
        assert_eq!(read.wait().memory.len(), 9000);
    }
    assert_eq!(flush.wait().result.unwrap_err().kind(), Kind::Unavailable);
    assert_eq!(fail(&client, Command::Flush).kind(), Kind::Unavailable);
    assert!(client.out_of_reach().is_some() && client.oldest_outstanding().is_none());
    server.start();
    until_true("commands are accepted again", || begin(&client, write(0, LEN, 7)).wait().result.is_ok());
    assert_eq!(read(&client, 0, LEN), pattern(LEN, 7));
    assert_eq!(client.out_of_reach(), None);
}

#[test]
fn a_server_that_returns_as_another_one_is_not_used() {
    let mut server = Server::nbdkit_file(SIZE, &[]);
    let client = server.client(Config { connections: 2, ..quick() });
    let line = server.line();
    for (with, word) in [
        ("size", "has 4096 bytes and had"),
        ("--readonly", "read-only"),
        ("--no-sr", "structured"),
        ("--filter=nozero", "write zeroes"),
    ] {
        server.kill();
        let image = fs::OpenOptions::new().write(true).open(server.image()).unwrap();
        let mut changed = line.clone();
        if with == "size" {
            image.set_len(4096).unwrap();
        } else {
            changed.insert(1, with.to_owned());
        }
        server.start_with(&changed);
        let error = fail_at_last(&client);
        assert_eq!(error.kind(), Kind::Changed, "{error}");
        assert!(error.to_string().contains(word), "{error}");
        server.kill();
        image.set_len(SIZE).unwrap();
        server.start();
        until_true("commands are accepted again", || begin(&client, write(0, LEN, 3)).wait().result.is_ok());
    }
}

/// A command that was begun while the server was away.
fn fail_at_last(client: &Client) -> everdisk_store_nbd::Error {
    fail(client, write(0, LEN, 1))
}

#[test]
fn a_server_that_hangs_is_waited_for() {
    let server = Server::nbdkit_file(512 << 20, &[]);
    let client = server.client(Config { unavailable_after: Duration::from_millis(50), ..quick() });
    let before = Instant::now();
    let frozen = freeze(server.pid());
    // More than the window and the sockets take.
    let pending: Vec<_> = (0..400).map(|index| begin(&client, write(index << 20, 1 << 20, index))).collect();
    let oldest = client.oldest_outstanding().unwrap();
    assert!(oldest >= before && oldest <= Instant::now());
    let at_the_server: u64 = client.outstanding_writes().iter().map(|write| u64::from(write.len)).sum();
    assert!(at_the_server <= Config::default().bytes_max, "{at_the_server} bytes in flight");
    assert!(pending.iter().all(Pending::is_outstanding));
    drop(frozen);
    for pending in pending {
        pending.wait().result.unwrap();
    }
    assert_eq!(client.losses(), 0);
    assert_eq!(client.oldest_outstanding(), None);
    for index in [0, 199, 399] {
        assert!(read(&client, index << 20, 1 << 20) == pattern(1 << 20, index));
    }
}

#[test]
fn closing_completes_everything_even_if_the_server_hangs() {
    let server = Server::nbdkit_file(512 << 20, &[]);
    let client = server.client(quick());
    let frozen = freeze(server.pid());
    let pending: Vec<_> = (0..300).map(|index| begin(&client, write(index << 20, 1 << 20, index))).collect();
    drop(client);
    for (index, pending) in (0..).zip(pending) {
        let outcome = pending.wait();
        assert_eq!(outcome.result.unwrap_err().kind(), Kind::Unavailable);
        assert!(outcome.memory == pattern(1 << 20, index));
    }
    drop(frozen);
}

/// nbdkit that is asked to end waits until its clients have left. It answers no request any more, so a client without requests
/// would stay.
#[test]
fn a_client_without_requests_leaves_a_server_that_is_asked_to_end() {
    let mut server = Server::nbdkit_file(SIZE, &[]);
    let client = server.client(Config { idle: Duration::from_millis(100), ..quick() });
    succeed(&client, write(0, LEN, 1));
    server.terminate();
    server.start();
    assert_eq!(read(&client, 0, LEN), pattern(LEN, 1));
}
