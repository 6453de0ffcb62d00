//! TLS, with nbdkit.

use std::{io::Read, time::Duration};

use everdisk_harness::wait::until_true;
use everdisk_proto::nbd::wire::{opt, rep};
use everdisk_store_nbd::{Client, Command, Config, Kind, Tls};
use tempfile::TempDir;

use crate::{
    certificates::make,
    conformance::suite,
    honest::{Fake, greeting, option_reply, read_option, send},
    kit::{begin, pattern, read, succeed, write},
    servers::Server,
};

fn server(directory: &TempDir, tls: &str) -> Server {
    let files = format!("--tls-certificates={}", directory.path().display());
    Server::nbdkit(&[tls, "--tls-verify-peer", &files, "memory", "20M"])
}

#[test]
fn an_encrypted_connection_carries_many_commands_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let files = make(directory.path(), "node.example");
    let mut server = server(&directory, "--tls=require");
    server.address.tls = Tls::Required(files);
    let client = server.client(Config::default());
    let len = 300_000_usize;
    let pending: Vec<_> = (0..60).map(|index| begin(&client, write(index * 300_000, len, index))).collect();
    for pending in pending {
        pending.wait().result.unwrap();
    }
    succeed(&client, Command::Flush);
    let pending: Vec<_> = (0..60_u64)
        .map(|index| begin(&client, Command::Read { offset: index * 300_000, memory: vec![0; len] }))
        .collect();
    for (index, pending) in (0..).zip(pending) {
        let outcome = pending.wait();
        outcome.result.unwrap();
        assert!(outcome.memory == pattern(len, index));
    }
    // Many small ones, so that writing and reading alternate.
    for index in 0..200 {
        succeed(&client, write(index * 64, 64, index + 1000));
    }
    assert_eq!(read(&client, 199 * 64, 64), pattern(64, 1199));
    // nbdkit keeps what memory holds for all connections: writes over one are seen over another.
    assert_eq!(client.losses(), 0);
}

#[test]
fn the_suite_of_every_server_over_tls() {
    let directory = tempfile::tempdir().unwrap();
    let files = make(directory.path(), "node.example");
    let mut server = server(&directory, "--tls=require");
    server.address.tls = Tls::Required(files);
    let client = server.client(Config::default());
    suite(&client, 20);
    assert_eq!(client.losses(), 0);
}

#[test]
fn a_server_killed_in_the_middle_of_encrypted_writes() {
    let directory = tempfile::tempdir().unwrap();
    let files = make(directory.path(), "node.example");
    let certificates = format!("--tls-certificates={}", directory.path().display());
    let options = ["--tls=require", "--tls-verify-peer", &certificates, "--filter=delay", "delay-write=10ms"];
    let mut server = Server::nbdkit_file(8 << 20, &options);
    server.address.tls = Tls::Required(files);
    let client = server.client(Config::default());
    let pending: Vec<_> = (0..150).map(|index| begin(&client, write(index * 40_000, 40_000, index))).collect();
    until_true("a write is at the server", || !client.outstanding_writes().is_empty());
    server.kill();
    server.start();
    for pending in pending {
        pending.wait().result.unwrap();
    }
    for index in 0..150 {
        assert!(read(&client, index * 40_000, 40_000) == pattern(40_000, index), "write {index}");
    }
    assert!(client.losses() > 0);
}

#[test]
fn a_server_that_demands_tls_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    make(directory.path(), "node.example");
    let server = server(&directory, "--tls=require");
    let error = Client::connect(server.address, Config::default()).unwrap_err();
    assert!(error.to_string().contains("demands TLS"), "{error}");
}

#[test]
fn a_server_without_tls_is_refused_where_tls_is_required() {
    let directory = tempfile::tempdir().unwrap();
    let files = make(directory.path(), "node.example");
    let mut server = Server::nbdkit(&["memory", "1M"]);
    server.address.tls = Tls::Required(files);
    let error = Client::connect(server.address, Config::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("offers no TLS"), "{error}");
}

/// The server agrees to TLS and then says nothing.
#[test]
fn tls_has_a_deadline_too() {
    let directory = tempfile::tempdir().unwrap();
    let files = make(directory.path(), "node.example");
    let fake = Fake::new(Box::new(|_, mut stream| {
        send(&mut stream, &greeting(3));
        let _ = stream.read_exact(&mut [0; 4]);
        let option = read_option(&mut stream).unwrap();
        assert_eq!(option, opt::STARTTLS);
        send(&mut stream, &option_reply(option, rep::ACK, &[]));
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    }));
    let mut address = fake.address();
    address.tls = Tls::Required(files);
    let config = Config { connect: Duration::from_millis(400), ..Config::default() };
    let error = Client::connect(address, config).unwrap_err().to_string();
    assert!(error.contains("agree on TLS") && error.contains("timed out"), "{error}");
}

#[test]
fn a_server_with_another_name_or_another_authority_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let files = make(directory.path(), "node.example");
    let mut server = server(&directory, "--tls=require");
    let mut other_name = files.clone();
    other_name.server_name = Some("other.example".into());
    server.address.tls = Tls::Required(other_name);
    let error = Client::connect(server.address.clone(), Config::default()).unwrap_err().to_string();
    assert!(error.contains("certificate not valid for name"), "{error}");

    let another = tempfile::tempdir().unwrap();
    let mut foreign = files.clone();
    foreign.authorities = make(another.path(), "node.example").authorities;
    server.address.tls = Tls::Required(foreign);
    let error = Client::connect(server.address.clone(), Config::default()).unwrap_err().to_string();
    assert!(error.contains("invalid peer certificate"), "{error}");

    let mut without_name = files;
    without_name.server_name = None;
    server.address.tls = Tls::Required(without_name);
    let error = Client::connect(server.address, Config::default()).unwrap_err().to_string();
    assert!(error.contains("configure the name"), "{error}");
}
