//! Upgrades that fail, each at another step: the old core serves on, and nothing of the new one is left.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
};

use everdisk_tests::{
    host::Host,
    load::Load,
    processes,
    programs::{VERSION, VERSION_NEXT, core, core_next, script, scripted_core},
    status::{Report, Status},
    volume::{Volume, report},
};

/// The volume is as before: the same core, its standby, no third core, nothing staged that is not in use.
fn as_before(volume: &Volume<'_>, before: &Status) {
    let now = volume.settled();
    assert_eq!(now.version(), before.version(), "{now:?}");
    assert_eq!(now.standby_version(), before.version(), "{now:?}");
    assert_eq!(now.cores().len(), 2, "a slot is still taken: {now:?}");
    assert_eq!(volume.processes().len(), 3, "interface, core, standby: {:#?}", volume.processes());
    let staged = volume.host.root().join("state/volumes").join(&volume.name).join("cores");
    let programs = fs::read_dir(staged).unwrap().count();
    assert!(programs <= 2, "{programs} core programs are staged: the current and the previous one may be");
}

/// One failure under load, then a good upgrade.
fn fails(volume: &Volume<'_>, core: &Path, options: &[&str], outcome: &str, words: &[&str]) -> Report {
    let load = Load::start(volume, 2);
    load.goes_on(50);
    let before = volume.settled();
    let report = volume.upgrade_fails(core, options, outcome, words);
    load.goes_on(50);
    // One that was refused before anything was begun is not the last upgrade.
    let refused = report.steps().iter().all(|step| ["stage", "verify"].contains(step));
    assert!(!refused || outcome == "aborted");
    assert_eq!(volume.status().last_outcome(), if refused { before.last_outcome() } else { Some(outcome) });
    if outcome == "aborted" {
        assert_eq!(volume.status().core(), before.core(), "the old core never stopped serving");
        assert_eq!(volume.status().generation(), before.generation());
    }
    as_before(volume, &before);
    volume.turn();
    load.goes_on(50);
    load.stop();
    report
}

const QUICK: &[&str] = &["--soak", "0s"];

/// M4: what is no core, or none for this volume, is found out before the suspension; the old core never stops.
#[test]
fn m4_a_file_that_is_no_usable_core_aborts_the_upgrade_before_the_suspension() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let plain = host.root().join("plain");
    fs::write(&plain, "no program\n").unwrap();
    let liar = script(&host.root().join("liar"), "echo 'everdisk-core 1.0 (abi x..y, buffer 0..0)'");
    let empty = host.root().join("empty");
    fs::write(&empty, "").unwrap();
    let scripted = |name: &str| scripted_core(host.root(), name);
    let cases: Vec<(PathBuf, &[&str], &str)> = vec![
        (host.root().join("missing"), &["missing"], "stage"),
        (host.root().to_owned(), &["is not a program"], "stage"),
        ("/dev/null".into(), &["is not a program"], "stage"),
        (plain, &[], "verify"),
        (empty, &[], "verify"),
        ("/bin/true".into(), &["is not an everdisk-core"], "verify"),
        ("/bin/false".into(), &[], "verify"),
        (liar, &["is not an everdisk-core"], "verify"),
        (scripted("other-abi"), &["ABI 900..901"], "verify"),
        (scripted("exit"), &["scripted to fail at once"], "standby"),
    ];
    for (file, words, step) in cases {
        let report = fails(&volume, &file, QUICK, "aborted", words);
        assert_eq!(report.0["failed_step"].as_str(), Some(step), "{}: {report:?}", file.display());
        assert_eq!(report.steps().last(), Some(&step), "{report:?}");
        assert_eq!(report.suspended_us(), None, "{report:?}");
    }
    volume.detach();
}

/// M4: a core that does not get ready is given up at its deadline. The cases wait side by side, each with a volume.
#[test]
fn m4_a_core_that_hangs_before_the_suspension_is_given_up() {
    let host = Host::new();
    let cases = [
        ("hang-version", "verify", "did not end within"),
        ("hang", "standby", "was not ready within"),
        ("garbage", "standby", ""),
        ("mute", "standby", "cannot read the volume"),
    ];
    thread::scope(|scope| {
        for (name, step, word) in cases {
            let host = &host;
            scope.spawn(move || {
                let volume = host.volume(name, "16M");
                let file = scripted_core(host.root(), name);
                let report = fails(&volume, &file, QUICK, "aborted", &[word]);
                assert_eq!(report.0["failed_step"].as_str(), Some(step), "{name}: {report:?}");
                assert_eq!(report.suspended_us(), None, "{report:?}");
                volume.detach();
            });
        }
    });
}

/// M4: a core that arms and never takes the gate: the interface returns it within the pause budget.
#[test]
fn m4_a_core_that_never_takes_the_gate_loses_it_within_the_pause_budget() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let file = scripted_core(host.root(), "no-workers");
    for budget in ["100ms", "400ms"] {
        let options = ["--soak", "0s", "--pause-budget", budget];
        let report = fails(&volume, &file, &options, "rolled-back", &["did not open the gate in time"]);
        assert_eq!(report.0["failed_step"].as_str(), Some("probe"), "{report:?}");
    }
    volume.detach();
}

/// M4: a core that dies when the gate is offered to it.
#[test]
fn m4_a_core_that_dies_when_it_is_given_the_gate_is_rolled_back() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let file = scripted_core(host.root(), "die-when-given");
    let report = fails(&volume, &file, QUICK, "rolled-back", &["died"]);
    assert_eq!(report.0["failed_step"].as_str(), Some("probe"), "{report:?}");
    volume.detach();
}

/// D9: a core that opens the gate and dies: its predecessor, parked, takes over, and the upgrade is rolled back.
#[test]
fn d9_a_core_that_dies_during_the_soak_is_rolled_back_to_its_parked_predecessor() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let file = scripted_core(host.root(), "open-and-die");
    let before = volume.settled();
    let options = ["--soak", "5s", "--pause-budget", "500ms"];
    let report = fails(&volume, &file, &options, "rolled-back", &["no longer serves"]);
    assert_eq!(report.0["failed_step"].as_str(), Some("soak"), "{report:?}");

    // A real core that is killed in the soak: the one that served before it has the gate again, the same process.
    let serving = volume.settled();
    assert_ne!(serving.core(), before.core());
    let load = Load::start(&volume, 2);
    let (to, program) = if serving.version() == VERSION { (VERSION_NEXT, core_next()) } else { (VERSION, core()) };
    let upgrade = volume.upgrading(&program, &["--soak", "30s"]);
    let soaking = volume.wait("the new core", |s| s.version() == to && s.core() != serving.core());
    assert!(processes::is_alive(serving.core().unwrap()), "the predecessor is parked");
    processes::kill(soaking.core().unwrap());
    let output = upgrade.end(everdisk_tests::wait::SOON);
    let ended = report_of(&output, "rolled-back");
    assert_eq!(output.code(), 1);
    assert!(ended.reason().contains("no longer serves"), "{ended:?}");
    load.goes_on(50);
    load.stop();
    let after = volume.settled();
    assert_eq!(after.version(), serving.version());
    assert_eq!(after.core(), serving.core(), "the parked predecessor serves again");
    as_before(&volume, &serving);
    volume.detach();
}

fn report_of(output: &everdisk_tests::run::Output, outcome: &str) -> Report {
    let report = report(output);
    assert_eq!(report.outcome(), outcome, "{report:?}");
    report
}

/// D11 M4: a new core refuses a store that is not the volume's; the old one, which has it open, serves on.
#[test]
fn d11_a_new_core_that_finds_a_damaged_superblock_refuses_and_the_old_one_serves_on() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    volume.settled();
    let load = Load::start(&volume, 2);
    load.goes_on(50);
    let path = volume.node(1).join("superblock");
    let sound = fs::read(&path).unwrap();
    let damage = fs::File::options().write(true).open(&path).unwrap();
    damage.write_all_at(&[0xff], 100).unwrap();
    let before = volume.status();
    volume.upgrade_fails(&core_next(), QUICK, "aborted", &["superblock", "damaged"]);
    load.goes_on(50);
    assert_eq!(volume.status().core(), before.core());
    damage.write_all_at(&sound[100..101], 100).unwrap();
    as_before(&volume, &before);
    volume.upgrade(&core_next());
    load.goes_on(50);
    load.stop();
    volume.detach();
}
