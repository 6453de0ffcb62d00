//! Going back to the core before.

use std::fs;

use everdisk_tests::{
    guards::Mount,
    host::{Host, Identity},
    load::Load,
    processes,
    programs::{self, VERSION, VERSION_NEXT, core_next, need_root},
    status::Report,
    volume::{Volume, report},
    wait::SOON,
};

/// Rollback after the commit, under load: to the build before the last committed upgrade and no further, again and again.
#[test]
fn a_rollback_after_the_commit_brings_the_old_version_back() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    volume.ask("rollback", &[]).refused(1, &["never upgraded"]);
    let load = Load::start(&volume, 3);
    for _ in 0..2 {
        let upgraded = volume.upgrade(&core_next());
        assert_eq!(upgraded.0["rollback"].as_bool(), Some(false), "{upgraded:?}");
        load.goes_on(100);
        // What is mistyped or refused changes nothing: not what was last, and not what a rollback goes back to.
        volume.try_upgrade("/no/such/core".as_ref(), &[]).refused(1, &["/no/such/core"]);
        volume.try_upgrade("/bin/true".as_ref(), &[]).refused(1, &["is not an everdisk-core"]);
        let last = volume.status().0["last_upgrade"]["upgrade"].clone();
        assert_eq!(last, upgraded.0["upgrade"]);
        let report = Report(host.json(&["rollback", "v"]));
        assert_eq!((report.outcome(), report.0["rollback"].as_bool()), ("committed", Some(true)), "{report:?}");
        assert_eq!((report.0["from"].as_str(), report.0["to"].as_str()), (Some(VERSION_NEXT), Some(VERSION)));
        let status = volume.settled();
        assert_eq!((status.version(), status.standby_version()), (VERSION, VERSION), "{status:?}");
        assert_eq!(status.0["last_upgrade"]["rollback"].as_bool(), Some(true), "{status:?}");
        volume.ask("rollback", &[]).refused(1, &["rolled back", "already", "upgrade v --core FILE"]);
        assert_eq!(volume.status().version(), VERSION);
    }
    load.goes_on(100);
    load.stop();
    let shown = host.json(&["volume", "show", "v"]);
    assert_eq!(shown["core_version"].as_str(), Some(VERSION), "{shown}");
    assert_eq!(shown["previous_core_version"].as_str(), None, "{shown}");
    let words = host.everdisk(&["status", "v"]).ok();
    assert!(words.contains("(a rollback"), "{words}");
    volume.detach();
}

/// D9: a rollback during the soak is a switch to the parked predecessor, the same process as before.
#[test]
fn d9_a_rollback_during_the_soak_switches_to_the_parked_predecessor() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 3);
    for _ in 0..3 {
        let before = volume.settled();
        let upgrade = volume.upgrading(&core_next(), &["--soak", "60s"]);
        let soaking = volume.wait("the new core", |status| status.version() == VERSION_NEXT);
        assert_eq!(soaking.state(), "upgrading", "{soaking:?}");
        assert!(processes::is_alive(before.core().unwrap()), "the predecessor is parked");
        // Until the upgrade ends, another upgrade, a detach and a delete are refused.
        volume.try_upgrade(&core_next(), &[]).refused(1, &["another operation is running", "upgrade"]);
        volume.ask("detach", &[]).refused(1, &["another operation is running"]);
        load.goes_on(100);
        let rolled = Report(host.json(&["rollback", "v"]));
        assert_eq!(rolled.outcome(), "rolled-back", "{rolled:?}");
        let output = upgrade.end(SOON);
        assert_eq!((output.code(), report(&output).outcome()), (1, "rolled-back"));
        assert!(output.stderr.contains("a rollback was asked for"), "{}", output.stderr);
        let after = volume.settled();
        assert_eq!((after.version(), after.core()), (VERSION, before.core()), "{after:?}");
        assert!(after.generation() >= before.generation() + 2, "there and back: {after:?}");
        assert_eq!(after.crashes(), 0, "{after:?}");
        assert_eq!(volume.processes().len(), 3, "{:#?}", volume.processes());
        load.goes_on(100);
    }
    load.stop();
    volume.upgrade(&core_next());
    volume.detach();
}

/// `--plan` says what would be done and changes nothing.
#[test]
fn a_plan_changes_nothing() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let before = volume.settled();
    let next = core_next();
    let plan = host.json(&["upgrade", "v", "--core", next.to_str().unwrap(), "--plan", "--soak", "3s"]);
    assert_eq!((plan["from"].as_str(), plan["to"].as_str()), (Some(VERSION), Some(VERSION_NEXT)), "{plan}");
    assert!(plan["steps"].as_array().is_some_and(|steps| steps.len() >= 8), "{plan}");
    volume.try_upgrade("/bin/true".as_ref(), &["--plan"]).refused(1, &["is not an everdisk-core"]);
    let after = volume.status();
    assert_eq!((after.core(), after.standby()), (before.core(), before.standby()));
    assert_eq!(after.generation(), before.generation());
    assert_eq!(after.last_outcome(), None);
    volume.detach();
}

/// `--plan` finds what the upgrade would fail at.
#[test]
fn a_plan_finds_a_node_that_has_gone_or_is_read_only_and_a_state_directory_that_is_full() {
    need_root();
    let mut host = Host::idle(Identity::default());
    let state = host.root().join("state");
    // Room for the interface's program, the first core's and the one to come, and no more.
    let [program, interface] =
        [core_next(), programs::program("everdisk-interface")].map(|path| fs::metadata(path).unwrap().len());
    let size = format!("size={},mode=0700", 3 * program + interface);
    let tmpfs = Mount::new(&["-t", "tmpfs", "-o", &size, "none"], &state);
    host.start_daemon();
    let volume = host.volume("v", "16M");
    let plan = |words: &[&str]| volume.try_upgrade(&core_next(), &["--plan"]).refused(1, words);
    let whole = |volume: &Volume<'_>| volume.try_upgrade(&core_next(), &["--plan"]).ok();
    whole(&volume);
    let node = volume.node(1);
    let text = node.to_str().unwrap();
    let aside = host.root().join("aside");
    fs::rename(&node, &aside).unwrap();
    plan(&[text, "no such directory"]);
    fs::rename(&aside, &node).unwrap();
    {
        let _bind = Mount::new(&["--bind", text], &node);
        everdisk_tests::run::sh("mount", &["-o", "remount,bind,ro", text]);
        plan(&[text, "Read-only"]);
    }
    let filler = state.join("filler");
    fs::write(&filler, vec![1; usize::try_from(program * 3 / 2).unwrap()]).unwrap();
    plan(&["has no room", "No space left"]);
    fs::remove_file(&filler).unwrap();
    everdisk_tests::run::sh("mount", &["-o", "remount,ro", state.to_str().unwrap()]);
    plan(&["cannot be written", "Read-only"]);
    everdisk_tests::run::sh("mount", &["-o", "remount,rw", state.to_str().unwrap()]);
    whole(&volume);
    volume.upgrade(&core_next());
    volume.detach();
    host.stop_daemon();
    drop(tmpfs);
    host.start_daemon();
}
