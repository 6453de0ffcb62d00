//! Making and removing nodes, and every refusal with its words.

use std::os::unix::fs::FileExt;

use super::*;
use crate::{ErrorKind, nbd::tail};

const LEN: u64 = 2 << 20;
/// A node of [`LEN`], with a MiB to spare.
const SIZE: u64 = 4 << 20;

/// Writes into the image behind the server's back.
fn put(server: &Server, offset: u64, bytes: &[u8]) {
    fs::File::options().write(true).open(server.image()).unwrap().write_all_at(bytes, offset).unwrap();
}

fn image(server: &Server) -> Vec<u8> {
    fs::read(server.image()).unwrap()
}

/// The offset of the first byte of the image that is not zero.
fn used(server: &Server) -> Option<usize> {
    image(server).iter().position(|byte| *byte != 0)
}

/// The refusal, which names the node, and says this.
#[track_caller]
fn refused<T: std::fmt::Debug>(server: &Server, result: Result<T, OpenError>, words: &str) -> OpenError {
    let error = result.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(&format!("{}: ", server.url())), "{text}");
    assert!(text.contains(words), "{text}");
    assert_eq!(text.matches("socket=").count(), 1, "it names the node once: {text}");
    error
}

/// The servers that differ in what they tell and do: block status and zeroing, neither, and TRIM alone.
fn servers() -> [Server; 4] {
    [
        Server::nbdkit_file(SIZE, &[]),
        Server::qemu_nbd(SIZE),
        Server::nbdkit_file(SIZE, &["--no-sr", "--filter=nozero", "--filter=noextents"]),
        Server::nbd_server(SIZE),
    ]
}

#[test]
fn a_node_that_is_made_has_its_layout_and_is_undone_unless_confirmed() {
    for server in servers() {
        drop(create(server.export(), &format(LEN), Creation::default()).unwrap());
        assert_eq!(used(&server), None, "something is left of an unconfirmed creation");

        made(&server, LEN);
        let (image, tail) = (image(&server), usize::try_from(SIZE - TAIL).unwrap());
        let superblock = format(LEN).superblock.encode();
        assert_eq!(used(&server), Some(tail));
        assert!(image[tail..tail + 4096] == superblock && image[tail + 65_536..tail + 69_632] == superblock);
        let record = tail + 131_072;
        assert_eq!(&image[record..record + 8], b"EVERDEXP");
        assert_eq!(image[record + 48..record + 56], SIZE.to_le_bytes());
        assert!(image[record + 4096..].iter().all(|byte| *byte == 0), "the rest is reserved");
        check_open(server.export(), &format(LEN)).unwrap();
    }
}

#[test]
fn an_export_that_is_not_empty_is_refused_with_what_was_found_and_where() {
    for server in servers() {
        for offset in [0, 511, LEN + 77, SIZE - TAIL, SIZE - 1] {
            put(&server, offset, &[0xa5]);
            let error = refused(
                &server,
                create(server.export(), &format(LEN), Creation::default()),
                &format!("the byte at {offset} is 0xa5"),
            );
            assert!(error.to_string().contains("--force"), "{error}");
            let mut expected = vec![0; usize::try_from(SIZE).unwrap()];
            expected[usize::try_from(offset).unwrap()] = 0xa5;
            assert!(image(&server) == expected, "a refused creation has changed something");
            put(&server, offset, &[0]);
        }
        // Zeros that take space are zeros.
        put(&server, 0, &vec![0; usize::try_from(SIZE).unwrap()]);
        made(&server, LEN);
    }
}

/// The first of several that are found at once is named.
#[test]
fn the_first_byte_that_is_in_the_way_is_named() {
    let server = Server::nbdkit_file(SIZE + (20 << 20), &["--filter=noextents"]);
    for offset in [12 << 20, (5 << 20) + 3, 6 << 20] {
        put(&server, offset, &[1]);
    }
    let created = create(server.export(), &format(LEN), Creation::default());
    refused(&server, created, &format!("the byte at {} is 0x01", (5 << 20) + 3));
}

/// A new volume reads as zeros, always.
#[test]
fn a_forced_creation_over_garbage_reads_as_zeros() {
    for server in servers() {
        put(&server, 0, &vec![0xa5; usize::try_from(SIZE).unwrap()]);
        create(server.export(), &format(LEN), force()).unwrap().confirm();
        let store: Arc<dyn Store> = opened(&server, LEN);
        let mut found = vec![1; usize::try_from(LEN).unwrap()];
        store.read_at(0, &mut found).unwrap();
        assert!(found.iter().all(|byte| *byte == 0));
        assert_eq!(
            used(&server),
            Some(usize::try_from(SIZE - TAIL).unwrap()),
            "a larger volume would not read as zeros"
        );
    }
}

#[test]
fn a_node_is_in_use_also_for_force() {
    let server = Server::nbdkit_file(SIZE, &[]);
    let store: Arc<dyn Store> = made(&server, LEN);
    store.write_at(0, b"dear").unwrap();
    let mut other = format(LEN);
    other.superblock.volume = Uuid::from_u128(0xC);
    for how in [Creation::default(), force()] {
        let error = refused(&server, create(server.export(), &other, how), &Uuid::from_u128(0xA).to_string());
        assert!(matches!(error, OpenError::InUse { .. }), "{error:?}");
        assert!(error.to_string().contains("Choose another export"), "{error}");
    }
    // One copy is enough for that.
    put(&server, SIZE - TAIL, &[0; 4096]);
    refused(&server, create(server.export(), &other, force()), "already");
    let mut bytes = [0; 4];
    store.read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"dear");
    store.recheck().unwrap();
}

#[test]
fn what_another_build_has_made_is_refused_also_for_force() {
    let server = Server::nbdkit_file(SIZE, &[]);
    let mut bytes = format(LEN).superblock.encode();
    bytes[8] = 9;
    put(&server, SIZE - TAIL, &bytes);
    for how in [Creation::default(), force()] {
        refused(&server, create(server.export(), &format(LEN), how), "format 9");
    }
    // A damaged one of this format is no node.
    put(&server, SIZE - TAIL + 8, &[1, 0, 0, 0, 0xff]);
    refused(&server, create(server.export(), &format(LEN), Creation::default()), "damaged");
    create(server.export(), &format(LEN), force()).unwrap().confirm();
    opened(&server, LEN);
}

#[test]
fn an_export_that_is_too_small_is_refused_with_the_bytes_it_has_and_needs() {
    let server = Server::nbdkit(&["memory", "3145727"]);
    let error = refused(&server, create(server.export(), &format(LEN), force()), "it has 3145727 bytes");
    assert!(error.to_string().contains("needs 3145728"), "{error}");
    let server = Server::nbdkit(&["memory", "100"]);
    refused(&server, create(server.export(), &format(0), force()), "it has 100 bytes");
    // What is lost to the blocks does not count.
    let server = Server::nbdkit(&["memory", "3149823"]);
    made(&server, LEN);
}

#[test]
fn a_server_that_is_of_no_use_is_refused() {
    let server = Server::nbdkit_file(SIZE, &["--readonly"]);
    refused(&server, create(server.export(), &format(LEN), force()), "for reading only");
    let server = Server::nbd_server_with(SIZE, "trim = true\n");
    refused(&server, create(server.export(), &format(LEN), force()), "offers no flush");
    let mut server = Server::nbdkit_file(SIZE, &[]);
    made(&server, LEN);
    server.kill();
    let url = server.export();
    let (volume, node) = (format(LEN).superblock.volume, format(LEN).superblock.node);
    let destroyed = destroy(url, volume, node);
    for result in [
        NbdStore::open(url, &format(LEN), LIMIT).map(drop),
        create(url, &format(LEN), force()).map(drop),
        check_open(url, &format(LEN)),
        check_resize(url, &format(LEN), &format(2 * LEN)),
        check_destroy(url, volume, node),
        destroyed.map(drop),
    ] {
        let error = refused(&server, result, "cannot connect: ");
        assert!(error.to_string().contains("Start the server"), "{error}");
    }
}

#[test]
fn d11_what_is_not_the_node_is_refused() {
    type Change = fn(&mut Superblock);
    let server = Server::nbdkit_file(SIZE, &[]);
    refused(&server, check_open(server.export(), &format(LEN)), "holds no superblock");
    made(&server, LEN);
    let changes: [(&str, Change); 6] = [
        ("belongs to volume", |s| s.volume = Uuid::from_u128(0xC)),
        ("it is storage node", |s| s.node = Uuid::from_u128(0xC)),
        ("place 0", |s| s.index = 1),
        ("number of storage nodes 1", |s| s.nodes = 2),
        ("stripe unit", |s| s.stripe *= 2),
        ("volume size", |s| s.size /= 2),
    ];
    for (words, change) in changes {
        let mut expected = format(LEN);
        change(&mut expected.superblock);
        refused(&server, check_open(server.export(), &expected), words);
        refused(&server, NbdStore::open(server.export(), &expected, LIMIT), words);
    }
    for copy in [0, 65_536] {
        put(&server, SIZE - TAIL + copy + 20, &[0xff]);
    }
    let error = refused(&server, check_open(server.export(), &format(LEN)), "the superblock is damaged");
    assert!(error.to_string().contains("last MiB of the export"), "{error}");
}

/// The node is replaced while a core has it open.
#[test]
fn d11_a_node_that_was_replaced_is_noticed() {
    let server = Server::nbdkit_file(SIZE, &[]);
    let store: Arc<dyn Store> = made(&server, LEN);
    store.recheck().unwrap();
    let mut other = format(LEN);
    other.superblock.node = Uuid::from_u128(0xC);
    put(&server, SIZE - TAIL, &other.superblock.encode());
    let error = store.recheck().unwrap_err();
    assert!(matches!(error, StoreError::Changed { .. }) && error.kind() == ErrorKind::Damaged, "{error}");
}

#[test]
fn destroy_wipes_the_node_and_can_be_repeated() {
    let (volume, node, other) = (format(LEN).superblock.volume, format(LEN).superblock.node, Uuid::from_u128(0xC));
    for server in servers() {
        let url = server.export();
        let store: Arc<dyn Store> = made(&server, LEN);
        store.write_at(4096, &vec![7; 100_000]).unwrap();
        store.flush().unwrap();
        for result in [check_destroy(url, other, node), destroy(url, other, node).map(drop)] {
            refused(&server, result, "belongs to volume");
        }
        for result in [check_destroy(url, volume, other), destroy(url, volume, other).map(drop)] {
            refused(&server, result, "it is storage node");
        }
        opened(&server, LEN);
        check_destroy(url, volume, node).unwrap();
        // Interrupted between the two copies.
        put(&server, SIZE - TAIL, &[0; 512]);
        put(&server, SIZE - TAIL + 131_072, &[0; 4096]);
        check_destroy(url, volume, node).unwrap();
        assert!(destroy(url, volume, node).unwrap());
        assert!(!destroy(url, volume, node).unwrap(), "nothing is left");
        refused(&server, check_destroy(url, volume, node), "holds no superblock");
        // A server that zeroes gives the space back, and the export can be used again.
        if store_zeroes(&server) {
            assert_eq!(used(&server), None);
            made(&server, LEN);
        } else {
            create(url, &format(LEN), force()).unwrap().confirm();
        }
    }
}

fn store_zeroes(server: &Server) -> bool {
    let client = node::connect(server.export(), Config::default(), None).unwrap();
    offers(&client, flag::SEND_WRITE_ZEROES)
}

/// Both copies, the first one first, each durable before the next is begun, and the whole data range before them.
#[test]
fn the_superblock_is_written_last_and_removed_last() {
    let server = Server::nbdkit_file(SIZE, &["--filter=log", "logfile=@/log"]);
    let log = || {
        let text = fs::read_to_string(server.image().with_file_name("log")).unwrap();
        let of = |line: &str, name: &str| {
            let value = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix("=0x"))?;
            u64::from_str_radix(value, 16).ok()
        };
        let writes = text.lines().filter(|line| line.contains(" Write id"));
        let writes: Vec<_> =
            writes.map(|line| (of(line, "offset").unwrap() - (SIZE - tail::BYTES), line.contains("fua=1"))).collect();
        writes
    };
    made(&server, LEN);
    assert_eq!(log(), [(131_072, true), (0, true), (65_536, true)]);
    // The first copy is the only sound one: the second is made so before the first is overwritten.
    put(&server, SIZE - TAIL + 65_536, &[0; 512]);
    resize(server.export(), &format(LEN), &format(LEN + 4096)).unwrap();
    assert_eq!(log()[3..], [(65_536, true), (0, true), (65_536, true)]);
    let Superblock { volume, node, .. } = format(LEN).superblock;
    assert!(destroy(server.export(), volume, node).unwrap());
    assert_eq!(log()[6..], [(0, true), (65_536, true)]);
}
