//! Servers with large minimum blocks.

use everdisk_store_nbd::{Command, Config, Kind};

use crate::{
    kit::{begin, fail, pattern, read, succeed, write},
    servers::Server,
};

fn with_blocks(size: &str) -> Server {
    Server::nbdkit(&[
        "--filter=blocksize-policy",
        "--filter=delay",
        "memory",
        size,
        "blocksize-minimum=4096",
        "blocksize-error-policy=error",
        "delay-read=2ms",
    ])
}

/// Without the order of changes in one block, a write undoes what another one wrote beside it. The server's reads are
/// slow, so that all of them would read before any writes.
#[test]
fn writes_side_by_side_in_one_block_do_not_undo_each_other() {
    let server = with_blocks("64k");
    let client = server.client(Config::default());
    let expected = pattern(16 << 10, 1);
    for round in 0..4 {
        succeed(&client, Command::Zeroes { offset: 0, len: 64 << 10, may_punch: true, fast: false });
        let step = 700 + round;
        let pending: Vec<_> = expected
            .chunks(step)
            .enumerate()
            .map(|(index, part)| {
                let offset = u64::try_from(index * step).unwrap();
                begin(&client, Command::Write { offset, memory: part.to_vec(), fua: index % 2 == 0 })
            })
            .collect();
        for pending in pending {
            pending.wait().result.unwrap();
        }
        assert!(read(&client, 0, expected.len()) == expected, "round {round}");
    }
}

#[test]
fn bytes_behind_the_last_whole_block_are_not_part_of_the_node() {
    let server = with_blocks("20000");
    let client = server.client(Config::default());
    assert_eq!(client.offer().size, 20_000);
    assert_eq!(client.size(), 16_384);
    succeed(&client, write(16_000, 384, 2));
    assert_eq!(read(&client, 16_000, 384), pattern(384, 2));
    let error = fail(&client, write(16_384, 1, 3));
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("16384 bytes"), "{error}");
}

#[test]
fn zeroes_and_trims_leave_the_rest_of_their_blocks() {
    let server = with_blocks("64k");
    let client = server.client(Config::default());
    let bytes = pattern(64 << 10, 4);
    for (offset, len) in [(100, 50), (4000, 200), (4096, 4096), (5000, 20_000), (0, 4097), (65_000, 536)] {
        succeed(&client, Command::Write { offset: 0, memory: bytes.clone(), fua: false });
        succeed(&client, Command::Zeroes { offset, len, may_punch: true, fast: false });
        let mut expected = bytes.clone();
        let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + len).unwrap());
        expected[from..to].fill(0);
        assert!(read(&client, 0, bytes.len()) == expected, "{len} zeros from {offset}");
        succeed(&client, Command::Write { offset: 0, memory: bytes.clone(), fua: false });
        succeed(&client, Command::Trim { offset, len });
        let now = read(&client, 0, bytes.len());
        assert!(now[..from] == bytes[..from] && now[to..] == bytes[to..], "trim of {len} from {offset}");
    }
}
