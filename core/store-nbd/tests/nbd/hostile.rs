//! Servers that lie. The first connection meets one, the second an honest one: the command has to end there, with the right
//! bytes, and the loss has to be counted.

use std::{os::unix::net::UnixStream, time::Duration};

use everdisk_proto::nbd::wire::{chunk, cmd};
use everdisk_store_nbd::{Command, Config, Kind};
use zerocopy::{
    IntoBytes,
    network_endian::{U32, U64},
};

use crate::{
    honest::{Fake, Request, answer, content, data, handshake, head, part, read_request, send, serve, simple},
    kit::{begin, read, succeed},
};

const OFFSET: u64 = 4096;
const LEN: usize = 8192;

/// Spoils the reply to a READ of [`LEN`] bytes from [`OFFSET`] on.
fn lie(structured: bool, reply: impl Fn(&Request) -> Vec<u8> + Send + 'static) {
    let fake = Fake::new(Box::new(move |number, mut stream: UnixStream| {
        if number > 0 {
            return serve(stream, structured);
        }
        if handshake(&mut stream, structured)
            && let Some(request) = read_request(&mut stream)
        {
            assert_eq!((request.command, request.offset), (cmd::READ, OFFSET));
            send(&mut stream, &reply(&request));
            // Nothing else follows. The client has to hang up by itself, or finds that the server has.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            while read_request(&mut stream).is_some() {}
        }
    }));
    let client = fake.client(Config::default());
    assert_eq!(read(&client, OFFSET, LEN), content(OFFSET, LEN.try_into().unwrap()));
    assert_eq!(client.losses(), 1);
    // Nothing is left of the first connection.
    assert_eq!(read(&client, 0, 3), content(0, 3));
    assert_eq!(client.losses(), 1);
    assert!(client.outstanding_writes().is_empty());
}

/// Bytes that nobody may ever see as the reply to a READ.
fn poison(len: usize) -> Vec<u8> {
    vec![0xbd; len]
}

#[test]
fn no_reply_at_all() {
    lie(false, |_| Vec::new());
    lie(true, |_| vec![0; 64]);
    lie(true, |_| b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec());
}

#[test]
fn half_a_reply() {
    for bytes in [1, 4, 15, 16, 17, 3000, LEN + 15] {
        lie(false, move |request| answer(request, false)[..bytes].to_vec());
    }
    for bytes in [1, 19, 20, 21, 27, 28, 3000, LEN + 27] {
        lie(true, move |request| answer(request, true)[..bytes].to_vec());
    }
}

#[test]
fn a_foreign_cookie() {
    lie(false, |request| [simple(request.cookie + 1, 0), poison(LEN)].concat());
    lie(true, |request| data(request.cookie ^ 1 << 40, true, OFFSET, &poison(LEN)));
}

#[test]
fn a_structured_reply_that_was_not_agreed_upon() {
    lie(false, |request| data(request.cookie, true, OFFSET, &poison(LEN)));
}

#[test]
fn a_simple_reply_where_a_structured_one_is_due() {
    lie(true, |request| [simple(request.cookie, 0), poison(LEN)].concat());
    lie(true, |request| simple(request.cookie, 5));
}

#[test]
fn data_outside_of_the_range() {
    lie(true, |request| data(request.cookie, true, OFFSET - 1, &poison(LEN)));
    lie(true, |request| data(request.cookie, true, OFFSET + 1, &poison(LEN)));
    lie(true, |request| data(request.cookie, true, u64::MAX - 5, &poison(LEN)));
    lie(true, |request| data(request.cookie, false, OFFSET, &poison(LEN + 1)));
    lie(true, |request| head(request.cookie, chunk::OFFSET_DATA, true, u32::MAX, &poison(100)));
}

#[test]
fn data_twice_or_not_at_all() {
    lie(true, |request| {
        [data(request.cookie, false, OFFSET, &poison(LEN)), data(request.cookie, true, OFFSET, &poison(LEN))].concat()
    });
    lie(true, |request| {
        [data(request.cookie, false, OFFSET + 100, &poison(100)), data(request.cookie, true, OFFSET, &poison(101))]
            .concat()
    });
    lie(true, |request| data(request.cookie, true, OFFSET, &poison(LEN - 1)));
    lie(true, |request| part(request.cookie, chunk::NONE, true, &[]));
    lie(true, |request| data(request.cookie, true, OFFSET, &[]));
}

fn hole(offset: u64, len: u32) -> Vec<u8> {
    [U64::new(offset).as_bytes(), U32::new(len).as_bytes()].concat()
}

#[test]
fn holes_that_do_not_fit() {
    for (offset, len) in [(OFFSET, 0), (OFFSET, 8193), (0, 8192), (OFFSET, 8191), (u64::MAX, 1), (OFFSET, u32::MAX)] {
        lie(true, move |request| part(request.cookie, chunk::OFFSET_HOLE, true, &hole(offset, len)));
    }
    lie(true, |request| part(request.cookie, chunk::OFFSET_HOLE, true, &[0; 13]));
}

#[test]
fn chunks_of_the_wrong_kind() {
    for kind in [3, 4, chunk::BLOCK_STATUS, 6, 0x7fff] {
        lie(true, move |request| part(request.cookie, kind, true, &[0; 12]));
    }
    lie(true, |request| part(request.cookie, chunk::NONE, false, &[]));
    lie(true, |request| part(request.cookie, chunk::NONE, true, &[0]));
    for body in [vec![], vec![0; 6], vec![0, 0, 0, 5], [&[0, 0, 0, 5, 0xff, 0xff][..], &[b'x'; 50]].concat()] {
        lie(true, move |request| part(request.cookie, chunk::ERROR, true, &body));
    }
    lie(true, |request| head(request.cookie, chunk::ERROR, true, u32::MAX, &[0; 6]));
}

#[test]
fn a_reply_after_the_last_one() {
    let fake = Fake::new(Box::new(|number, mut stream: UnixStream| {
        if number > 0 {
            return serve(stream, true);
        }
        if handshake(&mut stream, true)
            && let Some(request) = read_request(&mut stream)
        {
            let right = answer(&request, true);
            send(&mut stream, &[right.clone(), right].concat());
            while read_request(&mut stream).is_some() {}
        }
    }));
    let client = fake.client(Config::default());
    assert_eq!(read(&client, 0, 100), content(0, 100));
    assert_eq!(read(&client, 50, 100), content(50, 100));
    assert_eq!(client.losses(), 1);
}

#[test]
fn chunks_in_any_order_are_right() {
    let fake = Fake::new(Box::new(|_, mut stream: UnixStream| {
        if !handshake(&mut stream, true) {
            return;
        }
        let mut random = fastrand::Rng::with_seed(9);
        while let Some(request) = read_request(&mut stream) {
            let end = request.offset + u64::from(request.len);
            let mut parts: Vec<(u64, u64)> = Vec::new();
            let mut at = request.offset;
            while at < end {
                let len = random.u64(1..=997).min(end - at);
                parts.push((at, len));
                at += len;
            }
            random.shuffle(&mut parts);
            let chunks = parts.iter().map(|(at, len)| data(request.cookie, false, *at, &content(*at, *len)));
            let all: Vec<u8> = chunks.flatten().chain(part(request.cookie, chunk::NONE, true, &[])).collect();
            send(&mut stream, &all);
        }
    }));
    let client = fake.client(Config::default());
    let pending: Vec<_> = (0..20_u64)
        .map(|index| (index * 777, begin(&client, Command::Read { offset: index * 777, memory: vec![0; 50_000] })))
        .collect();
    for (offset, pending) in pending {
        let outcome = pending.wait();
        outcome.result.unwrap();
        assert!(outcome.memory == content(offset, 50_000));
    }
    assert_eq!(client.losses(), 0);
}

/// One bit of the replies' heads is wrong. Each read ends with the right bytes, or with an error that the bit has made.
#[test]
fn a_flipped_bit_never_makes_a_wrong_byte() {
    for structured in [false, true] {
        let mut random = fastrand::Rng::with_seed(u64::from(structured));
        let heads = if structured { 28 } else { 16 };
        let fake = Fake::new(Box::new(move |_, mut stream: UnixStream| {
            if !handshake(&mut stream, structured) {
                return;
            }
            // The socket's deadline would be long: a length that has become larger waits for bytes that do not come.
            while let Some(request) = read_request(&mut stream) {
                let mut reply = answer(&request, structured);
                let is_spoiled = random.bool();
                if is_spoiled {
                    reply[random.usize(..heads)] ^= 1 << random.u8(..8);
                }
                send(&mut stream, &reply);
                if is_spoiled {
                    return;
                }
            }
        }));
        let config = Config {
            backoff_min: Duration::from_micros(10),
            backoff_max: Duration::from_micros(100),
            ..Config::default()
        };
        let client = fake.client(config);
        let mut failed = 0;
        for index in 0..300 {
            let offset = index * 1000;
            let pending = begin(&client, Command::Read { offset, memory: vec![0xee; 700] });
            let outcome = pending.wait();
            match outcome.result {
                Ok(_) => assert!(outcome.memory == content(offset, 700), "read {index}"),
                Err(error) => {
                    assert!(
                        matches!(error.kind(), Kind::Fault(_) | Kind::Full | Kind::Unsupported | Kind::Invalid),
                        "{error}"
                    );
                    failed += 1;
                }
            }
        }
        assert!(client.losses() > 50, "{} losses", client.losses());
        assert!(failed < 150, "{failed} failed");
    }
}

#[test]
fn a_server_that_always_breaks_becomes_unavailable() {
    let fake = Fake::new(Box::new(|_, mut stream: UnixStream| {
        if handshake(&mut stream, true) && read_request(&mut stream).is_some() {
            send(&mut stream, &[0; 100]);
        }
    }));
    let config = Config {
        unavailable_after: Duration::from_millis(300),
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(20),
        ..Config::default()
    };
    let client = fake.client(config);
    let outcome = begin(&client, Command::Read { offset: 0, memory: vec![0; 10] }).wait();
    assert_eq!(outcome.result.unwrap_err().kind(), Kind::Unavailable);
    assert_eq!(outcome.memory.len(), 10);
    assert!(client.losses() > 1);
}

/// The server answers a write before it has read its data.
#[test]
fn a_write_that_is_answered_early_gives_its_memory_back() {
    let fake = Fake::new(Box::new(|number, mut stream: UnixStream| {
        if number > 0 {
            return serve(stream, false);
        }
        if handshake(&mut stream, false) {
            let mut head = [0; 28];
            std::io::Read::read_exact(&mut stream, &mut head).unwrap();
            let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
            send(&mut stream, &simple(cookie, 0));
            // The data come when the answer has been given.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    }));
    let client = fake.client(Config::default());
    let memory = vec![7; 1 << 20];
    let outcome = begin(&client, Command::Write { offset: 0, memory: memory.clone(), fua: false }).wait();
    assert!(outcome.memory == memory);
    outcome.result.unwrap();
    drop(client);
    let client = fake.client(Config::default());
    succeed(&client, Command::Flush);
}
