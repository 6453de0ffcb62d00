//! Several connections to one server.

use std::{os::unix::net::UnixStream, sync::mpsc, thread, time::Duration};

use everdisk_harness::wait::until_true;
use everdisk_proto::nbd::wire::transmission_flag::CAN_MULTI_CONN;
use everdisk_store_nbd::{Command, Config};

use crate::{
    honest::{Fake, answer, content, data, handshake_with, read_request, send},
    kit::begin,
};

fn serve(stream: &mut UnixStream, mut requests: usize) {
    while requests > 0
        && let Some(request) = read_request(stream)
    {
        send(stream, &answer(&request, true));
        requests -= 1;
    }
}

/// Each connection ends after some requests, with others outstanding, at a time of its own.
#[test]
fn what_was_outstanding_on_a_lost_connection_is_sent_on_the_others() {
    let fake = Fake::new(Box::new(|number, mut stream| {
        thread::spawn(move || {
            if handshake_with(&mut stream, true, CAN_MULTI_CONN) {
                serve(&mut stream, 20 + number % 17);
            }
        });
    }));
    let config = Config {
        connections: 4,
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(10),
        ..Config::default()
    };
    let client = fake.client(config);
    until_true("four connections are made", || client.connections() == 4);
    let pending: Vec<_> = (0..2000_u64)
        .map(|index| (index * 500, begin(&client, Command::Read { offset: index * 500, memory: vec![0xee; 700] })))
        .collect();
    for (offset, pending) in pending {
        let outcome = pending.wait();
        outcome.result.unwrap();
        assert!(outcome.memory == content(offset, 700), "read at {offset}");
    }
    assert!(client.losses() > 20, "{} losses", client.losses());
}

/// A reply counts only on the connection on which its request was sent.
#[test]
fn a_cookie_of_another_connection_is_foreign() {
    let (cookies, cookie) = mpsc::channel();
    let (poisoned, is_poisoned) = mpsc::channel::<()>();
    let mut of_first = Some((cookies, is_poisoned));
    let mut of_second = Some((cookie, poisoned));
    let fake = Fake::new(Box::new(move |number, mut stream| {
        let (first, second) = match number {
            0 => (of_first.take(), None),
            1 => (None, of_second.take()),
            _ => (None, None),
        };
        thread::spawn(move || {
            if !handshake_with(&mut stream, true, CAN_MULTI_CONN) {
                return;
            }
            if let Some((cookies, is_poisoned)) = first {
                let request = read_request(&mut stream).unwrap();
                cookies.send(request.cookie).unwrap();
                is_poisoned.recv().unwrap();
                send(&mut stream, &answer(&request, true));
            } else if let Some((cookie, poisoned)) = second {
                let request = read_request(&mut stream).unwrap();
                let foreign = cookie.recv().unwrap();
                send(&mut stream, &data(foreign, true, 0, &vec![0xbd; usize::try_from(request.len).unwrap()]));
                // Until the client hangs up.
                assert!(read_request(&mut stream).is_none());
                poisoned.send(()).unwrap();
                return;
            }
            serve(&mut stream, usize::MAX);
        });
    }));
    let client = fake.client(Config { connections: 2, ..Config::default() });
    until_true("two connections are made", || client.connections() == 2);
    let read = |offset| begin(&client, Command::Read { offset, memory: vec![0xee; 5000] });
    let pending = [(0, read(0)), (9000, read(9000))];
    for (offset, pending) in pending {
        let outcome = pending.wait();
        outcome.result.unwrap();
        assert!(outcome.memory == content(offset, 5000), "read at {offset}");
    }
    assert_eq!(client.losses(), 1);
}
