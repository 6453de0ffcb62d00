//! Servers that fail commands, and commands that do not fit.

use std::sync::{Arc, mpsc};

use everdisk_store_nbd::{Client, Command, Completion, Config, Kind, Outcome};

use crate::{
    kit::{LIMIT, call, fail, pattern, read, succeed, write},
    servers::Server,
};

fn failing(error: &str) -> Server {
    Server::nbdkit(&["--filter=error", "memory", "1M", &format!("error={error}"), "error-rate=100%"])
}

#[test]
fn errors_of_the_server_have_kinds_and_give_the_memory_back() {
    for (error, kind) in [
        ("ENOSPC", Kind::Full),
        ("EIO", Kind::Fault(5)),
        ("EPERM", Kind::Fault(1)),
        ("ENOMEM", Kind::Fault(12)),
        ("EINVAL", Kind::Invalid),
    ] {
        let server = failing(error);
        let client = server.client(Config::default());
        let outcome = call(&client, write(0, 3000, 1));
        assert_eq!(outcome.memory, pattern(3000, 1));
        let failure = outcome.result.unwrap_err();
        assert_eq!(failure.kind(), kind, "{failure}");
        assert!(failure.to_string().contains(&server.address.server.to_string()), "{failure}");
        let outcome = call(&client, Command::Read { offset: 0, memory: vec![0; 4096] });
        assert_eq!((outcome.memory.len(), outcome.result.unwrap_err().kind()), (4096, kind));
        assert_eq!(client.losses(), 0);
    }
}

fn refused(client: &Client, command: Command, kind: Kind, word: &str) {
    let error = fail(client, command);
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(word), "{error}");
}

#[test]
fn commands_that_do_not_fit_are_refused_without_the_server() {
    let server = Server::nbdkit(&["--readonly", "memory", "1M"]);
    let client = server.client(Config::default());
    refused(&client, write(0, 1, 1), Kind::Invalid, "read-only");
    for offset in [(1 << 20) - 1, 1 << 20, u64::MAX - 1, u64::MAX] {
        refused(&client, Command::Read { offset, memory: vec![0; 2] }, Kind::Invalid, "1048576 bytes");
    }
    assert_eq!(read(&client, (1 << 20) - 1, 1), [0]);
    assert!(read(&client, 1 << 20, 0).is_empty());
}

/// The client goes with the last handle, which may be that of a completion: on the thread that the client would wait for.
#[test]
fn a_completion_may_close_the_client() {
    let server = Server::nbdkit(&["--filter=delay", "memory", "1M", "delay-read=50ms"]);
    for _ in 0..5 {
        let client = Arc::new(server.client(Config::default()));
        let (send, receive) = mpsc::channel();
        let last = Arc::clone(&client);
        let then = move |outcome: Outcome| {
            drop(last);
            send.send(outcome.result).unwrap();
        };
        client.begin(Command::Read { offset: 0, memory: vec![0; 10] }, Completion::new(then));
        drop(client);
        receive.recv_timeout(LIMIT).unwrap().unwrap();
    }
}

#[test]
fn what_the_server_does_not_offer_is_unsupported() {
    let server = Server::nbdkit(&["--no-sr", "--filter=nozero", "memory", "1M"]);
    let client = server.client(Config::default());
    refused(&client, Command::BlockStatus { offset: 0, len: 1 }, Kind::Unsupported, "block status");
    let fast = Command::Zeroes { offset: 0, len: 1, may_punch: true, fast: true };
    refused(&client, fast, Kind::Unsupported, "zeroing");
    succeed(&client, Command::Zeroes { offset: 0, len: 1 << 20, may_punch: true, fast: false });
}
