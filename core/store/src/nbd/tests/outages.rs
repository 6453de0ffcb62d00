//! Servers that die and come back.

use super::*;
use crate::ErrorKind;

const LEN: u64 = 2 << 20;

fn read(store: &dyn Store, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![1; len];
    store.read_at(offset, &mut bytes).unwrap();
    bytes
}

/// A server whose memory dies with it, behind which lies a file: what was flushed is in the file, what was not is lost.
fn forgetful() -> Server {
    // The cache writes back on a flush only.
    Server::nbdkit_file(4 << 20, &["--filter=cache", "cache=writeback"])
}

/// Semantics 5: what a flush has answered survives; what the server lost comes out of the next flush as an error, and not
/// before; after it has been written again, a flush that succeeds means durable.
#[test]
fn d5_what_a_dead_server_has_lost_comes_out_of_flush() {
    let mut server = forgetful();
    let store: Arc<dyn Store> = made(&server, LEN);
    store.write_at(0, &[1; 4096]).unwrap();
    store.flush().unwrap();
    store.write_at(65_536, &[2; 4096]).unwrap();
    server.kill();
    server.start();
    assert_eq!(read(&*store, 0, 4096), [1; 4096], "it was durable");
    assert_eq!(read(&*store, 65_536, 4096), [0; 4096], "the server has lost it; else this test shows nothing");
    let error = store.flush().unwrap_err();
    assert!(error.to_string().contains("may have lost them"), "{error}");
    assert_eq!((error.kind(), error.errno(), error.is_fault()), (ErrorKind::Unflushed, 5, true));
    store.write_at(65_536, &[2; 4096]).unwrap();
    store.flush().unwrap();
    server.kill();
    server.start();
    assert_eq!(read(&*store, 65_536, 4096), [2; 4096]);
    store.flush().unwrap();
}

/// The same for what was begun, and with zeros and discards, which can be lost as well.
#[test]
fn d5_lost_zeros_come_out_of_flush() {
    for op in [Op::Discard(4096), Op::WriteZeroes(4096), Op::Write(vec![2; 4096])] {
        let mut server = forgetful();
        let store: Arc<dyn Store> = made(&server, LEN);
        store.write_at(0, &[1; 4096]).unwrap();
        store.flush().unwrap();
        let begin = |op: Owned| {
            let (completion, pending) = crate::pending();
            Arc::clone(&store).begin(0, op, completion);
            pending.wait()
        };
        let (given_back, outcome) = begin(op.clone());
        outcome.unwrap();
        assert_eq!(given_back, op);
        server.kill();
        server.start();
        let (given_back, outcome) = begin(Op::Flush);
        assert_eq!(given_back, Op::Flush);
        assert!(outcome.unwrap_err().to_string().contains("may have lost them"), "{op:?}");
    }
}

/// A server that is away for a while is waited for; nothing fails, and nothing is lost.
#[test]
fn operations_wait_for_a_server_that_comes_back() {
    let mut server = Server::nbdkit_file(4 << 20, &[]);
    let store: Arc<dyn Store> = made(&server, LEN);
    store.write_at(0, &[1; 4096]).unwrap();
    store.flush().unwrap();
    server.kill();
    let begun: Vec<_> = [Op::Write(vec![3; 4096]), Op::Discard(4096), Op::Identify, Op::Seek(Sought::Hole)]
        .into_iter()
        .zip([4096, 0, 0, 65_536])
        .map(|(op, offset)| {
            let (completion, pending) = crate::pending();
            Arc::clone(&store).begin(offset, op, completion);
            pending
        })
        .collect();
    server.start();
    for pending in begun {
        let (op, outcome) = pending.wait();
        assert!(outcome.is_ok(), "{op:?}: {outcome:?}");
    }
    assert_eq!(read(&*store, 0, 4096), [0; 4096]);
    assert_eq!(read(&*store, 4096, 4096), [3; 4096]);
    store.flush().unwrap();
}

/// A server that stays away is given up after the time that was set. When it is back, the node serves.
#[test]
fn a_server_that_stays_away_is_unavailable() {
    let mut server = Server::nbdkit_file(4 << 20, &[]);
    made(&server, LEN);
    let limit = Duration::from_millis(300);
    let store: Arc<dyn Store> = Arc::new(NbdStore::open(server.export(), &format(LEN), limit).unwrap());
    server.kill();
    let (completion, pending) = crate::pending();
    Arc::clone(&store).begin(0, Op::Write(vec![3; 4096]), completion);
    let (op, outcome) = pending.wait();
    assert_eq!(op, Op::Write(vec![3; 4096]), "its data comes back");
    let error = outcome.unwrap_err();
    assert_eq!((error.kind(), error.errno(), error.is_fault()), (ErrorKind::Unavailable, 5, true), "{error}");
    let recheck = store.recheck().unwrap_err();
    assert_eq!(recheck.kind(), ErrorKind::Unavailable, "nothing else was found: {recheck}");
    assert_eq!(store.next(0, Sought::Data).unwrap_err().kind(), ErrorKind::Unavailable);
    server.start();
    everdisk_harness::wait::until_true("the node serves again", || store.recheck().is_ok());
    store.write_at(0, &[3; 4096]).unwrap();
}

/// A server that loses what was zeroed while a node is being made: it is zeroed again before the superblock is written.
#[test]
fn what_is_lost_between_a_change_and_its_flush_is_changed_again() {
    let mut server = forgetful();
    let client = node::connect(server.export(), Config::default(), None).unwrap();
    plain(&client, Command::Write { offset: 0, memory: vec![7; 4096], fua: true }).unwrap();
    let times = std::cell::Cell::new(0);
    let server = std::cell::RefCell::new(&mut server);
    extents::durably(&client, || {
        extents::zero(&client, 0..4096)?;
        times.set(times.get() + 1);
        if times.get() == 1 {
            server.borrow_mut().kill();
            server.borrow_mut().start();
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(times.get(), 2);
    assert_eq!(extents::read(&client, 0, 4096).unwrap(), [0; 4096]);
}
