//! kill -9 of the interface, of the control module, and of everything at once.

use std::{os::unix::fs::FileExt, time::Duration};

use everdisk_tests::{
    bytes::pattern,
    fio::{Job, Load as Fio},
    host::Host,
    load::Load,
    processes,
    programs::{VERSION_NEXT, core, core_next},
    volume::Volume,
    wait::{SOON, until, until_true},
};

/// 9 M6: the interface hands the applications' instructions to the core by lending it the channels they arrive on: it
/// dies again and again under fio, the cores serve on from what was lent and give a new one the descriptors back.
#[test]
fn the_interface_dies_under_fio_and_io_never_fails() {
    let host = Host::new();
    let volume = host.volume("v", "128M");
    let file = volume.open();
    let load = Fio::start(&Job::writes(16, true), &volume.path);
    let plain = Load::start(&volume_tail(&volume), 1);
    for round in 0..10 {
        let before = volume.settled();
        processes::kill(before.interface().unwrap());
        plain.goes_on(20);
        let after = volume
            .wait("a new interface", |s| s.serves() && s.interface().is_some() && s.interface() != before.interface());
        assert_eq!(after.core(), before.core(), "the same core serves on: {after:?}");
        assert_eq!(after.generation(), before.generation(), "{after:?}");
        // What the new interface has taken up it can also do: suspend, hand over, survive a death.
        match round % 3 {
            0 => {
                volume.settled();
                volume.turn();
            }
            1 => {
                volume.settled();
                volume.kill_core();
            }
            _ => {
                volume.ask("suspend", &["--lease", "20s"]).ok();
                volume.ask("resume", &[]).ok();
            }
        }
        plain.goes_on(20);
    }
    assert_eq!(volume.settled().crashes(), 3);
    plain.stop();
    load.stop();
    drop(file);
    volume.detach();
}

/// fio has the beginning of the volume: the plain load gets a volume of its own on the same host.
fn volume_tail<'a>(volume: &Volume<'a>) -> Volume<'a> {
    let other = volume.host.volume("w", "16M");
    other.settled();
    // The death under test is `volume`'s; I/O on a neighbour shows that it stays there.
    other
}

/// 9 D3: the interface is killed and, before a new one is there, the core as well: what the segment says is enough.
#[test]
fn interface_and_serving_core_die_together_and_the_standby_recovers() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    for together in [true, false, true] {
        let before = volume.settled();
        let load = Load::start(&volume, 3);
        load.goes_on(50);
        let (interface, serving) = (before.interface().unwrap(), before.core().unwrap());
        if together {
            processes::kill_together(&[interface, serving]);
        } else {
            processes::kill(serving);
            processes::kill(interface);
        }
        let after = volume.wait("recovery", |s| s.serves() && s.core() != before.core());
        assert_ne!(after.interface(), before.interface());
        load.goes_on(50);
        load.stop();
    }
    volume.settled();
    volume.upgrade(&core_next());
    volume.detach();
}

/// 9: the control module dies and I/O does not notice; after its restart everything is as before and works.
#[test]
fn the_control_module_dies_idle_and_nothing_happens_to_io() {
    let mut host = Host::new();
    host.volume("v", "64M");
    let load = Load::start(&Volume::new(&host, "v"), 3);
    for round in 0..4 {
        let before = Volume::new(&host, "v").settled();
        host.kill_daemon();
        load.goes_on(100);
        if round % 2 == 1 {
            // A core dies while no supervisor runs: the standby takes over by itself.
            processes::kill(before.core().unwrap());
            load.goes_on(100);
        }
        if round == 2 {
            processes::kill(before.interface().unwrap());
            load.goes_on(100);
        }
        host.start_daemon();
        let volume = Volume::new(&host, "v");
        let after = volume.settled();
        if round % 2 == 0 {
            assert_eq!(after.core(), before.core());
            assert_eq!(after.standby(), before.standby());
        } else {
            assert_eq!(after.core(), before.standby());
        }
        volume.turn();
    }
    load.goes_on(100);
    load.stop();
    assert_eq!(Volume::new(&host, "v").processes().len(), 3);
}

/// 9 D7: the control module dies in the soak: the next one takes the upgrade up and ends it.
#[test]
fn d7_the_control_module_dies_in_a_soak_and_the_upgrade_is_taken_up() {
    let mut host = Host::new();
    host.volume("v", "64M");
    let load = Load::start(&Volume::new(&host, "v"), 2);
    let volume = Volume::new(&host, "v");
    volume.settled();
    let upgrade = volume.upgrading(&core_next(), &["--soak", "3s"]);
    volume.wait("the new core", |status| status.version() == VERSION_NEXT);
    host.kill_daemon();
    let output = upgrade.end(SOON);
    output.refused(1, &["everdiskd stopped answering"]);
    load.goes_on(100);
    host.start_daemon();
    let volume = Volume::new(&host, "v");
    let ended = volume.wait("the end of the upgrade", |s| s.state() == "serving" && s.last_outcome().is_some());
    assert_eq!((ended.last_outcome(), ended.version()), (Some("committed"), VERSION_NEXT), "{ended:?}");
    assert!(ended.0["last_upgrade"]["suspended_us"].as_u64().is_some(), "its figures are kept: {ended:?}");
    assert_eq!(volume.settled().standby_version(), VERSION_NEXT);
    assert_eq!(volume.processes().len(), 3, "{:#?}", volume.processes());
    volume.upgrade(&core());
    load.goes_on(100);
    load.stop();
}

/// Kills the control module in an upgrade, at the moment that `moment` waits for, and starts it again. Whether the upgrade is
/// committed; either way it has an end, and one version serves, stands by and is left over.
fn dies_in_an_upgrade(host: &mut Host, load: &Load, moment: impl FnOnce(&Host)) -> bool {
    let volume = Volume::new(host, "v");
    let before = volume.settled();
    let number = before.0["last_upgrade"]["upgrade"].as_u64().unwrap_or(0);
    let upgrade = volume.upgrading(&volume.other_core(), &["--soak", "0s"]);
    moment(host);
    host.kill_daemon();
    drop(upgrade);
    load.goes_on(10);
    host.start_daemon();
    let volume = Volume::new(host, "v");
    let after = volume.settled();
    let last = after.0["last_upgrade"]["upgrade"].as_u64().unwrap_or(0);
    let outcome = if last > number { after.last_outcome().unwrap_or("none") } else { "not begun" };
    let committed = outcome == "committed";
    assert_eq!(committed, before.version() != after.version(), "{outcome}: {before:?}, then {after:?}");
    assert_eq!(after.standby_version(), after.version(), "{outcome}: {after:?}");
    until("only what is needed runs", || (volume.processes().len() == 3).then_some(()));
    load.goes_on(10);
    committed
}

/// As [`dies_in_an_upgrade`], this long after a step has begun.
fn dies_after(host: &mut Host, load: &Load, step: &str, delay: Duration) -> bool {
    let words = format!("step={step}\n");
    let begun = |host: &Host| host.daemon_log().matches(&words).count();
    let before = begun(host);
    dies_in_an_upgrade(host, load, |host| {
        until(step, || (begun(host) > before).then_some(()));
        std::thread::sleep(delay);
    })
}

/// 9 D7: the control module is killed in any step of many upgrades; every time the volume ends up with one core that
/// serves and an upgrade that has an end.
#[test]
fn d7_the_control_module_dies_at_any_step_of_upgrades() {
    let mut host = Host::new();
    host.volume("v", "64M");
    let load = Load::start(&Volume::new(&host, "v"), 2);
    for delay in [0, 5, 25] {
        // The four steps of the hand-over are one command, which comes 100 ms after they are announced.
        for (step, later) in
            [("stage", 0), ("verify", 0), ("standby", 0), ("flush", 0), ("resume", 0), ("resume", 90), ("soak", 0)]
        {
            let committed = dies_after(&mut host, &load, step, Duration::from_millis(delay + later));
            assert!(!committed || step != "stage" || delay > 0, "it was not half done");
        }
    }
    load.stop();
    Volume::new(&host, "v").turn();
}

/// 9 D7: the control module is killed while it commits: at no moment of that there is a core left that could bring the version
/// back that the record no longer names, or a standby of it; and what had been found good is committed.
#[test]
fn d7_the_control_module_dies_at_any_moment_of_a_commit() {
    let mut host = Host::new();
    host.volume("v", "64M");
    let load = Load::start(&Volume::new(&host, "v"), 2);
    for round in 0..16 {
        assert!(dies_after(&mut host, &load, "commit", Duration::from_millis(6 * round)));
    }
    load.stop();
    Volume::new(&host, "v").turn();
}

/// 9: everything of a volume dies: a clear state, and `attach` brings back what was made durable.
#[test]
fn interface_and_every_core_die_and_attach_brings_the_data_back() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let data = pattern(1, 1 << 20);
    let file = volume.open();
    file.write_all_at(&data, 20_012_345).unwrap();
    file.sync_all().unwrap();
    let load = Load::start(&volume, 2);
    load.goes_on(50);
    let status = volume.settled();
    let mut all = status.cores();
    all.extend(status.interface());
    processes::kill_together(&all);
    let failed = volume.wait("a clear state", |status| status.state() == "failed");
    let reason = failed.0["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("everdisk attach v"), "{reason}");
    assert!(!load.stop_with_errors().is_empty(), "every holder of the descriptors is gone: applications see errors");
    assert!(file.sync_all().is_err() || file.write_at(&[1], 0).is_err());
    let output = volume.try_upgrade(&core_next(), &[]);
    assert_eq!(output.code(), 1, "{output:?}");
    assert_eq!(volume.ask("suspend", &[]).code(), 1);
    drop(file);
    volume.attach(&[]);
    let mut found = vec![0; data.len()];
    volume.open().read_exact_at(&mut found, 20_012_345).unwrap();
    assert!(found == data, "what was written and fsynced before is not there");
    let load = Load::start(&volume_tail(&volume), 1);
    load.goes_on(20);
    load.stop();
    assert_eq!(volume.status().crashes(), 0, "counted since the attach");
    volume.detach();

    // The other way out: detach --force.
    volume.attach(&[]);
    let status = volume.settled();
    let mut all = status.cores();
    all.extend(status.interface());
    processes::kill_together(&all);
    volume.wait("a clear state", |status| status.state() == "failed");
    volume.ask("detach", &[]).refused(1, &["--force"]);
    volume.ask("detach", &["--force"]).ok(); // Every process has gone: nothing is left to give up.
    assert_eq!(volume.status().state(), "detached");
    assert_eq!(processes::mount_on(&volume.path), None);
    volume.attach(&[]);
    volume.detach();
}

/// D5: the interface and the control module are dead, and the file is unmounted by hand: what was acknowledged and never flushed
/// is on the storage nodes when the core has gone.
#[test]
fn d5_an_unmount_by_a_stranger_while_the_interface_is_dead_loses_nothing() {
    let mut host = Host::new();
    let data = pattern(1, 1 << 20);
    let volume = host.create("v", "64M", 1);
    volume.attach(&[]);
    volume.open().write_all_at(&data, 20_012_345).unwrap();
    let (path, node) = (volume.path.clone(), volume.node(0).join("data"));
    let status = volume.settled();
    host.kill_daemon();
    processes::kill(status.interface().unwrap());
    rustix::mount::unmount(&path, rustix::mount::UnmountFlags::empty()).unwrap();
    until_true("the core has gone", || !processes::is_alive(status.core().unwrap()));
    processes::kill(status.standby().unwrap());
    let mut found = vec![0; data.len()];
    std::fs::File::open(node).unwrap().read_exact_at(&mut found, 20_012_345).unwrap();
    assert!(found == data, "what was acknowledged is not on the storage node");
}

/// 9: every core dies, again and again, so that no standby is there; the interface holds the requests until a core serves.
#[test]
fn every_core_dies_at_once_and_the_interface_holds_the_requests() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 4);
    for round in 1..=8 {
        let before = volume.settled();
        load.goes_on(50);
        processes::kill_together(&before.cores());
        let after = volume.wait("service", |s| s.serves() && !before.cores().contains(&s.core().unwrap()));
        // The standby may have been given the gate, and died with it, before its own signal came.
        assert!((round..=2 * round).contains(&after.crashes()), "{after:?}");
        load.goes_on(50);
    }
    load.stop();
    volume.detach();
}

/// A polite end and a new start of the control module: the volumes go on.
#[test]
fn the_control_module_is_restarted_in_order_and_the_volumes_go_on() {
    let mut host = Host::new();
    host.volume("v", "32M");
    let load = Load::start(&Volume::new(&host, "v"), 2);
    let before = Volume::new(&host, "v").settled();
    host.stop_daemon();
    load.goes_on(100);
    host.start_daemon();
    let after = Volume::new(&host, "v").settled();
    assert_eq!((before.core(), before.interface()), (after.core(), after.interface()));
    load.stop();
}
