//! Established NBD connections live through upgrades (M5, beyond 7): their clients see a pause and nothing else.

use std::{
    io::{Read, Write},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use everdisk_tests::{
    bytes::pattern,
    fio::{Job, Load, Target},
    host::Host,
    nbd::{Client, Exported, Front, Kind, request, write_request},
    status::percentiles,
    wait::SOON,
};

/// For each of the four loads.
const UPGRADES: usize = 26;

/// The next hand-over of a row: the other core, by one policy and by the other in turn.
fn upgrade(exported: &Exported<'_>, number: usize) -> u64 {
    let handover = if number % 4 < 2 { "carry" } else { "flush" };
    let report = exported.volume.upgrade_by(handover, &exported.volume.other_core());
    report.suspended_us().expect("the time of the suspension")
}

/// M4 M5 M9 M10, 7: fio's NBD engine never connects again, so that it ends with no error only if every connection lived
/// through all of 104 upgrades, and no reply was lost, wrong, or given twice.
#[test]
fn m5_m6_beyond7_a_hundred_upgrades_under_fio_over_nbd_show_no_error_and_no_mismatch() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "256M");
    let mut suspended = Vec::new();
    let loads = [
        (Job::mixed(1, true), &exported.unix),
        (Job::writes(32, true), &exported.tcp),
        (Job::writes(1, true), &exported.tcp),
        (Job::mixed(32, true), &exported.unix),
    ];
    for (job, front) in loads {
        let mut load = Load::start(&job, Target::nbd(front.uri()));
        for number in 0..UPGRADES {
            suspended.push(upgrade(&exported, number));
            load.check();
        }
        let ios = load.stop();
        println!("{job:?}, {}: {ios} I/Os verified through {UPGRADES} upgrades", front.uri());
    }
    let status = exported.volume.status();
    assert_eq!(status.crashes(), 0, "{status:?}");
    println!("suspended_us {}", percentiles(suspended));
    exported.detach();
}

/// 5, 7: file, unix socket and TCP change over in the same generation, each under a load of its own that verifies.
#[test]
fn m5_m6_beyond7_file_and_exports_change_over_together_under_fio() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "256M");
    let job = Job::writes(8, true);
    let mut loads = [
        Load::start(&job, &exported.volume.path),
        Load::start(&job, Target::Nbd { uri: exported.unix.uri(), offset: "64m" }),
        Load::start(&job, Target::Nbd { uri: exported.tcp.uri(), offset: "128m" }),
    ];
    for number in 0..20 {
        upgrade(&exported, number);
        loads.iter_mut().for_each(Load::check);
    }
    let ios: u64 = loads.into_iter().map(Load::stop).sum();
    println!("{ios} I/Os verified");
    exported.detach();
}

/// Starts something that has to wait until I/O is resumed; tells when it ended.
fn waiting(work: impl FnOnce() + Send + 'static) -> mpsc::Receiver<Instant> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        work();
        let _ = sender.send(Instant::now());
    });
    receiver
}

/// M4 M9 M10: a suspension is a wait, for connected and for new clients: none is refused, and nothing is executed.
#[test]
fn m4_m9_clients_that_are_connected_and_clients_that_come_wait_for_the_resumption() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    for round in 0..4u64 {
        let mut connected: Vec<Client> = exported.both().map(Front::client).into();
        connected[0].write(0, &pattern(round, 8192));
        exported.volume.ask("suspend", &["--lease", "60s"]).ok();
        let mut ends = Vec::new();
        for (mut client, at) in connected.into_iter().zip([8192, 16384]) {
            ends.push(waiting(move || {
                client.write(at, &pattern(round + at, 8192));
                client.flush();
                client.end();
            }));
        }
        for front in exported.both().map(Front::clone) {
            ends.push(waiting(move || {
                let mut client = front.client();
                assert!(client.read(0, 8192) == pattern(round, 8192));
                client.end();
            }));
        }
        thread::sleep(Duration::from_millis(300));
        for end in &ends {
            assert!(end.try_recv().is_err(), "a request was executed while I/O was suspended, or a client was refused");
        }
        assert_eq!(exported.volume.status().state(), "suspended");
        let resumed = Instant::now();
        exported.volume.ask("resume", &[]).ok();
        for end in ends {
            let at = end.recv_timeout(SOON).expect("every client's requests end well");
            assert!(at > resumed);
        }
        let mut client = exported.tcp.client();
        for at in [8192, 16384] {
            assert!(client.read(at, 8192) == pattern(round + at, 8192));
        }
        client.end();
        if round % 2 == 0 {
            exported.volume.turn();
        }
    }
    exported.detach();
}

/// 7: the upgrade falls between any two bytes of a request, in its head or in what it writes.
#[test]
fn m5_beyond7_a_request_of_which_a_part_has_arrived_goes_on_in_the_next_core() {
    const LEN: u32 = 300_000;
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let mut clients = exported.both().map(Front::client);
    let splits = [1, 4, 7, 16, 27, 28, 29, 28 + 4096, 28 + 200_000, 28 + LEN as usize - 1];
    for (number, split) in splits.into_iter().enumerate() {
        let data = [number as u64, number as u64 + 100].map(|seed| pattern(seed, LEN as usize));
        for (client, (at, data)) in clients.iter_mut().zip([(1_000_001, &data[0]), (9_000_001, &data[1])]) {
            // Before it one that is complete, so that there is a reply, too.
            let mut bytes = request(Kind::Read as u16, 0, 1, 0, 512).to_vec();
            bytes.extend_from_slice(&write_request(2, at, data)[..split]);
            client.stream.write_all(&bytes).unwrap();
            if number % 2 == 0 {
                client.good(1);
                client.payload(512);
            }
        }
        upgrade(&exported, number);
        for (client, (at, data)) in clients.iter_mut().zip([(1_000_001, &data[0]), (9_000_001, &data[1])]) {
            client.stream.write_all(&write_request(2, at, data)[split..]).unwrap();
            if number % 2 != 0 {
                client.good(1);
                client.payload(512);
            }
            client.good(2);
            assert!(client.read(at, LEN) == *data, "split at {split}");
        }
    }
    clients.into_iter().for_each(Client::end);
    exported.detach();
}

/// 7: the same for the handshake: a client in the middle of it goes on in the next core, or in the core that serves handshakes.
#[test]
fn m5_beyond7_a_handshake_of_which_a_part_was_said_goes_on() {
    use everdisk_tests::nbd::{go, option, wire};
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let said = [&3u32.to_be_bytes()[..], &option(wire::GO, &go("v"))].concat();
    for (number, split) in [0, 2, 4, 11, 20, said.len() - 1].into_iter().enumerate() {
        let mut streams = exported.both().map(Front::stream);
        for stream in &mut streams {
            stream.write_all(&said[..split]).unwrap();
        }
        upgrade(&exported, number);
        for mut stream in streams {
            let greeting: [u8; 18] = everdisk_tests::nbd::bytes(&mut stream).unwrap();
            assert_eq!(greeting[..8], wire::MAGIC.to_be_bytes());
            stream.write_all(&said[split..]).unwrap();
            while everdisk_tests::nbd::option_reply(&mut stream, wire::GO).unwrap().0 != wire::ACK {}
            stream.write_all(&request(Kind::Read as u16, 0, 1, 0, 512)).unwrap();
            let answer: [u8; 16 + 512] = everdisk_tests::nbd::bytes(&mut stream).unwrap();
            assert_eq!(answer[4..8], [0; 4]);
        }
    }
    exported.detach();
}

/// 7: replies that the client has not read yet, or only in part, are read to the end, whichever core sent them.
#[test]
fn m5_beyond7_a_reply_of_which_a_part_was_read_is_read_on_after_the_upgrade() {
    const LEN: u32 = 1 << 20;
    const READS: u32 = 24;
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let data = pattern(5, (READS * LEN) as usize);
    let mut clients = exported.both().map(Front::client);
    clients[0].write(0, &data);
    for number in 0..4 {
        for client in &mut clients {
            for read in 0..READS {
                client.send(Kind::Read, read.into(), u64::from(read * LEN), LEN, &[]).unwrap();
            }
        }
        let mut begun = Vec::new();
        for (client, part) in clients.iter_mut().zip([0, 5 + 100_000 * number]) {
            let mut bytes = vec![0; part];
            client.stream.read_exact(&mut bytes).unwrap();
            begun.push(bytes);
        }
        upgrade(&exported, number);
        upgrade(&exported, number + 1);
        for (client, begun) in clients.iter_mut().zip(begun) {
            let mut stream = begun.as_slice().chain(&client.stream);
            let mut seen = [false; READS as usize];
            for _ in 0..READS {
                let head: [u8; 16] = everdisk_tests::nbd::bytes(&mut stream).unwrap();
                let read = usize::try_from(u64::from_be_bytes(head[8..].try_into().unwrap())).unwrap();
                let mut found = vec![0; LEN as usize];
                stream.read_exact(&mut found).unwrap();
                assert!(found == data[read * LEN as usize..][..LEN as usize], "read {read}");
                assert!(!std::mem::replace(&mut seen[read], true), "read {read} was answered twice");
            }
        }
    }
    clients.into_iter().for_each(Client::end);
    exported.detach();
}
