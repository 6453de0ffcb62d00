//! One owner of a volume: the process that serves, grows or deletes it keeps all others off, and the refusal names it.

use std::{fs, os::unix::fs::FileExt, process::Command};

use everdisk_tests::{
    host::Host,
    load::Load,
    processes, programs,
    run::run,
    second::{Second, copy_state},
    volume::Volume,
    wait::{SOON, until_true},
};

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

/// A second control module with the same state directory and another run directory would serve and delete the volumes of the first.
#[test]
fn a_state_directory_has_one_control_module_and_the_second_is_told_which() {
    let mut host = Host::new();
    let pid = format!("process {}", host.daemon_pid());
    let volume = host.volume("v", "16M");
    let second = |host: &Host| {
        let mut command = Command::new(programs::program("everdiskd"));
        command.arg("--run-dir").arg(host.root().join("run2")).arg("--state-dir").arg(host.root().join("state"));
        run(command, SOON)
    };
    let run_dir = format!("run directory {}", host.root().join("run").display());
    second(&host).refused(1, &["another everdiskd runs with this state directory", &pid, &run_dir, "--state-dir"]);
    volume.detach();
    // The lock goes with the process, however it ends; what is written beside it is not believed then.
    host.kill_daemon();
    host.start_daemon();
    let pid = format!("process {}", host.daemon_pid());
    second(&host).refused(1, &[&pid]);
}

/// A control module with a copy of the state directory, or another one that knows the volume, can neither serve nor grow nor delete
/// what is served, and the refusal names the server. This holds through the death of the interface and of a core, and through an upgrade.
#[test]
fn a_copied_state_directory_neither_serves_nor_grows_nor_deletes_what_is_served() {
    let mut host = Host::new();
    host.create("v", "32M", 2);
    copy_state(&host, "state2");
    Volume::new(&host, "v").attach(&[]);
    let second = Second::start(&host, "run2", "state2");
    let other = host.file("other.img");
    let (node, data) = (format!("dir:{}", host.node("v-0").display()), host.node("v-0").join("data"));
    let refused = |pid: Option<u32>| {
        let holder = pid.map_or_else(|| "process ".to_owned(), |pid| format!("process {pid} ("));
        let words: [&str; 4] = ["in use by", &holder, "everdisk-", "volumes/v/volume.json"];
        second.everdisk(&["attach", "v", "--file", text(&other)]).refused(1, &words).refused(1, &[&node]);
        second.everdisk(&["volume", "resize", "v", "64M"]).refused(1, &words);
        second.everdisk(&["volume", "delete", "v", "--yes"]).refused(1, &words);
        assert!(!other.exists() && processes::mount_on(&other).is_none(), "nothing is left of the attempt");
        assert_eq!(fs::metadata(&data).unwrap().len(), 16 << 20);
    };
    {
        let volume = Volume::new(&host, "v");
        let file = volume.open();
        let load = Load::start(&volume, 1);
        refused(volume.settled().interface());
        // The locks outlive the process that took them, and come back to the one that takes its place.
        processes::kill(volume.settled().interface().unwrap());
        refused(None);
        let restored = volume.settled();
        refused(restored.interface());
        volume.kill_core();
        volume.settled();
        volume.turn();
        refused(volume.settled().interface());
        load.goes_on(20);
        load.stop();
        drop(file);
    }
    // The interface is not restored: the cores alone keep the nodes.
    host.kill_daemon();
    let named = processes::naming(&host.root().join("state/volumes/v/volume.json"));
    let (interface, cores): (Vec<_>, Vec<_>) =
        named.iter().partition(|process| process.line.contains("everdisk-interface"));
    processes::kill(interface[0].pid);
    assert_eq!(cores.len(), 2, "{named:?}");
    refused(None);
    // The last of them takes the locks with it.
    for core in &cores {
        processes::kill(core.pid);
    }
    second.everdisk(&["attach", "v", "--file", text(&other)]).ok();
    second.everdisk(&["detach", "v"]).ok();
    host.start_daemon();
    let volume = Volume::new(&host, "v");
    volume.wait("a clear state", |status| status.state() == "failed");
    volume.attach(&[]);
    volume.detach();
}

/// A copy that was made while the volume was attached lists processes and mounts that are not its own.
#[test]
fn a_state_directory_copied_while_attached_ends_nothing_of_the_original() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let before = volume.settled();
    let load = Load::start(&volume, 1);
    copy_state(&host, "state2");
    let second = Second::start(&host, "run2", "state2");
    second.everdisk(&["detach", "v", "--force"]).refused(1, &["not attached"]);
    second.everdisk(&["volume", "delete", "v", "--yes"]).refused(1, &["in use by"]);
    second.everdisk(&["attach", "v", "--file", text(&host.file("other.img"))]).refused(1, &["in use by"]);
    drop(second);
    load.goes_on(20);
    load.stop();
    let after = volume.status();
    assert_eq!((after.core(), after.interface()), (before.core(), before.interface()));
    assert!(processes::mount_on(&volume.path).is_some());
    volume.detach();
}

/// Processes that are not on record: the record is lost, and they serve on. They are named, and once they have ended the volume is
/// attached at once.
#[test]
fn processes_that_were_left_over_are_named_and_kept_off() {
    let mut host = Host::new();
    let first = host.volume("v", "16M").settled();
    host.kill_daemon();
    fs::remove_file(host.root().join("state/volumes/v/state.json")).unwrap();
    host.start_daemon();
    let path = host.file("v.img");
    let other = host.file("other.img");
    assert_eq!(Volume::new(&host, "v").status().state(), "detached");
    let attach = |words: &[&str]| host.everdisk(&["attach", "v", "--file", text(&other)]).refused(1, words);
    let interface = format!("process {}", first.interface().unwrap());
    attach(&[&interface, "everdisk-interface", "everdisk-core", "end them"]);
    host.everdisk(&["volume", "delete", "v", "--yes"]).refused(1, &["in use by", &interface]);
    assert!(first.cores().into_iter().chain(first.interface()).all(processes::is_alive), "nothing was done to them");
    processes::kill(first.interface().unwrap());
    // The cores have the nodes still.
    let named = attach(&["process", "everdisk-core"]).stderr;
    assert!(first.cores().iter().all(|pid| named.contains(&format!("process {pid}"))), "{named}");
    host.everdisk(&["volume", "delete", "v", "--yes"]).refused(1, &["in use by process"]);
    for core in first.cores() {
        processes::kill(core);
        until_true("a core has gone", || !processes::is_alive(core));
    }
    // The mount they served has no owner now, and is no obstacle.
    host.everdisk(&["attach", "v", "--file", text(&path)]).refused(1, &["mounted there already", "umount"]);
    everdisk_tests::run::sh("umount", &[&path]);
    Volume::new(&host, "v").attach(&[]);
    Volume::new(&host, "v").detach();
}

/// Every process of a volume dies at once: it is attached again at once, and what was flushed is there.
#[test]
fn a_volume_whose_processes_have_all_died_is_attached_at_once() {
    let mut host = Host::new();
    let volume = host.volume("v", "16M");
    volume.open().write_all_at(b"flushed", 4096).unwrap();
    volume.open().sync_all().unwrap();
    let status = volume.settled();
    let all: Vec<u32> = status.cores().into_iter().chain(status.interface()).collect();
    let path = host.file("v.img");
    host.kill_daemon();
    processes::kill_together(&all);
    host.start_daemon();
    let volume = Volume::new(&host, "v");
    volume.try_attach(&[]).ok();
    let mut found = [0; 7];
    fs::File::open(path).unwrap().read_exact_at(&mut found, 4096).unwrap();
    assert_eq!(&found, b"flushed");
    volume.detach();
}

/// Locks of as many nodes as a volume may have travel in more than one frame.
#[test]
fn every_node_of_a_wide_volume_is_locked_by_whoever_serves() {
    let host = Host::new();
    let volume = host.create("v", "16M", 20);
    volume.attach(&[]);
    let locked = || {
        (0..20).all(|index| {
            let file = fs::File::open(volume.node(index).join("data")).unwrap();
            let lock = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
            lock == Err(rustix::io::Errno::WOULDBLOCK)
        })
    };
    assert!(locked());
    let before = volume.settled();
    processes::kill(before.interface().unwrap());
    assert!(locked(), "by the cores");
    volume.wait("a new interface", |s| s.serves() && s.interface().is_some() && s.interface() != before.interface());
    for pid in volume.settled().cores() {
        processes::kill(pid);
    }
    assert!(locked(), "by the restored interface");
    volume.settled();
    volume.detach();
    assert!(!(0..20).any(|index| {
        let file = fs::File::open(volume.node(index).join("data")).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err()
    }));
}
