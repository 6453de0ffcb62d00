//! The NBD store on real servers: the conformance suite, and servers that die.

mod nodes;
mod outages;
mod sizes;

use everdisk_harness::servers::Server;
use everdisk_proto::{nbd::wire::transmission_flag as flag, superblock::Superblock};
use std::{fs, os::unix::fs::MetadataExt};
use uuid::Uuid;

use super::*;
use crate::{
    Creation,
    conformance::{self, Fixture},
};

/// Limit on what a test waits for.
const LIMIT: Duration = Duration::from_secs(60);
/// Everdisk's own part of an export.
const TAIL: u64 = 1 << 20;

fn format(len: u64) -> NodeFormat {
    let superblock = Superblock {
        volume: Uuid::from_u128(0xA),
        node: Uuid::from_u128(0xB),
        size: len,
        stripe: 64 << 10,
        index: 0,
        nodes: 1,
    };
    NodeFormat { superblock, len }
}

fn force() -> Creation {
    Creation { force: true }
}

/// A node of `len` bytes on the server.
fn made(server: &Server, len: u64) -> Arc<NbdStore> {
    create(server.export(), &format(len), Creation::default()).unwrap().confirm();
    opened(server, len)
}

fn opened(server: &Server, len: u64) -> Arc<NbdStore> {
    Arc::new(NbdStore::open(server.export(), &format(len), LIMIT).unwrap())
}

/// Nodes on servers that are started for each.
struct Servers {
    start: fn(u64) -> Server,
    last: Option<Server>,
    knows_holes: bool,
    frees: bool,
}

impl Servers {
    fn of(start: fn(u64) -> Server) -> Self {
        Self { start, last: None, knows_holes: true, frees: true }
    }
}

impl Fixture for Servers {
    fn store(&mut self, len: u64) -> Arc<dyn Store> {
        let server = self.last.insert((self.start)(len + TAIL));
        made(server, len)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        let image = fs::metadata(self.last.as_ref().unwrap().image()).ok()?;
        self.frees.then(|| image.blocks() * 512)
    }

    fn knows_holes(&self) -> bool {
        self.knows_holes
    }

    fn reserves(&self) -> bool {
        false
    }
}

#[test]
fn m7_conforms_on_nbdkit_in_memory() {
    conformance::run(&mut Servers::of(|size| Server::nbdkit(&["memory", &size.to_string()])));
}

#[test]
fn m7_conforms_on_nbdkit_with_a_file() {
    conformance::run(&mut Servers::of(|size| Server::nbdkit_file(size, &[])));
}

#[test]
fn m7_conforms_on_qemu_nbd() {
    conformance::run(&mut Servers::of(Server::qemu_nbd));
}

#[test]
fn m7_conforms_on_qemu_nbd_with_blocks_of_4096() {
    let server = Server::qemu_nbd_of_4096(8 << 20);
    assert_eq!(made(&server, 4 << 20).client().offer().blocks.min, 4096);
    conformance::run(&mut Servers::of(Server::qemu_nbd_of_4096));
}

#[test]
fn m7_conforms_on_nbdkit_with_blocks_of_65536() {
    let start = |size| {
        let filter = ["--filter=blocksize-policy", "blocksize-minimum=65536", "blocksize-error-policy=error"];
        Server::nbdkit_file(size, &[&filter[..], &["blocksize-preferred=65536"]].concat())
    };
    conformance::run(&mut Servers::of(start));
}

/// It has neither block status nor zeroing, only TRIM, after which the bytes may be anything.
#[test]
fn m7_conforms_on_nbd_server() {
    conformance::run(&mut Servers { knows_holes: false, frees: false, ..Servers::of(Server::nbd_server) });
}

/// Neither zeroing nor block status: zeros are written over what is not zero.
#[test]
fn m7_conforms_where_the_server_offers_the_least() {
    let start = |size| Server::nbdkit_file(size, &["--no-sr", "--filter=nozero", "--filter=noextents"]);
    let server = start(4 << 20);
    let store = made(&server, 1 << 20);
    assert!(!offers(store.client(), flag::SEND_WRITE_ZEROES) && store.client().offer().context.is_none());
    conformance::run(&mut Servers { knows_holes: false, frees: false, ..Servers::of(start) });
}

/// A server that offers fast zeroing and cannot do it there.
#[test]
fn a_discard_that_cannot_be_fast_is_done_slowly() {
    let server = Server::nbdkit_file(4 << 20, &["--filter=nozero", "zeromode=emulate", "fastzeromode=slow"]);
    let store = made(&server, 2 << 20);
    assert!(offers(store.client(), flag::SEND_FAST_ZERO) && offers(store.client(), flag::SEND_WRITE_ZEROES));
    let store: Arc<dyn Store> = store;
    for begun in [false, true] {
        store.write_at(0, &vec![7; 1 << 20]).unwrap();
        if begun {
            let (completion, pending) = crate::pending();
            Arc::clone(&store).begin(4096, Op::Discard(8192), completion);
            let (op, outcome) = pending.wait();
            assert_eq!((op, outcome.unwrap()), (Op::Discard(8192), None));
        } else {
            store.discard(4096, 8192).unwrap();
        }
        let mut expected = vec![7; 1 << 20];
        expected[4096..4096 + 8192].fill(0);
        let mut found = vec![1; 1 << 20];
        store.read_at(0, &mut found).unwrap();
        assert!(found == expected, "begun: {begun}");
    }
}

/// The volume's end is the node's, not the export's: what is Everdisk's own is out of reach.
#[test]
fn no_operation_reaches_the_tail() {
    let server = Server::nbdkit_file(8 << 20, &[]);
    let store: Arc<dyn Store> = made(&server, 1 << 20);
    store.write_at(0, &vec![7; 1 << 20]).unwrap();
    store.discard(0, 1 << 20).unwrap();
    store.write_zeroes(0, 1 << 20).unwrap();
    assert_eq!(store.next(0, Sought::Data).unwrap(), None);
    store.recheck().unwrap();
    opened(&server, 1 << 20);
}

/// The kinds that the engine and the applications see.
#[test]
fn errors_of_the_server_have_kinds() {
    use crate::ErrorKind::{Fault, Full};
    // The filter fails what is begun when the file is there, so the node can be made.
    for (error, kind, errno) in [("ENOSPC", Full, 28), ("EIO", Fault, 5), ("EPERM", Fault, 5), ("EINVAL", Fault, 5)] {
        let (error, rate) = (format!("error-pwrite={error}"), "error-pwrite-rate=100%");
        let server = Server::nbdkit_file(4 << 20, &["--filter=error", &error, rate, "error-pwrite-file=@/fails"]);
        let store: Arc<dyn Store> = made(&server, 1 << 20);
        fs::write(server.image().with_file_name("fails"), "").unwrap();
        let failed = store.write_at(0, &[1; 4096]).unwrap_err();
        assert_eq!((failed.kind(), failed.errno(), failed.is_fault()), (kind, errno, true), "{failed}");
        assert!(failed.to_string().starts_with(&format!("{}: ", server.url())), "{failed}");
        let (completion, pending) = crate::pending();
        Arc::clone(&store).begin(0, Op::Write(vec![1; 4096]), completion);
        let (op, outcome) = pending.wait();
        assert_eq!(op, Op::Write(vec![1; 4096]), "its data comes back");
        assert_eq!(outcome.unwrap_err().kind(), kind);
    }
}
