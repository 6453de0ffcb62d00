//! Superblocks that are torn, nodes that grow, and exports that change their size.

use std::os::unix::fs::FileExt;

use super::*;

const LEN: u64 = 1 << 20;
const SIZE: u64 = 8 << 20;
const FIRST: u64 = SIZE - TAIL;
const SECOND: u64 = FIRST + 65_536;

fn image(server: &Server) -> fs::File {
    fs::File::options().read(true).write(true).open(server.image()).unwrap()
}

fn put(server: &Server, offset: u64, bytes: &[u8]) {
    image(server).write_all_at(bytes, offset).unwrap();
}

fn encoded(format: &NodeFormat) -> [u8; 4096] {
    format.superblock.encode()
}

/// The first `n` bytes of one, the rest of the other.
fn torn(new: &NodeFormat, old: &NodeFormat, n: usize) -> Vec<u8> {
    [&encoded(new)[..n], &encoded(old)[n..]].concat()
}

/// Every state that a death can leave a write of the superblock in, at any byte that tells the two apart.
#[test]
fn a_superblock_that_is_torn_anywhere_is_the_old_or_the_new_one() {
    let server = Server::nbdkit_file(SIZE, &[]);
    made(&server, LEN);
    let (old, new) = (format(LEN), format(2 * LEN));
    for n in [0, 1, 12, 13, 50, 56, 512, 4096] {
        put(&server, FIRST, &torn(&new, &old, n));
        put(&server, SECOND, &encoded(&old));
        let is_old = check_open(server.export(), &old).is_ok();
        assert!(is_old != check_open(server.export(), &new).is_ok(), "the first copy is torn at {n}");
        assert_eq!(is_old, n < 51, "only a whole one is new");
        put(&server, FIRST, &encoded(&new));
        put(&server, SECOND, &torn(&new, &old, n));
        check_open(server.export(), &new).unwrap();
    }
}

/// What is torn is healed by the next write, from every state and in every direction, and no data is lost.
#[test]
fn a_resize_that_died_anywhere_can_be_repeated_and_undone() {
    let (old, new, newer) = (format(LEN), format(2 * LEN), format(4 * LEN));
    let server = Server::nbdkit_file(SIZE, &[]);
    let store: Arc<dyn Store> = made(&server, LEN);
    store.write_at(1000, b"kept").unwrap();
    store.flush().unwrap();
    let torn = torn(&new, &old, 51);
    let (a, b) = (encoded(&old).to_vec(), encoded(&new).to_vec());
    for (first, second) in [(&a, &a), (&torn, &a), (&b, &a), (&b, &torn), (&b, &b)] {
        for target in [old, new, newer] {
            put(&server, FIRST, first);
            put(&server, SECOND, second);
            check_resize(server.export(), &old, &target).unwrap();
            resize(server.export(), &old, &target).unwrap();
            let store: Arc<dyn Store> = opened(&server, target.len);
            let mut bytes = [0; 4];
            store.read_at(1000, &mut bytes).unwrap();
            assert_eq!(&bytes, b"kept");
        }
    }
}

/// Bytes that were not there before read as zeros, whatever somebody has written behind the node in between.
#[test]
fn what_a_node_gains_reads_as_zeros() {
    for server in [Server::nbdkit_file(SIZE, &[]), Server::nbd_server(SIZE)] {
        made(&server, LEN);
        put(&server, LEN - 4, b"keptgarbage");
        put(&server, 3 * LEN - 2, b"xy");
        resize(server.export(), &format(LEN), &format(3 * LEN)).unwrap();
        let store: Arc<dyn Store> = opened(&server, 3 * LEN);
        let mut bytes = vec![1; usize::try_from(2 * LEN + 4).unwrap()];
        store.read_at(LEN - 4, &mut bytes).unwrap();
        assert!(bytes.starts_with(b"kept") && bytes[4..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_resize_is_refused_where_it_does_not_fit_and_where_it_would_cut_data_off() {
    let server = Server::nbdkit_file(SIZE, &[]);
    made(&server, LEN);
    let (old, most, more) = (format(LEN), format(SIZE - TAIL), format(SIZE - TAIL + 4096));
    for refused in [check_resize(server.export(), &old, &more), resize(server.export(), &old, &more)] {
        assert!(matches!(refused, Err(OpenError::TooSmall { found: SIZE, .. })), "{refused:?}");
    }
    let mut other = old;
    other.superblock.node = Uuid::from_u128(0xC);
    assert!(matches!(resize(server.export(), &other, &most), Err(OpenError::OtherNode { .. })));
    assert!(matches!(resize(server.export(), &most, &most), Err(OpenError::OtherLayout { .. })));
    resize(server.export(), &old, &most).unwrap();
    // The volume was used at that size, and its description is an older one.
    let store: Arc<dyn Store> = opened(&server, most.len);
    store.write_at(5 * LEN, b"dear").unwrap();
    for target in [old, format(3 * LEN)] {
        for refused in [check_resize(server.export(), &old, &target), resize(server.export(), &old, &target)] {
            assert!(matches!(refused, Err(OpenError::Beyond { .. })), "{refused:?}");
        }
    }
    resize(server.export(), &old, &most).unwrap();
    let mut bytes = [0; 4];
    store.read_at(5 * LEN, &mut bytes).unwrap();
    assert_eq!(&bytes, b"dear", "what was written above is kept");
}

/// The words say which size it had, wherever the record can still be found.
#[test]
fn an_export_that_has_shrunk_or_grown_is_reported_as_such() {
    let (old, new) = (format(LEN), format(2 * LEN));
    for arguments in [&[][..], &["--filter=noextents"]] {
        let mut server = Server::nbdkit_file(SIZE, arguments);
        made(&server, LEN);
        let tail = fs::read(server.image()).unwrap();
        for size in [SIZE + 100, SIZE + (3 << 20), 3 * SIZE, SIZE - 4096, SIZE - (800 << 10)] {
            server.kill();
            image(&server).set_len(size).unwrap();
            server.start();
            for refused in [
                check_open(server.export(), &old),
                NbdStore::open(server.export(), &old, LIMIT).map(drop),
                check_resize(server.export(), &old, &new),
                resize(server.export(), &old, &new),
            ] {
                let text = refused.unwrap_err().to_string();
                let words = format!("{}: the export has {size} bytes and had {SIZE}: restore its size", server.url());
                assert_eq!(text, words);
            }
            image(&server).set_len(SIZE).unwrap();
            image(&server).write_all_at(&tail, 0).unwrap();
        }
        // The record is gone.
        for (size, words) in [(SIZE - (2 << 20), "another size"), (TAIL + LEN - 4096, "needs 2097152")] {
            server.kill();
            image(&server).set_len(size).unwrap();
            server.start();
            let text = check_open(server.export(), &old).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }
}

/// The client itself refuses to go on with an export of another size.
#[test]
fn an_export_that_changes_its_size_under_a_core_is_damaged() {
    let mut server = Server::nbdkit_file(SIZE, &[]);
    let store: Arc<dyn Store> = made(&server, LEN);
    server.kill();
    image(&server).set_len(SIZE + 4096).unwrap();
    server.start();
    let error = store.read_at(0, &mut [0; 4096]).unwrap_err();
    assert!(error.to_string().contains(&format!("the export has {} bytes and had {SIZE}", SIZE + 4096)), "{error}");
    assert_eq!(error.kind(), crate::ErrorKind::Damaged);
}

/// One copy of the superblock then lies where the other is sought.
#[test]
fn an_export_that_changed_by_the_distance_of_the_copies_is_refused() {
    for size in [SIZE + 65_536, SIZE - 65_536] {
        let mut server = Server::nbdkit_file(SIZE, &[]);
        drop(made(&server, LEN));
        server.terminate();
        image(&server).set_len(size).unwrap();
        server.start();
        let refused = check_open(server.export(), &format(LEN)).unwrap_err();
        assert!(matches!(refused, OpenError::ExportSize { had: SIZE, .. }), "{refused}");
    }
}
