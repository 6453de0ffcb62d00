//! Servers with which no handshake succeeds. The error says what is wrong, within the deadline.

use std::{io::Read, os::unix::net::UnixStream, sync::mpsc, thread, time::Duration};

use everdisk_proto::nbd::wire::{opt, rep};
use everdisk_store_nbd::{Client, Config, Kind};

use crate::honest::{Fake, at, export, greeting, option_reply, read_option, send};

#[track_caller]
fn refused(serve: impl FnMut(usize, UnixStream) + Send + 'static, word: &str) {
    let fake = Fake::new(Box::new(serve));
    let config = Config { connect: Duration::from_millis(400), ..Config::default() };
    let (send, receive) = mpsc::channel();
    let address = fake.address();
    // On a thread, so that a lack of the client's deadline is seen by the test's.
    thread::spawn(move || send.send(Client::connect(address, config)));
    let error = receive.recv_timeout(crate::kit::LIMIT).expect("connecting has a deadline").unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    let said = error.to_string();
    assert!(said.contains(word), "{said}");
    assert!(said.contains(&fake.address().server.to_string()), "{said}");
}

/// Greets with these bytes, and waits.
fn greets(bytes: Vec<u8>) -> impl FnMut(usize, UnixStream) + Send {
    move |_, mut stream| {
        send(&mut stream, &bytes);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    }
}

/// Replies to every option with these bytes, and waits.
fn replies(reply: impl Fn(u32) -> Vec<u8> + Send) -> impl FnMut(usize, UnixStream) + Send {
    move |_, mut stream| {
        send(&mut stream, &greeting(3));
        let _ = stream.read_exact(&mut [0; 4]);
        while let Some(option) = read_option(&mut stream) {
            if !send(&mut stream, &reply(option)) {
                return;
            }
        }
    }
}

#[test]
fn what_is_no_server_of_this_kind() {
    refused(greets(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()), "does not speak NBD");
    let oldstyle = [&b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"[..], &[0; 136]].concat();
    refused(greets(oldstyle), "oldstyle");
    refused(greets(greeting(0)), "fixed newstyle");
    refused(greets(greeting(2)), "fixed newstyle");
    refused(greets(Vec::new()), "greeting: timed out");
    refused(greets(b"NBDMAG".to_vec()), "greeting: timed out");
    refused(|_, stream| drop(stream), "greeting");
}

#[test]
fn what_does_not_answer_or_answers_nonsense() {
    refused(greets(greeting(3)), "reply to an option: timed out");
    refused(replies(|_| vec![0; 20]), "no reply");
    refused(replies(|option| option_reply(option + 1, rep::ACK, &[])), "while option");
    refused(replies(|option| option_reply(option, rep::INFO, &vec![0; 20_000])), "longer");
    refused(replies(|option| option_reply(option, rep::ACK, &[])), "without telling its size");
    refused(replies(|option| option_reply(option, rep::INFO, &[0, 9]).repeat(300)), "do not end");
    refused(replies(|option| option_reply(option, rep::ERR_TLS_REQD, b"no")), "demands TLS");
    refused(replies(|option| option_reply(option, rep::ERR_UNKNOWN, b"who?")), "no export");
    refused(replies(|option| option_reply(option, rep::ERR_SHUTDOWN, b"bye\x07")), "bye");
    refused(replies(|option| option_reply(option, 1 << 31 | 0x7777, b"?")), "0x80007777");
}

/// The deadline is one for the whole of the handshake, not one for each reply.
#[test]
fn what_answers_a_byte_at_a_time() {
    let trickle = |_, mut stream: UnixStream| {
        for byte in greeting(3).into_iter().chain(option_reply(opt::STRUCTURED_REPLY, rep::INFO, &[0; 5000])) {
            thread::sleep(Duration::from_millis(20));
            if !send(&mut stream, &[byte]) {
                return;
            }
        }
    };
    refused(trickle, "timed out");
}

#[test]
fn informations_that_contradict_the_protocol() {
    let with = |information: Vec<u8>| {
        replies(move |option| {
            if option != opt::GO {
                return option_reply(option, rep::ERR_UNSUP, &[]);
            }
            [option_reply(option, rep::INFO, &export()), option_reply(option, rep::INFO, &information)].concat()
        })
    };
    let blocks =
        |min: u32, max: u32| [&[0, 3][..], &min.to_be_bytes(), &4096_u32.to_be_bytes(), &max.to_be_bytes()].concat();
    refused(with(blocks(0, 1 << 20)), "minimum block is 0");
    refused(with(blocks(513, 1 << 20)), "513");
    refused(with(blocks(1 << 17, 1 << 20)), "131072");
    refused(with(blocks(4096, 512)), "largest payload");
    refused(with(vec![0, 3, 1]), "14 bytes");
    refused(with(vec![0, 0, 1]), "12 bytes");
    refused(with(vec![0]), "type is missing");
}

/// EXPORT_NAME is used with a server that does not know GO, with the zeroes and without.
#[test]
fn a_server_that_does_not_know_go() {
    for flags in [1_u16, 3] {
        let fake = Fake::new(Box::new(move |_, mut stream: UnixStream| {
            send(&mut stream, &greeting(flags));
            let _ = stream.read_exact(&mut [0; 4]);
            while let Some(option) = read_option(&mut stream) {
                if option != opt::EXPORT_NAME {
                    send(&mut stream, &option_reply(option, rep::ERR_UNSUP, &[]));
                    continue;
                }
                // The size and the flags, as in the information.
                let mut reply = export()[2..].to_vec();
                if flags & 2 == 0 {
                    reply.extend([0; 124]);
                }
                send(&mut stream, &reply);
                while let Some(request) = crate::honest::read_request(&mut stream) {
                    send(&mut stream, &crate::honest::answer(&request, false));
                }
            }
        }));
        let client = fake.client(Config::default());
        assert_eq!(client.size(), crate::honest::SIZE);
        assert_eq!(crate::kit::read(&client, 1000, 2000), crate::honest::content(1000, 2000));
        assert_eq!(client.losses(), 0);
    }
}

#[test]
fn an_address_where_nothing_listens() {
    let mut address = at("/nonexistent/socket".as_ref());
    let error = Client::connect(address.clone(), Config::default()).unwrap_err().to_string();
    assert!(error.contains("cannot connect") && error.contains("/nonexistent/socket"), "{error}");
    address.server = "tcp:name.invalid:10809".parse().unwrap();
    let error = Client::connect(address, Config { connect: Duration::from_secs(5), ..Config::default() }).unwrap_err();
    assert!(error.to_string().contains("cannot resolve"), "{error}");
}
