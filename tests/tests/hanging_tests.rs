//! The limit on every test: one that hangs ends, and is named.

use std::{
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use everdisk_tests::{
    faults::Faults,
    host::Host,
    run::{Output, run},
    volume::Volume,
    wait::{SOON, until},
    watchdog::Watchdog,
};

/// Has a test of this file hang; set for a run of its own, which prints what would otherwise stand in the middle of this run's
/// report.
const HANGS: &str = "EVERDISK_TEST_HANGS";

fn hangs() -> bool {
    std::env::var_os(HANGS).is_some()
}

/// Runs one test of this file in a process of its own, where it hangs.
fn run_alone(name: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--test-threads=1"]).env(HANGS, "1");
    run(command, 2 * SOON)
}

/// A test waits for a storage node that hangs: its processes are killed, and it goes on with an error.
#[test]
fn a_test_that_waits_for_ever_is_let_go() {
    let name = "hanging_tests::a_test_that_waits_for_ever_is_let_go";
    if !hangs() {
        let ended = run_alone(name);
        assert_eq!(ended.code(), 0, "{ended:?}");
        for words in
            [&format!("the test {name} has not ended within 500ms"), "its processes are killed", "everdisk-core"]
        {
            assert!(ended.stderr.contains(words), "{words}: {ended:?}");
        }
        return;
    }
    let host = Host::faulty();
    host.create_with("v", "16M", 1, &["--buffer", "0"]).attach(&[]);
    let volume = Volume::new(&host, "v");
    let file = volume.open();
    let faults = Faults::new(&volume);
    faults.set("write hang");
    let dog = Watchdog::with_limits(host.root(), Duration::from_millis(500), SOON);
    let writer = thread::spawn(move || file.write_all_at(&[1; 4096], 0));
    until("the write ends", || writer.is_finished().then_some(()));
    assert!(writer.join().unwrap().is_err(), "the write was acknowledged");
    drop(dog);
    drop(faults);
    // It says that its processes have gone.
    assert!(catch_unwind(AssertUnwindSafe(|| drop(host))).is_err());
}

/// A test hangs by itself: the run ends and says which one it was, and where.
#[test]
fn a_test_that_hangs_by_itself_ends_the_run_with_its_name() {
    let name = "hanging_tests::a_test_that_hangs_by_itself_ends_the_run_with_its_name";
    if hangs() {
        // No other process names it.
        let nobodys = format!("/proc/{}/nowhere", std::process::id());
        let _dog = Watchdog::with_limits(Path::new(&nobodys), Duration::from_millis(100), Duration::from_millis(100));
        thread::sleep(Duration::from_secs(3600));
    }
    let ended = run_alone(name);
    assert_eq!(ended.code(), 101, "{ended:?}");
    for words in [&format!("the test {name} has not ended within 100ms"), "the run ends here", "watchdog"] {
        assert!(ended.stderr.contains(words), "{words}: {ended:?}");
    }
}
