//! Deaths under NBD clients: of the serving core, of the interface, of the control module (M6, 2: one path for both).

use std::io::Write;

use everdisk_tests::{
    bytes::pattern,
    fio::{Job, Load, Target},
    host::Host,
    nbd::{Client, Exported, Front, fronts, write_request},
    processes,
    volume::Volume,
};

/// For each of the four loads.
const KILLS: u64 = 9;

/// M6 D3 D10, 2: fio's NBD engine never connects again; it has to see none of 36 deaths of the serving core.
#[test]
fn m6_beyond2_thirty_kills_of_the_core_under_fio_over_nbd_show_no_error_and_no_mismatch() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "256M");
    let loads = [
        (Job::mixed(1, true), &exported.unix),
        (Job::writes(32, true), &exported.tcp),
        (Job::writes(1, true), &exported.tcp),
        (Job::mixed(32, true), &exported.unix),
    ];
    let mut kills = 0;
    for (job, front) in loads {
        let mut load = Load::start(&job, Target::nbd(front.uri()));
        for _ in 0..KILLS {
            let before = exported.volume.settled();
            let after = exported.volume.kill_core();
            kills += 1;
            assert_eq!(after.core(), before.standby(), "the standby takes over: {before:?} {after:?}");
            assert_eq!(after.crashes(), kills, "{after:?}");
            load.check();
        }
        let ios = load.stop();
        println!("{job:?}, {}: {ios} I/Os verified through {KILLS} kills", front.uri());
    }
    assert!(kills >= 30);
    exported.volume.settled();
    exported.detach();
}

/// M6: requests of which a part had arrived when the core died are read on by the next one, and what was complete is done.
#[test]
fn m6_a_request_of_which_a_part_has_arrived_goes_on_after_a_kill() {
    const LEN: u32 = 300_000;
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let mut clients = exported.both().map(Front::client);
    for (number, split) in [1, 16, 27, 28, 28 + 100_000, 28 + LEN as usize - 1].into_iter().enumerate() {
        exported.volume.settled();
        let data = pattern(number as u64, LEN as usize);
        let write = |at| write_request(2, at, &data);
        for (client, at) in clients.iter_mut().zip([1_000_001, 9_000_001]) {
            client.stream.write_all(&write(at)[..split]).unwrap();
        }
        exported.volume.kill_core();
        for (client, at) in clients.iter_mut().zip([1_000_001, 9_000_001]) {
            client.stream.write_all(&write(at)[split..]).unwrap();
            client.good(2);
            assert!(client.read(at, LEN) == data, "split at {split}");
        }
    }
    clients.into_iter().for_each(Client::end);
    exported.volume.settled();
    exported.detach();
}

/// 9 M6: the interface, which keeps the connections' descriptors, dies under load; what is connected goes on, and
/// whatever the next interface has taken up lives through upgrades and deaths of the core.
#[test]
fn m6_the_interface_dies_under_fio_over_nbd_and_connections_go_on() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "256M");
    let mut loads = [
        Load::start(&Job::writes(16, true), Target::nbd(exported.unix.uri())),
        Load::start(&Job::writes(1, true), Target::Nbd { uri: exported.tcp.uri(), offset: "64m" }),
    ];
    for round in 0..6 {
        let before = exported.volume.settled();
        processes::kill(before.interface().unwrap());
        let after = exported.volume.wait("a new interface", |status| {
            status.serves() && status.interface().is_some() && status.interface() != before.interface()
        });
        assert_eq!(after.core(), before.core(), "the same core serves on: {after:?}");
        exported.volume.settled();
        if round % 2 == 0 {
            exported.volume.turn();
        } else {
            exported.volume.kill_core();
        }
        loads.iter_mut().for_each(Load::check);
        // A client that connects now is let in at the same address as before.
        let mut client = exported.both()[round % 2].client();
        client.write(200 << 20, b"new");
        assert_eq!(client.read(200 << 20, 3), b"new");
        client.end();
    }
    loads.into_iter().for_each(|load| {
        load.stop();
    });
    exported.volume.settled();
    exported.detach();
}

/// 9: the control module dies under load: no client notices, not even one that connects before the restart.
#[test]
fn m6_the_control_module_dies_under_fio_over_nbd_and_nobody_notices() {
    let mut host = Host::new();
    let Exported { unix, tcp, .. } = Exported::new(&host, "v", "256M");
    let mut load = Load::start(&Job::writes(16, true), Target::nbd(tcp.uri()));
    for round in 0..3 {
        let before = Volume::new(&host, "v").settled();
        host.kill_daemon();
        let mut client = unix.client();
        client.write(200 << 20, b"new");
        client.end();
        if round == 1 {
            processes::kill(before.core().unwrap());
            tcp.client().end();
        }
        load.check();
        host.start_daemon();
        let volume = Volume::new(&host, "v");
        let after = volume.settled();
        assert_eq!(after.interface(), before.interface());
        assert_eq!(fronts(&volume).len(), 2);
        volume.turn();
        load.check();
    }
    load.stop();
    let exported = Exported { volume: Volume::new(&host, "v"), unix, tcp };
    exported.detach();
}
