//! Storage nodes that are slow or hang, and what a write buffer makes of that. Without one (`EVERDISK_TEST_BUFFER=0`)
//! writes wait for the storage nodes, and what is about the buffer alone is left out.

use std::{
    cell::Cell,
    fs::File,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use everdisk_testkit::at_end::at_end;
use everdisk_tests::{
    buffer,
    bytes::{Random, pattern},
    faults::Faults,
    host::Host,
    nbd::{Client, Exported, Kind},
    processes,
    volume::Volume,
    wait::{SOON, until_true},
};
use rustix::fs::{FallocateFlags, fallocate};

const MIB: usize = 1 << 20;
const PIECE: usize = 64 << 10;
/// Nothing arrives on the storage nodes and nothing becomes durable there.
const HUNG: &str = "write hang\nflush hang";
/// Linux's EIO.
const EIO: i32 = 5;
/// Something that waits has waited when it has not ended after this time.
const A_WHILE: Duration = Duration::from_millis(500);

fn host(wanted: &str) -> Host {
    let host = Host::faulty();
    host.create_with("v", "256M", 2, &["--buffer", &buffer::size(wanted)]).attach(&[]);
    host
}

/// Writes in pieces of 64 KiB.
fn write(file: &File, data: &[u8], offset: usize) {
    for (index, piece) in data.chunks(PIECE).enumerate() {
        file.write_all_at(piece, (offset + index * PIECE) as u64).unwrap();
    }
}

/// Writes that the buffer has room for; they have to be acknowledged while the storage nodes hang. Where they are not, the
/// faults end before the test fails: it would wait for them for ever.
fn buffered(faults: &Faults, write: impl FnOnce() + Send) {
    let in_time = thread::scope(|scope| {
        let writer = scope.spawn(write);
        let deadline = Instant::now() + SOON;
        while !writer.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(3));
        }
        let in_time = writer.is_finished();
        if !in_time {
            faults.clear();
        }
        in_time
    });
    assert!(in_time, "the buffer has room, and yet a write waits for a storage node that hangs");
}

fn read(file: &File, len: usize, offset: usize) -> Vec<u8> {
    let mut found = vec![0; len];
    file.read_exact_at(&mut found, offset as u64).unwrap();
    found
}

/// An upgrade to the other version that carries the buffer over; has to be committed. Returns the pause.
fn carry(volume: &Volume<'_>) -> u64 {
    let before = volume.settled().version().to_owned();
    let output = volume.try_upgrade(&volume.other_core(), &["--soak", "0s", "--handover", "carry"]);
    let report = everdisk_tests::volume::report(&output);
    assert_eq!((output.code(), report.outcome()), (0, "committed"), "{report:?}\n{}", output.stderr);
    assert_ne!(volume.status().version(), before);
    report.suspended_us().unwrap()
}

/// M7, D5: discards that are sent side by side with writes, to slow nodes that cannot discard: zeros are written there.
#[test]
fn m7_d5_slow_nodes_that_cannot_discard_get_zeros() {
    const PIECES: usize = 512;
    let host = host("16M");
    let volume = Volume::new(&host, "v");
    let file = volume.open();
    let data = |index: usize| pattern(index as u64, 4096);
    // Pieces with gaps between them: each is a write or a discard of its own.
    let place = |index: usize| (index * 8192) as u64;
    (0..PIECES).for_each(|index| file.write_all_at(&data(index), place(index)).unwrap());
    volume.ask("flush", &[]).ok();
    let faults = Faults::new(&volume);
    faults.set("write delay_us=2000\ndiscard fail=EOPNOTSUPP");
    for index in 0..PIECES {
        match index % 2 {
            0 => fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, place(index), 4096).unwrap(),
            _ => file.write_all_at(&data(PIECES + index), place(index)).unwrap(),
        }
    }
    // What is durable is read from the nodes.
    volume.ask("flush", &[]).ok();
    faults.clear();
    for index in 0..PIECES {
        let expected = if index % 2 == 0 { vec![0; 4096] } else { data(PIECES + index) };
        let mut found = vec![0xEE; 4096];
        file.read_exact_at(&mut found, place(index)).unwrap();
        assert!(found == expected, "piece {index}");
    }
    drop((faults, file));
    volume.detach();
}

/// beyond 4, D5: how long an application waits for storage nodes that hang is the operator's choice. What has timed out was
/// lost by nobody: everything acknowledged is there when the nodes answer again.
#[test]
fn beyond4_d5_the_timeouts_of_a_volume_bound_how_long_applications_wait() {
    let host = Host::faulty();
    let timeouts = ["--buffer", "2M", "--room-timeout", "400ms", "--flush-timeout", "600ms"];
    host.create_with("v", "64M", 2, &timeouts).attach(&[]);
    let volume = Volume::new(&host, "v");
    let status = volume.ask("status", &["--json"]).ok();
    assert!(status.contains("\"room_ms\":400") && status.contains("\"flush_ms\":600"), "{status}");
    let file = volume.open();
    let faults = Faults::new(&volume);
    faults.set(HUNG);
    let (acknowledged, error, flushed) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let pieces = (0..).map(|index| (index, file.write_all_at(&pattern(index, PIECE), index * PIECE as u64)));
            let (failed, error) =
                pieces.into_iter().find_map(|(at, done)| Some((at, done.err()?))).expect("it is endless");
            (failed, error, file.sync_data())
        });
        // A failure ends the faults first: the writer would wait for them.
        let _let_go = at_end(|| faults.clear());
        until_true("a write that finds no room, and the flush after it, time out", || writer.is_finished());
        writer.join().unwrap()
    });
    assert!((8..=32).contains(&acknowledged), "a buffer of 2 MiB has taken {acknowledged} pieces of 64 KiB");
    assert_eq!((error.raw_os_error(), flushed.unwrap_err().raw_os_error()), (Some(EIO), Some(EIO)));
    volume.ask("flush", &[]).ok();
    for (place, index) in (0..acknowledged).enumerate() {
        assert!(read(&file, PIECE, place * PIECE) == pattern(index, PIECE), "piece {index}");
    }
    drop((faults, file));
    volume.detach();
}

/// beyond 4, beyond 3, D5: the storage nodes hang. Writes are acknowledged as long as the buffer has space, what was
/// written is read, and the core may die or be upgraded. A write that finds the buffer full waits, and no application sees an error.
#[test]
fn beyond4_beyond3_buffered_io_goes_on_while_the_storage_nodes_hang() {
    let host = host("16M");
    let volume = Volume::new(&host, "v");
    let file = volume.open();
    let old = pattern(1, 4 * MIB);
    write(&file, &old, 0);
    file.sync_data().unwrap();
    volume.settled();
    let (few, many) = (pattern(2, 4 * MIB), pattern(3, 32 * MIB));
    thread::scope(|scope| {
        // Made in here so that a failure ends the faults before it waits for the threads that hang by them.
        let faults = Faults::new(&volume);
        faults.set(HUNG);
        let writer = scope.spawn(|| write(&file, &few, 2 * MIB));
        if buffer::is_on() {
            until_true("the buffer takes the writes", || writer.is_finished());
            assert!(read(&file, 4 * MIB, 2 * MIB) == few);
            assert!(read(&file, 2 * MIB, 0) == old[..2 * MIB]);
            volume.kill_core();
            assert!(read(&file, 4 * MIB, 2 * MIB) == few, "the next core has taken the buffer over");
            println!("a hand-over with 4 MiB buffered and hung storage nodes: {} µs", carry(&volume));
            assert!(read(&file, 4 * MIB, 2 * MIB) == few, "and so has the other version");
        } else {
            thread::sleep(A_WHILE);
            assert!(!writer.is_finished(), "a synchronous write was acknowledged before the storage node had it");
        }
        let flush = scope.spawn(|| file.sync_data());
        let more = scope.spawn(|| write(&file, &many, 8 * MIB));
        thread::sleep(A_WHILE);
        assert!(!flush.is_finished(), "a flush was acknowledged by storage nodes that hang");
        assert!(!more.is_finished(), "32 MiB went into a buffer of 16");
        faults.clear();
        flush.join().unwrap().unwrap();
    });
    file.sync_data().unwrap();
    assert!(read(&file, 4 * MIB, 2 * MIB) == few && read(&file, 32 * MIB, 8 * MIB) == many);
    drop(file);
    volume.settled();
    volume.detach();
    volume.attach(&[]);
    let file = volume.open();
    assert!(read(&file, 4 * MIB, 2 * MIB) == few && read(&file, 32 * MIB, 8 * MIB) == many);
    drop(file);
    volume.detach();
}

/// D5: small writes next to each other, in any order, go to the storage nodes in few large ones.
#[test]
fn d5_neighbouring_writes_are_sent_to_the_storage_nodes_together() {
    if !buffer::is_on() {
        return;
    }
    let host = host("16M");
    let volume = Volume::new(&host, "v");
    let faults = Faults::new(&volume);
    let file = volume.open();
    faults.set("write hang");
    let mut blocks: Vec<usize> = (0..1024).collect();
    let mut random = Random::new(1);
    for index in (1..blocks.len()).rev() {
        blocks.swap(index, usize::try_from(random.below(index as u64 + 1)).unwrap());
    }
    let data = pattern(4, 4 * MIB);
    buffered(&faults, || {
        for block in blocks {
            file.write_all_at(&data[block * 4096..][..4096], block as u64 * 4096).unwrap();
        }
    });
    faults.clear();
    file.sync_data().unwrap();
    let counts = faults.counts();
    println!("1024 writes of 4 KiB: {} writes of {} bytes on average", faults.writes(), counts.mean_write());
    // The volume's stripe is 64 KiB: no write to a storage node needs to be smaller, except the few that hung.
    assert!(counts.mean_write() >= 48 << 10, "{counts:?}");
    assert!(read(&file, 4 * MIB, 0) == data);
    drop(file);
    volume.detach();
}

/// beyond 3, beyond 4: what an upgrade by `carry` suspends I/O for depends neither on how much is buffered nor on whether
/// the storage nodes answer.
#[test]
fn beyond3_beyond4_the_pause_depends_neither_on_the_buffered_bytes_nor_on_the_storage_nodes() {
    const ROUNDS: usize = 7;
    if !buffer::is_on() {
        return;
    }
    let host = host("128M");
    let volume = Volume::new(&host, "v");
    let faults = Faults::new(&volume);
    let file = volume.open();
    // MiB that are buffered, and what the storage nodes do.
    let cases = [(0, ""), (0, HUNG), (8, HUNG), (64, HUNG)];
    let mut pauses = cases.map(|_| Vec::new());
    for round in 0..ROUNDS {
        // In turn, so that the machine's moods meet all of them.
        for ((mib, text), pauses) in cases.iter().zip(&mut pauses) {
            faults.set(text);
            buffered(&faults, || write(&file, &pattern(round as u64, mib * MIB), 0));
            pauses.push(carry(&volume));
            faults.clear();
            file.sync_data().unwrap();
        }
    }
    let medians = cases.iter().zip(&mut pauses).map(|((mib, text), pauses)| {
        pauses.sort_unstable();
        println!("{mib} MiB buffered, faults {text:?}: median {} µs of {pauses:?}", pauses[ROUNDS / 2]);
        pauses[ROUNDS / 2]
    });
    let medians: Vec<u64> = medians.collect();
    // A pause that depended on them would be longer by milliseconds (64 MiB sent), or have no end (a node that hangs); the bench
    // has the ratios.
    let most = medians.iter().max().unwrap();
    assert!(*most <= 2 * medians[0] + 500, "the pause depends on what is buffered or on the nodes: {medians:?} µs");
    drop(file);
    volume.detach();
}

/// beyond 4: requests of one client, on the file or over one NBD connection, wait for a slow storage node together and not one
/// after the other; also after an upgrade, and after a kill in the midst of it.
#[test]
fn beyond4_many_requests_wait_for_a_slow_storage_node_at_once() {
    // Shorter than what is taken for a request that hangs: it is known beforehand that it will take so long.
    const SLOW: &str = "read delay_us=4000\nwrite delay_us=4000";
    const DEPTH: u64 = 16;
    let host = Host::faulty();
    let exported = Exported::attach(host.create_with("v", "64M", 1, &["--buffer", "0"]));
    let volume = &exported.volume;
    let faults = Faults::new(volume);
    let data = pattern(3, MIB);
    volume.open().write_all_at(&data, 0).unwrap();
    let at = |n: u64| usize::try_from(n % 256 * 4096).unwrap();
    let block = |n: u64| at(n)..at(n) + 4096;
    let most = |volume: &Volume<'_>| faults.counts_of(volume.settled().core().unwrap()).most_at_once();
    let mut client = exported.unix.client();
    let turns = |client: &mut Client, enough: &dyn Fn() -> bool| {
        let deadline = Instant::now() + SOON;
        let mut n = 0;
        while !enough() {
            assert!(Instant::now() < deadline, "not {DEPTH} at once");
            (n..n + 32).for_each(|n| client.send(Kind::Read, n, block(n).start as u64, 4096, &[]).unwrap());
            for _ in 0..32 {
                let (cookie, error) = client.reply().unwrap();
                assert_eq!(error, 0);
                assert!(client.payload(4096) == data[block(cookie)], "block {cookie}");
            }
            n += 32;
        }
    };
    faults.set(SLOW);
    turns(&mut client, &|| most(volume) >= DEPTH);
    volume.turn();
    turns(&mut client, &|| most(volume) >= DEPTH);
    let before = volume.settled();
    let killed = Cell::new(false);
    turns(&mut client, &|| {
        if !killed.replace(true) {
            processes::kill(before.core().unwrap());
        }
        volume.settled().core() != before.core() && most(volume) >= DEPTH
    });
    client.end();
    // The file, with writes, on the next core.
    volume.turn();
    let file = volume.open();
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        let _let_go = at_end(|| enough.store(true, Relaxed));
        for n in 0..2 * DEPTH {
            let (file, enough, data) = (&file, &enough, &data);
            scope.spawn(move || {
                while !enough.load(Relaxed) {
                    file.write_all_at(&data[block(n)], block(n).start as u64).unwrap();
                    assert!(read(file, 4096, block(n).start) == data[block(n)]);
                }
            });
        }
        let deadline = Instant::now() + SOON;
        while most(volume) < DEPTH && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(3));
        }
        enough.store(true, Relaxed);
    });
    assert!(most(volume) >= DEPTH);
    faults.clear();
}

/// beyond 4: a request hangs at its node, and long after, when surplus workers have ended, another one does: whatever
/// needs no node goes on each time, on the file and over NBD.
#[test]
fn beyond4_requests_that_hang_long_after_one_another_hold_up_nobody() {
    // Longer than surplus workers are kept.
    const LATER: Duration = Duration::from_secs(11);
    let host = Host::faulty();
    let exported = Exported::attach(host.create_with("v", "64M", 1, &["--buffer", "16M"]));
    let faults = Faults::new(&exported.volume);
    let mut client = exported.unix.client();
    let file = exported.volume.open();
    let written = pattern(3, 4096);
    faults.set("read hang\nwrite hang");
    for round in 0..2_u64 {
        client.send(Kind::Read, round, (32 << 20) + round * 4096, 4096, &[]).unwrap();
        for n in 0..4 {
            let at = (round * 4 + n) * 4096;
            client.write((1 << 20) + at, &written);
            assert!(client.read((1 << 20) + at, 4096) == written);
            file.write_all_at(&written, at).unwrap();
        }
        if round == 0 {
            thread::sleep(LATER);
        }
    }
    faults.clear();
    for _ in 0..2 {
        let (cookie, error) = client.reply().unwrap();
        assert!(cookie < 2 && error == 0);
        client.payload(4096);
    }
    client.end();
}
