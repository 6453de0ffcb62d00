//! A flush that fails once, on storage nodes that do what Linux does: what could not be written is gone from them, and their next flush
//! succeeds (`fault_store`). Each client that flushes gets the error, and a flush that succeeds afterwards means durable: the data is on the nodes.

use std::{fs::File, os::unix::fs::FileExt};

use everdisk_tests::{
    bytes::pattern,
    faults::Faults,
    host::Host,
    nbd::{Client, Exported, Kind},
    processes,
    run::Output,
    volume::{Volume, report, striped},
};
use rustix::io::Errno;

/// The nodes lose what is unflushed, and say so.
const FAILS: &str = "flush drop=EIO";
const SIZE: usize = 8 << 20;
/// What is written after the last good flush: on both nodes.
const AT: u64 = 100_000;
const LEN: usize = 1_200_000;
/// No write passes it by.
const BUFFERED: &[&str] = &["--buffer", "32M", "--bypass", "never"];
const NBD_EIO: u32 = 5;

/// A host of volatile nodes.
fn host(options: &[&str]) -> Host {
    let host = Host::faulty();
    host.create_with("v", "8M", 2, options);
    host
}

/// A volume with a file that is full and flushed, and what it holds.
struct Flushed<'a> {
    volume: Volume<'a>,
    faults: Faults,
    file: File,
    bytes: Vec<u8>,
}

impl<'a> Flushed<'a> {
    fn new(host: &'a Host) -> Self {
        let volume = Volume::new(host, "v");
        let faults = Faults::volatile(&volume);
        volume.attach(&[]);
        Self::of(volume, faults)
    }

    fn of(volume: Volume<'a>, faults: Faults) -> Self {
        let (file, bytes) = (volume.open(), pattern(1, SIZE));
        file.write_all_at(&bytes, 0).unwrap();
        file.sync_data().unwrap();
        Self { volume, faults, file, bytes }
    }

    /// Writes by the file; it is acknowledged.
    fn write(&mut self, at: u64, seed: u64) {
        let data = pattern(seed, LEN);
        self.file.write_all_at(&data, at).unwrap();
        self.expect(at, &data);
    }

    fn expect(&mut self, at: u64, data: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn fsync(&self) -> Result<(), Errno> {
        self.file.sync_data().map_err(|e| Errno::from_io_error(&e).unwrap())
    }

    /// The application flushes until a flush succeeds, after which all has to be durable. Returns how many times it was told
    /// that a flush failed.
    fn flushes_until_durable(&self) -> usize {
        let failed = (0..10).take_while(|_| self.fsync().is_err()).count();
        assert!(failed < 10, "the nodes work again, and no flush succeeds");
        self.is_durable("an fsync");
        failed
    }

    fn is_durable(&self, who: &str) {
        let found = striped(&self.faults.durable(), SIZE);
        let lost = found.iter().zip(&self.bytes).filter(|(a, b)| a != b).count();
        assert_eq!(lost, 0, "{who} said durable, and the storage nodes lack some {lost} acknowledged bytes");
        self.is_read();
    }

    fn is_read(&self) {
        let mut found = vec![0; SIZE];
        self.file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == self.bytes, "what was acknowledged is not read");
    }

    fn end(self) {
        let Self { volume, file, faults, .. } = self;
        drop(file);
        volume.detach();
        drop(faults);
    }
}

/// Nothing was done, and the message does not belittle it.
fn refused(output: Output) {
    let output = output.refused(1, &[]);
    assert!(!output.stderr.contains("nothing is lost") && !output.stderr.contains(" 0 MiB"), "{}", output.stderr);
}

/// semantics 7: the application's own fsync fails, as often as the nodes do; then one succeeds, and means it.
#[test]
fn d5_the_applications_next_fsync_after_a_failed_one_means_durable() {
    let host = host(BUFFERED);
    let mut flushed = Flushed::new(&host);
    for (node, times) in [(0, 1), (1, 1), (0, 3)] {
        flushed.write(AT, 2 + node as u64 + times);
        flushed.faults.set_node(node, FAILS);
        for _ in 0..times {
            assert_eq!(flushed.fsync(), Err(Errno::IO), "a flush of node {node} that fails is told");
            flushed.is_read();
        }
        assert!(flushed.volume.status().buffered() > 0, "what is on no node is kept, and said to be");
        flushed.faults.clear();
        assert_eq!(flushed.flushes_until_durable(), 0);
    }
    flushed.end();
}

/// semantics 7: an application that wrote nothing is told of the failure; the one that wrote is not told that it is durable when it is not.
#[test]
fn d5_anothers_failed_fsync_makes_no_later_one_lie() {
    let host = host(BUFFERED);
    let mut flushed = Flushed::new(&host);
    flushed.write(AT, 2);
    flushed.faults.set(FAILS);
    let other = flushed.volume.open();
    other.sync_data().unwrap_err();
    flushed.faults.clear();
    flushed.flushes_until_durable();
    other.sync_data().unwrap();
    drop(other);
    flushed.end();
}

/// semantics 8: `everdisk flush` fails as long as the nodes do, and the application that wrote the data gets the error once.
#[test]
fn d5_a_failed_flush_by_the_operator_is_told_again_and_to_the_application() {
    let host = host(BUFFERED);
    let mut flushed = Flushed::new(&host);
    flushed.write(AT, 2);
    flushed.faults.set(FAILS);
    for _ in 0..2 {
        refused(flushed.volume.ask("flush", &[]));
    }
    flushed.faults.clear();
    flushed.volume.ask("flush", &[]).ok();
    flushed.is_durable("the operator's flush");
    assert_eq!(
        flushed.flushes_until_durable(),
        1,
        "the application learns at its next fsync what the operator was told"
    );
    flushed.end();
}

/// semantics 8: a detach that cannot flush keeps the volume attached, the second time too; the one that succeeds has everything on the
/// nodes.
#[test]
fn d5_a_detach_after_a_failed_one_means_durable() {
    let host = host(BUFFERED);
    let mut flushed = Flushed::new(&host);
    flushed.write(AT, 2);
    let Flushed { volume, faults, file, bytes } = flushed;
    drop(file);
    faults.set(FAILS);
    for _ in 0..2 {
        refused(volume.ask("detach", &[]));
        assert_eq!(volume.status().state(), "serving");
    }
    faults.clear();
    volume.detach();
    assert!(
        striped(&faults.durable(), SIZE) == bytes,
        "detached with success, and the storage nodes lack what was acknowledged"
    );
}

/// M2, semantics 7: the flush of an upgrade fails. However the upgrade ends, what was acknowledged is there, and the application
/// learns of it once.
#[test]
fn m2_d5_the_failed_flush_of_an_upgrade_loses_nothing_and_is_told_to_the_application() {
    let host = host(BUFFERED);
    let mut flushed = Flushed::new(&host);
    for handover in ["flush", "carry"] {
        flushed.write(AT, 2);
        flushed.faults.set(FAILS);
        let core = flushed.volume.other_core();
        let output = flushed.volume.try_upgrade(&core, &["--soak", "0s", "--handover", handover]);
        println!("{handover}: {}", report(&output).outcome());
        flushed.is_read();
        flushed.faults.clear();
        let told = flushed.flushes_until_durable();
        assert!(told > 0 || handover == "carry", "the application learns at its next fsync what failed");
        flushed.volume.settled();
    }
    flushed.end();
}

/// errseq_t across a death: the core that was told of the failure dies with it, and its standby, and one is started that knows of nothing.
/// The application learns of it once, and then durable means durable.
#[test]
fn beyond2_d5_a_failed_flush_is_not_forgotten_with_the_core_that_saw_it() {
    let host = host(BUFFERED);
    let mut flushed = Flushed::new(&host);
    flushed.write(AT, 2);
    flushed.faults.set(FAILS);
    refused(flushed.volume.ask("flush", &[]));
    for _ in 0..2 {
        let status = flushed.volume.settled();
        processes::kill_together(&[status.core().unwrap(), status.standby().unwrap()]);
        let next =
            |now: &everdisk_tests::status::Status| now.serves() && !status.cores().contains(&now.core().unwrap());
        flushed.volume.wait("a core that is new", next);
    }
    flushed.is_read();
    flushed.faults.clear();
    assert_eq!(
        flushed.flushes_until_durable(),
        1,
        "the application learns at its next fsync what failed before the death"
    );
    flushed.end();
}

/// The kernel writes back by itself, and fails, while no flush runs. The next fsync fails, whichever core it meets; the one after it means
/// durable.
#[test]
fn d5_a_write_back_that_fails_by_itself_is_told_and_loses_nothing() {
    let host = host(BUFFERED);
    let mut flushed = Flushed::new(&host);
    for change in [false, true] {
        flushed.write(AT, 2 + u64::from(change));
        // Everything is on the nodes, and nothing was flushed.
        flushed.faults.set("flush fail=EIO");
        assert!(flushed.fsync().is_err());
        flushed.faults.clear();
        let lost = flushed.faults.fail_write_back(0) + flushed.faults.fail_write_back(1);
        println!("{lost} bytes lost");
        if change {
            flushed.volume.settled();
            flushed.volume.kill_core();
        }
        flushed.flushes_until_durable();
    }
    flushed.end();
}

/// Two NBD connections and the file wrote; one connection's flush fails. Each of the others learns of it at its own next flush, once; and when
/// one says durable, it is.
#[test]
fn d5_each_nbd_connection_and_the_file_learn_of_a_failed_flush() {
    let host = host(BUFFERED);
    let volume = Volume::new(&host, "v");
    let faults = Faults::volatile(&volume);
    let exported = Exported::attach(volume.clone());
    let mut flushed = Flushed::of(volume, faults);
    let mut clients = [exported.unix.client(), exported.tcp.client()];
    let flush = |client: &mut Client| {
        client.send(Kind::Flush, 1, 0, 0, &[]).unwrap();
        client.reply().unwrap().1
    };
    for round in 0..2 {
        flushed.write(AT, 3 * round + 2);
        for (n, client) in (1..).zip(&mut clients) {
            let (at, data) = (AT + n * (2 << 20), pattern(3 * round + 2 + n, LEN));
            client.write(at, &data);
            flushed.expect(at, &data);
        }
        flushed.faults.set(FAILS);
        assert_eq!(flush(&mut clients[0]), NBD_EIO);
        flushed.faults.clear();
        if round == 1 {
            flushed.volume.turn();
        }
        assert_eq!(flush(&mut clients[0]), 0, "it was told already");
        flushed.is_durable("an NBD flush");
        assert_eq!(flush(&mut clients[1]), NBD_EIO, "the other connection learns of it");
        assert_eq!(flush(&mut clients[1]), 0);
        assert!(flushed.flushes_until_durable() > 0, "and so does the file");
    }
    clients.into_iter().for_each(Client::end);
    let Flushed { file, .. } = flushed;
    drop(file);
    exported.detach();
}

/// What passed the buffer by cannot be written again: it is lost, and said to be, by reads and by every flush, until it is written anew.
#[test]
fn d5_what_passed_the_buffer_by_is_lost_by_a_failed_flush_until_it_is_written_anew() {
    const AT: u64 = 1 << 20;
    let host = host(&["--buffer", "0"]);
    let mut flushed = Flushed::new(&host);
    let [lost, anew] = [2, 3].map(|seed| pattern(seed, 1 << 20));
    flushed.file.write_all_at(&lost, AT).unwrap();
    flushed.faults.set(FAILS);
    assert_eq!(flushed.fsync(), Err(Errno::IO));
    flushed.faults.clear();
    let mut found = vec![0; 4096];
    for killed in [false, true] {
        if killed {
            flushed.volume.settled();
            flushed.volume.kill_core();
        }
        for _ in 0..2 {
            assert_eq!(flushed.fsync(), Err(Errno::IO), "acknowledged data is on no node, and an fsync succeeds");
        }
        for at in [AT, AT + (1 << 19), AT + (1 << 20) - 4096] {
            assert!(flushed.file.read_exact_at(&mut found, at).is_err(), "what was lost is read as something older");
        }
        flushed.file.read_exact_at(&mut found, 4 << 20).unwrap();
    }
    flushed.file.write_all_at(&anew, AT).unwrap();
    flushed.expect(AT, &anew);
    flushed.flushes_until_durable();
    flushed.end();
}
