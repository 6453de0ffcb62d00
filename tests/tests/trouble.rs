//! What goes wrong is seen: in `status`, in `health`, in the log with its beginning and its end, while everything else is answered. And
//! what does not answer is not waited for.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    thread,
    time::{Duration, Instant},
};

use everdisk_tests::{
    bytes::pattern,
    faults::Faults,
    guards::Mount,
    host::{Host, Identity},
    load::Load,
    processes,
    programs::need_root,
    status::Status,
    volume::Volume,
    wait::{SOON, until, until_true},
};

const MIB: usize = 1 << 20;
/// So soon trouble is seen. Twice what is promised: the machine may be busy.
const SEEN: Duration = Duration::from_secs(4);
/// The hang limit of these tests.
const HANG: Duration = Duration::from_secs(2);

/// A host whose cores may be silent for [`HANG`].
fn strict(mut host: Host) -> Host {
    host.stop_daemon();
    host.set_daemon_options(&["--hang-limit", "2s"]);
    host.start_daemon();
    host
}

/// Waits until a problem is in the status, in the exit status of `health`, in the overview, in `doctor` and in the log.
fn is_seen(volume: &Volume<'_>, words: &[&str], health: &str) -> Status {
    let status = volume.wait_within(SEEN, "the problem", |status| status.has_problem(words));
    assert_eq!(status.health(), health, "{status:?}");
    let told = volume.host.everdisk(&["health", &volume.name]);
    let code = if health == "failed" { 2 } else { 1 };
    assert!(told.code() == code && words.iter().all(|word| told.stdout.contains(word)), "{told:?}");
    let overview = volume.host.everdisk(&["status"]).ok();
    assert!(overview.contains("HEALTH") && overview.contains(health), "{overview}");
    let detail = volume.host.everdisk(&["status", &volume.name]).ok();
    assert!(words.iter().all(|word| detail.contains(word)), "{detail}");
    let doctor = volume.host.everdisk(&["doctor"]).stdout;
    assert!(words.iter().all(|word| doctor.contains(word)), "{doctor}");
    let begun = [&["problem_began"], words].concat();
    until("its beginning is logged", || (!volume.host.logged(&begun).is_empty()).then_some(()));
    status
}

/// Waits until nothing is wrong any more, and its end is logged.
fn is_over(volume: &Volume<'_>, about: &str) {
    volume.wait("health", |status| status.health() == "ok");
    until("its end is logged", || (!volume.host.logged(&["problem_ended", about]).is_empty()).then_some(()));
    assert_eq!(volume.host.everdisk(&["health", &volume.name]).code(), 0);
}

/// 9: a storage node whose writes hang, and with them the sender of the buffer.
#[test]
fn a_hung_write_and_a_hung_flush_are_seen_and_so_is_their_end() {
    let host = Host::faulty();
    let volume = host.create_with("v", "64M", 1, &["--buffer", "8M"]);
    volume.attach(&[]);
    let file = volume.open();
    volume.wait("health", |status| status.health() == "ok");
    let faults = Faults::new(&volume);
    for fault in ["write hang", "flush hang"] {
        faults.set(fault);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for piece in 0..20 {
                    file.write_all_at(&pattern(1, MIB), piece * MIB as u64).unwrap();
                }
                file.sync_data().unwrap();
            });
            let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let status = is_seen(&volume, &["storage node", "does not end"], "degraded");
                assert_eq!(status.0["nodes"][0]["state"], "stalled", "{status:?}");
                volume.wait("who waits", |status| status.0["waiting"].as_u64().is_some_and(|waiting| waiting > 0));
            }));
            faults.clear();
            writer.join().unwrap();
            seen.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        is_over(&volume, "node");
    }
    drop(file);
    volume.detach();
}

/// 9: a node that failed is still shown as failed when another core serves, until a write to it ends well.
#[test]
fn a_node_that_failed_is_still_failed_after_the_core_was_replaced() {
    let host = Host::faulty();
    let volume = host.create_with("v", "64M", 1, &["--buffer", "0"]);
    volume.attach(&[]);
    let file = volume.open();
    let faults = Faults::new(&volume);
    faults.set("write fail=28");
    assert!(file.write_all_at(&pattern(1, 4096), 0).is_err());
    is_seen(&volume, &["storage node", "fails", "No space left"], "degraded");
    faults.clear();
    let mut block = [0; 4096];
    for _ in 0..2 {
        let core = volume.kill_core().core().unwrap();
        file.read_exact_at(&mut block, 8192).unwrap();
        let status = volume.settled();
        assert_eq!((status.core(), status.0["nodes"][0]["state"].as_str()), (Some(core), Some("failed")), "{status:?}");
        assert!(status.has_problem(&["fails", "No space left", "found by the core before"]), "{status:?}");
    }
    file.write_all_at(&pattern(1, 4096), 0).unwrap();
    is_over(&volume, "node");
    drop(file);
    volume.detach();
}

/// 9: a stopped interface is reported in time, also to a client that asks for every volume; I/O goes on.
#[test]
fn a_stopped_interface_is_seen_and_holds_up_no_answer() {
    let host = Host::new();
    let (volume, other) = (host.volume("v", "64M"), host.volume("w", "16M"));
    let load = Load::start(&volume, 1);
    let frozen = processes::freeze(volume.settled().interface().unwrap());
    let asked = Instant::now();
    is_seen(&volume, &["the interface", "does not answer", "I/O goes on"], "degraded");
    assert_eq!(other.status().health(), "ok");
    assert!(asked.elapsed() < SOON);
    load.goes_on(50);
    drop(frozen);
    is_over(&volume, "interface");
    load.stop();
}

/// 9: a core that is stopped while requests wait is killed and the standby takes over; before, it is seen.
#[test]
fn a_stopped_core_is_seen_and_succeeded() {
    let host = strict(Host::new());
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    for round in 1..=2 {
        load.goes_on(50);
        let before = volume.settled();
        let core = before.core().unwrap();
        let frozen = processes::freeze(core);
        volume.wait_within(SEEN, "it is seen", |status| {
            status.has_problem(&["the core that serves", &format!("process {core}"), "does not answer"])
        });
        load.goes_on(50);
        drop(frozen);
        let after = volume.settled();
        assert_eq!((after.core(), after.crashes()), (before.standby(), round), "{after:?}");
        let pid = format!("pid={core} ");
        until("the crash is logged as what it was", || {
            let told = host.logged(&["core_crashed", &pid, "signal: 9", "did not answer", "successor="]);
            (told.len() == 1).then_some(())
        });
    }
    load.stop();
}

/// 9: a core whose storage nodes hang for longer than the limit answers, and is left alone.
#[test]
fn a_core_whose_nodes_hang_is_not_succeeded() {
    let host = strict(Host::faulty());
    let volume = host.create_with("v", "64M", 1, &["--buffer", "0"]);
    volume.attach(&[]);
    let file = volume.open();
    let faults = Faults::new(&volume);
    faults.set("write hang\nread hang\nflush hang");
    let before = volume.settled();
    thread::scope(|scope| {
        let writer = scope.spawn(|| file.write_all_at(&pattern(1, 4096), 0));
        thread::sleep(3 * HANG);
        let after = volume.status();
        faults.clear();
        writer.join().unwrap().unwrap();
        assert_eq!((after.core(), after.crashes(), after.generation()), (before.core(), 0, before.generation()));
    });
    drop(file);
    volume.detach();
}

/// 9: a stopped standby is never given the gate without a check and never keeps it; no request waits for it.
#[test]
fn a_stopped_standby_is_not_waited_for_when_the_core_dies() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    for round in 1..=3 {
        load.goes_on(50);
        let before = volume.settled();
        let standby = before.standby().unwrap();
        let frozen = processes::freeze(standby);
        processes::kill(before.core().unwrap());
        load.goes_on(50);
        let after = volume.settled();
        assert!(after.core() != Some(standby) && after.standby() != Some(standby), "{after:?}");
        until_true("it was killed", || !processes::is_alive(standby));
        drop(frozen);
        assert_eq!(after.crashes(), round, "{after:?}");
    }
    assert!(host.interface_log("v").contains("core_killed"));
    load.stop();
}

/// 9: a predecessor that was stopped while it was parked in the soak is not given the gate either.
#[test]
fn a_stopped_predecessor_is_not_waited_for_when_the_new_core_dies_in_the_soak() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    let before = volume.settled();
    let old = before.core().unwrap();
    let upgrade = volume.upgrading(&volume.other_core(), &["--soak", "60s"]);
    let new = volume.wait("the new core", |status| status.core().is_some_and(|core| core != old)).core().unwrap();
    let frozen = [processes::freeze(old)];
    processes::kill(new);
    load.goes_on(50);
    until_true("it was killed", || !processes::is_alive(old));
    drop(frozen);
    assert_ne!(upgrade.end(SOON).code(), 0);
    load.goes_on(50);
    load.stop();
    let after = volume.settled();
    assert!(after.version() == before.version() && after.core() != Some(old), "{after:?}");
}

/// 9: a standby that is stopped is seen, and replaced when it does not answer for the limit.
#[test]
fn a_stopped_standby_is_seen_and_replaced() {
    let host = strict(Host::new());
    let volume = host.volume("v", "64M");
    let before = volume.settled();
    let frozen = processes::freeze(before.standby().unwrap());
    volume.wait_within(SEEN, "it is seen", |status| status.has_problem(&["the standby core", "does not answer"]));
    let after = volume.wait("another standby", |status| {
        status.standby().is_some_and(|standby| Some(standby) != before.standby()) && status.health() == "ok"
    });
    assert_eq!((after.core(), after.crashes()), (before.core(), 0), "{after:?}");
    drop(frozen);
}

/// 9: a standby that cannot be started is missed, and why.
#[test]
fn a_missing_standby_is_seen_with_the_reason() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let before = volume.settled();
    let programs = host.root().join("state/volumes/v/cores");
    let staged = fs::read_dir(&programs).unwrap().next().unwrap().unwrap().path().join("everdisk-core");
    let aside = staged.with_file_name("aside");
    fs::rename(&staged, &aside).unwrap();
    everdisk_tests::programs::script(&staged, "echo 'everdisk-core: no luck today' >&2; exit 3");
    processes::kill(before.standby().unwrap());
    let status = is_seen(&volume, &["no standby core", "no luck today"], "degraded");
    assert_eq!((status.core(), status.state()), (before.core(), "serving"));
    fs::rename(&aside, &staged).unwrap();
    is_over(&volume, "standby");
}

/// 9: a full state directory is seen, and its end.
#[test]
fn a_full_state_directory_is_seen() {
    need_root();
    let mut host = Host::idle(Identity::default());
    let state = host.root().join("state");
    let mounted = Mount::new(&["-t", "tmpfs", "-o", "size=256m", "tmpfs"], &state);
    fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    host.start_daemon();
    {
        let volume = host.volume("v", "64M");
        let filler = state.join("filler");
        let file = File::create(&filler).unwrap();
        let mut at = 0;
        while file.write_all_at(&vec![1; MIB], at).is_ok() {
            at += MIB as u64;
        }
        while file.write_all_at(&[1; 4096], file.metadata().unwrap().len()).is_ok() {}
        is_seen(&volume, &["the state directory", "is full"], "degraded");
        // What happens now cannot be recorded: no standby can be started.
        processes::kill(volume.status().standby().unwrap());
        is_seen(&volume, &["no standby core", "No space left"], "degraded");
        is_seen(&volume, &["cannot be recorded", "No space left"], "degraded");
        drop(file);
        fs::remove_file(&filler).unwrap();
        is_over(&volume, "state directory");
        volume.detach();
    }
    host.stop_daemon();
    drop(mounted);
    host.start_daemon();
}

/// 9: when every process of a volume has died, however, its status says so at once and it can be attached again.
#[test]
fn when_every_process_has_died_the_volume_can_be_attached_again_at_once() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    for round in 0..4 {
        let status = volume.settled();
        let (interface, mut cores) = (status.interface().unwrap(), status.cores());
        if round % 2 == 0 {
            cores.push(interface);
            processes::kill_together(&cores);
        } else {
            // The interface that takes the dead one's place has begun to wait for a core.
            processes::kill(interface);
            until("another interface", || {
                let told = host.logged(&["interface_started", "restore=true"]);
                (told.len() > round / 2).then_some(())
            });
            processes::kill_together(&cores);
        }
        let died = Instant::now();
        let status = volume.wait_within(SEEN, "the end", |status| status.state() == "failed");
        assert!(status.health() == "failed" && status.has_problem(&["everdisk attach v"]), "{status:?}");
        volume.attach(&[]);
        // Without the mend it was 10 s and more.
        assert!(died.elapsed() < Duration::from_secs(8), "{:?}", died.elapsed());
    }
    volume.detach();
}

/// 9: every death of a serving core counts, also where the interface dies with it.
#[test]
fn crashes_survived_counts_each_death_of_a_core_and_its_interface_together() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    for round in 1..=5 {
        let before = volume.settled();
        processes::kill_together(&[before.interface().unwrap(), before.core().unwrap()]);
        let after = volume.wait("service", |status| status.serves() && status.core() != before.core());
        assert_eq!(after.crashes(), round, "{after:?}");
        let pid = format!("pid={} ", before.core().unwrap());
        until("it is logged", || {
            (host.logged(&["core_crashed", &pid, "signal: 9", "successor="]).len() == 1).then_some(())
        });
    }
    volume.detach();
}

/// 9 A: a suspension promises that nothing changes on the storage nodes: while a write hangs at one it is refused, and I/O goes on.
#[test]
fn a_suspension_does_not_return_while_a_write_hangs_at_a_node() {
    let host = Host::faulty();
    let volume = host.create_with("v", "64M", 2, &["--buffer", "0"]);
    volume.attach(&[]);
    let file = volume.open();
    let faults = Faults::new(&volume);
    // The flush of the other operation does not wait for this write: it hangs at one node, and only writes do.
    faults.set("write hang");
    thread::scope(|scope| {
        let writer = scope.spawn(|| file.write_all_at(&pattern(1, 4096), 0));
        until("the write is at its node", || {
            volume.status().has_problem(&["storage node", "does not end"]).then_some(())
        });
        let refused = volume.ask("suspend", &["--lease", "30s"]);
        let after = volume.status();
        let had_ended = writer.is_finished();
        faults.clear();
        writer.join().unwrap().unwrap();
        assert!(!had_ended);
        refused.refused(1, &["did not finish its requests"]);
        assert_eq!(after.state(), "serving", "{after:?}");
    });
    volume.ask("suspend", &["--lease", "30s"]).ok();
    volume.ask("resume", &[]).ok();
    drop(file);
    volume.detach();
}
