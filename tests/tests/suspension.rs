//! Suspend and resume by hand, and the lease.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use everdisk_tests::{
    bytes::pattern,
    host::Host,
    load::Load,
    programs::{VERSION, core_next},
    volume::Volume,
    wait::SOON,
};

const BLOCK: usize = 8192;

/// Starts `count` writers, one block each, and returns where each reports its end. The file has to be open already: an
/// open is held too.
fn writers(file: &Arc<File>, count: u64) -> mpsc::Receiver<(u64, Instant, std::io::Result<()>)> {
    let (sender, receiver) = mpsc::channel();
    for writer in 0..count {
        let (file, sender) = (Arc::clone(file), sender.clone());
        thread::spawn(move || {
            let ended = file.write_all_at(&pattern(writer, BLOCK), writer * BLOCK as u64);
            let _ = sender.send((writer, Instant::now(), ended));
        });
    }
    receiver
}

fn check_written(volume: &Volume<'_>, count: u64) {
    let file = volume.open();
    for writer in 0..count {
        let mut read = vec![0; BLOCK];
        file.read_exact_at(&mut read, writer * BLOCK as u64).unwrap();
        assert!(read == pattern(writer, BLOCK), "what writer {writer} wrote");
    }
}

/// M1 M4 M9 M10 A: instructions that arrive while I/O is suspended are held, not failed, and processed after the
/// resumption; an upgrade is refused during the suspension.
#[test]
fn m1_m4_m9_m10_writes_during_a_suspension_wait_and_complete_after_it() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    load.goes_on(100);
    load.stop();
    let file = Arc::new(volume.open());
    volume.ask("suspend", &["--lease", "60s"]).ok();
    let status = volume.status();
    assert_eq!(status.state(), "suspended");
    assert!(status.0["lease_ms"].as_u64().is_some_and(|ms| ms > 0 && ms <= 60_000), "{status:?}");

    let ended = writers(&file, 8);
    volume.wait("held requests", |status| status.0["waiting"].as_u64().is_some_and(|held| held >= 8));
    let output = volume.try_upgrade(&core_next(), &["--soak", "0s"]);
    output.refused(1, &["suspended", "everdisk resume v"]);
    assert_eq!(volume.ask("suspend", &[]).refused(1, &["suspended already"]).code(), 1);
    // The in-order detach is refused: it could not flush; nothing of that ends the suspension.
    assert_eq!(volume.ask("detach", &[]).code(), 1);
    assert_eq!(volume.status().state(), "suspended");
    assert!(ended.try_recv().is_err(), "a write ended while I/O was suspended");

    let resumed = Instant::now();
    volume.ask("resume", &[]).ok();
    for _ in 0..8 {
        let (writer, at, result) = ended.recv_timeout(SOON).expect("every held write ends");
        assert!(result.is_ok(), "writer {writer}: {result:?}");
        assert!(at > resumed, "writer {writer} ended before the resumption");
    }
    check_written(&volume, 8);
    let status = volume.status();
    assert_eq!((status.state(), status.version()), ("serving", VERSION));
    volume.ask("resume", &[]).refused(1, &["not suspended"]);
    volume.upgrade(&core_next());
    check_written(&volume, 8);
}

/// D8: a suspension without a resume ends by itself, also when the control module has died.
#[test]
fn d8_a_lease_that_is_over_lets_io_go_on_without_the_control_module() {
    let mut host = Host::new();
    host.volume("v", "64M");
    for kill in [false, true] {
        let before = Instant::now();
        let volume = Volume::new(&host, "v");
        let file = Arc::new(volume.open());
        volume.ask("suspend", &["--lease", "2s"]).ok();
        let ended = writers(&file, 4);
        volume.wait("held requests", |status| status.0["waiting"].as_u64().is_some_and(|held| held >= 4));
        if kill {
            host.kill_daemon();
        }
        for _ in 0..4 {
            let (writer, at, result) = ended.recv_timeout(SOON).expect("the lease ends the suspension");
            assert!(result.is_ok(), "writer {writer}: {result:?}");
            assert!(at - before >= Duration::from_secs(2), "writer {writer} ended within the lease");
        }
        if kill {
            host.start_daemon();
        }
        let volume = Volume::new(&host, "v");
        assert_eq!(volume.wait("service", |s| s.state() == "serving").crashes(), 0);
        check_written(&volume, 4);
    }
}

/// A: a core that dies while I/O is suspended: the suspension holds, and the next core executes what was held.
#[test]
fn a_core_that_dies_during_a_suspension_leaves_it_in_force() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let pid = volume.settled().core().unwrap();
    let file = Arc::new(volume.open());
    volume.ask("suspend", &["--lease", "60s"]).ok();
    let ended = writers(&file, 6);
    volume.wait("held requests", |status| status.0["waiting"].as_u64().is_some_and(|held| held >= 6));
    everdisk_tests::processes::kill(pid);
    let status = volume.wait("the death", |status| status.core() != Some(pid));
    assert_eq!(status.state(), "suspended", "{status:?}");
    assert!(ended.try_recv().is_err(), "a write ended while I/O was suspended");
    volume.ask("resume", &[]).ok();
    for _ in 0..6 {
        let (writer, _, result) = ended.recv_timeout(SOON).expect("every held write ends");
        assert!(result.is_ok(), "writer {writer}: {result:?}");
    }
    check_written(&volume, 6);
    assert_eq!(volume.settled().crashes(), 1);
}

/// A: suspensions and resumptions in a row under load.
#[test]
fn a_fifty_suspensions_under_load_show_no_error() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 4);
    for _ in 0..50 {
        volume.ask("suspend", &["--lease", "30s"]).ok();
        assert_eq!(volume.status().state(), "suspended");
        let before = load.operations();
        volume.ask("flush", &[]);
        assert!(load.operations() <= before + 4, "I/O was executed during a suspension");
        volume.ask("resume", &[]).ok();
        load.goes_on(20);
    }
    load.stop();
}
