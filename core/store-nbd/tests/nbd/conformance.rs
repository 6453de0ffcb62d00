//! One suite, over every server: random commands, against an image in memory.

use std::{fs, ops::Range, time::Duration};

use everdisk_harness::wait::until_true;
use everdisk_proto::nbd::wire::transmission_flag as flag;
use everdisk_store_nbd::{Client, Command, Config, Done};

use crate::{
    kit::{begin, pattern, read, succeed},
    servers::Server,
};

const SIZE: u64 = 3 << 20;
const ROUNDS: usize = 60;
const WIDTH: usize = 12;

/// Runs the suite, and compares with the file that the server serves, if there is one.
fn conforms(server: &Server, config: Config, seed: u64) {
    let client = server.client(config);
    assert_eq!(client.size(), SIZE);
    let image = suite(&client, seed);
    if server.image().exists() {
        let file = fs::read(server.image()).unwrap();
        assert!(file[..image.len()] == image[..], "the file differs from what was written");
    }
    assert_eq!(client.losses(), 0, "the connection was lost");
}

/// Random commands, and what the export contains then.
pub(crate) fn suite(client: &Client, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let size = usize::try_from(client.size()).unwrap();
    let mut image = read(client, 0, size);
    for _ in 0..ROUNDS {
        round(client, &mut random, &mut image);
    }
    if client.offer().flags & flag::SEND_FLUSH != 0 {
        assert_eq!(succeed(client, Command::Flush), Done::Plain);
    }
    assert!(read(client, 0, size) == image, "the export differs from what was written");
    image
}

/// Commands side by side. None overlaps a change.
fn round(client: &Client, random: &mut fastrand::Rng, image: &mut [u8]) {
    let mut taken: Vec<Range<usize>> = Vec::new();
    let mut pending = Vec::new();
    for _ in 0..WIDTH {
        let len = if random.u8(..) < 30 { random.usize(1..400_000) } else { random.usize(1..12_000) };
        let start = random.usize(0..image.len() - len);
        let range = start..start + len;
        if taken.iter().any(|other| other.start < range.end && range.start < other.end) {
            continue;
        }
        taken.push(range.clone());
        let command = choose(client, random, &range);
        pending.push((range, command.clone(), begin(client, command)));
    }
    for (range, command, pending) in pending {
        let outcome = pending.wait();
        let done = outcome.result.unwrap();
        match command {
            Command::Read { .. } => assert!(outcome.memory == image[range.clone()], "read of {range:?}"),
            Command::Write { memory, .. } => {
                assert!(outcome.memory == memory, "the memory of a write comes back as it was");
                image[range].copy_from_slice(&memory);
            }
            Command::Zeroes { .. } => image[range].fill(0),
            Command::Trim { .. } => {
                let now = read(client, range.start.try_into().unwrap(), range.len());
                let is_kept = now.iter().zip(&image[range.clone()]).all(|(now, then)| now == then || *now == 0);
                assert!(is_kept, "a trim left something else than zeros and the old bytes in {range:?}");
                image[range].copy_from_slice(&now);
            }
            Command::BlockStatus { .. } => {
                let Done::Extents(extents) = done else { panic!("a block status returns extents") };
                let mut at = range.start;
                for extent in &extents {
                    let end = at + usize::try_from(extent.len).unwrap();
                    assert!(end <= range.end, "an extent goes on behind the range");
                    assert!(!extent.zero || image[at..end].iter().all(|byte| *byte == 0), "{extent:?} at {at}");
                    at = end;
                }
                assert!(at > range.start, "at least one byte is covered");
            }
            Command::Flush => unreachable!(),
        }
    }
}

fn choose(client: &Client, random: &mut fastrand::Rng, range: &Range<usize>) -> Command {
    let has = |flag| client.offer().flags & flag != 0;
    let (offset, len) = (u64::try_from(range.start).unwrap(), u64::try_from(range.len()).unwrap());
    match random.u8(0..12) {
        0 | 1 => Command::Zeroes { offset, len, may_punch: random.bool(), fast: false },
        2 if has(flag::SEND_TRIM) => Command::Trim { offset, len },
        3 if client.offer().context.is_some() => Command::BlockStatus { offset, len },
        4..8 => Command::Read { offset, memory: vec![0xee; range.len()] },
        _ => {
            let fua = random.u8(..) < 60 && (has(flag::SEND_FUA) || has(flag::SEND_FLUSH));
            Command::Write { offset, memory: pattern(range.len(), random.u64(..)), fua }
        }
    }
}

fn default() -> Config {
    Config { unavailable_after: Duration::from_secs(30), ..Config::default() }
}

#[test]
fn nbdkit_memory() {
    let server = Server::nbdkit(&["memory", "3M"]);
    let client = server.client(default());
    assert!(client.offer().structured && client.offer().context.is_some());
    until_true("four connections are made", || client.connections() == 4);
    suite(&client, 1);
}

#[test]
fn nbdkit_file_over_tcp() {
    let server = Server::nbdkit_tcp(&["memory", "3M"]);
    conforms(&server, default(), 2);
}

#[test]
fn nbdkit_file() {
    conforms(&Server::nbdkit_file(SIZE, &[]), default(), 3);
}

#[test]
fn nbdkit_with_simple_replies() {
    let server = Server::nbdkit_file(SIZE, &["--no-sr"]);
    assert!(!server.client(default()).offer().structured);
    conforms(&server, default(), 4);
}

#[test]
fn nbdkit_with_small_window_and_one_connection() {
    let config = Config { connections: 1, requests_max: 3, bytes_max: 10_000, ..default() };
    conforms(&Server::nbdkit_file(SIZE, &[]), config, 5);
}

#[test]
fn nbdkit_with_blocks_of_4096() {
    let filter = ["--filter=blocksize-policy"];
    let server = Server::nbdkit(
        &[&filter[..], &["memory", "3M", "blocksize-minimum=4096", "blocksize-error-policy=error"]].concat(),
    );
    assert_eq!(server.client(default()).offer().blocks.min, 4096);
    conforms(&server, default(), 6);
}

#[test]
fn nbdkit_with_blocks_of_65536_and_small_payloads() {
    let server = Server::nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "3M",
        "blocksize-minimum=65536",
        "blocksize-preferred=65536",
        "blocksize-maximum=131072",
        "blocksize-error-policy=error",
    ]);
    conforms(&server, default(), 7);
}

#[test]
fn nbdkit_with_payloads_of_at_most_5000_bytes() {
    let server = Server::nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "3M",
        "blocksize-minimum=512",
        "blocksize-preferred=512",
        "blocksize-maximum=5120",
        "blocksize-error-policy=error",
    ]);
    conforms(&server, default(), 8);
}

#[test]
fn nbdkit_without_fua_and_zeroes() {
    let server = Server::nbdkit_file(SIZE, &["--filter=nozero", "--filter=fua"]);
    let flags = server.client(default()).offer().flags;
    assert_eq!(flags & (flag::SEND_FUA | flag::SEND_WRITE_ZEROES), 0);
    conforms(&server, default(), 9);
}

#[test]
fn nbdkit_that_answers_out_of_order() {
    let server = Server::nbdkit_file(SIZE, &["--filter=delay", "delay-read=1ms"]);
    conforms(&server, default(), 10);
}

#[test]
fn qemu_nbd() {
    let server = Server::qemu_nbd(SIZE);
    let client = server.client(default());
    assert!(client.offer().structured && client.offer().context.is_some());
    until_true("four connections are made", || client.connections() == 4);
    drop(client);
    conforms(&server, default(), 11);
}

#[test]
fn nbd_server() {
    let server = Server::nbd_server(SIZE);
    assert!(!server.client(default()).offer().structured);
    conforms(&server, default(), 12);
}

#[test]
fn requests_above_32_mib_are_split() {
    let server = Server::nbdkit(&["memory", "100M"]);
    let client = server.client(default());
    let bytes = pattern(70 << 20, 13);
    succeed(&client, Command::Write { offset: 12_345, memory: bytes.clone(), fua: false });
    assert!(read(&client, 12_345, bytes.len()) == bytes);
    succeed(&client, Command::Zeroes { offset: 20_000, len: 60 << 20, may_punch: true, fast: false });
    let after = read(&client, 12_345, bytes.len());
    let (from, to) = (20_000 - 12_345, 20_000 - 12_345 + (60 << 20));
    assert!(after[..from] == bytes[..from] && after[to..] == bytes[to..] && after[from..to].iter().all(|b| *b == 0));
}
